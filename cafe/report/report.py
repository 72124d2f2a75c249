"""The report of a comparison: its tables, the tests behind them, and the records of the CSV file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cafe.report.sheets import (
    Sheet,
    class_sheet,
    main_sheet,
    matrix_sheets,
    published_sheet,
    ranks_sheet,
    tests_sheets,
)
from cafe.results.comparison import Comparison, Row, compare, compare_classes
from cafe.results.metrics import Estimate
from cafe.results.paired_tests import Paired, Ranks, pair_rows, rank
from cafe.results.protocols import ALL_PROTOCOLS, find_protocol
from cafe.results.published import Published, publish_classes, publish_rows
from cafe.results.scores import Run
from cafe.results.sources import SOURCE


@dataclass(frozen=True)
class Report:
    """A comparison with its tables and tests; `target` is set where it compares the expressions of one target."""

    title: str
    about: list[str]  # the protocol, and what else holds for all sheets
    sheets: list[Sheet]
    comparison: Comparison
    published: Sequence[Published | None]
    tests: Sequence[Paired] = ()
    ranks: Ranks | None = None
    target: str = ""


def make_report(
    runs: Sequence[Run],
    scores: pd.DataFrame,
    protocol: str = "clean",
    leak_free: pd.DataFrame | None = None,
    metric: str = "accuracy",
    per_class: str | None = None,
    versus: str | None = None,
) -> Report:
    """Compare runs, on all targets or by expression on one, with paired tests against one method; raise `UserError`.

    `scores` are those of the runs; `leak_free` the same without copies of the source's training faces.
    """
    about = [f"Protocol {protocol}: {find_protocol(protocol).about}"]
    if per_class:
        classes = compare_classes(runs, scores, per_class, protocol)
        published = publish_classes(classes)
        tests = pair_rows(classes, versus, per_class) if versus else []
        sheets = [class_sheet(classes, per_class, published), *tests_sheets(tests)]
        return Report(f"Every expression of {per_class}", about, sheets, classes, published, tests, target=per_class)
    comparison = compare(runs, scores, metric, protocol, leak_free)
    published, ranks = publish_rows(comparison), rank(comparison)
    tests = pair_rows(comparison, versus) if versus else []
    sheets = [main_sheet(comparison), *matrix_sheets(comparison)]
    sheets += [published_sheet(comparison, published)] if any(published) else []
    sheets += tests_sheets(tests) + ([ranks_sheet(ranks, comparison)] if ranks else [])
    about += list_others(comparison, scores)
    return Report("Trained on one data set, judged on all", about, sheets, comparison, published, tests, ranks)


def list_others(comparison: Comparison, scores: pd.DataFrame) -> Iterator[str]:
    """Yield how else runs of a comparison were judged, and how to see that."""
    shown = {row.test_time for row in comparison.rows}
    for name in ALL_PROTOCOLS:
        plain, _, option = name.partition("-")
        if (scores["protocol"] == name).any():
            if not option and plain != comparison.protocol:
                yield f"Some of these runs were also judged by --protocol {name}: see its own table."
            if option not in shown and plain == comparison.protocol:
                yield f"Some of these runs were also judged with --test-time {option}: name it to see rows of its own."


def conclude(comparison: Comparison) -> str:
    """Say in one sentence whether frozen features or pixels alone carry over better to the unseen targets.

    Empty where there is nothing to compare.
    """
    best: dict[bool, Row] = {}  # of the rows that read frozen features, and of those that do not
    for row in sorted(comparison.rows, key=lambda row: -row.unseen.mean):
        if not (row.oracle or math.isnan(row.unseen.mean)):
            best.setdefault(row.runs[0].derived.get("store", "none") != "none", row)
    if len(best) < 2:
        return ""
    frozen, pixels = best[True], best[False]
    difference = frozen.unseen.mean - pixels.unseen.mean
    reach = float(np.nansum([row.unseen.half_width for row in (frozen, pixels)]))
    several = min(frozen.unseen.count, pixels.unseen.count) > 2
    sure = several and abs(difference) > reach
    winner = "Frozen features carry over better than pixels" if difference > 0 else "Pixels carry over no worse"
    return (
        f"{winner}: on the unseen targets {frozen.label}, which reads frozen features, is right on {frozen.unseen} % of the "
        f"faces, and {pixels.label}, which sees pixels alone, on {pixels.unseen} % "
        f"({'the intervals do not overlap' if sure else 'too few seeds or too small a difference to be sure'})."
    )


def list_records(report: Report) -> Iterator[dict[str, object]]:
    """Yield what the CSV file holds, as fractions: one record per row and target or expression, then the row's means."""
    comparison, metric = report.comparison, report.comparison.metric
    tested = {(id(test.row), test.target): test for test in report.tests}
    for row, published in zip(comparison.rows, report.published, strict=True):
        numbers = published or Published({})
        for name, estimate in row.cells.items():
            where: dict[str, object] = {"target": report.target, "expression": name}
            if not report.target:
                role = SOURCE if name in row.source.split("+") else "same set" if name in row.seen else "unseen"
                where = {"target": name, "role": role, "metric": metric}
            described = _describe(comparison, row, where, estimate, numbers.cells.get(name, math.nan))
            mean = report.target and name == "mean"
            yield described | _describe_test(tested.get((id(row), "" if mean else name)))
        means = {
            "unseen": ("mean of unseen", metric, numbers.unseen),
            "unseen macro_f1": ("mean of unseen", "macro_f1", math.nan),
            "unseen ece": ("mean of unseen", "ece", math.nan),
            "all": ("mean of all", metric, numbers.everything),
            "unseen leak-free": ("mean of unseen leak-free", metric, math.nan),
        }
        means.pop(f"unseen {metric}", None)  # it is the mean of the table's own metric
        for name in (name for name in row.means if name in means):
            target, of, number = means[name]
            where = {"target": target, "role": "mean", "metric": of}
            described = _describe(comparison, row, where, row.means[name], number)
            yield described | _describe_test(tested.get((id(row), "")) if name == "unseen" else None)


def _describe(
    comparison: Comparison, row: Row, where: dict[str, object], estimate: Estimate, published: float
) -> dict[str, object]:
    return {
        "protocol": comparison.protocol, "source": row.source, "method": row.method, "row": row.label,
        "selection": row.runs[0].selection, "seeds": row.seeds, **where,
        "mean": estimate.mean, "half_width": estimate.half_width, "averaged": estimate.count, "published": published,
    }  # fmt: skip


def _describe_test(test: Paired | None) -> dict[str, object]:
    if test is None:
        return {}
    difference = test.difference
    return {
        "versus": test.reference.label, "faces": difference.faces, "groups": difference.groups,
        "accuracy_difference": difference.mean, "low": difference.low, "high": difference.high,
        "p": difference.p, "p_holm": test.adjusted_p, "seeds_apart": "" if test.apart is None else str(test.apart).lower(),
    }  # fmt: skip
