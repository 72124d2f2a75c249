"""Frames and their predictions as rows of plain values, and the five forms in which these are written as they come.

One row per face; a photo or frame without any has one row whose `error` says why.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from textwrap import wrap
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cafe.errors import printable, shorten
from cafe.files import is_encoded
from cafe.inference.recognition import PredictedFrame
from cafe.outputs import Own, begins

# The columns before the probabilities of the classes, and behind them.
BEFORE = (
    ("file", pa.string()),
    ("frame", pa.int32()),  # of a video, an animation or a file of several pages, from 0; null for a photo
    ("time", pa.float64()),  # of a video or an animation, seconds from its beginning; null for a photo and a page
    ("face", pa.int32()),  # in its frame, from 0, the largest first; null where there is none
    *((name, pa.int32()) for name in ("left", "top", "width", "height")),  # of its box, pixels of the frame
    ("confidence", pa.float32()),  # of the detector; null for faces that were aligned already
    ("expression", pa.string()),  # the most probable class
)
AFTER = (
    ("unsure", pa.bool_()),  # whether the expression is doubtful by its probability; null where no threshold is known
    *((name, pa.bool_()) for name in ("small", "blurred", "turned")),  # turned: null where no landmarks are known
    ("error", pa.string()),  # why a frame has no face; null where it has
)
DIGITS = 6  # of a probability, where it is text
# Of a line of aligned columns; the last is the file's.
CELLS = ("{:<10} {:>4}", "  {:<13}", " {:<13}", " {:>19}", "  {}")
TABLE_HEADER = "".join(CELLS).format("expression", "", "next", "doubts", "box", "file") + "\n"
LEAST_NAME, INDENT = 14, "    "  # of a file's name on a terminal, and before what stands below the line it belongs to

Row = dict[str, Any]
Write = Callable[[list[Row]], None]


def name_columns(classes: Sequence[str]) -> dict[str, str]:
    """Return the column of every class's probability: its name, behind `class_` where another column has that name."""
    columns: dict[str, str] = {}
    for name in classes:
        column = name
        while column in (*dict(BEFORE), *dict(AFTER), *columns.values()):
            column = f"class_{column}"
        columns[name] = column
    return columns


def build_schema(classes: Sequence[str]) -> pa.Schema:
    """Return the columns of the rows of a model with these classes."""
    return pa.schema([*BEFORE, *((column, pa.float32()) for column in name_columns(classes).values()), *AFTER])


def list_rows(predicted: PredictedFrame, classes: Sequence[str]) -> list[Row]:
    """Return a row of every column of the schema for each face of a frame, or one that says why there is none."""
    frame, columns = predicted.frame, name_columns(classes).values()
    nothing = dict.fromkeys(build_schema(classes).names)
    place = {**nothing, "file": str(frame.file), "frame": frame.number, "time": frame.time}
    if not predicted.faces:
        return [{**place, "error": predicted.error}]
    return [
        {
            **place,
            "face": number,
            **dict(zip(("left", "top", "width", "height"), face.box, strict=True)),
            "confidence": face.confidence,
            "expression": face.expression,
            **dict(zip(columns, map(float, face.probabilities), strict=True)),
            "unsure": face.unsure,
            **{name: getattr(face.quality, name) for name in ("small", "blurred", "turned")},
        }
        for number, face in enumerate(predicted.faces)
    ]


@contextmanager
def write_table(file: IO[bytes], classes: Sequence[str], width: int | None = None) -> Iterator[Write]:
    """Write aligned columns to be read on a terminal; the file stands last, so that any name fits.

    With a `width`, no line has more columns of a terminal: what has no room stands below, long paths are shortened.
    """
    columns = name_columns(classes)

    def put(cells: Sequence[str], name: str, time: str = "", error: str = "") -> None:
        if width is None:
            _put(file, "".join((*cells, CELLS[-1].format(f"{name}{time}: {error}" if error else name + time), "\n")))
        else:
            _put(file, "".join(f"{line.rstrip()}\n" for line in _fit(cells, name, time, error, width)))

    def write(rows: list[Row]) -> None:
        for row in rows:
            time = "" if row["time"] is None else f" at {row['time']:.2f} s"
            put(_list_cells(row, columns), _on_one_line(row["file"]), time, _on_one_line(row["error"] or ""))

    put(_format("expression", "", "next", "doubts", "box"), "file")
    yield write


