"""What says what a feature store is and that it is whole: its description, its receipts, and the checksums of both.

All of it is small files, read without opening the arrays. Each shard has a receipt, written after everything else of it.
What was left out of the whole store is summed up in `skipped.json` once all shards are done, so that nobody has to read
every receipt to find out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.errors import UserError
from cafe.files import exists, list_folder, list_sizes, place_below, read_file, read_json, remove_file
from cafe.pipeline.features.key import StoreInfo, store_name
from cafe.records import FORMAT, check_record, digest
from cafe.seals import read_sealed, write_sealed

ABOUT, GROUP = "about.json", "store.zarr/zarr.json"  # both say what the store is
CHECKSUMS = "checksums.json"  # of these and of all other files that belong to no shard
CHANGED, MISSING = "is not what was written", "is missing"
TOO_LARGE = re.compile(r"pixels are more than ([\d,]+)$")  # why a picture was left out
READERS = 16  # threads that wait for an object store
READERS_HERE = 2  # that read a disk: more would only wait for each other

Item = TypeVar("Item")
Result = TypeVar("Result")


def find_stores(features: UPath, manifest: str) -> list[tuple[UPath, StoreInfo]]:
    """Return the stores of a manifest and what they hold, without opening them; raise `UserError` for a damaged one."""
    found = [(path, read_info(path)) for path in list_folder(place_below(features, manifest))]
    return [(path, info) for path, info in found if info]


def read_info(store: UPath) -> StoreInfo | None:
    """Return what a store is, or None where none was made yet; raise `UserError` where nothing says so."""
    path = store / ABOUT
    record = read_json(path)
    if record is None:
        if list_sizes(store).get(ABOUT):
            raise damaged(store, f"{ABOUT} is no record")
        return None
    try:
        info = StoreInfo.from_record(record, str(path))
    except UserError as error:
        raise damaged(store, str(error).rstrip(".")) from None
    if info.version == FORMAT and info.folder != store.name:
        raise damaged(store, f"{ABOUT} is that of {info.folder}")
    return info


def damaged(store: UPath, problem: str) -> UserError:
    """Return the error for a store that is not as it was written."""
    return UserError(f"The features in {store} are damaged ({problem}): run `cafe store repair {store_name(store)}`.")


def read_checksums(store: UPath) -> dict[str, str]:
    """Return the SHA-256 of each file that belongs to no shard, nothing for an older store; raise `UserError`."""
    return dict(_read_description(store).get("files", {}))


def read_described(store: UPath) -> list[str] | None:
    """Return the `labelling` of the large manifest that a store's samples and labels are of, None where nothing says it."""
    return _read_description(store).get("manifest")


def _read_description(store: UPath) -> dict[str, Any]:
    try:
        return read_sealed(store / CHECKSUMS) or {}
    except UserError:
        raise damaged(store, f"{CHECKSUMS} is not what was written") from None


def changed_files(store: UPath, checksums: dict[str, str]) -> list[str]:
    """Return those of some files that are missing or not what was written."""
    return [file for file, wanted in checksums.items() if _read_digest(place_below(store, file)) != wanted]


def check_description(store: UPath) -> None:
    """Raise `UserError` where a file that describes the arrays is not what was written, which no shard's checksum shows."""
    described = {file: wanted for file, wanted in read_checksums(store).items() if file.endswith(".json")}
    if changed := changed_files(store, described):
        raise damaged(store, f"{changed[0]} is not what was written")


def recover_info(store: UPath) -> StoreInfo:
    """Return what a store is from either of the two files that say so; raise `UserError` where neither can be trusted."""
    try:
        checksums = read_checksums(store)
    except UserError:
        checksums = {}
    found = {file: info for file in (ABOUT, GROUP) if (info := _read_copy(store, file))}
    if checksums:
        found = {file: info for file, info in found.items() if _read_digest(store / file) == checksums.get(file)}
    agreed = list(found.values())
    if not agreed or agreed[0] != agreed[-1]:
        raise UserError(
            f"No file in {store} says reliably what it holds: remove it with `cafe store rm {store_name(store)}`, then run "
            "`cafe extract` again."
        )
    return agreed[0]


def _read_copy(store: UPath, file: str) -> StoreInfo | None:
    record = read_json(store / file) or {}
    try:
        info = StoreInfo.from_record(record.get("attributes", {}) if file == GROUP else record, file)
    except UserError:
        return None
    return info if info.folder == store.name else None


