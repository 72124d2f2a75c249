"""From the specification of a run to its method, its data and its model: the part of a run that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from upath import UPath

from cafe.errors import UserError, quote
from cafe.files import exists, locate, read_file
from cafe.inference.model import BATCH_SIZE, Model, TowerInput
from cafe.learning.loading import FaceDataset
from cafe.methods import find_method
from cafe.methods.method import ARRAYS, Inputs, Method, check_recipe
from cafe.pipeline.faces import Faces
from cafe.pipeline.runs import RunSpec
from cafe.plugins import check_plugins
from cafe.records import check_record, digest
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.keeping import find_tower
from cafe.towers.weights import read_tensors
from cafe.views.drawing import ViewPlan


def find_inputs(spec: RunSpec) -> Inputs:
    """Return what the method is built for."""
    return Inputs(spec.width, spec.network, spec.init, spec.image_size, spec.backbone, spec.grid, spec.classes)


def build_method(spec: RunSpec, init: str | None = None) -> Method:
    """Return the method with initial weights drawn from the seed.

    Raises `UserError` where a plug-in of its is missing, and for a specification that the method cannot be built from.
    """
    check_plugins(spec.plugins)
    method = find_method(spec.method)
    where = f"The record of the run {spec.name!r}"
    recipe = check_record(spec.recipe, method.recipe_type, where)
    check_recipe(recipe, spec.method)
    needed = {"backbone": method.needs_tower(), "width": method.needs_features(), "features": method.needs_features()}
    needed["grid"] = "map" in method.needs
    if lacking := [name for name, wanted in needed.items() if wanted and getattr(spec, name) is None]:
        raise UserError(
            f"{where} has no {lacking[0]}, which {spec.method} needs: it was changed by hand; train it again."
        )
    if init is None and spec.init_digest and digest(read_file(locate(spec.init[5:]))) != spec.init_digest:
        raise UserError(
            f"The file of {spec.init!r} is not the one that this run was planned with: give the command again."
        )
    torch.manual_seed(spec.seed)
    return method(recipe, replace(find_inputs(spec), init=init or spec.init))


def load_method(spec: RunSpec, run: UPath) -> Method:
    """Return the trained method of a run's folder; raise `UserError` where its weights are damaged or not finite."""
    path, method = run / "model.safetensors", build_method(spec, init="scratch")
    weights = read_tensors(path, "move the run's folder elsewhere and train it again with `cafe train`")
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:  # torch's, of other names or shapes
        raise UserError(
            f"The weights in {path} are not those of the run that run.json describes ({quote(error)}): they belong together."
        ) from None
    check_finite(method, path)
    return method


def check_finite(method: Method, path: UPath) -> None:
    """Raise `UserError` where a weight is no finite number, or a buffer, some of which are infinite by design, is NaN."""
    broken = [name for name, value in method.named_parameters() if not value.isfinite().all()]
    broken += [name for name, value in method.named_buffers() if value.isnan().any()]
    if broken:
        raise UserError(
            f"{path} holds weights that are NaN or infinite, {broken[0]!r} among {len(broken)}: train again with a smaller "
            "learning rate, or with --precision fp32."
        )


def build_model(runs: Sequence[UPath], device: str = "cpu", batch_size: int = BATCH_SIZE) -> Model:
    """Return trained runs that differ in nothing but their seed as one model, which averages them; usually one run.

    Raises `UserError` for a run without weights and where the tower's weights are no longer those it was trained on.
    """
    specs = [RunSpec.load(run) for run in runs]
    for run in runs:
        if not exists(run / "model.safetensors"):
            raise UserError(f"The run {run.name!r} has no trained weights here: give its `cafe train` command again.")
    name = specs[0].name
    specs = [
        replace(own, backbone=own.backbone and find_tower(own.backbone, run))
        for own, run in zip(specs, runs, strict=True)
    ]
    spec = specs[0]
    methods = [load_method(own, run).to(device) for own, run in zip(specs, runs, strict=True)]
    methods = [method.to(memory_format=torch.channels_last) for method in methods]
    tower = load_tower(spec, batch_size) if find_method(spec.method).needs_features() else None
    return Model(name, tuple(methods), view_plan(spec), spec.image_size, tower, torch.device(device))


def load_tower(spec: RunSpec, batch_size: int) -> TowerInput:
    """Return the tower of a run with what its features depend on; raise `UserError` when its weights are others."""
    key = spec.features
    assert key is not None
    assert spec.backbone is not None
    tower = load_backbone(spec.backbone, key.precision, key.input_size)
    if tower.facts.weights_digest != key.weights:
        raise UserError(
            f"The weights of the tower {spec.backbone!r} are not those that the run {spec.name!r} was trained on: put the "
            "old ones back, or train again."
        )
    return TowerInput(tower, key.view_plan, key.dtype, batch_size)


def view_plan(spec: RunSpec) -> ViewPlan:
    """Return how the views of the run's faces are drawn."""
    return ViewPlan(spec.policy, spec.view_seed, spec.views, spec.interpolation, spec.mean, spec.std)


def make_dataset(spec: RunSpec, faces: Faces, keep: bool = False) -> FaceDataset:
    """Return faces as the method needs them, with the features of their store; `keep` what is decoded for other epochs."""
    needs = find_method(spec.method).needs
    names = [ARRAYS[need] for need in needs if need in ARRAYS]
    pictures = faces.kept_pictures if keep else faces.pictures
    return FaceDataset(pictures, view_plan(spec), needs, spec.image_size, faces.reader(names), faces.channels)


def make_live_dataset(spec: RunSpec, source: Faces, device: str) -> FaceDataset:
    """Return the faces of the source with features of the tower run on the fly."""
    key, info = spec.features, source.info
    assert key is not None
    assert info is not None
    assert spec.backbone is not None
    needs, plan, pictures = find_method(spec.method).needs, view_plan(spec), source.kept_pictures
    tower = load_tower(spec, info.batch_size).backbone
    mean, std = key.normalisation
    towers_plan = replace(plan, mean=mean, std=std)
    embedder = Embedder(tower, pictures, towers_plan, device, "map" in needs, key.dtype, info.batch_size)
    return FaceDataset(pictures, plan, needs, spec.image_size, embedder)
