"""From the specification of a run to its method, its data and its model: the part of a run that needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from cafe.errors import UserError, quote
from cafe.files import exists, locate, read_file
from cafe.inference.model import BATCH_SIZE, Model, TowerInput
from cafe.learning.loading import FaceDataset
from cafe.methods import find_method
from cafe.methods.method import ARRAYS, Inputs, Method, check_recipe
from cafe.pipeline.faces import Faces
from cafe.pipeline.runs import RunSpec, check_exported, model_folder, read_model
from cafe.plugins import check_plugins
from cafe.records import check_record, digest
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.keeping import find_tower
from cafe.towers.weights import read_tensors
from cafe.views.drawing import ViewPlan

USUAL_SIZE = 2**14  # of a layer: up to here no record asks for much memory


def find_inputs(spec: RunSpec) -> Inputs:
    """Return what the method is built for."""
    described = (spec.width, spec.network, spec.init, spec.image_size, spec.backbone, spec.grid, spec.classes)
    return Inputs(*described, sources=len(spec.own_sources))


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


def load_method(spec: RunSpec, run: UPath, file: str = "model.safetensors") -> Method:
    """Return the trained method of a run's folder; raise `UserError` where its weights are damaged or not finite.

    Weights of half precision become float32 again.
    """
    path = run / file
    weights = read_tensors(path, "move the run's folder elsewhere and train it again with `cafe train`")
    _check_sizes(spec, weights, path)
    method = build_method(spec, init="scratch")
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:  # torch's, of other names or shapes
        raise UserError(
            f"The weights in {path} are not those of the run that run.json describes ({quote(error)}): they belong together."
        ) from None
    check_finite(method, path)
    return method


def _check_sizes(spec: RunSpec, weights: Mapping[str, Tensor], path: UPath) -> None:
    """Raise `UserError` for a large size that a record claims and no weight has, before a method asks for its memory."""
    hidden = spec.recipe.get("hidden")
    claimed = {
        "width": spec.width or 0,
        "grid": math.prod(spec.grid or (0,)),
        "hidden": hidden if isinstance(hidden, int) else 0,
    }
    real = {side for value in weights.values() for side in value.shape}
    if wrong := [name for name, size in claimed.items() if size > USUAL_SIZE and size not in real]:
        raise UserError(
            f"The weights in {path} are not those of the run that run.json describes ({wrong[0]} {claimed[wrong[0]]:,}): "
            "they belong together."
        )


def check_finite(method: Method, path: UPath) -> None:
    """Raise `UserError` where a weight is no finite number, or a buffer, some of which are infinite by design, is NaN."""
    broken = [name for name, value in method.named_parameters() if not value.isfinite().all()]
    broken += [name for name, value in method.named_buffers() if value.isnan().any()]
    if broken:
        raise UserError(
            f"{path} holds weights that are NaN or infinite, {broken[0]!r} among {len(broken)}: train again with a smaller "
            "learning rate, or with --precision fp32."
        )


def name_files(number: int) -> tuple[str, str]:
    """Return what the files of run 1, 2, … of those that one exported folder averages are called: record and weights."""
    tail = f"-{number}" if number > 1 else ""
    return f"run{tail}.json", f"model{tail}.safetensors"


def read_averages(folder: UPath) -> tuple[int, bool]:
    """Return how many runs a folder holds, which its model averages, and whether it averages mirror images too.

    That is what the record of an exported folder says; the folder of a run has none, and older ones do not say.
    """
    averaged = read_model(folder).get("averaged") or {}
    return len(averaged.get("seeds") or [0]), bool(averaged.get("mirror_images"))


def build_model(folders: Sequence[UPath], device: str = "cpu", batch_size: int = BATCH_SIZE) -> Model:
    """Return trained runs that differ in nothing but their seed as one model, which averages them; usually one run.

    A folder is a run's or an exported one, also kept in a run's, which may hold several runs and ask for mirror images to be
    averaged too. Raises `UserError` for a run without weights and where the tower's weights are no longer those it was
    trained on.
    """
    specs, methods, flip = list[RunSpec](), list[Method](), False
    for folder in map(model_folder, folders):
        check_exported(folder)
        count, mirrored = read_averages(folder)
        flip |= mirrored
        for record, weights in map(name_files, range(1, count + 1)):
            spec = RunSpec.load(folder, record)
            if not exists(folder / weights):
                raise UserError(
                    f"The run {folder.name!r} has no trained weights here: give its `cafe train` command again."
                )
            specs.append(replace(spec, backbone=spec.backbone and find_tower(spec.backbone, folder)))
            method = load_method(specs[-1], folder, weights).to(device)
            methods.append(method.to(memory_format=torch.channels_last))
    name, spec = RunSpec.load(folders[0]).name, specs[0]
    tower = load_tower(spec, batch_size) if find_method(spec.method).needs_features() else None
    return Model(name, tuple(methods), view_plan(spec), spec.image_size, tower, torch.device(device), flip)


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
    """Return faces as the method needs them, with the features of their store; `keep` for many epochs of training."""
    needs = find_method(spec.method).needs
    names = [ARRAYS[need] for need in needs if need in ARRAYS]
    pictures = faces.kept_pictures if keep else faces.pictures
    reader, targets = faces.reader(names), find_targets(spec, faces) if keep else None
    domains = faces.domains if keep else None
    return FaceDataset(
        pictures, view_plan(spec), needs, spec.image_size, reader, faces.channels, targets, domains=domains
    )


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
    targets, domains = find_targets(spec, source), source.domains
    return FaceDataset(pictures, plan, needs, spec.image_size, embedder, targets=targets, domains=domains)


def find_targets(spec: RunSpec, source: Faces) -> np.ndarray | None:
    """Return what a training learns of each row, (N, K) float32; None where that is its label."""
    return source.shares if spec.recipe.get("labels") == "votes" else None
