"""The tables of a comparison as cells of text; how they look in each output is in `pipeline.render`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cafe.results.metrics import Estimate
from pipeline.compare import ClassRow, Comparison, Group, Row
from pipeline.versus import Paired, Published, Ranks

BEST, SECOND = "best", "second"
NOISE = (
    "Published numbers are single runs; the choice of their test faces alone moves them by ±4.7 (SFEW), ±1.7 (AffectNet), "
    "±1.5 (FERPlus), ±1.1 (RAF-DB) or ±0.7 (MMA) points (95 %)."
)


@dataclass(frozen=True)
class Cell:
    """What is written in a table, and whether it is the best or the second best of its column."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: the first `words` columns are words, the others numbers; notes say how to read it.

    Lines whose first `block` columns agree belong together.
    """

    title: str
    words: int
    block: int
    header: list[str]
    lines: list[list[Cell]]
    notes: list[str]

    def starts_block(self, number: int) -> bool:
        """Whether a line does not belong with the line before."""
        return 0 < number < len(self.lines) and self.lines[number][: self.block] != self.lines[number - 1][: self.block]


def mark_best(rows: Sequence[Group], columns: Sequence[Sequence[Estimate]]) -> list[list[str]]:
    """Return for each row and column whether it is the best or the second of its source, ties in print sharing it.

    What peeked at the faces it is judged on takes part in no contest.
    """
    marks = [[""] * len(cells) for cells in columns]
    for source in {row.source for row in rows}:
        rivals = [place for place, row in enumerate(rows) if row.source == source and not row.peeked]
        for column in range(len(columns[0])):
            means = {place: columns[place][column].mean for place in rivals}
            printed = {place: round(100 * mean, 1) for place, mean in means.items() if not math.isnan(mean)}
            order = sorted(set(printed.values()), reverse=True)
            for place, value in printed.items() if len(printed) > 1 else ():
                marks[place][column] = BEST if value == order[0] else SECOND if value == order[1] else ""
    return marks


def main_sheet(comparison: Comparison) -> Sheet:
    """Methods × targets, one block per source, then the means over targets."""
    metric = comparison.metric.replace("_", " ")
    leaking = comparison.leaking or []
    shown = [  # title, target, whether leak-free
        (f"{target} leak-free" if without else target, target, without)
        for target in comparison.targets
        for without in ([False, True] if target in leaking else [False])
    ]
    header = ["source", "method", "seeds", *(title for title, _, _ in shown)]
    header += [f"unseen {metric}", "unseen macro-F1", f"all {metric}"]
    header += [] if comparison.leaking is None else [f"unseen {metric} leak-free"]
    columns = [
        [
            *((row.leak_free if without else row.targets)[target] for _, target, without in shown),
            row.unseen,
            row.unseen_macro_f1,
            row.everything,
            *([] if comparison.leaking is None else [row.unseen_leak_free]),
        ]
        for row in comparison.rows
    ]  # in the order of the header
    lines = []
    for row, estimates, marks in zip(comparison.rows, columns, mark_best(comparison.rows, columns), strict=True):
        texts = [str(estimate) for estimate in estimates]
        for place, (_, target, _) in enumerate(shown):
            if target == row.source:  # seen in training: not a measure of generalisation
                texts[place] = f"({texts[place]})"
        lines.append([*_head(row), *_peeked(row, texts, marks)])
    notes = [
        "Percent, mean ± half-width of the 95 % t-interval over seeds. In brackets: the source itself, its own test split. "
        "Unseen: mean over the targets not trained on; all: with the source, as published tables average.",
        *_footnotes(comparison.rows),
        *_leaks(comparison.leaking),
    ]
    return Sheet(metric.capitalize(), 2, 1, header, lines, notes)


def _leaks(leaking: list[str] | None) -> list[str]:
    if leaking is None:
        return []
    note = "Leak-free: without the samples that are copies of the source's training faces, as `cafe data audit` found."
    return [note if leaking else f"{note} It found none."]


def _head(row: Group) -> list[Cell]:
    return [Cell(row.source), Cell(row.label), Cell(str(row.seeds))]


def _peeked(row: Group, texts: list[str], marks: list[str]) -> list[Cell]:
    return [Cell(f"{text} †" if row.peeked else text, mark) for text, mark in zip(texts, marks, strict=True)]


def _footnotes(rows: Sequence[Group]) -> list[str]:
    marked = ["Of each source, the best is bold and the second underlined; that says nothing of significance."]
    peeked = "†: the epoch was chosen on the source's test split, as published scripts do: not comparable."
    contest = len(rows) > len({row.source for row in rows})
    return (marked if contest else []) + ([peeked] if any(row.peeked for row in rows) else [])


def matrix_sheets(comparison: Comparison) -> list[Sheet]:
    """A source × target matrix of each method, where there are several sources."""
    sheets = []
    for label, rows in by_label(comparison):
        lines = []
        for row in rows:
            texts = [f"({cell})" if target == row.source else str(cell) for target, cell in row.targets.items()]
            lines.append([Cell(row.source), *_peeked(row, [*texts, str(row.unseen)], [""] * (len(texts) + 1))])
        header = ["source \\ target", *comparison.targets, "unseen"]
        sheets.append(Sheet(f"{label}: every source on every target", 1, 0, header, lines, []))
    return sheets


def by_label(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Return the rows of each method over all sources; nothing where there is one source."""
    labels = dict.fromkeys(row.label for row in comparison.rows)
    if len({row.source for row in comparison.rows}) < 2:
        return []
    return [(label, [row for row in comparison.rows if row.label == label]) for label in labels]


