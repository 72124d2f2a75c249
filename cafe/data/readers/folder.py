"""Sets of your own: a folder for each expression, a table of paths and labels, or a domain drawn by `cafe data synth`."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from upath import UPath

from cafe.data.expressions import ALIASES, EIGHT, normalise_name, spell_name
from cafe.data.indexing import LabelledFile, Listing
from cafe.data.layouts import SPLIT_NAMES, Tree, merge_repeated
from cafe.data.manifest import SPLITS
from cafe.errors import UserError, quote, unknown
from cafe.files import read_file, retry
from cafe.seals import MOST_BYTES, read_rows

COLUMNS = ("path", "label", "split", "group")
MOST_VOTES = 2**31  # as the manifest counts them


def read_folder(root: UPath) -> Listing:
    """List ROOT/EXPRESSION/**/*.jpg, or ROOT/SPLIT/EXPRESSION/**/*.jpg when the set comes split.

    Raises `UserError` when `root` is no folder.
    """
    tree = Tree.open(root)
    found = tree.start("folder", "EXPRESSION/image", ())
    for path in tree.images:
        first, *others = path.split("/")
        split = SPLIT_NAMES.get(first.lower(), "")
        if others:
            found.add(path, others[0] if split else first, split)
    if any(file.split for file in found.files):
        found.layout = "SPLIT/EXPRESSION/image"
    found.ignored = len(tree.files) - len(found.files)
    return found


def read_synthetic(root: UPath) -> Listing:
    """List a drawn domain; every face belongs to the group of its identity, `id0007` of `id0007_01.jpg`."""
    found = read_folder(root)
    found.kind = "synthetic"
    found.group_by_name()
    return found


def read_table(file: UPath, root: UPath | None = None) -> Listing:
    """List the faces of a CSV or Parquet table of path,label[,split,group]; labels are names of classes.

    Other columns are named after classes and say how many people chose each.

    Paths are absolute, or relative to `root`, by default the folder of the table. Without a `root`, absolute paths make the
    deepest folder that holds all pictures the root. A face listed twice with equal cells counts once. Raises `UserError` for
    a missing column, an empty cell, an unknown split, a path that leads out of the root, and for faces that are
    listed with different cells, all of them named.
    """
    columns, cells = _load(file)
    _check_repeated(columns, file)
    if missing := [column for column in COLUMNS[:2] if column not in columns]:
        raise UserError(
            f"{file} has no column {missing[0]!r}: it needs path and label, and may have split and group "
            f"(found {', '.join(columns)})."
        )
    classes = {spell_name(str(row["label"])) for row in cells} | {*EIGHT}
    chosen = [column for column in columns if column not in COLUMNS and spell_name(column) in classes]
    if other := set(columns) - {*COLUMNS, *chosen}:
        raise UserError(
            f"{file} has an unknown column {min(other)!r}: choose {', '.join(COLUMNS)}, or name it after a class to say how "
            "many people chose that."
        )
    rows = [_read_row(row, f"Row {number} of {file}", chosen) for number, row in enumerate(cells, start=1)]
    root, rows = _place(rows, file, root)
    found = Listing(root, "table", f"table of {', '.join(columns)}")
    cells_of = [(row.path, replace(row, expression=spell_name(row.expression))) for row in rows]
    numbered = [(path, row, f"row {n}") for n, (path, row) in enumerate(cells_of, start=1)]
    kept, found.repeated = merge_repeated(numbered, file)
    found.files = [rows[position] for position in sorted(kept)]
    return found


def _check_repeated(columns: list[str], file: UPath) -> None:
    """Raise `UserError` for two columns of one name, or of two spellings of a class: one of them would count, or both."""
    first: dict[str, str] = {}
    for column in columns:
        name = ALIASES.get(normalise_name(column), normalise_name(column))
        if name in first:
            raise UserError(
                f"{file} has the column {column!r} besides {first[name]!r}, which means the same: keep one of them."
            )
        first[name] = column


def _load(file: UPath) -> tuple[list[str], list[dict[str, object]]]:
    """Return the columns and the rows of a table."""
    if not retry(file, "read", file.is_file):
        raise UserError(f"{file} is not a file: give a CSV or Parquet table with the columns path and label.")
    data = pa.BufferReader(read_file(file))
    try:
        if file.suffix.lower() == ".parquet":
            table = read_rows(pa.parquet.ParquetFile(data), file, MOST_BYTES)
        else:
            text = pa.csv.ConvertOptions(column_types={column: pa.string() for column in COLUMNS})
            table = pa.csv.read_csv(data, convert_options=text)
        return table.column_names, table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is neither a CSV nor a Parquet table ({quote(error)}): write it again.") from None


def _read_row(row: dict[str, object], where: str, classes: Sequence[str]) -> LabelledFile:
    if row["path"] in (None, "") or row["label"] in (None, ""):
        raise UserError(f"{where} has no path or no label: fill it in or remove the row.")
    path = str(row["path"]).replace("\\", "/")
    if ".." in path.split("/"):
        raise UserError(f"{where} has the path {row['path']!r}: write it without '..', absolute or relative to --root.")
    split = SPLIT_NAMES.get(str(row.get("split") or "").strip().lower(), "")
    if row.get("split") and not split:
        raise unknown("split", row["split"], SPLITS)
    group = str(row["group"]) if row.get("group") else None
    votes = {name: _read_count(row[name], f"{where} has for {name!r}") for name in classes}
    return LabelledFile(path, str(row["label"]), split, group, votes=votes)


def _read_count(cell: object, what: str) -> int:
    """Return how many people chose a class; an empty cell says nobody."""
    if cell is None:
        return 0
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not 0 <= cell < MOST_VOTES or cell != int(cell):
        raise UserError(f"{what} {cell!r}: write how many people chose it, a whole number from 0.")
    return int(cell)


def _place(rows: list[LabelledFile], file: UPath, root: UPath | None) -> tuple[UPath, list[LabelledFile]]:
    """Return the root of the pictures and the rows with their paths below it."""
    base = root or file.parent
    paths = [PurePosixPath(base.path, row.path) for row in rows]  # an absolute path stays as it is
    outside = [path for path in paths if not path.is_relative_to(base.path)]
    if outside and root is None:
        folder = posixpath.commonpath([str(path.parent) for path in paths])
        base = UPath(folder, protocol=base.protocol, **base.storage_options)
    elif outside:
        raise UserError(
            f"{file} lists {outside[0]}, which is not in {base}: give a --root that holds all its pictures."
        )
    inside = [str(path.relative_to(base.path)) for path in paths]
    return base, [replace(row, path=path) for row, path in zip(rows, inside, strict=True)]