def _read_digest(path: UPath) -> str:
    try:
        return digest(read_file(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


@dataclass(frozen=True)
class Skipped:
    """A row of the manifest without features, and why."""

    row: int
    reason: str

    @property
    def limit(self) -> int | None:
        """The largest number of pixels allowed, where the picture was left out for having more."""
        found = TOO_LARGE.search(self.reason)
        return int(found[1].replace(",", "")) if found else None


@dataclass(frozen=True)
class Receipt:
    """What a finished shard holds: `checksums` of each array by view, and of its `files`, which older receipts lack."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    rows: int
    skipped: list[Skipped]
    checksums: dict[str, list[str]]
    files: dict[str, str] | None = None


class Receipts:
    """The receipts of a store, in the folder of that name within it; listed to plan, read to check."""

    def __init__(self, store: UPath, info: StoreInfo) -> None:
        self.store, self.info = store, info
        self.summary = store / "skipped.json"
        self._kept: dict[int, Receipt] = {}  # those read so far: each holds checksums of many views

    def path(self, shard: int) -> UPath:
        """Where the receipt of a shard lies once it is done."""
        return self.store / "receipts" / f"{shard:05d}.json"

    def pending(self) -> list[int]:
        """The shards still to compute: a listing, never a scan."""
        done = list_sizes(self.store / "receipts")  # a receipt torn by a kill is empty
        return [shard for shard in range(self.info.shards) if not done.get(f"{shard:05d}.json")]

    def done(self) -> list[int]:
        """The shards that are finished."""
        return sorted(set(range(self.info.shards)).difference(self.pending()))

    def write(
        self, shard: int, skipped: dict[int, str], checksums: dict[str, list[str]], files: dict[str, str]
    ) -> None:
        """Declare a shard done."""
        reasons = [Skipped(row, reason) for row, reason in sorted(skipped.items())]
        receipt = Receipt(len(self.info.rows_of(shard)), reasons, checksums, files)
        self._kept.pop(shard, None)
        write_sealed(self.path(shard), asdict(receipt))

    def read(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard that is done; raise `UserError` for one that is not as it was written."""
        if shard not in self._kept and (receipt := self._read(shard)):
            self._kept[shard] = receipt
        return self._kept.get(shard)

    def _read(self, shard: int) -> Receipt | None:
        path, rows = self.path(shard), self.info.rows_of(shard)
        try:
            record = read_sealed(path, "canonical")  # older ones have no seal
            receipt = check_record(record, Receipt, str(path)) if record else None
        except UserError:
            raise damaged(self.store, f"receipts/{path.name} is not what was written") from None
        if receipt and not all(skipped.row in rows for skipped in receipt.skipped):
            raise damaged(self.store, f"receipts/{path.name} names a row of another shard")
        return receipt

    def read_all(self) -> Iterator[tuple[int, Receipt]]:
        """Yield the receipt of every shard that is done; none is kept, as there are many."""
        done = self.done()
        for shard, receipt in zip(done, in_parallel(self.store, self._read, done), strict=True):
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
        skipped = self.skipped()
        paths = manifest.table.take(np.array([entry.row for entry in skipped], int))["path"].to_pylist()
        return [(path, entry.reason) for path, entry in zip(paths, skipped, strict=True)]

    def valid(self) -> np.ndarray:
        """Which rows of a finished store have features, (N,) bool."""
        valid = np.ones(self.info.rows, bool)
        valid[np.array([entry.row for entry in self.skipped()], int)] = False
        return valid

    def unreadable(self) -> set[int]:
        """Return the rows whose picture nothing can read, whatever this store's own limit to the pixels is."""
        return {entry.row for entry in self.skipped() if entry.limit is None}

    def outdated(self) -> list[int]:
        """Return the shards that an earlier version made with another limit to the pixels than the key says."""
        limit, step = self.info.key.max_megapixels * 1_000_000, self.info.shard_rows
        return sorted({entry.row // step for entry in self.skipped() if entry.limit not in (None, limit)})

    def is_summed_up(self) -> bool:
        """Whether it is written down what was left out."""
        return bool(list_sizes(self.store).get(self.summary.name))

    def sum_up(self) -> None:
        """Write down what was left out, all shards being done."""
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


@dataclass(frozen=True)
class Damage:
    """A file of a store, by its place in the folder, that is not as it was written, and the shard it belongs to."""

    file: str
    problem: str
    shard: int | None = None


Matches = Callable[[StoreInfo, int, Receipt], bool]


def find_damage(store: UPath, matches: Matches, progress: Callable[[int, int], None]) -> list[Damage]:
    """Read every file of a store and return what is not as it was written; `progress` counts shards.

    `matches` compares what the arrays hold of a shard with its receipt, where that is too old to have checksums.
    """
    damages = [Damage(file, CHANGED) for file in _changed_description(store)]
    try:
        info = recover_info(store)
    except UserError:
        return damages or [Damage(ABOUT, CHANGED)]
    receipts = Receipts(store, info)
    done = receipts.done()
    if receipts.is_summed_up():  # all shards were done
        damages += [Damage(f"receipts/{receipts.path(shard).name}", MISSING, shard) for shard in receipts.pending()]
        try:
            receipts.skipped()
        except UserError:
            damages.append(Damage(receipts.summary.name, CHANGED))
    for count, found in enumerate(in_parallel(store, partial(_check_shard, receipts, matches), done), start=1):
        damages += found
        progress(count, len(done))
    return damages


def _changed_description(store: UPath) -> list[str]:
    try:
        return changed_files(store, read_checksums(store))
    except UserError:
        return [CHECKSUMS]


def _check_shard(receipts: Receipts, matches: Matches, shard: int) -> list[Damage]:
    name = f"receipts/{receipts.path(shard).name}"
    try:
        receipt = receipts.read(shard)
    except UserError:
        return [Damage(name, CHANGED, shard)]
    if receipt is None:
        return [Damage(name, MISSING, shard)]
    files = receipts.info.objects(shard).values()
    if receipt.files is None:  # of an older version: what the files hold is compared
        return [] if matches(receipts.info, shard, receipt) else [Damage(file, CHANGED, shard) for file in files]
    if shard == 0 and not exists(receipts.store / CHECKSUMS):  # of an older version there is none
        return [Damage(CHECKSUMS, MISSING)]
    wanted = {file: receipt.files.get(file, "") for file in files}
    return [Damage(file, CHANGED, shard) for file in changed_files(receipts.store, wanted)]