def _on_one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _format(first: str, share: str, *others: str) -> list[str]:
    """Return the cells before the file's, as wide as their columns."""
    return [CELLS[0].format(first, share), *(form.format(text) for form, text in zip(CELLS[1:-1], others, strict=True))]


def _list_cells(row: Row, columns: Mapping[str, str]) -> list[str]:
    if row["expression"] is None:
        return _format("–", "", "", "", "")
    first, second = sorted(columns, key=lambda name: -row[columns[name]])[:2]
    doubts = ", ".join(name for name in ("unsure", "small", "blurred", "turned") if row[name])
    box = f"{row['width']}×{row['height']} at {row['left']}, {row['top']}"
    shares = [f"{row[columns[name]]:.0%}" for name in (first, second)]
    return _format(first, shares[0], f"{second} {shares[1]}", doubts, box)


def _fit(cells: Sequence[str], name: str, time: str, error: str, width: int) -> list[str]:
    """Return the lines of a row for a terminal; one that has only an error says it right behind the dash."""
    from rich.cells import cell_len

    lines = [cells[0]]
    for cell in cells[1:] if not error else ():
        if len(lines[-1]) + len(cell.rstrip()) > width:
            lines.append(INDENT + cell.strip())
        else:
            lines[-1] += cell
    least = min(LEAST_NAME, cell_len(name)) + len(time)
    if len(lines[-1]) + 2 + least > width:
        lines.append(INDENT[2:])
    room = width - len(lines[-1]) - 2 - len(time)
    beside = f": {error}" if error and least + 2 + cell_len(error) <= room else ":" * bool(error)
    below = wrap(error, max(width - len(INDENT), 1), break_on_hyphens=False) if beside == ":" else []
    lines[-1] += f"  {_shorten_path(name, room - cell_len(beside))}{time}{beside}"
    return [*lines, *(INDENT + line for line in below)]


def _shorten_path(path: str, longest: int) -> str:
    """Return a path without its first folders where it is wider; a name that is still too wide loses its middle."""
    from rich.cells import cell_len

    folders = path.split("/")
    ends = [path, *("/".join(["…", *folders[first:]]) for first in range(1, len(folders)))]
    return next((end for end in ends if cell_len(end) <= longest), shorten(ends[-1], longest))


@contextmanager
def write_jsonl(file: IO[bytes], classes: Sequence[str]) -> Iterator[Write]:
    """Write a JSON object a line; the rows name the classes themselves. What is no text is written as JSON escapes it."""

    def write(rows: list[Row]) -> None:
        _put(file, "".join(printable(json.dumps(_rounded(row), ensure_ascii=False)) + "\n" for row in rows))

    yield write


@contextmanager
def write_json(file: IO[bytes], classes: Sequence[str]) -> Iterator[Write]:
    """Write one JSON list of the objects that `write_jsonl` writes line by line."""
    before = "[\n"

    def write(rows: list[Row]) -> None:
        nonlocal before
        for row in rows:
            _put(file, before + printable(json.dumps(_rounded(row), ensure_ascii=False)))
            before = ",\n"

    try:
        yield write
    finally:  # what was predicted before an interruption is a list, too
        _put(file, "[]\n" if before == "[\n" else "\n]\n")


@contextmanager
def write_csv(file: IO[bytes], classes: Sequence[str]) -> Iterator[Write]:
    """Write comma-separated values with a header; true and false are 1 and 0."""

    def write(rows: list[Row], header: bool = False) -> None:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, build_schema(classes).names, lineterminator="\n")
        if header:
            table.writeheader()
        table.writerows(
            {name: int(value) if isinstance(value, bool) else value for name, value in _rounded(row).items()}
            | {"file": _name_no_formula(row["file"])}
            for row in rows
        )
        _put(file, text.getvalue())

    write([], header=True)
    yield write


