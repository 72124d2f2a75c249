"""The tables of the paired tests and of the ranks."""

from __future__ import annotations

import math
from itertools import groupby

from cafe.report.sheets.sheet import BEST, PEEKED, SAW, Sheet, SheetCell, write_p
from cafe.results.comparison import Comparison
from cafe.results.metrics import METRICS
from cafe.results.significance.paired_tests import PAIRS, RECALLS, Paired, Ranks
from cafe.results.units import PERCENT

TESTED = (
    "Accuracy minus that of the reference, in percentage points. The interval and p measure what other faces would change, "
    "not other seeds: a bootstrap over faces, each with all seeds of both methods; where faces belong to groups (a person, "
    "a film), a jackknife over groups with Student's t. p (Holm) is corrected over a row's targets or expressions. "
    "Seed ranges overlap: whether the accuracies of the two methods' seeds overlap, from the lowest to the highest of each. "
    "Bold: p (Holm), or p for the mean, is below 0.05, and the seed ranges do not overlap."
)


def tests_sheets(tests: list[Paired]) -> list[Sheet]:
    """The paired tests, a line per method and target and a sheet per source; the first says how to read them."""
    sheets: list[Sheet] = []
    for source, block in groupby(tests, lambda test: test.row.source):
        own = list(block)
        what = "expression" if own[0].mean == RECALLS else "target"
        header = ["method", what, "faces", "difference", "95 % interval", "p", "p (Holm)", "seed ranges overlap", SAW]
        notes = [*([] if sheets else [TESTED]), *([PEEKED] if any(test.peeked for test in own) else [])]
        if incomplete := [test for test in own if test.left_out and test.column]:
            missing = (f"{test.left_out:,} of {test.title} ({test.row.label})" for test in incomplete)
            notes.append(f"Tested on the faces all runs have evaluated, without {', '.join(missing)}.")
        title = f"Against {own[0].reference.label}, trained on {source}"
        lines = [_test_line(test) for test in own]
        sheets.append(Sheet(title, 2, 1, header, lines, notes, order=(3, 4, 6, 5, 7, 2)))
    return sheets


def _test_line(test: Paired) -> list[SheetCell]:
    difference = test.difference
    groups = f" in {difference.groups:,} groups" if difference.groups and test.column else ""
    return [
        SheetCell(f"{test.row.label} †" if test.peeked else test.row.label),
        SheetCell(name_target(test)),
        SheetCell(f"{difference.faces:,}{groups}"),
        SheetCell(PERCENT.write_difference(difference.mean), BEST if test.holds else ""),
        SheetCell(f"{PERCENT.write_difference(difference.low)} to {PERCENT.write_difference(difference.high)}"),
        SheetCell(write_p(difference.p)),
        SheetCell(write_p(test.adjusted_p) if test.column else "–"),
        SheetCell("–" if test.overlap is None else "yes" if test.overlap else "no"),
        SheetCell(test.row.saw_target),
    ]


def name_target(test: Paired) -> str:
    """Return the name of a test's target or class, in brackets where the row was trained on that set."""
    return f"({test.title})" if test.column in test.row.seen else test.title


def ranks_sheet(ranks: Ranks, comparison: Comparison) -> Sheet:
    """Mean ranks over targets with Friedman's and Nemenyi's tests."""
    ranking = ranks.ranking
    lines = [
        [SheetCell(label), SheetCell(f"{place:.2f}")] for label, place in zip(ranks.labels, ranking.ranks, strict=True)
    ]
    notes = [f"By {METRICS[comparison.metric].title} over {ranking.targets} pairs of source and unseen target."]
    if not math.isnan(ranking.p):
        notes.append(f"Friedman's test: p = {write_p(ranking.p)}.".replace("= <", "< "))
    notes.append(
        f"Fewer than three methods or {PAIRS} pairs: no critical difference and no diagram."
        if math.isnan(ranking.p)
        else "The ranks cannot differ by as much as a critical difference."
        if math.isnan(ranking.critical_difference)
        else f"Nemenyi's critical difference of two mean ranks (5 %): {ranking.critical_difference:.2f}. Pairs that share a "
        "source or a target are not independent, so take it as a guide."
    )
    if ranks.left_out:
        notes.append(f"Not ranked, as not trained on every source or not comparable: {', '.join(ranks.left_out)}.")
    return Sheet("Mean ranks", 1, 0, ["method", "mean rank"], lines, notes)
