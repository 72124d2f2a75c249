"""Stage one: a manifest's images through a frozen tower into feature stores.

Plan the shards that have no receipt, then decode, embed and write one after the other: one tower of this machine works in
this process; several, and a cluster's, under Ray Data, where a row is a shard. Kill it at any time; the next run computes
only what has no receipt, and the store comes out byte for byte the same.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from upath import UPath

from cafe.addresses import permission
from cafe.data.manifest import Manifest
from cafe.errors import IncompleteError, UserError, first_line
from cafe.files import place_below, read_file, read_json, write_json
from cafe.pipeline import cluster
from cafe.pipeline.features.integrity import Skipped
from cafe.pipeline.features.key import FeatureKey, StoreInfo, default_shard_rows, describe_policy
from cafe.pipeline.features.reuse import find_donors
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.features.stream import PendingRows, pack_passes, stream_shards
from cafe.pipeline.features.worker import MANY_VIEWS, TowerWorker, end_if_imported
from cafe.pipeline.process import machine
from cafe.pipeline.process.lease import hold
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.process.versions import versions
from cafe.pipeline.settings import ExtractSettings, FeatureIdentity, take
from cafe.pipeline.workspace import Workspace
from cafe.plugins import find_plugins
from cafe.records import check_record, digest
from cafe.towers.facts import TowerFacts, resolve_normalisation
from cafe.towers.names import absolute_name, parse_backbone, single_names

LISTED = 20  # faults of an extraction that are reported
TRIES = 3  # of shards whose workers died
RESTARTS = 3  # of a tower on a cluster before it counts as dead
HANDED_OUT = 2  # shards that a tower has at a time
FEW_DECODERS = 4  # which decode enough for a GPU that makes many views of each face; more only disturb
CORES_EACH = 4  # of this machine for a tower; more speed it up little


@dataclass(frozen=True)
class Extraction:
    """What an extract command did: so many shards `computed`, and why the `skipped` images have no features."""

    store: UPath
    info: StoreInfo
    computed: int
    skipped: list[tuple[str, str]]
    taken: int = 0  # faces of these shards whose features another store had

    def sentence(self) -> str:
        """Say what happened, for the end of a command."""
        what = f"computed {self.computed} of {self.info.shards} shards" if self.computed else "nothing to do"
        what += f", {self.taken:,} faces of them taken over from other stores" if self.taken else ""
        unreadable = f", {len(self.skipped)} unreadable images left out" if self.skipped else ""
        return f"{self.info.manifest}: {what}{unreadable}; {self.info.describe()} in {self.store}"

    def complaint(self, allowed: int) -> str:
        """Say that too many images are unreadable, with their list."""
        listed = "\n".join(f"  {path}: {reason}" for path, reason in self.skipped)
        large = sum(Skipped(0, reason).limit is not None for _, reason in self.skipped)
        limit = self.info.key.max_megapixels
        remedy = (
            f" ({large} only for having more pixels than --max-megapixels {limit} allows: give more)" if large else ""
        )
        return (
            f"{len(self.skipped)} of {self.info.rows} images of {self.info.manifest!r} are unreadable{remedy}, more than "
            f"--max-skipped {allowed}; the features of all others are kept:\n{listed}"
        )


def describe_store(manifest: Manifest, settings: ExtractSettings, tower: TowerFacts) -> StoreInfo:
    """Return the store these settings ask for; with one view only the clean image counts, so the policy plays no part."""
    if settings.maps and tower.map_shape is None:
        raise UserError(f"The tower {settings.backbone!r} has no spatial map: leave out --maps.")
    clean = settings.views == 1
    chosen = take(settings, FeatureIdentity) | ({"view_seed": 0} if clean else {})
    key = FeatureKey(
        **chosen,
        images=manifest.image_digest,
        backbone=tower.architecture,
        weights=tower.weights_digest,
        input_size=tower.input_size,
        normalisation=resolve_normalisation(tower, settings.normalisation),
        policy=describe_policy("clean" if clean else settings.policy),
    )
    map_shape = tower.map_shape if settings.maps else None
    step = settings.shard_rows or default_shard_rows(
        len(manifest), settings.views, tower.width, map_shape, np.dtype(settings.dtype).itemsize
    )
    return StoreInfo(
        key, manifest.name, settings.backbone, len(manifest), tower.width, map_shape, step, settings.batch_size
    )


def look_up_tower(workspace: Workspace, settings: ExtractSettings) -> TowerFacts:
    """Return the facts of the tower at the layer its name says."""
    return look_up_layers(workspace, settings, [settings.backbone])[0]


def look_up_layers(workspace: Workspace, settings: ExtractSettings, names: Sequence[str]) -> list[TowerFacts]:
    """Return the facts of one tower at each layer, remembered by the content of its files.

    So a rerun need not load the tower, which it does once, whatever the number of layers.
    """
    spec, notes = parse_backbone(names[0]), dict[str, UPath]()
    if spec.files:
        content = " ".join(digest(read_file(UPath(file))) for file in spec.files)
        asked = {name: f"2 {name} {settings.input_size} {content}" for name in names}
        folder = workspace.root / "towers"
        notes = {name: place_below(folder, f"{digest(text.encode())[:16]}.json") for name, text in asked.items()}
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
        return single_names(settings.backbone)
    if "#" in settings.backbone:
        raise UserError(f"Both --backbone {settings.backbone} and --layers {settings.layers} name layers: use one.")
    layers = [layer.strip() for layer in settings.layers.split(",")]
    return list(dict.fromkeys(absolute_name(f"{settings.backbone}#{layer}") for layer in layers))


def extract(
    workspace: Workspace, manifests: Sequence[Manifest], settings: ExtractSettings, progress: Progress
) -> list[Extraction]:
    """Fill the feature stores of each manifest, one for each layer, and return what was done, in the order asked for.

    Where all are finished, Ray is not started. `progress(done, total)` counts faces of all manifests. Raises
    `IncompleteError` when more than `max_skipped` images of one are unreadable, or when shards could not be computed; what
    was computed is kept.
    """
    end_if_imported()
    names = name_layers(settings)
    towers = dict(zip(names, look_up_layers(workspace, settings, names), strict=True))
    asked = {manifest.name: manifest for manifest in manifests}
    with ExitStack() as leases:
        by_name = [asked[name] for name in sorted(asked)]  # so that no two commands wait for each other
        passes = [step for manifest in by_name for step in _plan(workspace, manifest, settings, towers, leases)]
        _run(passes, settings, progress)
        results = [result for step in passes for result in step.results()]
    order, layers = [*asked], [tower.architecture for tower in towers.values()]
    results.sort(key=lambda result: (order.index(result.store.parent.name), layers.index(result.info.key.backbone)))
    for result in results:
        if len(result.skipped) > settings.max_skipped:
            raise IncompleteError(result.complaint(settings.max_skipped))
    return results


def _run(passes: list[_Pass], settings: ExtractSettings, progress: Progress) -> None:
    """Compute what the stores lack; raise `IncompleteError` when they still lack something then."""
    total, faults = sum(len(step.manifest) for step in passes), Counter[str]()
    done = total - sum(len(step.stores[0].info.rows_of(shard)) for step in passes for shard in step.shards)
    lacking = sum(len(step.shards) for step in passes)
    with cluster.connect(settings) if needs_ray(settings, lacking) else nullcontext():
        for shard in _compute_with_retries(passes, settings):
            done += shard["rows"]
            step = passes[int(shard["pass"])]
            step.taken[int(shard["shard"])] = int(shard["taken"])
            faults[str(shard["fault"])] += 1
            step.check_leases()
            progress(done, total)
    for step in passes:
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
    donors: list[list[FeatureStore]]  # from which each store takes rows
    taken: Counter[int] = field(default_factory=Counter)  # by shard: faces that needed no tower

    @property
    def shards(self) -> list[int]:
        """The shards that any of the stores lacks."""
        return sorted(set().union(*self.pending))

    def lacking(self) -> list[int]:
        """List the shards again that any of the stores lacks."""
        return sorted(set().union(*(store.pending() for store in self.stores)))

    def facts(self) -> tuple[dict[str, StoreInfo], Manifest, list[dict[str, StoreInfo]]]:
        """Return what its workers know of it: its stores, the manifest without its rows, and from whom each store takes."""
        donors = [{str(donor.path): donor.info for donor in some} for some in self.donors]
        return {str(store.path): store.info for store in self.stores}, self.manifest.outline(), donors

    def check_leases(self) -> None:
        """Raise `UserError` when another command has taken over a store."""
        for check in self.leases:
            check()

    def rows(self, shards: Sequence[int]) -> PendingRows:
        """Return the rows of some shards, to be handed out."""
        donors = [[(donor.path, donor.info) for donor in some] for some in self.donors]
        # A copy, without what was worked out of the manifest so far, since it goes to another process.
        return PendingRows(replace(self.manifest), self.stores[0].info, donors, list(shards))

    def results(self) -> list[Extraction]:
        """Say what was done for each store."""
        return [
            Extraction(
                store.path,
                store.info,
                len(pending),
                store.receipts.skipped_paths(self.manifest),
                sum(self.taken[shard] for shard in pending),
            )
            for store, pending in zip(self.stores, self.pending, strict=True)
        ]


def _plan(
    workspace: Workspace, manifest: Manifest, settings: ExtractSettings, towers: dict[str, TowerFacts], held: ExitStack
) -> list[_Pass]:
    """Lease, make or open the stores of all layers; those cut alike share a pass, which all do that are made together."""
    asked = [describe_store(manifest, replace(settings, backbone=name), tower) for name, tower in towers.items()]
    step = min(info.shard_rows for info in asked)
    alike: dict[int, list[tuple[FeatureStore, list[int]]]] = defaultdict(list)
    folder = place_below(workspace.features, manifest.name)
    names = sorted({info.folder for info in asked})
    leases = [held.enter_context(hold(folder / name, settings.wait)) for name in names]
    for info in asked:
        store = FeatureStore.create(folder, replace(info, shard_rows=step), manifest)
        if outdated := store.receipts.outdated():
            store.receipts.discard(outdated)
        if settings.retry_skipped:
            store.receipts.discard_skipped()
        if pending := store.pending():
            store.receipts.discard([])  # what is summed up may be wrong soon
        alike[store.info.shard_rows].append((store, pending))
    return [_make_pass(workspace, manifest, stores, leases) for stores in alike.values()]


def _make_pass(
    workspace: Workspace,
    manifest: Manifest,
    found: list[tuple[FeatureStore, list[int]]],
    leases: list[Callable[[], None]],
) -> _Pass:
    stores, pending = [store for store, _ in found], [own for _, own in found]
    donors = [find_donors(workspace.features, store) if own else [] for store, own in found]
    return _Pass(manifest, stores, pending, leases, donors)


def _check_finished(passes: Sequence[_Pass], faults: Counter[str]) -> None:
    """List the stores again; raise `IncompleteError` with what went wrong where they still lack shards."""
    lacking = sum(len(store.pending()) for step in passes if step.shards for store in step.stores)
    if lacking:
        listed = "".join(f"\n  {fault} ({count} shards)" for fault, count in faults.most_common(LISTED) if fault)
        raise IncompleteError(
            f"{lacking} of {sum(store.info.shards for step in passes for store in step.stores)} shards could not be "
            f"computed; all others are kept: give the same command again.{listed}"
        )


def _compute_with_retries(passes: Sequence[_Pass], settings: ExtractSettings) -> Iterator[dict[str, Any]]:
    """Compute the shards of all passes; yield what became of each.

    After a worker has died those that are lacking are computed again, until `TRIES` have died without a shard done.
    """
    died, shards = 0, [step.shards for step in passes]
    if settings.address and any(shards) and _wants_gpu(settings) is None:
        settings = replace(settings, use_gpu=cluster.wants_gpu(None))  # which stays so when nodes come and go
    while any(shards):
        try:
            for shard in _compute(passes, settings, shards):
                died = 0
                yield shard
            return
        except cluster.WorkerDiedError as error:
            died += 1
            shards = [sorted(set(step.lacking()).intersection(some)) for step, some in zip(passes, shards, strict=True)]
            left = [(step.manifest.name, some[0]) for step, some in zip(passes, shards, strict=True) if some]
            if left and died == TRIES:
                name, first = left[0]
                raise IncompleteError(
                    f"The worker of shard {first} of {name!r} died {died} times ({error}): if memory is "
                    "short, take fewer --num-actors or a smaller --batch-size; give the same command again."
                ) from None
            if left and settings.address:
                cluster.await_return("GPU" if _wants_gpu(settings) else "CPU", all_of_them=True)


def _compute(
    passes: Sequence[_Pass], settings: ExtractSettings, shards: Sequence[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    """Compute some shards of each pass; yield the receipt of each as it is done, or its fault; raise `WorkerDiedError`."""
    begun = [(number, step) for number, step in enumerate(passes) if shards[number]]
    rows = [step.rows(shards[number]) for number, step in begun]
    compute = _compute_with_ray if needs_ray(settings, sum(map(len, shards))) else _compute_here
    for shard in compute([step for _, step in begun], rows, settings):
        yield {**shard, "pass": begun[int(shard["pass"])][0]}


def needs_ray(settings: ExtractSettings, shards: int) -> bool:
    """Whether shards are computed on a cluster, or by several towers of this machine; one tower works in this process."""
    return shards > 0 and (settings.address is not None or share_out(settings, shards, *_count_here(settings))[0] > 1)


def share_out(settings: ExtractSettings, shards: int, gpus: int, cores: int) -> tuple[int, float]:
    """Return how many towers work side by side and what each has of a GPU, so that all fit; never more than one."""
    # The cores of a cluster may lie on as many nodes; on one machine a tower works with several.
    towers = cores if settings.address else max(1, cores // CORES_EACH)
    actors = min(settings.num_actors or gpus or towers, shards)
    return actors, cluster.share(actors, gpus)


def _wants_gpu(settings: ExtractSettings) -> bool | None:
    return settings.use_gpu if settings.num_gpus is None else settings.num_gpus > 0


def _count_here(settings: ExtractSettings) -> tuple[int, int]:
    """Return the GPUs and the cores of this machine that may be used; raise `UserError` where a GPU is missing."""
    import torch

    gpus = torch.cuda.device_count() if machine.own_device(_wants_gpu(settings)) == "cuda" else 0
    return (settings.num_gpus or gpus) if gpus else 0, settings.num_cpus or machine.cores()


def _arguments(passes: Sequence[_Pass], settings: ExtractSettings, gpus: int, share: int) -> tuple[Any, ...]:
    """Return what a `TowerWorker` is made of that has a share of the cores."""
    views = passes[0].stores[0].info.key.views
    enough = share - 1 if views < MANY_VIEWS else FEW_DECODERS
    decoders = max(1, min(share - 1, enough)) if gpus else 1  # on a CPU everything waits for the tower
    return (
        [step.facts() for step in passes],
        replace(settings, decoders=decoders if settings.decoders is None else settings.decoders),
        1 if gpus else share,
        "cuda" if gpus else "cpu",
        versions(),
        find_plugins(towers=settings.backbone),
        permission(),
    )


def _enough(settings: ExtractSettings) -> int:
    """Return how many rows fill a pass of the tower."""
    return max(1, settings.batch_size // settings.views)


def _compute_here(
    passes: Sequence[_Pass], rows: Sequence[PendingRows], settings: ExtractSettings
) -> Iterator[dict[str, Any]]:
    """Compute shards in this process, two at a time: one has the tower, the other is being decoded or written."""
    worker = TowerWorker(*_arguments(passes, settings, *_count_here(settings)))
    pool, under_way = ThreadPoolExecutor(HANDED_OUT), deque[Future[dict[str, Any]]]()
    try:
        for shard in pack_passes(rows, _enough(settings)):
            under_way.append(pool.submit(worker, {name: [value] for name, value in shard.items()}))
            if len(under_way) > HANDED_OUT:
                yield from _single(under_way.popleft().result())
        while under_way:
            yield from _single(under_way.popleft().result())
    finally:
        worker.end()
        pool.shutdown(wait=False, cancel_futures=True)


def _single(done: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what became of each of several shards."""
    return (dict(zip(done, values, strict=True)) for values in zip(*done.values(), strict=True))


