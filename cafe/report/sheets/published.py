"""The tables in which published numbers stand beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from cafe.report.sheets.comparison import class_notes, find_cells, ground_lines, ground_notes, mark_lines, row_notes
from cafe.report.sheets.sheet import HEAD, NOISE, SAW, Sheet, SheetCell, head_cells
from cafe.results.comparison import Comparison, Row
from cafe.results.published import Published
from cafe.results.units import PERCENT


def published_sheet(comparison: Comparison, published: Sequence[Published | None]) -> Sheet:
    """How far each row is from the numbers published for its method, and which of its settings differ."""
    lines: list[list[SheetCell]] = []
    differing: dict[str, list[str]] = {}
    for row, numbers in zip(comparison.rows, published, strict=True):
        if numbers:
            pairs = [(row.cells[column].mean, numbers.cells.get(column, math.nan)) for column in comparison.columns]
            pairs += [(row.unseen.mean, numbers.unseen), (row.everything.mean, numbers.everything)]
            lines.append(
                [*head_cells(row), *(SheetCell(_beside(row, *pair)) for pair in pairs), SheetCell(row.saw_target)]
            )
            if settings := row.runs[0].not_as_published:
                differing.setdefault(", ".join(settings), []).append(f"{row.label} from {row.source}")
    notes = [
        "Our accuracy minus the published one, which is in brackets, in percentage points. Only where this protocol "
        f"takes the data set as the released test readers do. {NOISE}",
        *(f"Not as published: {settings} ({'; '.join(rows)})." for settings, rows in differing.items()),
    ]
    titles = (column.title for column in comparison.columns)
    header = [*HEAD, *titles, "unseen accuracy", "all accuracy", SAW]
    return Sheet("Beside the published numbers", 2, 1, header, lines, notes)


def _beside(row: Row, ours: float, published: float) -> str:
    unknown = math.isnan(ours) or math.isnan(published)
    text = "–" if unknown else f"{PERCENT.write_difference(ours - published)} ({PERCENT.write(published)})"
    return f"{text} †" if row.peeked else text


def class_sheet(comparison: Comparison, target: str, published: Sequence[Published | None]) -> Sheet:
    """Recall per expression on one target, and below each row how far it is from the published numbers."""
    lines: list[list[SheetCell]] = []
    for _, block in groupby(zip(comparison.rows, published, strict=True), lambda pair: pair[0].source):
        rows, known = zip(*block, strict=True)
        cells = [find_cells(row, comparison.columns) for row in rows]
        marked = mark_lines(rows, cells, dict.fromkeys(comparison.columns, True))
        for row, numbers, line in zip(rows, known, marked, strict=True):
            lines.append([*line, SheetCell(row.saw_target)])
            if numbers:
                pairs = ((own.mean, numbers.cells.get(column, math.nan)) for column, own in row.cells.items())
                texts = [_beside(row, *pair) for pair in pairs]
                lines.append(list(map(SheetCell, [row.source, f"{row.label} − published", "", *texts, ""])))
        lines += [[*line, SheetCell("")] for line in ground_lines(rows[0].source, cells)]
    notes = [
        f"Recall per expression on {target} in percent: the mean ± the half-width of the 95 % t-interval over seeds, or "
        "both values where there are two; overall: accuracy; mean: of the recalls. In brackets: trained on the same set.",
        *ground_notes(comparison.rows),
        *class_notes(comparison),
        *row_notes(comparison.rows),
        *([f"− published: minus the published numbers, which are in brackets. {NOISE}"] if any(published) else []),
    ]
    header = [*HEAD, *(column.title for column in comparison.columns), SAW]
    return Sheet(f"Expressions on {target}", 2, 1, header, lines, notes)
