"""Everything that is said of a comparison: its tables, its figures, and the records behind them, for any output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from cafe.charts import Point, draw_heat_map, draw_points, draw_ranks
from cafe.errors import UserError
from cafe.metrics import Estimate
from cafe.protocols import find_protocol
from pipeline.compare import ClassRow, Comparison, Group, compare, compare_classes
from pipeline.sheets import (
    Sheet,
    by_label,
    class_sheet,
    main_sheet,
    matrix_sheets,
    published_sheet,
    ranks_sheet,
    tests_sheet,
)
from pipeline.tracking import TrackedRun
from pipeline.versus import (
    Paired,
    Published,
    Ranks,
    find_published_class_rows,
    find_published_rows,
    pair_rows,
    rank,
)
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption, drawn only when an output shows it."""

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
    return _report(comparison, find_published_rows(workspace, comparison), tests, rank(comparison))


def report_comparison(comparison: Comparison) -> Report:
    """Report what needs no predictions: the estimates and the ranks."""
    return _report(comparison, [None] * len(comparison.rows), [], rank(comparison))


def _report(
    comparison: Comparison, published: Sequence[Published | None], tests: list[Paired], ranks: Ranks | None
) -> Report:
    sheets = [main_sheet(comparison), *matrix_sheets(comparison)]
    sheets += [published_sheet(comparison, published)] if any(published) else []
    sheets += [tests_sheet(tests)] if tests else []
    sheets += [ranks_sheet(ranks, comparison)] if ranks else []
    about = [describe_protocol(comparison.protocol)] + [
        f"Some of these runs were also judged by --protocol {name}: see its own table." for name in comparison.others
    ]
    title = "Trained on one data set, judged on all"
    records = list(_records(comparison, published, tests))
    return Report(title, about, sheets, records, list(_drawings(comparison, published, tests, ranks)))


def describe_protocol(protocol: str) -> str:
    """Say how the targets of a table were judged: numbers of two protocols are not comparable."""
    return f"Protocol {protocol}: {find_protocol(protocol).about}"


def _drawings(
    comparison: Comparison, published: Sequence[Published | None], tests: list[Paired], ranks: Ranks | None
) -> Iterator[Drawing]:
    metric = comparison.metric.replace("_", " ")
    panels: dict[str, list[Point]] = {}
    for row, numbers in zip(comparison.rows, published, strict=True):
        if not math.isnan(row.unseen.mean):
            name = f"{row.label} †" if row.peeked else row.label
            point = Point.of(name, row.unseen, numbers.unseen if numbers else math.nan)
            panels.setdefault(f"trained on {row.source}", []).append(point)
    if panels:
        diamonds = (
            " Diamonds: published." if any(not math.isnan(p.published) for ps in panels.values() for p in ps) else ""
        )
        yield Drawing(
            f"Mean {metric} over the unseen targets with its 95 % t-interval over seeds.{diamonds}",
            partial(draw_points, list(panels.items()), "percent"),
        )
    maps = [(f"{label}: source × target", "source", rows) for label, rows in by_label(comparison)]
    maps = maps or [(f"Trained on {comparison.rows[0].source}: method × target", "label", comparison.rows)]
    means = [estimate.mean for row in comparison.rows for estimate in row.targets.values()]
    limits = (float(np.nanmin(means)), float(np.nanmax(means)))
    for caption, name, rows in maps:
        values = np.array([[estimate.mean for estimate in row.targets.values()] for row in rows])
        seen = np.array([[target == row.source for target in comparison.targets] for row in rows])
        names = [getattr(row, name) for row in rows]
        drawing = partial(draw_heat_map, names, comparison.targets, values, limits, seen)
        yield Drawing(f"{caption}, {metric} in percent; in brackets the source itself.", drawing)
    if tests:
        differences: dict[str, list[Point]] = {}
        for test in tests:
            target = f"({test.target})" if test.seen else test.target or "mean of unseen"
            title = f"{test.row.label} − {test.reference.label}, trained on {test.row.source}"
            point = Point(target, test.difference.mean, test.difference.low, test.difference.high)
            differences.setdefault(title, []).append(point)
        yield Drawing(
            "Accuracy less that of the reference, with its 95 % interval over faces; left of zero the reference is ahead.",
            partial(draw_points, list(differences.items()), "percentage points", zero=True),
        )
    if ranks and not math.isnan(ranks.ranking.p):
        yield Drawing(
            "Mean ranks over pairs of source and unseen target. A bar joins methods that cannot be told apart.",
            partial(draw_ranks, ranks.labels, ranks.ranking),
        )


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
    labels = [f"{row.source}: {row.label}" for row in rows]
    drawing = partial(draw_heat_map, labels, list(rows[0].values), values, (0.0, 1.0), np.zeros(values.shape, bool))
    title = f"Every expression of {target}"
    sheets = [class_sheet(rows, target, published)]
    return Report(title, [describe_protocol(protocol)], sheets, records, [Drawing(f"{title}, percent.", drawing)])