def _bounded_restarts() -> dict[str, int]:
    return {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}


def _without_restarts() -> dict[str, int]:
    return {"max_restarts": 0}


def size_up(rows: Sequence[PendingRows], settings: ExtractSettings) -> tuple[int, float, int, int]:
    """Return how many towers work on the connected cluster, what each has of a GPU, and the GPUs and cores there are.

    Raises `UserError` where there is not enough for them, also after the wait for an autoscaler. Where a cluster had enough
    and has lost some, what remains is used.
    """

    def count_tasks(most: int) -> int:  # shards with few new rows are one
        return sum(1 for _ in islice(pack_passes(rows, _enough(settings)), most))

    settings = replace(settings, num_gpus=cluster.remaining("GPU", settings.num_gpus))
    wanted = cluster.wants_gpu(_wants_gpu(settings), settings.num_gpus or 1, settings.scale_minutes)
    if not wanted:  # towers may share a GPU, and no core
        settings = replace(settings, num_actors=cluster.remaining("CPU", settings.num_actors))
    tasks = count_tasks(settings.num_actors) if settings.num_actors else 0
    cluster.check_cores(1 if wanted else max(1, tasks), settings.scale_minutes)
    gpus = (settings.num_gpus or cluster.count("GPU")) if wanted else 0
    cores = cluster.count("CPU")  # now, since before the wait there may have been none
    return *share_out(settings, tasks or count_tasks(gpus or cores), gpus, cores), gpus, cores


def _compute_with_ray(
    passes: Sequence[_Pass], rows: Sequence[PendingRows], settings: ExtractSettings
) -> Iterator[dict[str, Any]]:
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError, RayTaskError

    actors, gpus_each, gpus, cores = size_up(rows, settings)
    _quieten_ray_data()
    receipts = stream_shards(rows, _enough(settings)).map_batches(
        TowerWorker,
        fn_constructor_args=_arguments(passes, settings, gpus, max(1, cores // actors)),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=HANDED_OUT),
        num_cpus=1,
        num_gpus=gpus_each,
        # On a cluster, whose nodes come and go, Ray starts a tower elsewhere.
        ray_remote_args_fn=_bounded_restarts if settings.address else _without_restarts,
    )
    try:
        yield from receipts.iter_rows()
    except RayTaskError as error:
        raise cluster.user_error(error) or error from None
    except RayError as error:
        raise cluster.WorkerDiedError(first_line(str(error))) from error


def _quieten_ray_data() -> None:
    from ray.data import DataContext
    from ray.util.annotations import RayDeprecationWarning

    cluster.quieten("ray.data")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: a shard is a block, so that no tower waits for several
    # `ray_remote_args_fn` has no successor yet.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
