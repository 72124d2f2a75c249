"""A table as cells of text, and what its parts are called; how it looks in each output is in `cafe.report.formats`."""

from __future__ import annotations

from dataclasses import dataclass

from cafe.results.columns import Column, Mean
from cafe.results.comparison import Row
from cafe.results.metrics import FEW, Estimate

Place = Column | Mean
Cells = dict[Place, Estimate]  # of one line
BEST, SECOND = "best", "second"
UNDERLINED = "underlined"  # how the second is shown, which not every format can
HEAD = ["source", "method", "seeds"]  # of the tables with a line for each row of a comparison
SAW = "saw target"  # the last column of every table with a line for each row
NOISE = (
    "Published numbers are single runs; the choice of their test faces alone moves them by ±3.3 (SFEW), ±1.7 (AffectNet), "
    "±1.5 (FERPlus), ±1.1 (RAF-DB) or ±0.7 (MMA) points (95 %)."
)
FACES, CHANCE = "faces", "chance"  # the lines that end a block
DOUBTFUL = (
    "‡: other faces might as well have shown nothing above chance (95 % over faces, taken for independent), or there are "
    f"fewer than {FEW}."
)
PEEKED = "†: the epoch was chosen on the source's test split, as RUL's and OFER's scripts do: not comparable."


@dataclass(frozen=True)
class SheetCell:
    """What is written in a table, and whether it is the best or the second best of its column."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: the first `words` columns are words, the others numbers; notes say how to read it.

    Lines whose first `block` columns agree belong together. `order` holds the columns behind the words by importance, for a
    screen that has no room for all.
    """

    title: str
    words: int
    block: int
    header: list[str]
    lines: list[list[SheetCell]]
    notes: list[str]
    order: tuple[int, ...] = ()

    @property
    def shown(self) -> list[int]:
        """Its columns as a page shows them, where the most important one stands behind the words and stays in view."""
        first = [*range(self.words), *self.order[:1]]
        return [*first, *(column for column in range(len(self.header)) if column not in first)]

    def starts_block(self, number: int) -> bool:
        """Whether a line does not belong with the line before."""
        return 0 < number < len(self.lines) and self.lines[number][: self.block] != self.lines[number - 1][: self.block]


def head_cells(row: Row) -> list[SheetCell]:
    """Return what stands in the columns `HEAD`."""
    return [SheetCell(row.source), SheetCell(row.label), SheetCell(str(row.seeds) if row.seeded else "any")]


def write_p(value: float) -> str:
    """Return a p-value as text."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
