"""From settings to the specification of a run, and from that to its method and data: the part of a run that needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace

import torch
from upath import UPath

from cafe.arithmetic import choose_precision
from cafe.data.manifest import Manifest
from cafe.data.union import parts_of
from cafe.errors import UserError
from cafe.files import exists, locate
from cafe.inference.model import BATCH_SIZE, Model, TowerInput
from cafe.learning.loading import FaceDataset
from cafe.methods import find_method
from cafe.methods.method import ARRAYS, Inputs, Method, Recipe, apply_overrides
from cafe.pipeline.faces import Faces
from cafe.pipeline.features.key import FeatureKey, StoreInfo, describe_policy
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.sources import UnitedFaces
from cafe.records import changed_fields
from cafe.results.sources import Source
from cafe.towers.building import load_backbone
from cafe.towers.embedding import Embedder
from cafe.towers.facts import NORMALISATIONS
from cafe.towers.keeping import find_tower
from cafe.towers.weights import read_tensors
from cafe.views.drawing import ViewPlan

PUBLISHED_SIZE = 224  # pixels: the input of every published method
PUBLISHED_TOWERS = {"cafe": "clip-vit-b32"}


def find_recipe(settings: TrainSettings, kind: str) -> Recipe:
    """Return the published recipe of the method for a kind of source with the changes asked for; raise `UserError`."""
    shortcuts = [f"epochs={settings.epochs}"] if settings.epochs else []
    published = find_method(settings.method).published_recipe(kind)
    recipe = apply_overrides(published, [*settings.overrides, *shortcuts], settings.method)
    if not settings.scale_batch:
        return recipe
    # Linear scaling of the rate with the batch: Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    batch, rate = settings.num_workers * recipe.batch_size, settings.num_workers * recipe.learning_rate
    return apply_overrides(recipe, [f"batch_size={batch}", f"learning_rate={rate:.12g}"], settings.method)


def find_precision(settings: TrainSettings) -> str:
    """Return the arithmetic asked for, or that which suits this machine; raise `UserError` where others compute."""
    if settings.precision != "auto":
        return settings.precision
    if settings.address:
        raise UserError("--precision auto looks at this machine, not at a cluster's: name fp32, tf32 or bf16.")
    return choose_precision()


def specify(settings: TrainSettings, manifest: Manifest, recipe: Recipe, store: StoreInfo | None) -> RunSpec:
    """Return what names the run: the settings, with what they leave open taken from the store and the method."""
    method = find_method(settings.method)
    policy = settings.policy or method.policy
    key = _find_key(settings, recipe, store, policy)
    # As published, every image branch sees the same pixel statistics, whatever its tower takes; a learning tower its own.
    mean, std = key.normalisation if key and "tower" in method.needs else NORMALISATIONS["imagenet"]
    own = key is None or method.clean_features  # views that no store has
    shape = store.map_shape if store and "map" in method.needs else None
    return RunSpec(
        source=manifest.name,
        source_digest=manifest.digest,
        source_kind=manifest.kind,
        method=settings.method,
        recipe=asdict(recipe),
        recipe_changes=changed_fields(recipe),
        seed=settings.seed,
        network=settings.network,
        init=f"file:{locate(settings.init[5:])}" if settings.init.startswith("file:") else settings.init,
        image_size=settings.image_size or (key.input_size if key else PUBLISHED_SIZE),
        precision=find_precision(settings),
        policy=policy if key is None or own else key.policy["name"],
        view_seed=settings.view_seed or 0 if key is None or own else key.view_seed,
        views=_count_views(settings, recipe, key, own),
        interpolation=key.interpolation if key else "bilinear",
        mean=tuple(mean),
        std=tuple(std),
        features=key,
        backbone=store.backbone_name if store else None,
        width=shape[0] if shape else store.width if store else None,
        grid=shape[1:] if shape else None,
        live=settings.live,
        selection=settings.selection,
        tag=settings.tag,
        sources=_list_sources(manifest),
        sampler=settings.sampler,
        fold=settings.fold,
        views_per_seed=settings.views_per_seed,
    )


def _find_key(settings: TrainSettings, recipe: Recipe, store: StoreInfo | None, policy: str) -> FeatureKey | None:
    """Return the key of the features a training reads; a tower on the fly makes views of its own."""
    if store and settings.live:
        return replace(store.key, views=recipe.epochs + 1, policy=describe_policy(policy))
    return store.key if store else None


def _list_sources(manifest: Manifest) -> tuple[Source, ...]:
    """Return the sources of a union; nothing for a single one, whose name does not change."""
    parts = parts_of(manifest)
    return tuple(Source(part.name, part.kind, part.digest) for part in parts if len(parts) > 1)


def _count_views(settings: TrainSettings, recipe: Recipe, key: FeatureKey | None, own: bool) -> int:
    """Return how many views of a face a training sees: one for every epoch and the clean one, or those of its store."""
    if key is None:
        return settings.views or recipe.epochs + 1
    return recipe.epochs + 1 if own or settings.live else settings.views or key.views


def find_inputs(spec: RunSpec) -> Inputs:
    """Return what the method is built for."""
    return Inputs(spec.width, spec.network, spec.init, spec.image_size, spec.backbone, spec.grid)


def build_method(spec: RunSpec, init: str | None = None) -> Method:
    """Return the method with initial weights drawn from the seed."""
    method = find_method(spec.method)
    torch.manual_seed(spec.seed)
    return method(method.recipe_type(**spec.recipe), replace(find_inputs(spec), init=init or spec.init))


def load_method(spec: RunSpec, run: UPath) -> Method:
    """Return the trained method of a run's folder."""
    method = build_method(spec, init="scratch")
    method.load_state_dict(read_tensors(run / "model.safetensors"))
    return method


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


