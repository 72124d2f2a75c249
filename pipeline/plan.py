"""From settings to a plan: every name, file and store is checked, and the run is named, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from upath import UPath

from cafe.arithmetic import Precision, computes_bf16
from cafe.errors import UserError
from cafe.files import locate, place_below, read_file
from cafe.learning.loading import SMALLEST_BATCH, smallest_batch
from cafe.methods import find_method
from cafe.methods.draws import Distribution, draw_settings
from cafe.methods.method import Method, Recipe, apply_overrides
from cafe.networks.branches import check_network
from cafe.pipeline.faces import Faces, Part, choose_target, choose_targets
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.key import FeatureKey, StoreInfo, describe_policy
from cafe.pipeline.models import find_inputs
from cafe.pipeline.need import Store, Stores, choose_source_stores, join_layers, join_stores
from cafe.pipeline.release.start import Start, find_start
from cafe.pipeline.runs import RunSpec, is_finished
from cafe.pipeline.settings import RunIdentity, TrainSettings, take
from cafe.pipeline.workspace import Workspace, check_name
from cafe.plugins import find_plugins
from cafe.records import changed_fields, digest
from cafe.results.protocols import find_protocol
from cafe.results.sources import Source
from cafe.towers.facts import NORMALISATIONS

LONGEST_RUN = 200  # characters of a run's name, which names files: of 255 bytes at most
PUBLISHED_SIZE = 224  # pixels: the input of every published method
AVERAGED = "swad"  # selection of several epochs, whose weights are averaged
NEEDED = ("source_val", "source_test", AVERAGED)  # selections that need faces of the source besides those trained on


@dataclass(frozen=True)
class TrainPlan:
    """A checked training: nothing in it can be wrong any more when work begins. Workers are given it as it is."""

    runs: UPath  # the folder of all runs
    settings: TrainSettings
    spec: RunSpec
    source: Faces
    targets: tuple[Faces, ...] = ()
    benchmark: str | None = None  # whose cell it is
    validation: Faces | None = None  # the domain left out, where its training faces choose the epoch
    folds: tuple[TrainPlan, ...] = ()  # trainings on all sources but one, which choose the epoch together
    start: Start | None = None  # the model it goes on from

    @property
    def run(self) -> UPath:
        """The folder of the run."""
        return place_below(self.runs, self.spec.name)

    @property
    def remaining(self) -> list[Faces]:
        """The targets that the run is not evaluated on yet."""
        trained = is_finished(self.run)
        return [target for target in self.targets if not (trained and target.is_evaluated(self.run))]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return is_finished(self.run) and not self.remaining

    def with_seed(self, seed: int, draw: int | None = None) -> TrainPlan:
        """Return the same training with another seed, of a sweep with another draw."""
        settings, spec = replace(self.settings, seed=seed, draw=draw), replace(self.spec, seed=seed, draw=draw)
        if draw is not None:
            recipe = find_recipe(settings, spec.source_kind)
            spec = replace(spec, recipe=asdict(recipe), recipe_changes=changed_fields(recipe))
        folds = tuple(fold.with_seed(seed, draw) for fold in self.folds)
        return replace(self, settings=settings, spec=spec, folds=folds)


def plan_training(workspace: Workspace, settings: TrainSettings) -> TrainPlan:
    """Check every name, file and store and return what will be trained; raise `UserError`."""
    workspace = workspace.keeping_manifests()  # a source is a target, too
    if settings.views_per_seed:
        settings = replace(settings, view_seed=settings.seed)
    names = split_names(settings.source)
    sources = Faces.of(*(Part.of(workspace, workspace.load_manifest(name)) for name in names))
    recipe = find_recipe(settings, sources.kind)
    _check_names(settings, recipe, len(names))
    _check_domains(settings, names)
    start = find_start(workspace, settings.start, settings.seed) if settings.start else None
    if start:
        start.check_features([part.manifest for part in sources.parts], workspace)
    stores = _choose_stores(workspace, sources, settings)
    source = Faces.of(
        *(
            Part.of(workspace, part.manifest, own) if own else Part.of_pictures(workspace, part.manifest)
            for part, own in zip(sources.parts, stores, strict=True)
        )
    )
    spec = specify(settings, source, recipe, _describe_stores(sources, stores, settings))
    spec = replace(
        spec, rows=_name_rows(sources, source, settings.selection, recipe), votes=_name_votes(source, recipe)
    )
    if len(spec.name) > LONGEST_RUN:
        raise UserError(
            f"The run's name {spec.name[:40]}… would have {len(spec.name)} characters, more than {LONGEST_RUN}: take "
            "shorter names of manifests, or a shorter --tag."
        )
    find_method(settings.method).check(find_inputs(spec))
    if start:
        start.check(spec)
        spec = replace(spec, start=digest(read_file(start.weights)), start_sources=start.trained_on)
    for part in source.parts:
        _check_faces(part, settings, recipe)
    evaluated = settings.fold or None if settings.targets is None else settings.targets
    targets = choose_targets(workspace, evaluated, spec, settings.protocol)
    plan = TrainPlan(workspace.runs, settings, spec, source, tuple(targets), start=start)
    if settings.selection == "oracle":
        plan = replace(plan, validation=choose_target(workspace, settings.fold, spec, find_protocol("clean"), "train"))
    if settings.selection == "leave_one_out":
        plan = replace(plan, folds=tuple(_plan_fold(workspace, plan, part) for part in source.parts))
    return plan


def _plan_fold(workspace: Workspace, plan: TrainPlan, left_out: Part) -> TrainPlan:
    """Return the training on all sources but one, with the same stores, whose epochs are evaluated on the one left out."""
    others = [part for part in plan.source.parts if part is not left_out]
    changes: dict[str, Any] = {"source": ",".join(part.name for part in others), "fold": left_out.name}
    if plan.spec.features:
        folders = [info.folder for part in others for _, info in part.stores]
        changes |= {"backbone": None, "store": ",".join(folders)}
    if len(others) == 1:
        changes["sampler"] = "proportional"
    return plan_training(workspace, replace(plan.settings, selection="oracle", targets="none", **changes))


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list of sources, sorted, so that their order changes no run."""
    names = sorted(name for part in text.split(",") if (name := part.strip()))
    if not names or len(set(names)) < len(names):
        raise UserError(f"The source {text!r} must be one manifest or different ones, comma-separated.")
    return names


