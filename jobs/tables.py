"""Tables of every command: each fits the screen there is, and no digit of it is ever cut off.

Where not all columns have room, long names are shortened in the middle, words and headers are wrapped, and columns that
still do not fit stand in further parts below the first, by their importance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from cafe.errors import printable, shorten
from cafe.jobs.terminal import show, show_json

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from cafe.report.sheets.sheet import Sheet

# In characters: what is left of a name, words on a line, one word, and one of a header.
NAME, WORD, TOKEN, HEAD = 24, 18, 28, 12
STYLES = {"best": "bold", "second": "underline", "": ""}  # of the marks of `cafe.report.sheets`


class TableCell(NamedTuple):
    """A text and its style."""

    text: str
    style: str = ""


class TablePart(NamedTuple):
    """Columns that stand beside each other, with their widths."""

    columns: list[int]
    widths: list[int]


@dataclass
class FittedTable:
    """A table whose first `names` columns say what a line is of, the first `words` are words and the others numbers.

    `order` holds the columns behind the names by importance where not all have room, by default as they stand;
    `elsewhere` names what shows all of it besides --wide. Lines of which `sections` holds the number end a section.
    """

    header: list[str]
    names: int = 1
    words: int = 1
    title: str = ""
    order: Sequence[int] = ()
    elsewhere: str = ""
    lines: list[list[TableCell]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add_row(self, *cells: object) -> None:
        """Add a line; whole numbers are written with commas, None and lists line by line."""
        self.lines.append([cell if isinstance(cell, TableCell) else TableCell(_write(cell)) for cell in cells])

    def add_section(self) -> None:
        """End a section behind the last line."""
        self.sections.add(len(self.lines) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield its parts for the width that the options give, and how to see it whole where it had to be changed."""
        parts, same = self.arrange(options.max_width)
        whole = [self._widest(column) for column in self.columns]
        shortened = any(
            width < self._widest(column)
            for part in parts
            for column, width in zip(part.columns, part.widths, strict=True)
            if column < self.names
        )
        for number, part in enumerate(parts):
            said = [self.title] if number == 0 and self.title else []
            said += [f"{self.header[column]}: {self.lines[0][column].text}" for column in same] if number == 0 else []
            width = _total(part.widths)
            yield from console.render(self._draw(part, " – ".join(said)), options.update(width=width, max_width=width))
        if len(parts) > 1 or shortened:
            what = f"in {len(parts)} parts" if len(parts) > 1 else "with names shortened"
            also = f"; so do {self.elsewhere}" if self.elsewhere else ""
            yield f"Shown {what}, for its lines are {_total(whole)} characters long: --wide shows them whole{also}."

    @property
    def columns(self) -> list[int]:
        """The columns in which anything is written."""
        filled = [n for n in range(len(self.header)) if any(line[n].text for line in self.lines)]
        return filled or list(range(len(self.header)))

    def arrange(self, width: int) -> tuple[list[TablePart], list[int]]:
        """Return the parts for a width, and the columns that are the same in all lines, to be said once above them."""
        columns = self.columns
        if part := self._fit(columns, width):
            return [part], []
        same = [n for n in columns if n < self.names and len(self.lines) > 1 and len(self._texts(n)) == 1]
        names = [n for n in columns if n < self.names and n not in same]
        if not names:
            same, names = same[:-1], same[-1:]
        if part := self._fit([n for n in columns if n not in same], width):
            return [part], same
        order = [*self.order, *(n for n in columns if n not in self.order)]
        waiting = [n for n in order if n in columns and n >= self.names]
        parts: list[TablePart] = []
        while waiting or not parts:
            own = [*names, *waiting[:1]]
            for column in waiting[1:]:  # what is less important fills what room is left
                if self._fit([*own, column], width):
                    own.append(column)
            waiting = [column for column in waiting if column not in own]
            least = [self._least(column, width) for column in own]
            parts.append(self._fit(own, width) or TablePart(own, least))
        return parts, same

    def _fit(self, columns: list[int], width: int) -> TablePart | None:
        """Return the columns with widths that fill no more than a width, or None where even the least are too wide."""
        widths = {column: self._least(column, width) for column in columns}
        room = width - _total(list(widths.values()))
        if room < 0:
            return None
        names = [n for n in columns if n < self.names]
        words = [n for n in columns if self.names <= n < self.words]
        numbers = [n for n in columns if n >= self.words]
        # First the words, that a command or a path in them can be copied whole, then the names.
        for group, enough in (
            (words, self._longest_token), (names, self._widest), (words, self._widest), (numbers, self._widest)
        ):  # fmt: skip
            while room and (growing := [n for n in group if widths[n] < enough(n)]):
                for column in growing[:room]:
                    widths[column] += 1
                room -= len(growing[:room])
        return TablePart(columns, [widths[column] for column in columns])

    def _texts(self, column: int) -> set[str]:
        return {line[column].text for line in self.lines}

    def _widest(self, column: int) -> int:
        return max([_width(self.header[column]), *map(_width, self._texts(column))])

    def _longest_token(self, column: int) -> int:
        return max([0, *(_width(word) for text in self._texts(column) for word in text.split())])

    def _least(self, column: int, width: int) -> int:
        """Return the least width of a column: a number's is that of the widest number."""
        head = min(HEAD, max([0, *(_width(word) for word in self.header[column].split())]))
        if column < self.names:
            return min(max(NAME, width // 3), self._widest(column))
        if column < self.words:
            return max(head, min(self._widest(column), max(WORD, min(self._longest_token(column), TOKEN))))
        return max([head, *map(_width, self._texts(column))])

    def _shorten(self, column: int, width: int) -> dict[str, str]:
        """Return how each text of a column is written: names are shortened, unless two of them would be the same."""
        texts = {text: text for text in self._texts(column)}
        shortened = {text: shorten_lines(text, width) for text in texts}
        return shortened if column < self.names and len({*shortened.values()}) == len(texts) else texts

    def _draw(self, part: TablePart, title: str) -> Table:
        from rich.table import Table
        from rich.text import Text

        places = list(zip(part.columns, part.widths, strict=True))
        written = [self._shorten(column, width) for column, width in places]
        wrapped = any(_width(text) > part.widths[0] for text in written[0].values())
        table = Table(title=title or None, title_justify="left", title_style="bold", show_lines=wrapped)
        for column, width in places:
            number = column >= self.words
            head = " ".join(shorten(word, width) for word in self.header[column].split(" "))
            table.add_column(
                Text("\n".join(wrap(head, max(1, width)))),
                justify="right" if number else "left", no_wrap=number, overflow="fold", width=width,
            )  # fmt: skip
        for place, line in enumerate(self.lines):
            own = [line[column] for column in part.columns]
            cells = (Text(texts[cell.text], cell.style) for texts, cell in zip(written, own, strict=True))
            table.add_row(*cells, end_section=place in self.sections)
        return table


def shorten_lines(text: str, longest: int) -> str:
    """Return a text each of whose lines is shortened."""
    return "\n".join(shorten(line, longest) for line in text.split("\n"))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for line in text.split("\n"))


def _total(widths: Sequence[int]) -> int:
    """Return the width of a table of columns: between two there are a line and a space on either side of it."""
    return sum(widths) + 3 * len(widths) + 1


def _write(cell: object) -> str:
    if isinstance(cell, list):
        return "\n".join(map(_write, cell))
    if isinstance(cell, float) and math.isnan(cell):
        return "–"
    return printable("" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell))


