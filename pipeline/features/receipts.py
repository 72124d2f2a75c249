"""Receipts: what says that a shard of a store is done, and what it then holds.

Each is one small file, written after everything else of its shard. What was left out of the whole store is summed up in
`skipped.json` once all shards are done, so that nobody has to read every receipt to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import list_sizes, remove_file
from cafe.pipeline.features.description import damaged
from cafe.pipeline.features.key import StoreInfo
from cafe.records import check_record, read_sealed, write_sealed

READERS = 16  # threads that wait for an object store
READERS_HERE = 2  # that read a disk: more would only wait for each other

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Skipped:
    """A row of the manifest without features, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What a finished shard holds: `checksums` of each array by view, and of its `files`, which older receipts lack."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    rows: int
    skipped: list[Skipped]
    checksums: dict[str, list[str]]
    files: dict[str, str] | None = None


class Receipts:
    """The receipts of a store, in the folder of that name within it."""

    def __init__(self, store: UPath, about: StoreInfo) -> None:
        self.store, self.about = store, about
        self.summary = store / "skipped.json"
        self._kept: dict[int, Receipt] = {}  # those read so far: each holds checksums of many views

    def path(self, shard: int) -> UPath:
        """Where the receipt of a shard lies once it is done."""
        return self.store / "receipts" / f"{shard:05d}.json"

    def pending(self) -> list[int]:
        """The shards still to compute: a listing, never a scan."""
        done = list_sizes(self.store / "receipts")  # a receipt torn by a kill is empty
        return [shard for shard in range(self.about.shards) if not done.get(f"{shard:05d}.json")]

    def done(self) -> list[int]:
        """The shards that are finished."""
        return sorted(set(range(self.about.shards)).difference(self.pending()))

    def write(
        self, shard: int, skipped: dict[int, str], checksums: dict[str, list[str]], files: dict[str, str]
    ) -> None:
        """Declare a shard done."""
        reasons = [Skipped(row, reason) for row, reason in sorted(skipped.items())]
        receipt = Receipt(len(self.about.rows_of(shard)), reasons, checksums, files)
        self._kept.pop(shard, None)
        write_sealed(self.path(shard), asdict(receipt))

    def read(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard that is done; raise `UserError` for one that is not as it was written."""
        if shard in self._kept:
            return self._kept[shard]
        path, rows = self.path(shard), self.about.rows_of(shard)
        try:
            record = read_sealed(path, required=False)  # older ones have no seal
            receipt = check_record(record, Receipt, str(path)) if record else None
        except UserError:
            raise damaged(self.store, f"receipts/{path.name} is not what was written") from None
        if receipt and not all(skipped.row in rows for skipped in receipt.skipped):
            raise damaged(self.store, f"receipts/{path.name} names a row of another shard")
        if receipt:
            self._kept[shard] = receipt
        return receipt

    def read_all(self) -> Iterator[tuple[int, Receipt]]:
        """Yield the receipt of every shard that is done."""
        done = self.done()
        for shard, receipt in zip(done, in_parallel(self.store, self.read, done), strict=True):
            if receipt:
                yield shard, receipt

    def skipped(self) -> list[Skipped]:
        """Return what was left out of the shards that are done."""
        try:
            record = read_sealed(self.summary)
        except UserError:
            raise damaged(self.store, "skipped.json is not what was written") from None
        if record is not None:
            return [check_record(entry, Skipped, str(self.summary)) for entry in record["skipped"]]
        return [entry for _, receipt in self.read_all() for entry in receipt.skipped]

    def skipped_paths(self, manifest: Manifest) -> list[tuple[str, str]]:
        """Path and reason of every image without features."""
        return [(manifest.table["path"][entry.row].as_py(), entry.reason) for entry in self.skipped()]

    def valid(self) -> np.ndarray:
        """Which rows of a finished store have features, (N,) bool."""
        valid = np.ones(self.about.rows, bool)
        valid[np.array([entry.row for entry in self.skipped()], int)] = False
        return valid

    def sum_up(self) -> None:
        """Write down what was left out, once all shards are done."""
        if self.pending():
            return
        if not list_sizes(self.store).get(self.summary.name):
            write_sealed(self.summary, {"skipped": [asdict(entry) for entry in self.skipped()]})

    def discard(self, shards: Iterable[int]) -> None:
        """Declare shards undone."""
        remove_file(self.summary)  # first: from here on it may be wrong
        for shard in shards:
            self._kept.pop(shard, None)
            remove_file(self.path(shard))

    def discard_skipped(self) -> None:
        """Declare those shards undone in which images were left out."""
        self.discard([shard for shard, receipt in self.read_all() if receipt.skipped])


def in_parallel(folder: UPath, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)`, which reads or writes below a folder, in order; many wait at once for an object store."""
    with ThreadPoolExecutor(READERS if folder.protocol else READERS_HERE) as pool:
        yield from pool.map(function, items)