def _name_no_formula(file: str) -> str:
    """Return the name of a file such that no spreadsheet takes it for a formula; it still names the file."""
    return f"./{file}" if file.startswith(("=", "+", "-", "@", "\t", "\r")) else file


@contextmanager
def write_parquet(file: IO[bytes], classes: Sequence[str]) -> Iterator[Write]:
    """Write Parquet, some thousand rows a group."""
    waiting: list[Row] = []
    schema = build_schema(classes)
    with pq.ParquetWriter(file, schema) as table:

        def write(rows: list[Row], least: int = 4096) -> None:
            waiting.extend(
                {**row, "file": row["file"] if is_encoded(row["file"]) else printable(row["file"])} for row in rows
            )
            if len(waiting) >= least:
                table.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting.clear()

        try:
            yield write
        finally:  # what was predicted before an interruption is kept
            write([], least=1)


FORMATS: dict[str, Callable[[IO[bytes], Sequence[str]], AbstractContextManager[Write]]] = {
    "table": write_table,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def _is_parquet_of_rows(file: IO[bytes]) -> bool:
    try:
        return bool(pq.read_schema(file).names[: len(BEFORE)] == list(dict(BEFORE)))
    except pa.ArrowException:
        return False


OWN: dict[str, Own] = {  # what knows a file of rows, by its format
    "table": begins(TABLE_HEADER),
    "jsonl": begins('{"file": '),
    "json": begins('[\n{"file": ', "[]\n"),
    "csv": begins(",".join(dict(BEFORE))),
    "parquet": _is_parquet_of_rows,
}


def _put(file: IO[bytes], text: str) -> None:
    """Write a text as UTF-8, to a terminal without control characters; what a name has that is no text as `\\udce9`."""
    text = printable(text) if file.isatty() else text
    file.write(text.encode("utf-8", "backslashreplace"))
    file.flush()


def _rounded(row: Row) -> Row:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in row.items()}


@dataclass
class Summary:
    """Counts of all that was looked at."""

    photos: int = 0
    frames: int = 0  # of videos, and of photos that hold several
    faces: int = 0
    without: int = 0  # frames in which there is no face that can be used
    several: int = 0  # frames with more than one face
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # file, reason
    expressions: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)

    def add(self, predicted: PredictedFrame) -> None:
        """Count a frame."""
        frame = predicted.frame
        if frame.error:
            self.unreadable.append((str(frame.file), frame.error))
            return
        self.photos += frame.number is None
        self.frames += frame.number is not None
        self.faces += len(predicted.faces)
        self.without += not predicted.faces
        self.several += predicted.found > 1
        self.expressions.update(face.expression for face in predicted.faces)
        self.doubts.update(doubt for face in predicted.faces for doubt in face.doubts)

    def sentences(self) -> list[str]:
        """Say what came out: faces and their expressions, then what there was besides."""
        looked = [_count(number, name) for number, name in ((self.photos, "photo"), (self.frames, "frame")) if number]
        faces = _count(self.faces, "face")
        lines = [
            f"{faces} in {' and '.join(looked)}{_listed(self.expressions)}." if looked else "No picture was readable."
        ]
        counts = ((self.without, "without a face"), (self.several, "with several faces"))
        lines += [f"Pictures {name}: {number:,}." for number, name in counts if number]
        lines += [f"Doubtful faces{_listed(self.doubts)}."] if self.doubts else []
        shown = self.unreadable[:10]
        lines += [f"Unreadable: {file}: {reason}." for file, reason in shown]
        more = len(self.unreadable) - len(shown)
        return [*lines, *([f"Unreadable: {more:,} more, in the rows with an error."] if more else [])]


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def _listed(counts: Counter[str]) -> str:
    return f": {', '.join(f'{name} {count:,}' for name, count in counts.most_common())}" if counts else ""
