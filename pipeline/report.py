"""Everything that is said of a comparison: its tables, its figures, and the records behind them, for any output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from cafe.errors import UserError
from cafe.report.charts import Point, draw_heat_map, draw_points, draw_ranks, find_limits
from cafe.results.metrics import Estimate
from cafe.results.protocols import find_protocol
from cafe.results.published import ACCURACY
from pipeline.compare import ClassRow, Comparison, Group, compare, compare_classes
from pipeline.sheets import (
    Sheet,
    by_label,
    class_sheet,
    main_sheet,
    matrix_sheets,
    published_sheet,
    ranks_sheet,
    tests_sheets,
)
from pipeline.tracking import TrackedRun
from pipeline.versus import (
    Paired,
    Published,
    Ranks,
    find_published_class_rows,
    find_published_rows,
    is_elsewhere,
    pair_rows,
    rank,
)
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Drawing:
    """A figure to a sheet, with its caption; drawn only when an output shows it."""

    sheet: str  # the title of the sheet it belongs to
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Report:
    """All that is said of a comparison, for any output."""

    title: str
    about: list[str]  # the protocol, and what else holds for all sheets
    sheets: list[Sheet]
    records: list[dict[str, object]]  # of the CSV file: one per row and target
    drawings: list[Drawing]


def make_report(
    workspace: Workspace,
    runs: list[TrackedRun],
    metric: str = "accuracy",
    protocol: str = "clean",
    per_class: str | None = None,
    versus: str | None = None,
    leak_free: bool = False,
) -> Report:
    """Compare runs, on all targets or by expression on one, with tests against one method; raise `UserError`."""
    if per_class and versus:
        raise UserError("--versus tests the accuracy over all expressions: leave it or --per-class out.")
    if per_class:
        rows = compare_classes(runs, per_class, protocol)
        return _report_classes(
            rows, per_class, protocol, find_published_class_rows(workspace, rows, per_class, protocol)
        )
    comparison = compare(runs, metric, protocol, leak_free)
    tests = pair_rows(workspace, comparison, versus) if versus else []
    report = _report(comparison, find_published_rows(workspace, comparison), tests, rank(comparison))
    if any(is_elsewhere(workspace, row) for row in comparison.rows if row.method in ACCURACY):
        report.about.append(f"Runs that are not in {workspace.root} have no published numbers beside them.")
    return report


def report_comparison(comparison: Comparison) -> Report:
    """Report what needs no predictions: the estimates and the ranks."""
    return _report(comparison, [None] * len(comparison.rows), [], rank(comparison))


def _report(
    comparison: Comparison, published: Sequence[Published | None], tests: list[Paired], ranks: Ranks | None
) -> Report:
    main = main_sheet(comparison)
    sheets = [main, *matrix_sheets(comparison)]
    drawings = [*_draw_means(main, comparison, published), *_draw_maps(main, comparison)]
    if any(published):
        sheets.append(published_sheet(comparison, published))
    if tests:
        sheets += (by_source := tests_sheets(tests))
        drawings += _draw_tests(by_source, tests)
    if ranks:
        sheets.append(ranks_sheet(ranks, comparison))
        drawings += _draw_ranks(sheets[-1], ranks)
    about = [describe_protocol(comparison.protocol)] + [
        f"Some of these runs were also judged by --protocol {name}: see its own table." for name in comparison.others
    ]
    title = "Trained on one data set, judged on all"
    records = list(_records(comparison, published, tests))
    return Report(title, about, sheets, records, drawings)


def describe_protocol(protocol: str) -> str:
    """Say how the targets of a table were judged: numbers of two protocols are not comparable."""
    return f"Protocol {protocol}: {find_protocol(protocol).about}"


def _draw_means(main: Sheet, comparison: Comparison, published: Sequence[Published | None]) -> list[Drawing]:
    sources: dict[str, list[Point]] = {}
    for row, numbers in zip(comparison.rows, published, strict=True):
        if not math.isnan(row.unseen.mean):
            name = f"{row.label} †" if row.peeked else row.label
            point = Point.of(name, row.unseen, numbers.unseen if numbers else math.nan)
            sources.setdefault(row.source, []).append(point)
    everything = [point for points in sources.values() for point in points]
    diamonds = " Diamonds: published." if any(not math.isnan(point.published) for point in everything) else ""
    metric = comparison.metric.replace("_", " ")
    about = f"mean {metric} over the unseen targets with its 95 % t-interval over seeds.{diamonds}"
    return [
        Drawing(
            main.title,
            f"Trained on {source}: {about}",
            partial(draw_points, points, "percent", find_limits(everything)),
        )
        for source, points in sources.items()
    ]


def _draw_maps(main: Sheet, comparison: Comparison) -> Iterator[Drawing]:
    """A map of each method over sources and targets; with one source, a single one of methods and targets."""
    metric = comparison.metric.replace("_", " ")
    by_method = [(label, rows, [row.source for row in rows]) for label, rows in by_label(comparison)]
    source = comparison.rows[0].source
    across = "source × target" if by_method else "method × target"
    maps = by_method or [(f"Trained on {source}", comparison.rows, [row.label for row in comparison.rows])]
    means = [estimate.mean for row in comparison.rows for estimate in row.targets.values()]
    if np.isnan(means).all():  # nothing was judged on its protocol's split
        return
    limits = (float(np.nanmin(means)), float(np.nanmax(means)))
    for name, rows, names in maps:
        values = np.array([[estimate.mean for estimate in row.targets.values()] for row in rows])
        seen = np.array([[target == row.source for target in comparison.targets] for row in rows])
        drawing = partial(draw_heat_map, names, comparison.targets, values, limits, seen)
        yield Drawing(main.title, f"{name}: {metric} of {across} in percent; in brackets the source itself.", drawing)


def _draw_tests(sheets: list[Sheet], tests: list[Paired]) -> list[Drawing]:
    titles = dict(zip(dict.fromkeys(test.row.source for test in tests), (sheet.title for sheet in sheets), strict=True))
    pairs: dict[tuple[str, str], list[Point]] = {}
    for test in tests:
        target = f"({test.target})" if test.seen else test.target or "mean of unseen"
        name = f"{test.row.label} against {test.reference.label}, trained on {test.row.source}"
        point = Point(target, test.difference.mean, test.difference.low, test.difference.high)
        pairs.setdefault((titles[test.row.source], name), []).append(point)
    low, high = find_limits([point for points in pairs.values() for point in points])
    return [
        Drawing(
            title,
            f"{name}: difference of accuracy with its 95 % interval over faces; left of zero the reference is ahead.",
            partial(draw_points, points, "percentage points", (min(low, 0.0), max(high, 0.0)), zero=True),
        )
        for (title, name), points in pairs.items()
    ]


def _draw_ranks(sheet: Sheet, ranks: Ranks) -> list[Drawing]:
    caption = "Mean ranks over pairs of source and unseen target. A bar joins methods that cannot be told apart."
    drawing = Drawing(sheet.title, caption, partial(draw_ranks, ranks.labels, ranks.ranking))
    return [] if math.isnan(ranks.ranking.p) else [drawing]


def _records(
    comparison: Comparison, published: Sequence[Published | None], tests: list[Paired]
) -> Iterator[dict[str, object]]:
    """One record per row and target, then its means; fractions, not percent."""
    metric, tested = comparison.metric, {(id(test.row), test.target): test for test in tests}
    for row, numbers in zip(comparison.rows, published, strict=True):
        unseen, everything = (numbers.unseen, numbers.everything) if numbers else (math.nan, math.nan)
        cells = {
            (target, "source" if target == row.source else "unseen", metric): (
                estimate, numbers.targets.get(target, math.nan) if numbers else math.nan, tested.get((id(row), target))
            )
            for target, estimate in row.targets.items()
        }  # fmt: skip
        cells["mean of unseen", "mean", "macro_f1"] = (row.unseen_macro_f1, math.nan, None)
        cells["mean of unseen", "mean", metric] = (row.unseen, unseen, tested.get((id(row), "")))
        cells["mean of all", "mean", metric] = (row.everything, everything, None)
        for (target, role, name), numbers_of_cell in cells.items():
            where = {"target": target, "role": role, "metric": name}
            yield {**_identity(row, comparison.protocol), **where, **_numbers(*numbers_of_cell)}


def _identity(row: Group, protocol: str) -> dict[str, object]:
    selection = row.runs[0].params.get("selection", "final")
    named = {"protocol": protocol, "source": row.source, "method": row.method, "variant": row.variant}
    return {**named, "selection": selection, "seeds": row.seeds}


def _numbers(estimate: Estimate, published: float, test: Paired | None = None) -> dict[str, object]:
    numbers: dict[str, object] = {"mean": estimate.mean, "half_width": estimate.half_width, "published": published}
    if test:
        difference = test.difference
        numbers |= {"versus": test.reference.label, "faces": difference.samples, "accuracy_difference": difference.mean}
        numbers |= {"low": difference.low, "high": difference.high, "p": difference.p, "p_holm": test.adjusted_p}
        numbers |= {"seeds_apart": "" if test.apart is None else str(test.apart).lower()}
    return numbers


def _report_classes(rows: list[ClassRow], target: str, protocol: str, published: list[dict[str, float]]) -> Report:
    records = [
        {
            **_identity(row, protocol),
            "target": target,
            "expression": name,
            **_numbers(estimate, numbers.get(name, math.nan)),
        }
        for row, numbers in zip(rows, published, strict=True)
        for name, estimate in row.values.items()
    ]
    values = np.array([[estimate.mean for estimate in row.values.values()] for row in rows])
    seen = np.array([[row.source == target] * values.shape[1] for row in rows])
    labels = [f"{row.source}: {row.label}" for row in rows]
    drawing = partial(draw_heat_map, labels, list(rows[0].values), values, (0.0, 1.0), seen)
    title = f"Every expression of {target}"
    sheets = [class_sheet(rows, target, published)]
    return Report(
        title, [describe_protocol(protocol)], sheets, records, [Drawing(sheets[0].title, f"{title}, percent.", drawing)]
    )
