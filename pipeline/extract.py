"""Stage one: a manifest's images through a frozen tower into a feature store, with Ray Data.

One Ray row is one shard: plan the unfinished ones, decode, embed, write. Kill it at any time; the next run computes only
what has no receipt, and the store comes out byte for byte the same.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import IncompleteError, UserError
from cafe.files import read_json, write_json
from cafe.towers.building import TowerFacts, load_backbone, resolve_normalisation
from cafe.towers.embedding import Embedder
from cafe.towers.names import absolute_name, parse_backbone
from pipeline import cluster
from pipeline.progress import Progress
from pipeline.records import check_record
from pipeline.settings import ExtractSettings
from pipeline.store import About, FeatureKey, FeatureStore, default_shard_rows, describe_policy
from pipeline.workspace import Workspace, locate

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Extraction:
    """What an extract command did: `computed` shards of `shards`, and why the `skipped` images have no features."""

    store: UPath
    about: About
    shards: int
    computed: int
    skipped: list[tuple[str, str]]

    def sentence(self) -> str:
        """Say what happened, for the end of a command."""
        what = f"computed {self.computed} of {self.shards} shards" if self.computed else "nothing to do"
        unreadable = f", {len(self.skipped)} unreadable images left out" if self.skipped else ""
        return f"{self.about.manifest}: {what}{unreadable}; {self.about.describe()} in {self.store}"

    def complaint(self, allowed: int) -> str:
        """Say that too many images are unreadable, with their list."""
        listed = "\n".join(f"  {path}: {reason}" for path, reason in self.skipped)
        return (
            f"{len(self.skipped)} of {self.about.rows} images of {self.about.manifest!r} are unreadable, more than "
            f"--max-skipped {allowed}; the features of all others are kept:\n{listed}"
        )


def describe_store(manifest: Manifest, settings: ExtractSettings, tower: TowerFacts) -> About:
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
    return About(
        key, manifest.name, settings.backbone, len(manifest), tower.width, map_shape, step, settings.batch_size
    )


def know_tower(workspace: Workspace, settings: ExtractSettings) -> TowerFacts:
    """Return the facts of a tower, remembered by the content of its weights file, so that a rerun need not load it."""
    spec = parse_backbone(settings.backbone)
    note = None
    if spec.file:
        content = hashlib.sha256(Path(spec.file).read_bytes()).hexdigest()
        asked = f"{settings.backbone} {settings.input_size} {content}"
        note = workspace.root / "towers" / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        if record := read_json(note):
            return check_record(record, TowerFacts, str(note))
    facts = load_backbone(settings.backbone, settings.precision, settings.input_size).facts
    if note:
        write_json(note, asdict(facts))
    return facts


class ShardEmbedder:
    """A tower at work: shard number in, receipt out. Loaded once per actor, usable without Ray."""

    def __init__(
        self, store: str, about: About, manifest: str, settings: ExtractSettings, threads: int, device: str
    ) -> None:
        torch.set_num_threads(threads)
        self.store = FeatureStore(locate(store), about)
        tower = load_backbone(settings.backbone, settings.precision, settings.input_size)
        if tower.weights_digest != about.key.weights:
            raise UserError(
                f"The weights of {settings.backbone!r} on this node are not those the store was planned with."
            )
        self.embedder = Embedder(
            tower,
            Manifest.load(locate(manifest)),
            about.key.view_plan,
            device,
            about.key.maps,
            about.key.dtype,
            about.batch_size,
            about.key.channels,
        )
        decoders = settings.decode_threads or 0
        self.pool: Executor | None = ThreadPoolExecutor(decoders) if decoders else None
        self.ahead = 2 * decoders

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Embed one shard, write it and return {shard, rows}."""
        (shard,) = batch["shard"].tolist()
        rows, views = self.store.rows_of(shard), self.store.about.key.views
        batches = self.embedder.batches(list(product(rows, range(views))))

        skipped: dict[int, str] = {}
        features: dict[str, list[np.ndarray]] = defaultdict(list)
        for rendered in prefetch(self.embedder.render, batches, self.pool, self.ahead):
            skipped |= rendered.unreadable
            for name, values in self.embedder.embed(rendered).items():
                features[name].append(values)
        arrays = {
            name: np.concatenate(parts).reshape(len(rows), views, *parts[0].shape[1:])
            for name, parts in features.items()
        }
        self.store.write_shard(shard, arrays, skipped)
        return {"shard": [shard], "rows": [len(rows)]}


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor | None, ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` in order, with up to `ahead` of them under way in the pool; without a pool, one by one."""
    if pool is None:
        yield from map(function, items)
        return
    under_way: deque[Any] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def extract(
    workspace: Workspace, manifests: Sequence[Manifest], settings: ExtractSettings, progress: Progress
) -> list[Extraction]:
    """Fill the feature store of each manifest and return what was done; finished ones cost no Ray.

    `progress(done, total)` counts faces of all manifests. Raises `IncompleteError` when more than `max_skipped` images of
    one are unreadable; what was computed is kept.
    """
    settings = replace(settings, backbone=absolute_name(settings.backbone))
    tower = know_tower(workspace, settings)
    abouts = [describe_store(manifest, settings, tower) for manifest in manifests]
    stores = [
        FeatureStore.create(workspace.features / manifest.name, about, manifest)
        for manifest, about in zip(manifests, abouts, strict=True)
    ]
    if settings.verify:
        for store in stores:
            store.discard_damaged()
    pending = [store.pending() for store in stores]
    total, done = sum(map(len, manifests)), 0
    with cluster.connect(settings) if any(pending) else nullcontext():
        for manifest, store, shards in zip(manifests, stores, pending, strict=True):
            done += len(manifest) - sum(len(store.rows_of(shard)) for shard in shards)
            path = str(workspace.manifest_path(manifest.name))
            for rows in _embed(store, path, settings, shards) if shards else ():
                done += rows
                progress(done, total)
            store.sweep()
    results = [
        Extraction(store.path, store.about, store.shards, len(shards), store.skipped_paths(manifest))
        for manifest, store, shards in zip(manifests, stores, pending, strict=True)
    ]
    for result in results:
        if len(result.skipped) > settings.max_skipped:
            raise IncompleteError(result.complaint(settings.max_skipped))
    return results


def _without_restarts() -> dict[str, int]:
    """On one machine a tower that dies is an error; on a cluster, whose nodes come and go, Ray starts it elsewhere."""
    return {"max_restarts": 0}


def _embed(store: FeatureStore, manifest: str, settings: ExtractSettings, shards: list[int]) -> Iterator[int]:
    """Compute shards under Ray; yield the faces of each as it is done."""
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    gpus = cluster.count("GPU") if settings.num_gpus is None else settings.num_gpus
    cores = cluster.count("CPU")
    actors = min(settings.num_actors or gpus or cores, len(shards))
    share = max(1, cores // actors)
    # On a CPU the tower is the bottleneck, so decoding shares its thread; a GPU never waits for the decoders.
    decoders = settings.decode_threads if settings.decode_threads is not None else (share if gpus else 0)
    arguments = (
        str(store.path),
        store.about,
        manifest,
        replace(settings, decode_threads=decoders),
        1 if gpus else share,
        "cuda" if gpus else "cpu",
    )

    cluster.quieten("ray.data")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # of the last argument, which has no successor yet
        receipts = rows.map_batches(
            ShardEmbedder,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=gpus / actors if gpus else 0,
            ray_remote_args_fn=None if settings.address else _without_restarts,
        )
    try:
        for receipt in receipts.iter_rows():
            yield receipt["rows"]
    except RayTaskError as error:
        raise cluster.user_error(error) or error from None
