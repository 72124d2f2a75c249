"""The report of a comparison: its tables, the tests behind them, and the records of the CSV file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from upath import UPath

from cafe.errors import UserError
from cafe.report import ReportSettings
from cafe.report.origins import draws_sheet
from cafe.report.sheets.comparison import faces_sheet, main_sheet, matrix_sheets
from cafe.report.sheets.groups import groups_sheets
from cafe.report.sheets.printed import printed_sheets
from cafe.report.sheets.published import class_sheet, published_sheet
from cafe.report.sheets.sheet import Sheet
from cafe.report.sheets.tests import ranks_sheet, tests_sheets
from cafe.results.columns import MEAN, Column
from cafe.results.comparison import ALL, NOTHING, Comparison, Row, check_evaluated, compare, compare_classes
from cafe.results.groups import FindManifest, Parted, Parting, part_rows
from cafe.results.leaks import leave_out_leaks
from cafe.results.metrics import METRICS, Estimate, choose_metrics
from cafe.results.protocols import ALL_PROTOCOLS, ProtocolName, find_protocol
from cafe.results.published import Published, publish_classes, publish_rows
from cafe.results.runs import Run
from cafe.results.scores import (
    Filter,
    Kept,
    LeftOut,
    describe_left_out,
    list_evaluated,
    meet,
    read_filtered_scores,
    share_sources,
)
from cafe.results.significance.paired_tests import Paired, Ranks, pair_rows, rank_rows
from cafe.results.significance.verdicts import Verdict, reach_verdicts
from cafe.results.sources import SAME_SET, SOURCE, UNSEEN
from cafe.results.variants import Trial, choose_draws, vary_runs


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
    further: Sequence[Comparison] = ()  # of the same rows by other metrics
    parting: Parting | None = None  # their accuracy by a column of the manifests
    target: str = ""
    verdicts: Sequence[Verdict] = ()  # one for each source
    left_out: Sequence[LeftOut] = ()  # predictions that do not belong beside the others; `about` says of what kinds


def make_report(
    runs: Sequence[Run],
    known: Mapping[str, str] | None = None,
    settings: ReportSettings | None = None,
    *,
    metrics: str = "accuracy",
    per_class: str | None = None,
    root: UPath | None = None,
    find_manifest: FindManifest | None = None,
    about: Sequence[str] = (),
) -> Report:
    """Compare runs, on all targets or by class on one, with paired tests against one method; raise `UserError`.

    `known` are the digests of the manifests by name. `root` is that of the workspace, whose audits found copies of the
    source's training faces: needed where the settings want columns without them. `about` is what else there is to say
    of these runs. Of several `metrics`, `NAME,NAME,…`, the first is that of the ranks and verdicts. `find_manifest` gives
    the faces of a target: needed where the settings part them by a column.
    """
    metric, *others = choose_metrics(metrics)
    settings = settings or ReportSettings()
    for option, needless in (("metrics", metrics if metrics != "accuracy" else ""), ("by", settings.by)):
        if per_class and needless:
            raise UserError(f"--per-class {per_class} shows recalls alone: leave --{option} {needless} out.")
    versus, known = settings.versus, known or {}
    runs, strangers = share_sources(runs, known)
    runs, trials = choose_draws(runs)
    runs, left_out = meet(runs, known)
    about = [*about, *strangers, *describe_left_out(left_out)]
    evaluated = list_evaluated(runs)
    protocol = settings.protocol or choose_protocol(evaluated)
    _check_left_out(evaluated, left_out, protocol)
    elsewhere = list_others(evaluated, protocol, settings.test_time)
    varied = vary_runs(runs, protocol, settings.test_time)
    if not varied:
        check_evaluated(evaluated, protocol)
    shown = [replace(run, shared_classes=settings.shared_classes) for run in (*runs, *varied)]
    filters: list[Filter | None] = [None]
    if settings.exclude_leaks:
        assert root is not None
        filters.append(leave_out_leaks(root))
    kept = Kept()
    scores, *others_left = read_filtered_scores(shown, known, [protocol], filters, kept)
    leak_free = others_left[0] if others_left else None
    said = [f"Protocol {protocol}: {find_protocol(protocol).about}"]
    if per_class:
        classes = compare_classes(shown, scores, per_class, protocol, kept)
        return _report_classes(classes, per_class, versus, [*said, *about], left_out)
    measured = [other for other in others if scores[other].notna().any()]
    if lacking := [METRICS[other].title for other in others if other not in measured]:
        about += [f"No target has what it takes to compute {', '.join(lacking)}."]
    comparison = compare(shown, scores, metric, protocol, leak_free, measured if others else None, kept)
    further = [compare(shown, scores, other, protocol, leak_free, (), kept) for other in measured]
    parting = None
    if settings.by:
        assert find_manifest is not None
        parting = part_rows(comparison, settings.by, find_manifest)
    report = _report_targets(comparison, further, settings, parting, trials)
    return replace(report, about=[*said, *elsewhere, *about], left_out=left_out)


def _report_targets(
    comparison: Comparison,
    further: Sequence[Comparison],
    settings: ReportSettings,
    parting: Parting | None,
    trials: Sequence[Trial],
) -> Report:
    """Return the report of a comparison on all targets, with further metrics, groups of faces, and the trials of a sweep."""
    published, ranks = publish_rows(comparison), rank_rows(comparison)
    tests = pair_rows(comparison, settings.versus) if settings.versus else []
    over_faces = faces_sheet(comparison)
    sheets = [main_sheet(comparison), *(main_sheet(other, first=False) for other in further)]
    sheets += groups_sheets(parting) if parting else []
    sheets += [*([over_faces] if over_faces else []), *matrix_sheets(comparison)]
    sheets += [published_sheet(comparison, published)] if any(published) else []
    sheets += printed_sheets(comparison) if settings.as_printed else []
    sheets += tests_sheets(tests) + ([ranks_sheet(ranks, comparison)] if ranks else [])
    sheets += [draws_sheet(trials, comparison)] if trials else []
    title, verdicts = "Trained on one data set, evaluated on all", reach_verdicts(comparison)
    return Report(title, [], sheets, comparison, published, tests, ranks, further, parting, verdicts=verdicts)


def _report_classes(
    classes: Comparison, target: str, versus: str | None, about: Sequence[str], left_out: Sequence[LeftOut]
) -> Report:
    published = publish_classes(classes)
    tests = pair_rows(classes, versus, target) if versus else []
    sheets = [class_sheet(classes, target, published), *tests_sheets(tests)]
    title = f"Every expression of {target}"
    return Report(title, [*about], sheets, classes, published, tests, target=target, left_out=left_out)


def choose_protocol(evaluated: Collection[str]) -> ProtocolName:
    """Return the protocol whose numbers are shown where none is asked for: the first by which any run was evaluated."""
    return next((name for name in get_args(ProtocolName) if name in evaluated), get_args(ProtocolName)[0])


def _check_left_out(evaluated: Collection[str], left_out: Sequence[LeftOut], protocol: str) -> None:
    """Raise `UserError` that names them where nothing but predictions of other faces than those of now was found."""
    own = [one for one in left_out if find_protocol(one.protocol).plain == protocol]
    missing = own if evaluated else left_out
    if missing and protocol not in evaluated:
        listed = "".join(f"\n  {line}" for line in describe_left_out(missing))
        raise UserError(
            f"All {len(missing)} predictions are of other faces than those that count now: evaluate the runs again.{listed}"
        )


def list_others(evaluated: Collection[str], protocol: str, test_time: Sequence[str] = ()) -> list[str]:
    """Return how else runs were evaluated than by a protocol and with these options, and how to see that."""
    said = []
    for other in map(find_protocol, ALL_PROTOCOLS):
        if other.name in evaluated:
            if not other.option and other.plain != protocol:
                said.append(f"Some of these runs were also evaluated by --protocol {other.name}: see its own table.")
            if other.option and other.option not in test_time and other.plain == protocol:
                said.append(
                    f"Some of these runs were also evaluated with --test-time {other.option}: name it to see its rows."
                )
    return said


def list_records(report: Report) -> Iterator[dict[str, object]]:
    """Yield what the CSV file holds, as fractions: one record per row and target or class, then the row's means.

    Of several metrics one after the other.
    """
    alone = not report.further  # else each of the others has records of its own
    yield from _list_records(report, report.comparison, report.published, beside=alone)
    for comparison in report.further:
        yield from _list_records(report, comparison, [None] * len(comparison.rows), beside=False)
    if parting := report.parting:
        for part in parting.parts:
            yield from _list_groups(report.comparison, part, parting.by)


def _list_groups(comparison: Comparison, part: Parted, by: str) -> Iterator[dict[str, object]]:
    """Yield the records of the groups of a target, and of the gap between the best and the worst of them."""
    row, gap = part.row, part.gap
    where: dict[str, object] = {"target": part.column.title, "role": _name_role(row, part.column), "metric": "accuracy"}
    where |= {"by": by}
    for group, share in zip(part.groups, part.shares, strict=True):
        found = Estimate(share.mean, math.nan, faces=share.faces, low=share.low, high=share.high)
        seeds = {"averaged": row.cells[part.column].count}
        yield _describe(comparison, row, {**where, "group": group}, found, math.nan) | seeds
    if gap:
        named = {**where, "group": f"{part.groups[gap.best]} less {part.groups[gap.worst]}"}
        faces = sum(share.faces for share in part.shares)
        tested = {"faces": faces, "accuracy_difference": gap.mean, "low": gap.low, "high": gap.high}
        tested |= {"p": gap.p, "p_holm": part.adjusted_p}
        yield _describe(comparison, row, named, NOTHING, math.nan) | tested


def _name_role(row: Row, column: Column) -> str:
    return SOURCE if column.name in row.sources else SAME_SET if column in row.seen else UNSEEN


def _list_records(
    report: Report, comparison: Comparison, published_rows: Sequence[Published | None], beside: bool
) -> Iterator[dict[str, object]]:
    """Yield the records of one metric, with the means of those `beside` it or without."""
    metric, tested = comparison.metric, {(id(test.row), test.column): test for test in report.tests}
    for row, published in zip(comparison.rows, published_rows, strict=True):
        numbers = published or Published({})
        for column, estimate in row.cells.items():
            where: dict[str, object] = {"target": report.target, "expression": column.title}
            if not report.target:
                where = {"target": column.title, "role": _name_role(row, column), "metric": metric}
            described = _describe(comparison, row, where, estimate, numbers.cells.get(column, math.nan))
            yield described | _describe_test(tested.get((id(row), None if column.part == MEAN else column)))
        for mean, estimate in row.means.items():
            if mean.metric != metric and not beside:
                continue
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
        "p": difference.p, "p_holm": test.adjusted_p,
        "seed_ranges_overlap": "" if test.overlap is None else str(test.overlap).lower(),
    }  # fmt: skip
