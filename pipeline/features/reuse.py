"""What a store takes over from others of its workspace: features of the same pictures that the same tower saw alike.

A face's features depend on the name of its sample, the bytes of its picture, its box and the store's key, and on nothing
else: every pass is of one size, whatever shares it (`Embedder`). So where a picture was added or changed, only that one goes
through the tower, and the store comes out byte for byte as if all had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

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

Places = dict[tuple[str, str], tuple[int, int]]  # (sample, picture) → (number of the store, row there)


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
        self.places: Places = {}
        for number, donor in enumerate(stores):
            self.places |= {name: (number, row) for name, row in _list_rows(donor) if name not in self.places}


def find_known(places: Places, manifest: Manifest, rows: range) -> np.ndarray:
    """Return (rows, 2): the number of the store that has a row of a manifest and its row there, or `UNKNOWN` twice."""
    nowhere = (UNKNOWN, UNKNOWN)
    if not places:
        return np.full((len(rows), 2), UNKNOWN)
    faces = manifest.table.slice(rows.start, len(rows))
    names = zip(faces["sample_id"].to_pylist(), name_images(faces), strict=True)
    return np.array([places.get(name, nowhere) for name in names]).reshape(-1, 2)


def _list_rows(donor: FeatureStore) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield (sample, picture) and row of all that a store has features of."""
    samples, images = (np.asarray(donor.array(name)[:]) for name in ("sample_id", "image"))
    for shard, receipt in donor.receipts.read_all():
        skipped = {entry.row for entry in receipt.skipped}
        for row in donor.info.rows_of(shard):
            if row not in skipped:
                yield (str(samples[row]), str(images[row])), row


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