def published_sheet(comparison: Comparison, published: Sequence[Published | None]) -> Sheet:
    """How far each row is from what was published of its method, and in which settings it is another."""
    header = ["source", "method", "seeds", *comparison.targets, "unseen accuracy", "all accuracy"]
    lines: list[list[Cell]] = []
    differing: dict[str, list[str]] = {}
    for row, numbers in zip(comparison.rows, published, strict=True):
        if numbers:
            pairs = [(row.targets[target].mean, numbers.targets.get(target, math.nan)) for target in comparison.targets]
            pairs += [(row.unseen.mean, numbers.unseen), (row.everything.mean, numbers.everything)]
            lines.append([*_head(row), *_peeked(row, [_beside(*pair) for pair in pairs], [""] * len(pairs))])
            if numbers.differences:
                differing.setdefault(", ".join(numbers.differences), []).append(f"{row.method} from {row.source}")
    notes = [
        "Ours less the published accuracy, in percentage points; the published one in brackets. Only where this protocol "
        f"judges the data set as the released test readers do. {NOISE}",
        *(f"Not as published: {settings} ({', '.join(rows)})." for settings, rows in differing.items()),
    ]
    return Sheet("Beside the published numbers", 2, 1, header, lines, notes)


def _beside(ours: float, published: float) -> str:
    return "–" if math.isnan(ours) or math.isnan(published) else f"{points(ours - published)} ({100 * published:.1f})"


