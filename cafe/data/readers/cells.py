"""Columns and cells of a table as people have it: CSV of any dialect and encoding, JSON lines or Parquet.

What the columns mean is the affair of `cafe.data.readers.table`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import pyarrow as pa
import pyarrow.parquet
from upath import UPath

from cafe.data.labels import READ_AT_ONCE, find_encoding
from cafe.data.packed.archives import MemberError, open_content
from cafe.errors import StorageError, UserError, quote
from cafe.seals import MOST_BYTES, iterate_rows
from cafe.spool import Spool

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
DELIMITERS = ",;\t|"
NULLS = frozenset({"", "NaN", "nan", "null", "NULL", "None", "<NA>"})  # as programs write an empty cell; not `NA`
LONGEST_CELL = 2**24  # characters


@dataclass(frozen=True)
class Cells:
    """A table: the names of its `columns` as they stand, some of them perhaps the same, and its `rows`, cells by place."""

    columns: list[str]
    rows: Sequence[Sequence[object]]

    @classmethod
    def load(cls, file: UPath) -> Cells:
        """Read a table; raise `UserError` naming the row that cannot be read."""
        try:
            with open_content(file) as data:
                if file.suffix.lower() == ".parquet" or data.read(4) == b"PAR1":
                    return _read_parquet(data, file)
                data.seek(0)
                encoding, errors = find_encoding(data)
                with io.TextIOWrapper(data, encoding, errors, newline="") as text:
                    if any("\0" in some for some in iter(partial(text.read, READ_AT_ONCE), "")):
                        raise _refuse(file, "it holds zero bytes")
                    text.seek(0)
                    if file.suffix.lower() in (".jsonl", ".ndjson"):
                        return _read_json(text, file)
                    lines = _read_csv(text, file)
                    return cls(next(lines, []), Spool(lines))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(
                f"{file} is not a file: give a CSV or Parquet table with the columns path and label."
            ) from None
        except MemberError as error:
            raise _refuse(file, str(error)) from None


def as_text(cell: object) -> str | None:
    """Return what a cell says, None where it is empty; a whole number is written as one, whatever its type."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    text = str(cell).strip()
    return None if text in NULLS else text


def _refuse(file: UPath, reason: str) -> UserError:
    return UserError(f"{file} is neither a CSV nor a Parquet table ({reason}): write it again.")


def _read_parquet(data: IO[bytes], file: UPath) -> Cells:
    try:
        parquet, rows = pa.parquet.ParquetFile(data), Spool[Sequence[object]]()
        for batch in iterate_rows(parquet, file, MOST_BYTES):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                rows.append(row)
        return Cells(parquet.schema_arrow.names, rows)
    except StorageError:  # it is no fault of the table
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _refuse(file, quote(error)) from None


def _read_csv(text: IO[str], file: UPath) -> Iterator[list[str]]:
    """Yield the columns, and then rows of as many cells; raise `UserError` for a row of another number of cells."""
    named = re.match(r"sep=(.)\r?\n", text.readline())  # as spreadsheets begin their files
    if not named:
        text.seek(0)
    delimiter = named[1] if named else _find_delimiter(text)
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    width, number = 0, 0
    try:
        for line in lines:
            cells = [cell.strip() for cell in line]
            if not any(cells):
                continue
            width = width or len(cells)
            if len(cells) > width and not any(cells[width:]):
                cells = cells[:width]  # a delimiter at the end of a line
            if len(cells) != width:
                raise _refuse(file, f"row {number} has {len(cells)} cells, its header {width}")
            yield cells
            number += 1
    except csv.Error as error:
        raise _refuse(file, f"line {lines.line_num}: {quote(error)}") from None


def _split_lines(text: IO[str]) -> Iterator[str]:
    """Yield the lines of a text as `str.splitlines` has them."""
    return (line for some in text for line in some.splitlines())


def _find_delimiter(text: IO[str]) -> str:
    """Return what parts the cells of the header, which makes most of it, and go back to the beginning."""
    header = next((line for line in _split_lines(text) if line.strip()), "")
    text.seek(0)
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _read_json(text: IO[str], file: UPath) -> Cells:
    """Read an object a line; cells that a line lacks are empty."""
    records = Spool[dict[str, object]]()
    for number, line in enumerate(_split_lines(text), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"Line {number} of {file} is no JSON object: write one a line, such as "
                            '{"file_name": "1.jpg", "label": "happiness"}.')  # fmt: skip
        records.append(record)
    columns = list(dict.fromkeys(column for record in records for column in record))
    return Cells(columns, Spool([record.get(column) for column in columns] for record in records))
