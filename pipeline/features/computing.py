"""Where shards are computed: one tower of this machine works in this process; several, and a cluster's, under Ray Data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from cafe.data.manifest import Manifest
from cafe.errors import first_line
from cafe.pipeline import cluster
from cafe.pipeline.features.decoding import MANY_VIEWS
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.process import machine
from cafe.pipeline.process.versions import versions
from cafe.pipeline.settings import ExtractSettings

RESTARTS = 3  # of a tower on a cluster before it counts as dead
HANDED_OUT = 2  # shards that a tower has at a time
FEW_DECODERS = 4  # which decode enough for a GPU that makes many views of each face; more only disturb
CORES_EACH = 4  # of this machine for a tower; more speed it up little


def share_out(settings: ExtractSettings, shards: int, gpus: int, cores: int) -> tuple[int, float]:
    """Return how many towers work side by side and what each has of a GPU, so that all fit; never more than one."""
    # The cores of a cluster may lie on as many nodes; on one machine a tower works with several.
    towers = cores if settings.address else max(1, cores // CORES_EACH)
    actors = min(settings.num_actors or gpus or towers, shards)
    return actors, cluster.share(actors, gpus)


def compute_shards(
    manifest: Manifest, stores: Sequence[FeatureStore], settings: ExtractSettings, shards: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Compute shards; yield the receipt of each as it is done, or its fault; raise `WorkerDiedError`."""
    packed = [pack_shard(manifest, stores[0].about, shard) for shard in shards]
    return (
        _compute_with_ray(manifest, stores, settings, packed)
        if needs_ray(settings, len(shards))
        else _compute_here(manifest, stores, settings, packed)
    )


def needs_ray(settings: ExtractSettings, shards: int) -> bool:
    """Whether shards are computed on a cluster, or by several towers of this machine; one tower works in this process."""
    return shards > 0 and (settings.address is not None or share_out(settings, shards, *_count_here(settings))[0] > 1)


def _asked_for_gpu(settings: ExtractSettings) -> bool | None:
    return settings.use_gpu if settings.num_gpus is None else settings.num_gpus > 0


def _count_here(settings: ExtractSettings) -> tuple[int, int]:
    """Return the GPUs and the cores of this machine that may be used; raise `UserError` where a GPU is missing."""
    import torch

    gpus = torch.cuda.device_count() if machine.own_device(_asked_for_gpu(settings)) == "cuda" else 0
    return (settings.num_gpus or gpus) if gpus else 0, settings.num_cpus or machine.cores()


def _arguments(
    manifest: Manifest, stores: Sequence[FeatureStore], settings: ExtractSettings, gpus: int, share: int
) -> tuple[Any, ...]:
    """Return what a `ShardEmbedder` is made of that has a share of the cores."""
    enough = share - 1 if stores[0].about.key.views < MANY_VIEWS else FEW_DECODERS
    decoders = max(1, min(share - 1, enough)) if gpus else 1  # on a CPU everything waits for the tower
    return (
        {str(store.path): store.about for store in stores},
        replace(manifest, table=manifest.table.slice(0, 0)),
        replace(settings, decoders=decoders if settings.decoders is None else settings.decoders),
        1 if gpus else share,
        "cuda" if gpus else "cpu",
        versions(),
    )


def _compute_here(
    manifest: Manifest, stores: Sequence[FeatureStore], settings: ExtractSettings, packed: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compute shards in this process, two at a time: one has the tower, the other is being decoded or written."""
    from cafe.pipeline.features.shards import ShardEmbedder

    embedder = ShardEmbedder(*_arguments(manifest, stores, settings, *_count_here(settings)))
    pool = ThreadPoolExecutor(HANDED_OUT)
    try:
        for receipt in pool.map(embedder, ({name: [value] for name, value in shard.items()} for shard in packed)):
            yield {name: value for name, (value,) in receipt.items()}
    finally:
        embedder.end()
        pool.shutdown(wait=False, cancel_futures=True)


def _bounded_restarts() -> dict[str, int]:
    return {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}


def _without_restarts() -> dict[str, int]:
    return {"max_restarts": 0}


def _compute_with_ray(
    manifest: Manifest, stores: Sequence[FeatureStore], settings: ExtractSettings, packed: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError, RayTaskError

    from cafe.pipeline.features.shards import ShardEmbedder

    wanted = cluster.wants_gpu(_asked_for_gpu(settings), settings.num_gpus or 1, settings.scale_minutes)
    cluster.check_cores(1 if wanted else min(settings.num_actors or 1, len(packed)), settings.scale_minutes)
    gpus = (settings.num_gpus or cluster.count("GPU")) if wanted else 0
    cores = cluster.count("CPU")
    actors, gpus_each = share_out(settings, len(packed), gpus, cores)

    _quieten_ray_data()
    rows = ray.data.from_items(packed, override_num_blocks=len(packed))
    receipts = rows.map_batches(
        ShardEmbedder,
        fn_constructor_args=_arguments(manifest, stores, settings, gpus, max(1, cores // actors)),
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
    # `ray_remote_args_fn` has no successor yet.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)


def pack_shard(manifest: Manifest, about: StoreInfo, shard: int) -> dict[str, Any]:
    """Return a shard as a row of Ray: its number and its rows of the manifest."""
    rows, sink = about.rows_of(shard), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, manifest.table.schema) as stream:
        stream.write_table(manifest.table.slice(rows.start, len(rows)))
    return {"shard": shard, "faces": sink.getvalue().to_pybytes()}