def find_recipe(settings: TrainSettings, kind: str) -> Recipe:
    """Return the published recipe of the method for a kind of source with the changes asked for; raise `UserError`."""
    shortcuts = [f"epochs={settings.epochs}"] if settings.epochs else []
    published = find_method(settings.method).published_recipe(kind)
    recipe = apply_overrides(published, [*_draw_overrides(settings), *settings.overrides, *shortcuts], settings.method)
    find_method(settings.method).check_recipe(recipe, settings.method)
    if recipe.calibration != "none" and settings.selection == "source_test":
        raise UserError(
            "calibration needs faces that are neither trained on nor evaluated, and --selection source_test looks at those "
            "that are: take another selection, or leave calibration out."
        )
    if not settings.scale_batch:
        return recipe
    # Linear scaling of the rate with the batch: Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    batch, rate = settings.num_workers * recipe.batch_size, settings.num_workers * recipe.learning_rate
    return apply_overrides(recipe, [f"batch_size={batch}", f"learning_rate={rate:.12g}"], settings.method)


def find_distributions(settings: TrainSettings) -> dict[str, Distribution]:
    """Return what the settings of a sweep are drawn from; nothing for a run that is none of one. Raise `UserError`."""
    if settings.draw is None:
        return {}
    fixed = {override.partition("=")[0] for override in settings.overrides}
    distributions = find_method(settings.method).distributions()
    free = {name: known for name, known in distributions.items() if name not in fixed}
    if not free:
        raise UserError(f"{settings.method} has no setting to draw that is not given: leave --draw out.")
    return free


