"""Stage one: a manifest's images through a frozen tower into a feature store, with Ray Data.

One Ray row is one shard: plan the unfinished ones, decode, embed, write. Kill it at any time; the next run computes only
what has no receipt, and the store comes out byte for byte the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import IncompleteError, UserError
from cafe.files import read_json, write_json
from cafe.pipeline import cluster
from cafe.pipeline.features.computing import compute_shards, needs_ray
from cafe.pipeline.features.key import FeatureKey, StoreInfo, default_shard_rows, describe_policy
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.process.lease import hold
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.records import check_record
from cafe.towers.facts import TowerFacts, resolve_normalisation
from cafe.towers.names import absolute_name, parse_backbone

LISTED = 20  # faults of an extraction that are told
TRIES = 3  # of shards whose workers died
AT_ONCE = 1024  # shards given to Ray together, whose rows take about 1 GB


@dataclass(frozen=True)
class Extraction:
    """What an extract command did: so many shards `computed`, and why the `skipped` images have no features."""

    store: UPath
    about: StoreInfo
    computed: int
    skipped: list[tuple[str, str]]

    def sentence(self) -> str:
        """Say what happened, for the end of a command."""
        what = f"computed {self.computed} of {self.about.shards} shards" if self.computed else "nothing to do"
        unreadable = f", {len(self.skipped)} unreadable images left out" if self.skipped else ""
        return f"{self.about.manifest}: {what}{unreadable}; {self.about.describe()} in {self.store}"

    def complaint(self, allowed: int) -> str:
        """Say that too many images are unreadable, with their list."""
        listed = "\n".join(f"  {path}: {reason}" for path, reason in self.skipped)
        return (
            f"{len(self.skipped)} of {self.about.rows} images of {self.about.manifest!r} are unreadable, more than "
            f"--max-skipped {allowed}; the features of all others are kept:\n{listed}"
        )


def describe_store(manifest: Manifest, settings: ExtractSettings, tower: TowerFacts) -> StoreInfo:
    """Return the store these settings ask for; with one view only the clean image counts, so the policy plays no part."""
    if settings.maps and tower.map_shape is None:
        raise UserError(f"The tower {settings.backbone!r} has no spatial map: leave out --maps.")
    clean = settings.views == 1
    key = FeatureKey(
        images=manifest.image_digest,
        backbone=tower.architecture,
        weights=tower.weights_digest,
        precision=settings.precision,
        input_size=tower.input_size,
        interpolation=settings.interpolation,
        normalisation=resolve_normalisation(tower, settings.normalisation),
        policy=describe_policy("clean" if clean else settings.policy),
        view_seed=0 if clean else settings.view_seed,
        views=settings.views,
        maps=settings.maps,
        dtype=settings.dtype,
        channels=settings.channels,
    )
    map_shape = tower.map_shape if settings.maps else None
    step = settings.shard_rows or default_shard_rows(
        len(manifest), settings.views, tower.width, map_shape, np.dtype(settings.dtype).itemsize
    )
    return StoreInfo(
        key, manifest.name, settings.backbone, len(manifest), tower.width, map_shape, step, settings.batch_size
    )


def know_tower(workspace: Workspace, settings: ExtractSettings) -> TowerFacts:
    """Return the facts of the tower at the layer its name says."""
    return know_layers(workspace, settings, [settings.backbone])[0]


def know_layers(workspace: Workspace, settings: ExtractSettings, names: Sequence[str]) -> list[TowerFacts]:
    """Return the facts of one tower at each layer, remembered by the content of its weights file.

    So a rerun need not load the tower, which it does once, whatever the number of layers.
    """
    spec, notes = parse_backbone(names[0]), dict[str, UPath]()
    if spec.file:
        content = hashlib.sha256(Path(spec.file).read_bytes()).hexdigest()
        asked = {name: f"2 {name} {settings.input_size} {content}" for name in names}
        notes = {
            name: workspace.root / "towers" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
            for name, text in asked.items()
        }
    known = {
        name: check_record(record, TowerFacts, str(note)) for name, note in notes.items() if (record := read_json(note))
    }
    if len(known) < len(names):
        from cafe.towers.building import load_backbone

        tower = load_backbone(names[0], settings.precision, settings.input_size)
        for name in names:
            known[name] = tower.describe(parse_backbone(name).layer)
            if name in notes:
                write_json(notes[name], asdict(known[name]))
    return [known[name] for name in names]


def name_layers(settings: ExtractSettings) -> list[str]:
    """Return the tower's name with each of the layers asked for."""
    if settings.layers is None:
        return [absolute_name(settings.backbone)]
    if "#" in settings.backbone:
        raise UserError(f"Both --backbone {settings.backbone} and --layers {settings.layers} name layers: use one.")
    layers = [layer.strip() for layer in settings.layers.split(",")]
    return list(dict.fromkeys(absolute_name(f"{settings.backbone}#{layer}") for layer in layers))