def make_table(
    header: Sequence[str], lines: Iterable[Sequence[object]] = (), words: int = 1, title: str = "", names: int = 1
) -> FittedTable:
    """Return a table: the first `words` columns are words, of which `names` say what a line is of, the others numbers."""
    table = FittedTable([printable(name) for name in header], names, words, printable(title))
    for line in lines:
        table.add_row(*line)
    return table


def show_records(
    records: Sequence[Mapping[str, Any]], as_json: bool, words: int = 1, title: str = "", order: Sequence[str] = ()
) -> None:
    """Print records as a table, the first `words` columns left-aligned and lists line by line, or as a list in JSON.

    `order` names what is most important where not all columns have room.
    """
    if as_json:
        show_json(list(records))
        return
    header = [name.replace("_", " ") for name in (records[0] if records else ())]
    table = make_table(header, [list(row.values()) for row in records], words, title)
    table.order, table.elsewhere = [header.index(name.replace("_", " ")) for name in order if records], "--json"
    show(table)


def sheet_tables(sheets: Iterable[Sheet], elsewhere: str = "") -> Iterator[FittedTable | str]:
    """Yield tables with how to read them; the best is bold, the second underlined."""
    for sheet in sheets:
        table = make_table(sheet.header, (), sheet.words, sheet.title, sheet.words)
        table.order, table.elsewhere = sheet.order, elsewhere
        for number, line in enumerate(sheet.lines):
            table.add_row(*(TableCell(printable(cell.text), STYLES[cell.mark]) for cell in line))
            if sheet.starts_block(number + 1):
                table.add_section()
        yield table
        yield from sheet.notes