def _draw_overrides(settings: TrainSettings) -> list[str]:
    drawn = draw_settings(find_distributions(settings), settings.draw or 0, settings.seed)
    return [f"{name}={value}" for name, value in drawn.items()]


def specify(settings: TrainSettings, source: Faces, recipe: Recipe, store: StoreInfo | None) -> RunSpec:
    """Return what names the run: the settings, with what they leave open taken from the source, its store and the method."""
    method = find_method(settings.method)
    policy = settings.policy or method.policy
    key = store.key if store else None
    if key and settings.live:  # a tower on the fly makes views of its own
        key = replace(key, views=recipe.epochs + 1, policy=describe_policy(policy))
    # As published, every image branch sees the same pixel statistics, whatever its tower takes; a learning tower its own.
    mean, std = key.normalisation if key and "tower" in method.needs else NORMALISATIONS["imagenet"]
    own = key is None or method.clean_features  # views that no store has
    shape = store.map_shape if store and "map" in method.needs else None
    identity, init_digest = take(settings, RunIdentity), ""
    if settings.init.startswith("file:"):
        file = locate(settings.init[5:])
        identity["init"], init_digest = f"file:{file}", digest(read_file(file))
    several = source.parts if len(source.parts) > 1 else ()
    branch = settings.network if "image" in method.needs else None
    plugins = find_plugins(methods=settings.method, networks=branch, towers=store.backbone_name if store else None)
    return RunSpec(
        **identity,
        source=source.name,
        source_digest=source.digest,
        source_kind=source.kind,
        sources=tuple(Source(part.name, part.manifest.kind, part.digest) for part in several),
        classes=source.classes,
        recipe=asdict(recipe),
        recipe_changes=changed_fields(recipe),
        drawn=tuple(find_distributions(settings)),
        image_size=settings.image_size or (key.input_size if key else PUBLISHED_SIZE),
        precision=find_precision(settings),
        policy=policy if key is None or own else key.policy["name"],
        views=_count_views(settings, recipe, key, own),
        view_seed=settings.view_seed or 0 if key is None or own else key.view_seed,
        interpolation=key.interpolation if key else "bilinear",
        mean=tuple(mean),
        std=tuple(std),
        features=key,
        backbone=store.backbone_name if store else None,
        width=shape[0] if shape else store.width if store else None,
        grid=shape[1:] if shape else None,
        init_digest=init_digest,
        revision=method.revision,
        plugins=tuple(plugin.identity for plugin in plugins),
    )


def _name_rows(listed: Faces, source: Faces, selection: str, recipe: Recipe) -> str:
    """Name the rows that are trained on and held out where they are not all that the manifests list, which is usual."""
    everything, left = (faces.split_rows(selection, recipe.calibration) for faces in (listed, source))
    if all(np.array_equal(one, other) for one, other in zip(everything, left, strict=True)):
        return ""
    return digest("|".join(" ".join(map(str, rows)) for rows in left).encode())


def _name_votes(source: Faces, recipe: Recipe) -> str:
    """Name what is learned of people's votes, empty where it is labels; raise `UserError` where nobody voted."""
    if recipe.labels != "votes":
        return ""
    if source.votes is None:
        raise UserError(
            f"No face of {source.name!r} has votes: leave labels=votes out, or index a set that has them again."
        )
    return digest(source.shares.tobytes())


def find_precision(settings: TrainSettings) -> Precision:
    """Return the arithmetic asked for, or that which suits this machine; raise `UserError` where others compute."""
    if settings.precision != "auto":
        return settings.precision
    if settings.address:
        raise UserError("--precision auto looks at this machine, not at a cluster's: name fp32, tf32 or bf16.")
    return "bf16" if computes_bf16() else "fp32"


def _count_views(settings: TrainSettings, recipe: Recipe, key: FeatureKey | None, own: bool) -> int:
    """Return how many views of a face a training sees: one for every epoch and the clean one, or those of its store."""
    if key is None:
        return settings.views or recipe.epochs + 1
    return recipe.epochs + 1 if own or settings.live else settings.views or key.views


