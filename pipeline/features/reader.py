"""What a training reads of a store: any rows of one view, kept in memory or in a mapped scratch file."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cafe.pipeline.features.store import MEMORY_SHARE, FeatureStore
from cafe.pipeline.process.machine import free_memory


class FeatureReader:
    """The features of any rows of one view: a view is read when it is first asked for and kept while there is room.

    An epoch uses one view, so maps far larger than the memory are read view by view, and mapped where even one is too large.
    """

    def __init__(self, store: FeatureStore, names: Iterable[str], memory_share: float = MEMORY_SHARE) -> None:
        self.store, self.names, self.memory_share = store, tuple(names), memory_share
        self.kept: dict[int, dict[str, np.ndarray]] = {}

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return {array: (n, …)} of some rows, in the number format of the store."""
        if view not in self.kept:
            kept = sum(values.nbytes for arrays in self.kept.values() for values in arrays.values())
            if kept > self.memory_share * free_memory():
                self.kept.clear()
            self.kept[view] = {name: self.store.read_view(name, view, self.memory_share) for name in self.names}
        return {name: np.asarray(values[rows]) for name, values in self.kept[view].items()}
