"""The report of a comparison: its tables, the tests behind them, and the records of the CSV file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import pandas as pd
from upath import UPath

from cafe.errors import UserError
from cafe.report import ReportSettings
from cafe.report.origins import draws_sheet
from cafe.report.sheets.comparison import faces_sheet, main_sheet, matrix_sheets
from cafe.report.sheets.printed import printed_sheets
from cafe.report.sheets.published import class_sheet, published_sheet
from cafe.report.sheets.sheet import Sheet
from cafe.report.sheets.tests import ranks_sheet, tests_sheets
from cafe.results.columns import MEAN
from cafe.results.comparison import ALL, Comparison, Row, compare, compare_classes
from cafe.results.leaks import leave_out_leaks
from cafe.results.metrics import Estimate
from cafe.results.protocols import ALL_PROTOCOLS, ProtocolName, find_protocol
from cafe.results.published import Published, publish_classes, publish_rows
from cafe.results.runs import Run
from cafe.results.scores import LeftOut, describe_left_out, meet, read_scores
from cafe.results.significance.paired_tests import Paired, Ranks, pair_rows, rank_rows
from cafe.results.significance.verdicts import Verdict, reach_verdicts
from cafe.results.sources import SAME_SET, SOURCE, UNSEEN
from cafe.results.variants import choose_draws, vary_runs


@dataclass(frozen=True)
class Report:
    """A comparison with its tables and tests; `target` is set where it compares the classes of one target."""

    title: str
    about: list[str]  # the protocol, and what else holds for all sheets
    sheets: list[Sheet]
    comparison: Comparison
    published: Sequence[Published | None]
    tests: Sequence[Paired] = ()
    ranks: Ranks | None = None
    target: str = ""
    verdicts: Sequence[Verdict] = ()  # one for each source
    left_out: Sequence[LeftOut] = ()  # predictions that do not belong beside the others; `about` says of what kinds


def make_report(
    runs: Sequence[Run],
    known: Mapping[str, str] | None = None,
    settings: ReportSettings | None = None,
    *,
    metric: str = "accuracy",
    per_class: str | None = None,
    root: UPath | None = None,
    about: Sequence[str] = (),
) -> Report:
    """Compare runs, on all targets or by class on one, with paired tests against one method; raise `UserError`.

    `known` are the digests of the manifests by name. `root` is that of the workspace, whose audits found copies of the
    source's training faces: needed where the settings want columns without them. `about` is what else there is to say
    of these runs.
    """
    settings = settings or ReportSettings()
    versus, known = settings.versus, known or {}
    runs, trials = choose_draws(runs)
    runs, left_out = meet(runs, known)
    about = [*about, *describe_left_out(left_out)]
    scores = read_scores(runs, known)
    protocol = settings.protocol or choose_protocol(scores)
    _check_left_out(scores, left_out, protocol)
    others = list_others(scores, protocol, settings.test_time)
    varied = vary_runs(runs, protocol, settings.test_time)
    shown = [*runs, *varied]
    if settings.shared_classes:
        shown = [replace(run, shared_classes=True) for run in shown]
        scores = read_scores(shown, known, [protocol])
    elif varied:
        scores = pd.concat([scores, read_scores(varied, known, [protocol])], ignore_index=True)
    leak_free = None
    if settings.exclude_leaks:
        assert root is not None
        leak_free = read_scores(shown, known, [protocol], leave_out_leaks(root))
    said = [f"Protocol {protocol}: {find_protocol(protocol).about}"]
    if per_class:
        classes = compare_classes(shown, scores, per_class, protocol)
        return _report_classes(classes, per_class, versus, [*said, *about], left_out)
    comparison = compare(shown, scores, metric, protocol, leak_free)
    published, ranks = publish_rows(comparison), rank_rows(comparison)
    tests = pair_rows(comparison, versus) if versus else []
    over_faces = faces_sheet(comparison)
    sheets = [main_sheet(comparison), *([over_faces] if over_faces else []), *matrix_sheets(comparison)]
    sheets += [published_sheet(comparison, published)] if any(published) else []
    sheets += printed_sheets(comparison) if settings.as_printed else []
    sheets += tests_sheets(tests) + ([ranks_sheet(ranks, comparison)] if ranks else [])
    sheets += [draws_sheet(trials, comparison)] if trials else []
    title = "Trained on one data set, evaluated on all"
    about, verdicts = [*said, *others, *about], reach_verdicts(comparison)
    return Report(title, about, sheets, comparison, published, tests, ranks, verdicts=verdicts, left_out=left_out)


def _report_classes(
    classes: Comparison, target: str, versus: str | None, about: Sequence[str], left_out: Sequence[LeftOut]
) -> Report:
    published = publish_classes(classes)
    tests = pair_rows(classes, versus, target) if versus else []
    sheets = [class_sheet(classes, target, published), *tests_sheets(tests)]
    title = f"Every expression of {target}"
    return Report(title, [*about], sheets, classes, published, tests, target=target, left_out=left_out)


def choose_protocol(scores: pd.DataFrame) -> ProtocolName:
    """Return the protocol whose numbers are shown where none is asked for: the first by which any run was evaluated."""
    there = set(scores["protocol"])
    return next((name for name in get_args(ProtocolName) if name in there), get_args(ProtocolName)[0])


def _check_left_out(scores: pd.DataFrame, left_out: Sequence[LeftOut], protocol: str) -> None:
    """Raise `UserError` that names them where nothing but predictions of other faces than those of now was found."""
    own = [one for one in left_out if find_protocol(one.protocol).plain == protocol]
    missing = left_out if scores.empty else own
    if missing and not (scores["protocol"] == protocol).any():
        listed = "".join(f"\n  {line}" for line in describe_left_out(missing))
        raise UserError(
            f"All {len(missing)} predictions are of other faces than those that count now: evaluate the runs again.{listed}"
        )


def list_others(scores: pd.DataFrame, protocol: str, test_time: Sequence[str] = ()) -> list[str]:
    """Return how else runs were evaluated than by a protocol and with these options, and how to see that."""
    said = []
    for other in map(find_protocol, ALL_PROTOCOLS):
        if (scores["protocol"] == other.name).any():
            if not other.option and other.plain != protocol:
                said.append(f"Some of these runs were also evaluated by --protocol {other.name}: see its own table.")
            if other.option and other.option not in test_time and other.plain == protocol:
                said.append(
                    f"Some of these runs were also evaluated with --test-time {other.option}: name it to see its rows."
                )
    return said


def list_records(report: Report) -> Iterator[dict[str, object]]:
    """Yield what the CSV file holds, as fractions: one record per row and target or class, then the row's means."""
    comparison, metric = report.comparison, report.comparison.metric
    tested = {(id(test.row), test.column): test for test in report.tests}
    for row, published in zip(comparison.rows, report.published, strict=True):
        numbers = published or Published({})
        for column, estimate in row.cells.items():
            where: dict[str, object] = {"target": report.target, "expression": column.title}
            if not report.target:
                role = SOURCE if column.name in row.sources else SAME_SET if column in row.seen else UNSEEN
                where = {"target": column.title, "role": role, "metric": metric}
            described = _describe(comparison, row, where, estimate, numbers.cells.get(column, math.nan))
            yield described | _describe_test(tested.get((id(row), None if column.part == MEAN else column)))
        for mean, estimate in row.means.items():
            own = mean.metric == metric and not mean.leak_free
            number = {UNSEEN: numbers.unseen, ALL: numbers.everything}[mean.over] if own else math.nan
            where = {"target": mean.name, "role": "mean", "metric": mean.metric}
            described = _describe(comparison, row, where, estimate, number)
            yield described | _describe_test(tested.get((id(row), None)) if own and mean.over == UNSEEN else None)


def _describe(
    comparison: Comparison, row: Row, where: dict[str, object], estimate: Estimate, published: float
) -> dict[str, object]:
    return {
        "protocol": comparison.protocol, "source": row.source, "method": row.method, "row": row.label,
        "selection": row.runs[0].selection, "seeds": row.seeds, "saw_target": row.saw_target, **where,
        "mean": estimate.mean, "half_width": estimate.half_width, "averaged": estimate.count, "published": published,
        "seeds_low": estimate.over_seeds[0], "seeds_high": estimate.over_seeds[1], "evaluated": estimate.faces,
        "faces_low": estimate.low, "faces_high": estimate.high, "chance": estimate.chance,
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