def _choose_stores(workspace: Workspace, source: Faces, settings: TrainSettings) -> list[Stores]:
    """Return the stores of each source for a method that needs a tower; any other learns as published unless asked to.

    `settings.store` may name those of each source, of which several are read side by side. Raises `UserError` where one is
    missing.
    """
    folders = settings.store.split(",") if settings.store else []
    method, chosen = find_method(settings.method), list[Stores]()
    for part in source.parts:
        there = {path.name for path, _ in find_stores(workspace.features, part.name)} if folders else set()
        own = ",".join(folder for folder in folders if folder in there) or settings.store
        stores: Stores = ()
        if settings.backbone != "none" and (method.needs_tower() or settings.backbone or own):
            choice = replace(settings, store=own)
            stores = choose_source_stores(workspace, part.manifest, choice, method, settings.live)
        _check_stores(settings, method, part.name, stores)
        chosen.append(stores)
    return chosen


def _check_stores(settings: TrainSettings, method: type[Method], source: str, stores: Stores) -> None:
    if settings.backbone == "none" and method.needs_tower():
        raise UserError(f"{settings.method} needs a frozen tower: leave out --backbone none.")
    if settings.live and not (method.needs_features() and method.trained):
        raise UserError(f"{settings.method} is not trained on a frozen tower's features: leave out --live.")
    if not stores and method.needs_tower():
        raise UserError(f"{settings.method} needs frozen features of {source!r}: run `cafe extract {source}` first.")


def _describe_stores(source: Faces, stores: Sequence[Stores], settings: TrainSettings) -> StoreInfo | None:
    """Return the description of the only store, or of those of all sources as one; raise `UserError` where they differ."""
    found: list[Store] = [(own[0][0], join_layers(own)) for own in stores if own]
    if len(found) < 2:
        return found[0][1] if found else None
    together = join_stores(found, settings, find_method(settings.method), settings.live)
    key = replace(together.key, images=source.image_digest)
    return replace(together, key=key, manifest=source.name, rows=len(source.labels))


def find_deviations(spec: RunSpec) -> list[str]:
    """Return, as `key=value`, the settings in which a run is not what was published of its method."""
    found = {**vars(spec), "backbone": spec.backbone or "none"}
    if spec.features:
        found["mean"], found["std"] = spec.features.normalisation  # the tower's pixel statistics
    deviations = [f"source={spec.source}"] if spec.sources else []
    deviations += [f"start={spec.start[:8]}"] if spec.start else []
    return [*deviations, *list_deviations(find_method(spec.method), spec.source_kind, found)]


