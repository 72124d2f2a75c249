"""The rows of a manifest: their columns, what may be wrong with them, what names them, and how many of them are kept.

Up to a million rows are a table in memory. More lie in several Parquet files of one folder, and whoever needs some reads the
files that hold them: what plans needs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from cafe.data.expressions import check_classes
from cafe.errors import DamagedError, UserError
from cafe.files import OUTSIDE, find_below, list_folder, place_below, read_file, remove_file, write_file
from cafe.seals import damaged, encode_table, most_values, read_rows

SPLITS = ("train", "val", "test")
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),  # stable under moving the folder: the path below its root
        ("path", pa.string()),  # relative to the root; of a member of an archive as if that were a folder
        ("label", pa.int8()),  # index into the class set
        ("split", pa.string()),
        ("group", pa.string()),  # identity, film or session that must not be split; may be null
        ("width", pa.int32()),  # of the face: of its box when it has one
        ("height", pa.int32()),
        ("digest", pa.string()),  # SHA-256 of the file, or of the member
        ("box", pa.list_(pa.int32())),  # left, top, width, height of the face in its picture; null: all of it
        ("votes", pa.list_(pa.int32())),  # how many people chose each class, in their order; null: not known
        ("span", pa.list_(pa.int64())),  # where in its archive it lies (`packed.archives`); null: a file by itself
    ]
)
YOUNGER = ("votes", "span")  # columns that older files lack
REQUIRED = ("sample_id", "path", "label", "split", "width", "height", "digest")
LIST = pa.schema(  # of the files of a large manifest, in the order of their rows
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("digest", pa.string()),  # SHA-256 of the file
        ("empty", pa.list_(pa.string())),  # the columns that are null in every row
    ]
)
LARGE = 2**20  # rows; a manifest of more lies in several files
ROWS_A_FILE = 2**16
ROWS_AT_ONCE = 2**14  # that become values of Python
KEPT = 2  # files of rows that stay in memory: shards are smaller, and neighbours are asked for together
REMEDY = "write it again with `cafe data index`"

Columns = tuple[str, ...]


@dataclass(frozen=True)
class RowFile:
    """One of the files of a large manifest, as its list (`LIST`) names it."""

    file: str
    rows: int
    digest: str
    empty: Columns


@dataclass(frozen=True)
class RowFiles:
    """The rows of a large manifest, or those from `start` to `stop`, in files that are read when they are asked for.

    It answers as a `pa.Table` does: a column that is asked for as a whole stays in memory, and a slice reads nothing yet.
    Every file is checked against its checksum and for faults; raises `UserError` for one that is not what was written.
    """

    folder: UPath
    files: tuple[RowFile, ...]
    classes: tuple[str, ...]
    start: int
    stop: int
    kept: Columns = ()  # further columns of text
    _columns: dict[str, pa.ChunkedArray] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, manifest: UPath, files: Sequence[RowFile], classes: tuple[str, ...], kept: Columns = ()) -> RowFiles:
        """Return all rows of the files of a manifest."""
        return cls(find_folder(manifest), tuple(files), classes, 0, sum(file.rows for file in files), kept)

    @classmethod
    def listed(cls, table: pa.Table, manifest: UPath, classes: tuple[str, ...], kept: Columns) -> RowFiles:
        """Return all rows of the files that a manifest lists; raises as pyarrow does for what is no such list."""
        entries = table.select(LIST.names).cast(LIST).to_pylist()
        files = [RowFile(**{**entry, "empty": tuple(entry["empty"])}) for entry in entries]
        return cls.of(manifest, files, classes, kept)

    def write_list(self) -> pa.Table:
        """Return the list of the files, as `listed` reads it."""
        return pa.Table.from_pylist([vars(file) for file in self.files], schema=LIST)

    def __getstate__(self) -> dict[str, Any]:
        """To other processes goes the list of files, and none of what was read."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"_columns": {}}

    @property
    def paths(self) -> list[UPath]:
        """Where the files lie, or should."""
        return [find_below(self.folder, file.file) for file in self.files]

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.stop - self.start

    def __len__(self) -> int:
        return self.num_rows

    @property
    def column_names(self) -> list[str]:
        """The columns, in their order."""
        return [*SCHEMA.names, *self.kept]

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        """Return a whole column."""
        if column not in self._columns:
            self._columns[column] = self.read((column,))[column]
        return self._columns[column]

    def slice(self, offset: int, length: int | None = None) -> RowFiles:
        """Return some of these rows, without reading any."""
        start = min(self.start + offset, self.stop)
        stop = self.stop if length is None else min(start + length, self.stop)
        return replace(self, start=start, stop=stop, _columns={})

    def read(self, columns: Columns | None = None) -> pa.Table:
        """Return the rows, or some columns of them, in memory."""
        empty = self._schema().empty_table()
        return pa.concat_tables([empty.select(columns or self.column_names), *self.pieces(columns)])

    def _schema(self) -> pa.Schema:
        return pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in self.kept)])

    def pieces(self, columns: Columns | None = None) -> Iterator[pa.Table]:
        """Yield the rows, or some columns of them, file by file."""
        first = 0
        for number, file in enumerate(self.files):
            start, stop = max(self.start - first, 0), min(self.stop - first, file.rows)
            if start < stop:
                yield self._read(number, columns).slice(start, stop - start)
            first += file.rows

    def take(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """Return some of these rows, in the order given, in memory."""
        wanted = np.asarray(rows, np.int64)
        order, found, first = np.argsort(wanted, kind="stable"), [self._schema().empty_table()], -self.start
        ordered = wanted[order]
        for number, file in enumerate(self.files):
            own = ordered[slice(*np.searchsorted(ordered, (first, first + file.rows)))]
            if len(own):
                found.append(self._read(number).take(own - first))
            first += file.rows
        return pa.concat_tables(found).take(np.argsort(order, kind="stable"))

    def _read(self, number: int, columns: Columns | None = None) -> pa.Table:
        file = self.files[number]
        return _read_file(self.folder, file, self.classes, columns or tuple(self.column_names))


@lru_cache(KEPT)
def _read_file(folder: UPath, file: RowFile, classes: tuple[str, ...], columns: Columns) -> pa.Table:
    """Return some columns of the rows of a file; raise `UserError` where it is not the one that was listed."""
    path = find_below(folder, file.file)
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise DamagedError(
            f"{path} is missing, which holds rows of a manifest: where that was written anew meanwhile, give the command "
            f"again, else {REMEDY}."
        ) from None
    if hashlib.sha256(content).hexdigest() != file.digest:
        raise damaged(path, REMEDY)
    table = read_rows(pq.ParquetFile(pa.BufferReader(content)), path, most_values(content), list(columns))
    table = table.select(columns).replace_schema_metadata(None)
    if fault := find_fault(table, classes) or ("another number of rows" if len(table) != file.rows else ""):
        raise UserError(f"{path} holds damaged rows of a manifest ({fault}): {REMEDY}.")
    return table


def find_folder(manifest: UPath) -> UPath:
    """Return the folder of the files that hold the rows of a manifest: `NAME.rows` beside `NAME.parquet`."""
    return manifest.with_suffix(".rows")


def write_files(manifest: UPath, tables: Iterable[pa.Table], classes: tuple[str, ...]) -> RowFiles:
    """Write the rows of a manifest, which come sorted by sample_id, to files beside it.

    Files are named by what they hold, so that those of the manifest before, if there is one, stay until `keep_files`.
    Raises `UserError` for a sample that is listed twice, and for others that are not sorted.
    """
    written, last, kept = list[RowFile](), pa.array([], pa.string()), Columns()
    for number, table in enumerate(_cut(tables, ROWS_A_FILE)):
        ids = pa.concat_arrays([last, *table["sample_id"].chunks])
        if pc.any(equal := pc.equal(ids[:-1], ids[1:])).as_py():
            raise UserError(f"{ids[1:].filter(equal)[0]} is listed more than once: keep one row of each sample.")
        if not pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py():
            raise UserError(f"The rows of {manifest} do not come in the order of their sample_id: sort them.")
        last, kept = ids[-1:], tuple(table.column_names[len(SCHEMA) :])
        content = encode_table(table.combine_chunks())  # the same bytes in whatever pieces it came
        digest = hashlib.sha256(content).hexdigest()
        empty = tuple(name for name in table.column_names if is_empty(table, name))
        file = RowFile(f"{number:05d}-{digest[:16]}.parquet", len(table), digest, empty)
        write_file(place_below(find_folder(manifest), file.file), content)
        written.append(file)
    return RowFiles.of(manifest, written, classes, kept)


def keep_files(manifest: UPath, files: Iterable[RowFile]) -> None:
    """Remove all files beside a manifest but some."""
    kept = {file.file for file in files}
    for path in list_folder(find_folder(manifest)):
        if path.name not in kept:
            remove_file(path)


def _cut(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yield the rows of some tables in tables of one size, the last of which may be smaller."""
    waiting: pa.Table | None = None
    for table in tables:
        table = table.replace_schema_metadata(None)
        waiting = pa.concat_tables([waiting, table]) if waiting else table
        while len(waiting) >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting:
        yield waiting


def complete_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a manifest's file, with the columns that older files lack."""
    for name in YOUNGER:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    own = table.schema
    kept = [one.name for one in own if pa.types.is_string(one.type) and one.name not in SCHEMA.names]
    schema = pa.schema([*SCHEMA, *(pa.field(column, pa.string()) for column in kept)])
    return table.select(schema.names).cast(schema)


def read_pieces(rows: pa.Table | RowFiles, columns: Columns) -> Iterator[pa.Table]:
    """Yield some columns of rows, a few of them at a time."""
    for piece in rows.pieces(columns) if isinstance(rows, RowFiles) else [rows.select(columns)]:
        for start in range(0, len(piece), ROWS_AT_ONCE):
            yield piece.slice(start, ROWS_AT_ONCE)


def read_values(rows: pa.Table | RowFiles, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield of each row the values of some columns; a few rows are in memory at a time."""
    for piece in read_pieces(rows, columns):
        yield from zip(*(piece[name].to_pylist() for name in columns), strict=True)


def is_empty(rows: pa.Table | RowFiles, column: str) -> bool:
    """Whether a column is null in every row; of a large manifest the list of files mostly says so."""
    if isinstance(rows, RowFiles):
        listed = all(column in file.empty for file in rows.files)
        return listed or all(piece[column].null_count == len(piece) for piece in rows.pieces((column,)))
    return bool(rows[column].null_count == len(rows))


def digest_rows(
    rows: pa.Table | RowFiles,
    *several: Columns,
    change: Callable[[str, pa.ChunkedArray], pa.Array] = lambda column, values: values,
) -> list[str]:
    """Hash some columns, for each of `several` choices of them; `change(column, values)` puts other values in their place.

    Only columns that say something count: one that is empty in every row changes nothing, so that new ones can be added. In
    however many files the rows lie, they have one digest, and a few of them are in memory at a time.
    """
    digests = [hashlib.sha256() for _ in several]
    for column in dict.fromkeys(name for columns in several for name in columns):
        if is_empty(rows, column):
            continue
        own = [digest for digest, columns in zip(digests, several, strict=True) if column in columns]
        text, comma = f"[{json.dumps(column)}, [", ""
        for piece in read_pieces(rows, (column,)):  # a list of all rows would take gigabytes
            text += comma + json.dumps(change(column, piece[column]).to_pylist())[1:-1]
            for digest in own:
                digest.update(text.encode())
            text, comma = "", ", "
        for digest in own:
            digest.update(f"{text}]]".encode())
    return [digest.hexdigest() for digest in digests]


def find_fault(table: pa.Table, classes: tuple[str, ...]) -> str:
    """Return what is wrong with the classes and rows of a manifest's file, or some columns of them; empty for nothing."""
    try:
        check_classes(classes)
    except UserError as error:
        return str(error).rstrip(".")
    there = set(table.column_names)
    if empty := [name for name in REQUIRED if name in there and table[name].null_count]:
        return f"empty cells in {empty[0]!r}"
    faults = (check(table[name], len(classes)) for name, check in CHECKS.items() if name in there)
    return next(filter(None, faults), "")


def _check_digests(digests: pa.ChunkedArray, classes: int) -> str:
    empty = pc.any(pc.equal(pc.utf8_trim_whitespace(digests), "")).as_py()  # replaced pictures would not be noticed
    return "a face without the SHA-256 of its file in 'digest'" if empty else ""


def _check_paths(paths: pa.ChunkedArray, classes: int) -> str:
    outside = pc.any(pc.match_substring_regex(paths, OUTSIDE.pattern)).as_py()
    return "a path that leads out of its root" if outside else ""


def _check_votes(votes: pa.ChunkedArray, classes: int) -> str:
    if not pc.all(pc.equal(pc.list_value_length(votes), classes), min_count=0).as_py():
        return "votes for another number of classes"
    return "fewer than no votes" if pc.any(pc.less(pc.list_flatten(votes), 0)).as_py() else ""


def _check_boxes(boxes: pa.ChunkedArray, classes: int) -> str:
    whole = pc.list_flatten(boxes).null_count == 0
    four = pc.all(pc.equal(pc.list_value_length(boxes), 4)).as_py()  # nothing where there are none
    return "" if whole and four is not False else "a box that is not left, top, width and height"


def _check_spans(spans: pa.ChunkedArray, classes: int) -> str:
    numbers = pc.list_flatten(spans)
    if numbers.null_count or not pc.all(pc.is_in(pc.list_value_length(spans), pa.array([2, 3, None]))).as_py():
        return "a place in an archive that is not two or three numbers"
    return "a place in an archive before its beginning" if pc.any(pc.less(numbers, 0)).as_py() else ""


def _check_samples(samples: pa.ChunkedArray, classes: int) -> str:
    return "a sample listed twice" if pc.count_distinct(samples).as_py() < len(samples) else ""


def _check_splits(splits: pa.ChunkedArray, classes: int) -> str:
    return "" if pc.all(pc.is_in(splits, pa.array(SPLITS))).as_py() else "an unknown split"


def _check_labels(labels: pa.ChunkedArray, classes: int) -> str:
    return "" if pc.all(pc.is_in(labels, pa.array(range(classes), pa.int8()))).as_py() else "an unknown label"


CHECKS = {  # of a column, in the order in which faults are named
    "digest": _check_digests,
    "path": _check_paths,
    "votes": _check_votes,
    "box": _check_boxes,
    "span": _check_spans,
    "sample_id": _check_samples,
    "split": _check_splits,
    "label": _check_labels,
}
