"""What a store takes over from others of its workspace: features of the same pictures that the same tower saw alike.

A face's features depend on the name of its sample, the bytes of its picture, its box and the store's key, and on nothing
else: every pass is of one size, whatever shares it (`Embedder`). So where a picture was added or changed, only that one goes
through the tower, and the store comes out byte for byte as if all had.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

import numpy as np
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import list_folder
from cafe.pipeline.features.integrity import read_info
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.store import FeatureStore, name_images

UNKNOWN = -1  # where no store has a row
GROUPED = 64  # shards at most that are computed together
KEPT = 2  # chunks of a store's samples that stay in memory

Names = Sequence[tuple[str, str]]  # sample and picture


def find_donors(features: UPath, store: FeatureStore) -> list[FeatureStore]:
    """Return the stores of a workspace that differ from one in their images alone and say which picture each row is of."""
    found = []
    for path in (path for manifest in list_folder(features) for path in list_folder(manifest)):
        try:
            info = read_info(path)
            if info and path != store.path and _alike(info, store.info):
                donor = FeatureStore(path, info)
                donor.array("image")
                found.append(donor)
        except UserError:  # damaged, or of an earlier version, which did not say it
            continue
    return found


def _alike(one: StoreInfo, other: StoreInfo) -> bool:
    alike = replace(one.key, images="") == replace(other.key, images="")
    return alike and one.batch_size == one.key.batch_size and one.map_shape == other.map_shape


class Donors:
    """The stores from which one may take rows, and where each row lies."""

    def __init__(self, stores: list[FeatureStore]) -> None:
        self.stores = stores
        self.samples = [_Samples(store) for store in stores]

    def find(self, manifest: Manifest, rows: range) -> np.ndarray:
        """Return (rows, 2): the number of the store that has a row and its row there, or `UNKNOWN` twice."""
        found = np.full((len(rows), 2), UNKNOWN)
        if not self.stores:
            return found
        faces = manifest.read(rows)
        names = list(zip(faces["sample_id"].to_pylist(), name_images(faces), strict=True))
        for number, samples in reversed(list(enumerate(self.samples))):  # where several have a row, the first counts
            there = samples.find(names)
            found[there != UNKNOWN] = number, UNKNOWN
            found[there != UNKNOWN, 1] = there[there != UNKNOWN]
        return found


class _Samples:
    """The samples of a store, read a chunk at a time: they lie there in the order of their names, as in every manifest.

    In a store where they do not, or cannot be read, some are not found and are computed.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.done = store, set(store.receipts.done())
        self.size = store.array("sample_id").chunks[0]
        self.firsts: dict[int, str] = {}  # the first sample of each chunk that was read so far
        self.rows = lru_cache(KEPT)(self._read)

    def find(self, names: Names) -> np.ndarray:
        """Return the row of each of some neighbouring samples, (n,), where its picture is the same, or `UNKNOWN`."""
        chunks, samples = range(-(-self.store.info.rows // self.size)), [sample for sample, _ in names]
        first = max(bisect_right(chunks, min(samples), key=self._first) - 1, 0)
        last = max(bisect_right(chunks, max(samples), key=self._first) - 1, 0)
        found = np.full(len(names), UNKNOWN)
        for chunk in chunks[first : last + 1]:
            rows = self.rows(chunk)
            found = np.where(found == UNKNOWN, [rows.get(name, UNKNOWN) for name in names], found)
        return found

    def _first(self, chunk: int) -> str:
        if chunk not in self.firsts:
            self.rows(chunk)
        return self.firsts[chunk]

    def _read(self, chunk: int) -> dict[tuple[str, str], int]:
        """Return the rows of a chunk, by sample and picture, of which the store has features."""
        start, info = chunk * self.size, self.store.info
        rows = range(start, min(start + self.size, info.rows))
        self.firsts[chunk] = ""
        try:
            samples, images = (self.store.read_column(name, rows).tolist() for name in ("sample_id", "image"))
        except UserError:
            return {}
        self.firsts[chunk] = samples[0]
        lacking = set[int]()
        for shard in range(rows[0] // info.shard_rows, rows[-1] // info.shard_rows + 1):
            lacking.update(self._list_lacking(shard))
        return {
            name: row for row, name in zip(rows, zip(samples, images, strict=True), strict=True) if row not in lacking
        }

    def _list_lacking(self, shard: int) -> Iterable[int]:
        """Return the rows of a shard of which the store has no features, all where no receipt can be trusted."""
        with suppress(UserError):
            if shard in self.done and (receipt := self.store.receipts.read(shard)):
                return [entry.row for entry in receipt.skipped]
        return self.store.info.rows_of(shard)


def group_shards(shards: Iterable[int], known: Iterable[np.ndarray], enough: int) -> Iterator[list[int]]:
    """Part shards into runs of neighbours that together have `enough` rows for the tower; `known` is of each shard.

    So that few rows of many shards do not make as many passes, each filled up with nothing. A shard of which nothing is
    known stays alone.
    """
    group: list[int] = []
    total = 0
    for shard, places in zip(shards, known, strict=True):
        lacking = (places[:, :, 0] == UNKNOWN).any(axis=1)
        count = enough + 1 if lacking.all() else int(lacking.sum())
        if group and (shard != group[-1] + 1 or total + count > enough or len(group) == GROUPED):
            yield group
            group, total = [], 0
        group.append(shard)
        total += count
    if group:
        yield group


def take_rows(stores: Sequence[FeatureStore], known: np.ndarray, into: dict[str, np.ndarray]) -> np.ndarray:
    """Fill arrays {array: (rows, V, …)} where `known` (rows, 2) says which store has a row; return which rows are filled.

    All that is read is checked: a store that is not what was written gives nothing.
    """
    filled = np.zeros(len(known), bool)
    for number in np.unique(known[known[:, 0] != UNKNOWN, 0]):
        own = np.flatnonzero(known[:, 0] == number)
        with suppress(UserError):
            for name, values in into.items():
                values[own] = stores[number].read_rows(name, known[own, 1])
            filled[own] = True
    return filled