def list_deviations(method: type[Method], kind: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield, as `key=value`, which of some settings are not as published of a method for a kind of source."""
    published = method.published_recipe(kind)
    usual = {one.name: getattr(published, one.name) for one in fields(published)}
    yield from (f"{name}={value}" for name, value in found["recipe"].items() if value != usual[name])
    mean, std = NORMALISATIONS["imagenet"]
    settings: dict[str, object] = {"precision": "fp32", "selection": "final", "mean": mean, "std": std}
    settings["interpolation"] = "bilinear"
    if "image" in method.needs:
        settings |= {"network": "resnet18", "image_size": PUBLISHED_SIZE}
    if method.trained:
        settings |= {"policy": method.policy, "views": found["recipe"]["epochs"] + 1}
    if method.published_tower:
        settings["backbone"] = method.published_tower
    found = {**found, "backbone": found["backbone"].partition("@")[0]}
    yield from (f"{name}={_plain(found[name])}" for name, value in settings.items() if found[name] != value)
    if "image" in method.needs and found["init"].startswith("file:"):
        # Nobody has published a checksum of the MS-Celeb-1M weights: what a file is called proves nothing.
        digits = found.get("init_digest", "")[:12]
        yield f"init={PurePath(found['init']).name} (unknown weights{f', SHA-256 {digits}' if digits else ''})"
    elif "image" in method.needs and found["init"] != "scratch":
        yield f"init={found['init']}"


def _plain(value: object) -> str:
    return "/".join(f"{part:.4g}" for part in value) if isinstance(value, tuple) else str(value)


def _check_names(settings: TrainSettings, recipe: Recipe, sources: int) -> None:
    check_network(settings.network, settings.init)
    check_name(settings.experiment)
    if settings.tag:
        check_name(settings.tag)
    if find_method(settings.method).needs_domains() and recipe.batch_size < smallest_batch(sources):
        raise UserError(
            f"{settings.method} compares {sources} sources, and a batch of {recipe.batch_size} faces has not two of each: "
            f"set batch_size={smallest_batch(sources)} or more."
        )
    if settings.num_workers > recipe.batch_size:
        raise UserError(f"{settings.num_workers} workers are too many for batches of {recipe.batch_size}: use fewer.")


def _check_domains(settings: TrainSettings, names: Sequence[str]) -> None:
    """Raise `UserError` for a sampler, a selection or a fold that these sources have no use for."""
    selection, alone = settings.selection, f"several sources, not {settings.source!r} alone"
    if find_method(settings.method).needs_domains():
        _check_compared(settings, names)
    if settings.sampler == "balanced" and len(names) == 1:
        raise UserError(f"--sampler balanced needs {alone}: leave it out.")
    if selection == "leave_one_out" and len(names) == 1:
        raise UserError(f"--selection leave_one_out needs {alone}: choose the epoch by source_val.")
    if selection == "oracle" and not settings.fold:
        raise UserError("--selection oracle looks at the domain left out: name it with --fold.")
    if selection == AVERAGED and not find_method(settings.method).needs.isdisjoint({"image", "tower"}):
        raise UserError(
            f"--selection {AVERAGED} keeps the weights of every epoch, which of {settings.method} are too many: choose the "
            "epoch by source_val."
        )
    if selection in ("leave_one_out", "oracle", AVERAGED) and not find_method(settings.method).trained:
        raise UserError(f"{settings.method} has no epochs to choose from: leave out --selection {selection}.")
    if settings.fold in names:
        raise UserError(
            f"--fold {settings.fold} is one of the sources {settings.source!r}: name a domain they leave out."
        )


def _check_compared(settings: TrainSettings, names: Sequence[str]) -> None:
    """Raise `UserError` for a training of a method that compares sources in which it cannot."""
    method = settings.method
    if len(names) == 1:
        raise UserError(
            f"{method} compares several sources, not {settings.source!r} alone: name more, comma-separated, or train erm."
        )
    if settings.sampler != "balanced":
        raise UserError(
            f"{method} compares the sources within each batch: give --sampler balanced, so that all are in it."
        )
    if settings.selection == "leave_one_out" and len(names) == 2:
        raise UserError(
            f"{method} compares several sources, and --selection leave_one_out leaves one of {settings.source!r}: name a "
            "third, or choose the epoch by source_val."
        )


def _check_faces(part: Part, settings: TrainSettings, recipe: Recipe) -> None:
    """Raise `UserError` where a source has too few faces to train on, or none to choose the epoch by."""
    train, held_out = Faces.of(part).split_rows(settings.selection, recipe.calibration)
    if len(train) < SMALLEST_BATCH:
        raise UserError(f"{part.name!r} has {len(train)} training faces: at least {SMALLEST_BATCH} are needed.")
    if len(train) < settings.num_workers:
        raise UserError(
            f"{settings.num_workers} workers are too many for {len(train)} faces of {part.name!r}: use fewer."
        )
    if settings.selection in NEEDED and not len(held_out):
        raise UserError(
            f"{part.name!r} has no faces for --selection {settings.selection}: choose the epoch by source_val, or take "
            "the last one with final."
        )
    if recipe.calibration != "none" and not len(held_out):
        raise UserError(f"{part.name!r} has no faces to hold out for a calibration: leave it out.")
