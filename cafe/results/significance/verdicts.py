"""Verdicts: what a comparison allows to be said in a sentence, chosen by paired tests and naming the rows it speaks of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cafe.results.comparison import Comparison, Row
from cafe.results.significance.paired_tests import Paired, test_unseen
from cafe.results.significance.statistics import holm
from cafe.results.units import PERCENT

NAMED = 3  # rows that a verdict names of those that are behind


@dataclass(frozen=True)
class Verdict:
    """What may be said of the rows of one source, and the tests of all others against the best that say it."""

    text: str
    tests: tuple[Paired, ...] = ()


def reach_verdicts(comparison: Comparison) -> list[Verdict]:
    """Return a verdict for every source of a comparison by accuracy: which row is ahead on the unseen targets, if any is.

    The row with the highest mean is tested against all others, with Holm's correction over these. Rows that were evaluated
    on other unseen targets, or over other classes, are not compared.
    """
    if comparison.metric != "accuracy":
        return []
    sources = dict.fromkeys(row.source for row in comparison.rows)
    blocks = [[row for row in comparison.rows if row.source == source and row.contends] for source in sources]
    return [
        _compare_block(scored, comparison) for block in blocks if (scored := [row for row in block if _is_scored(row)])
    ]


def _is_scored(row: Row) -> bool:
    return not math.isnan(row.unseen.mean)


def _compare_block(rows: Sequence[Row], comparison: Comparison) -> Verdict:
    best = max(rows, key=lambda row: row.unseen.mean)
    found = [test_unseen(row, best, comparison) for row in rows if row is not best]
    tests = [test for test in found if test]
    adjusted = holm([test.difference.p for test in tests]) if tests else []
    tests = [replace(test, difference=replace(test.difference, p=p)) for test, p in zip(tests, adjusted, strict=True)]
    behind = [test for test in tests if test.holds]
    mixed = [test for test in tests if not test.holds and test.difference.p < 0.05]
    alike = [test for test in tests if not test.difference.p < 0.05]
    said = f"Trained on {best.source}, "
    if alike or mixed:
        clauses = [f"does not differ significantly from {_list_leads(alike)}"] if alike else []
        clauses += [f"is ahead of {_list_leads(mixed)} over faces, though the seed ranges overlap,"] if mixed else []
        said += f"{_name(best)} {' and '.join(clauses)} on the unseen targets"
        said += f", and is ahead of {_list_behind(behind)}" if behind else ""
    elif behind:
        said += f"{_name(best)} is ahead on the unseen targets: of {_list_behind(behind)}"
    else:
        said += f"{best.label} is right on {best.unseen.over_faces} % of the faces of unseen targets"
    at_chance = [row.label for row in rows if row.unseen.at_chance]
    chance = f"{PERCENT.write(best.unseen.chance)} %, the share of the largest class"
    if at_chance:
        said += f"; not above chance ({chance}): {', '.join(at_chance)}"
    if best.unseen.few:
        said += f"; there are {best.unseen.faces} faces, too few to say much"
    return Verdict(f"{said}.", tuple(tests))


def _name(row: Row) -> str:
    return f"{row.label} ({PERCENT.write(row.unseen.mean)} %)"


def _list_leads(tests: Sequence[Paired]) -> str:
    return ", ".join(f"{test.row.label} ({_describe_lead(test)})" for test in tests)


def _list_behind(tests: Sequence[Paired]) -> str:
    """Name the closest ones, and count the rest."""
    closest = sorted(tests, key=lambda test: -test.difference.mean)
    named = [f"{test.row.label} by {_describe_lead(test)}" for test in closest[:NAMED]]
    rest = len(closest) - len(named)
    return ", ".join(named) + (f", and {rest} more by more" if rest else "")


def _describe_lead(test: Paired) -> str:
    """Return how far the reference of a test is ahead in percentage points, with the interval over faces."""
    mean, low, high = (100 * value for value in (test.difference.mean, test.difference.low, test.difference.high))
    return f"{-mean:z.1f} points, {-high:z.1f} to {-low:z.1f}".replace("-", "−")


def conclude(comparison: Comparison) -> str:
    """Say of each source what a paired test says of the best row that reads frozen features and the best of pixels alone.

    A sentence each; empty where there is nothing to compare.
    """
    best: dict[str, dict[bool, Row]] = defaultdict(dict)
    for row in sorted(filter(_is_scored, comparison.rows), key=lambda row: -row.unseen.mean):
        if row.contends:
            best[row.source].setdefault(row.runs[0].derived.get("store", "none") != "none", row)
    tests = [test_unseen(own[True], own[False], comparison) for own in best.values() if len(own) == 2]
    return " ".join(_compare_frozen(test) for test in tests if test)


def _compare_frozen(test: Paired) -> str:
    frozen, pixels, difference = test.row, test.reference, test.difference
    if difference.p < 0.05 and test.overlap:
        said = "Frozen features and pixels differ over faces, though the seed ranges overlap"
    elif not test.holds:
        said = "Frozen features and pixels do not differ significantly"
    elif difference.mean > 0:
        said = "Frozen features carry over better than pixels"
    else:
        said = "Pixels carry over better than frozen features"
    p = "p < 0.001" if difference.p < 0.001 else f"p = {difference.p:.3f}"
    mean, low, high = map(PERCENT.write_difference, (difference.mean, difference.low, difference.high))
    return (
        f"{said}: trained on {frozen.source}, {frozen.label}, which reads frozen features, is right on {frozen.unseen} % of "
        f"the faces of unseen targets, and {pixels.label}, which sees pixels alone, on {pixels.unseen} % (difference {mean} "
        f"points, {low} to {high} over {difference.faces:,} faces, {p})."
    )
