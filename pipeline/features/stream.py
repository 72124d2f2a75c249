"""The shards that an extraction lacks, in one stream: a row is a shard, or neighbouring ones with few faces to embed.

Rows are made while others are embedded, and wait by the handful: what is in memory does not grow with the data set, and the
towers that take them live as long as the command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.reuse import UNKNOWN, Donors, group_shards
from cafe.pipeline.features.store import FeatureStore

if TYPE_CHECKING:
    from ray.data import Dataset


@dataclass(frozen=True)
class PendingRows:
    """The shards to compute of one manifest, and for each of its stores those from which it takes rows over."""

    manifest: Manifest
    info: StoreInfo  # of one of the stores, which are all cut alike
    donors: list[list[tuple[UPath, StoreInfo]]]
    shards: list[int]

    def pack(self, enough: int) -> Iterator[dict[str, Any]]:
        """Yield shards, in order, packed; neighbours together that have at most `enough` rows for the tower."""
        known: dict[int, np.ndarray] = {}
        donors = [Donors([FeatureStore(*store) for store in stores]) for stores in self.donors]

        def find() -> Iterator[np.ndarray]:
            for shard in self.shards:
                rows = self.info.rows_of(shard)
                known[shard] = np.stack([one.find(self.manifest, rows) for one in donors], axis=1)
                yield known[shard]

        for group in group_shards(self.shards, find(), enough):
            yield pack_shards(self.manifest, self.info, group, np.concatenate([known.pop(shard) for shard in group]))


def pack_passes(passes: Iterable[PendingRows], enough: int) -> Iterator[dict[str, Any]]:
    """Yield the shards of several passes, one pass after another, each with the number of its own."""
    for number, rows in enumerate(passes):
        for shard in rows.pack(enough):
            yield {"pass": number, **shard}


def pack_shards(
    manifest: Manifest, info: StoreInfo, shards: Sequence[int], known: np.ndarray | None = None
) -> dict[str, Any]:
    """Return neighbouring shards as a row: the first one's number, how many they are, and their manifest rows, packed.

    `known` (rows, stores, 2) says which other stores have which of the rows; by default none has any.
    """
    rows = range(info.rows_of(shards[0]).start, info.rows_of(shards[-1]).stop)
    places = b"" if known is None or (known == UNKNOWN).all() else known.astype(np.int64).tobytes()
    return {"shard": shards[0], "count": len(shards), "faces": manifest.pack(rows), "known": places}


def stream_shards(passes: Sequence[PendingRows], enough: int) -> Dataset:
    """Return what `pack_passes` yields as a dataset of Ray's, which is made as it is consumed, a row a block.

    A task on this machine makes it, from manifests that lie in the object store.
    """
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kept = ray.put(passes)
    unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)

    def read() -> Iterator[pa.Table]:
        for row in pack_passes(ray.get(kept), enough):
            yield pa.table({name: [value] for name, value in row.items()})

    class Shards(Datasource):  # type: ignore[misc]  # Ray has no types
        """One task that yields one row after another."""

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(read, unknown)]

        def estimate_inmemory_data_size(self) -> None:
            return None

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Another number of cores than a tower has, or Ray would make one task of both.
    return ray.data.read_datasource(
        Shards(), override_num_blocks=1, num_cpus=0, ray_remote_args={"scheduling_strategy": here}
    )
