"""A CSV or Parquet table of `path,label[,split,group]`: for sets whose folders do not tell the label.

Paths are relative to the table's own folder, or absolute below it; labels are names, since numbers mean something else in
every data set.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from upath import UPath

from cafe.data.expressions import parse_expression
from cafe.data.indexing import LabelledFile, Listing, parse_split
from cafe.errors import UserError

COLUMNS = ("path", "label", "split", "group")


def read_table(file: UPath) -> Listing:
    """List the faces of a table; raise `UserError` for a missing column, an empty cell or an unknown label or split."""
    table = _load(file)
    if missing := [column for column in COLUMNS[:2] if column not in table.column_names]:
        raise UserError(
            f"{file} has no column {missing[0]!r}: it needs path and label, and may have split and group "
            f"(found {', '.join(table.column_names)})."
        )
    if unknown := set(table.column_names) - set(COLUMNS):
        raise UserError(f"{file} has an unknown column {min(unknown)!r}: choose {', '.join(COLUMNS)}.")
    files = []
    for number, row in enumerate(table.to_pylist(), start=1):
        if not row["path"] or row["label"] in (None, ""):
            raise UserError(f"Row {number} of {file} has no path or no label: fill it in or remove the row.")
        path = str(row["path"]).replace("\\", "/").removeprefix(f"{file.parent.path.rstrip('/')}/").removeprefix("./")
        if path.startswith("/") or ".." in path.split("/"):
            raise UserError(f"Row {number} of {file} points outside its folder ({row['path']}): move the table up.")
        split = parse_split(str(row["split"])) if row.get("split") else ""
        files.append(LabelledFile(path, parse_expression(str(row["label"])), split, row.get("group") or None))
    return Listing(file.parent, files, f"table of {', '.join(table.column_names)}", "table")


def _load(file: UPath) -> pa.Table:
    if not file.is_file():
        raise UserError(f"{file} is not a file: give a CSV or Parquet table with the columns path and label.")
    data = pa.BufferReader(file.read_bytes())
    try:
        if file.suffix.lower() == ".parquet":
            return pa.parquet.read_table(data)
        text = {column: pa.string() for column in COLUMNS}
        return pa.csv.read_csv(data, convert_options=pa.csv.ConvertOptions(column_types=text))
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is neither a CSV nor a Parquet table: {error}".splitlines()[0]) from None