def extract(
    workspace: Workspace, manifests: Sequence[Manifest], settings: ExtractSettings, progress: Progress
) -> list[Extraction]:
    """Fill the feature stores of each manifest, one for each layer, and return what was done; finished ones cost no Ray.

    `progress(done, total)` counts faces of all manifests. Raises `IncompleteError` when more than `max_skipped` images of
    one are unreadable, or when shards could not be computed; what was computed is kept.
    """
    names = name_layers(settings)
    towers = dict(zip(names, know_layers(workspace, settings, names), strict=True))
    with ExitStack() as leases:
        by_name = sorted(manifests, key=lambda manifest: manifest.name)  # so that no two wait for each other
        passes = [step for manifest in by_name for step in _plan(workspace, manifest, settings, towers, leases)]
        _run(passes, settings, progress)
        results = [result for step in passes for result in step.results()]
    for result in results:
        if len(result.skipped) > settings.max_skipped:
            raise IncompleteError(result.complaint(settings.max_skipped))
    return results


def _run(passes: list[_Pass], settings: ExtractSettings, progress: Progress) -> None:
    """Compute what the stores lack; raise `IncompleteError` when they still lack something then."""
    total, done, faults = sum(len(step.manifest) for step in passes), 0, Counter[str]()
    with cluster.connect(settings) if any(needs_ray(settings, len(step.shards)) for step in passes) else nullcontext():
        for step in passes:
            done += len(step.manifest) - sum(len(step.stores[0].about.rows_of(shard)) for shard in step.shards)
            for shard in _embed_patiently(step, settings):
                done += shard["rows"]
                faults[str(shard["fault"])] += 1
                step.check_leases()
                progress(done, total)
            for store in step.stores:
                store.finish()
    _check_finished(passes, faults)


@dataclass(frozen=True)
class _Pass:
    """One manifest on its way through the tower, into stores that are cut into the same shards."""

    manifest: Manifest
    stores: list[FeatureStore]
    pending: list[list[int]]  # the shards that each store lacks
    leases: list[Callable[[], None]]

    @property
    def shards(self) -> list[int]:
        """The shards that any of the stores lacks."""
        return sorted(set().union(*self.pending))

    def lacking(self) -> list[int]:
        """List the shards again that any of the stores lacks."""
        return sorted(set().union(*(store.pending() for store in self.stores)))

    def check_leases(self) -> None:
        """Raise `UserError` when another command has taken over a store."""
        for check in self.leases:
            check()

    def results(self) -> list[Extraction]:
        """Say what was done for each store."""
        return [
            Extraction(store.path, store.about, len(pending), store.receipts.skipped_paths(self.manifest))
            for store, pending in zip(self.stores, self.pending, strict=True)
        ]


def _plan(
    workspace: Workspace, manifest: Manifest, settings: ExtractSettings, towers: dict[str, TowerFacts], held: ExitStack
) -> list[_Pass]:
    """Lease, make or open the stores of all layers; those cut alike share a pass, which all do that are made together."""
    asked = [describe_store(manifest, replace(settings, backbone=name), tower) for name, tower in towers.items()]
    step = min(about.shard_rows for about in asked)
    alike: dict[int, list[FeatureStore]] = defaultdict(list)
    folder = workspace.features / manifest.name
    names = sorted({about.folder for about in asked})
    leases = [held.enter_context(hold(folder / name, settings.wait)) for name in names]
    for about in asked:
        store = FeatureStore.create(folder, replace(about, shard_rows=step), manifest)
        if settings.retry_skipped:
            store.receipts.discard_skipped()
        if store.pending():
            store.receipts.discard([])  # what is summed up may be wrong soon
        alike[store.about.shard_rows].append(store)
    return [_Pass(manifest, stores, [store.pending() for store in stores], leases) for stores in alike.values()]


def _check_finished(passes: Sequence[_Pass], faults: Counter[str]) -> None:
    """List the stores again; raise `IncompleteError` with what went wrong where they still lack shards."""
    lacking = sum(len(store.pending()) for step in passes for store in step.stores)
    if lacking:
        listed = "".join(f"\n  {fault} ({count} shards)" for fault, count in faults.most_common(LISTED) if fault)
        raise IncompleteError(
            f"{lacking} of {sum(store.about.shards for step in passes for store in step.stores)} shards could not be "
            f"computed; all others are kept: give the same command again.{listed}"
        )


def _embed_patiently(step: _Pass, settings: ExtractSettings) -> Iterator[dict[str, Any]]:
    """Compute shards, so many at a time that their rows have room in memory.

    After a worker has died they are computed again, until `TRIES` have died without a shard done.
    """
    died, shards = 0, step.shards
    while shards:
        some = shards[:AT_ONCE]
        try:
            for shard in compute_shards(step.manifest, step.stores, settings, some):
                died = 0
                yield shard
            shards = shards[AT_ONCE:]
        except cluster.WorkerDiedError as error:
            died, shards = died + 1, sorted(set(step.lacking()).intersection(shards))
            if shards and died == TRIES:
                raise IncompleteError(
                    f"The worker of shard {shards[0]} of {step.manifest.name!r} died {died} times ({error}): if memory is "
                    "short, take fewer --num-actors or a smaller --batch-size; give the same command again."
                ) from None