def make_dataset(spec: RunSpec, faces: Faces | UnitedFaces, keep: bool = False) -> FaceDataset:
    """Return faces as the method needs them, with the features of their store; `keep` what is decoded for other epochs."""
    needs = find_method(spec.method).needs
    names = [ARRAYS[need] for need in needs if need in ARRAYS]
    pictures = faces.pictures if keep else faces.manifest
    return FaceDataset(pictures, view_plan(spec), needs, spec.image_size, faces.reader(names), faces.channels)


def make_live_dataset(spec: RunSpec, source: Faces | UnitedFaces, device: str) -> FaceDataset:
    """Return the faces of the source with features of the tower run on the fly."""
    key, about = spec.features, source.about
    assert key is not None
    assert about is not None
    assert spec.backbone is not None
    needs, plan = find_method(spec.method).needs, view_plan(spec)
    tower = load_backbone(spec.backbone, key.precision, key.input_size)
    mean, std = key.normalisation
    towers_plan = replace(plan, mean=mean, std=std)
    embedder = Embedder(tower, source.pictures, towers_plan, device, "map" in needs, key.dtype, about.batch_size)
    return FaceDataset(source.pictures, plan, needs, spec.image_size, embedder)


def find_deviations(spec: RunSpec) -> Iterator[str]:
    """Yield, as `key=value`, the settings in which a run is not what was published of its method."""
    method = find_method(spec.method)
    if spec.sources:
        yield f"source={spec.source}"
    published = method.published_recipe(spec.source_kind)
    wanted = {field.name: getattr(published, field.name) for field in fields(published)}
    yield from (f"{name}={value}" for name, value in spec.recipe.items() if value != wanted[name])
    mean, std = NORMALISATIONS["imagenet"]
    settings: dict[str, object] = {"precision": "fp32", "selection": "final", "mean": mean, "std": std}
    settings["interpolation"] = "bilinear"
    if "image" in method.needs:
        settings |= {"network": "resnet18", "image_size": PUBLISHED_SIZE}
    if method.trained:
        settings |= {"policy": method.policy, "views": spec.recipe["epochs"] + 1}
    if spec.method in PUBLISHED_TOWERS:
        settings["backbone"] = PUBLISHED_TOWERS[spec.method]
    found = {**vars(spec), "backbone": (spec.backbone or "none").partition("@")[0]}
    if spec.features:
        found["mean"], found["std"] = spec.features.normalisation  # the tower's pixel statistics
    yield from (f"{name}={_plain(found[name])}" for name, value in settings.items() if found[name] != value)
    if "image" in method.needs and spec.init != "scratch" and "msceleb" not in spec.init:
        yield f"init={spec.init}"


def _plain(value: object) -> str:
    return "/".join(f"{part:.4g}" for part in value) if isinstance(value, tuple) else str(value)