def points(difference: float) -> str:
    """Return a difference of fractions in percentage points with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def tests_sheets(tests: list[Paired]) -> list[Sheet]:
    """The paired tests, a line per method and target and a sheet per source; the first says how to read them."""
    about = [
        "Accuracy less that of the reference, in percentage points. Paired bootstrap over faces, each with all seeds of "
        "both methods: interval and p are about other faces, not about other seeds. p (Holm) is corrected over the targets "
        "of a method and source. Seeds apart: every seed of the one is ahead of every seed of the other. Bold: p (Holm), or "
        "p for the mean, is below 0.05, and the seeds are not mixed."
    ]
    sheets: list[Sheet] = []
    for source in dict.fromkeys(test.row.source for test in tests):
        own = [test for test in tests if test.row.source == source]
        title = f"Against {own[0].reference.label}, trained on {source}"
        header = ["method", "target", "faces", "difference", "95 % interval", "p", "p (Holm)", "seeds apart"]
        notes = [*([] if sheets else about), *_footnotes([test.row for test in own if test.row.peeked])]
        incomplete = [
            f"{test.left_out:,} of {test.target} ({test.row.label})" for test in own if test.left_out and test.target
        ]
        if incomplete:
            notes.append(f"Tested on the faces all runs have judged, without {', '.join(incomplete)}.")
        sheets.append(Sheet(title, 2, 1, header, [_test_line(test) for test in own], notes))
    return sheets


def _test_line(test: Paired) -> list[Cell]:
    difference = test.difference
    return [
        Cell(f"{test.row.label} †" if test.peeked else test.row.label),
        Cell(f"({test.target})" if test.seen else test.target or "mean of unseen"),
        Cell(f"{difference.samples:,}"),
        Cell(points(difference.mean), BEST if _holds(test) else ""),
        Cell(f"{points(difference.low)} to {points(difference.high)}"),
        Cell(_p(difference.p)),
        Cell(_p(test.adjusted_p) if test.target else "–"),
        Cell("–" if test.apart is None else "yes" if test.apart else "no"),
    ]


def _holds(test: Paired) -> bool:
    return (test.adjusted_p if test.target else test.difference.p) < 0.05 and test.apart is not False


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def ranks_sheet(ranks: Ranks, comparison: Comparison) -> Sheet:
    """Mean ranks over targets with Friedman's and Nemenyi's tests."""
    ranking = ranks.ranking
    lines = [[Cell(label), Cell(f"{place:.2f}")] for label, place in zip(ranks.labels, ranking.ranks, strict=True)]
    notes = [
        f"By unseen {comparison.metric.replace('_', ' ')} over {ranking.targets} pairs of source and unseen target."
    ]
    if not math.isnan(ranking.p):
        notes.append(f"Friedman's test: p = {_p(ranking.p)}.".replace("= <", "< "))
    if not math.isnan(ranking.critical_difference):
        notes.append(
            f"Nemenyi's critical difference of two mean ranks (5 %): {ranking.critical_difference:.2f}. Pairs that share a "
            "source or a target are not independent, so take it as a guide."
        )
    else:
        notes.append("Too few methods or targets for a critical difference.")
    if ranks.left_out:
        notes.append(f"Not ranked, as not trained on every source or not comparable: {', '.join(ranks.left_out)}.")
    return Sheet("Mean ranks", 1, 0, ["method", "mean rank"], lines, notes)


def class_sheet(rows: list[ClassRow], target: str, published: list[dict[str, float]]) -> Sheet:
    """Recall per expression on one target, and below a row how far it is from what was published."""
    columns = [list(row.values.values()) for row in rows]
    lines = []
    for row, estimates, marks, numbers in zip(rows, columns, mark_best(rows, columns), published, strict=True):
        texts = [f"({estimate})" if row.source == target else str(estimate) for estimate in estimates]
        lines.append([*_head(row), *_peeked(row, texts, marks)])
        if numbers:
            texts = [_beside(estimate.mean, numbers[name]) for name, estimate in row.values.items()]
            head = [Cell(row.source), Cell(f"{row.label} − published"), Cell("")]
            lines.append([*head, *_peeked(row, texts, [""] * len(texts))])
    notes = [
        f"Recall per expression on {target} in percent, mean ± half-width of the 95 % t-interval over seeds; overall: "
        "accuracy; mean: of the recalls. In brackets: trained on the same data set.",
        *_footnotes(rows),
        *([f"Less the published numbers, which are in brackets. {NOISE}"] if any(published) else []),
    ]
    return Sheet(f"Expressions on {target}", 2, 1, ["source", "method", "seeds", *rows[0].values], lines, notes)
