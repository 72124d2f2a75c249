"""Which figures a report has: means and maps of what was measured, differences of what was tested, and mean ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from cafe.report.charts import Point, draw_heat_map, draw_points, draw_ranks, find_limits
from cafe.report.report import Report
from cafe.report.sheets import by_label, name_target
from cafe.results.metrics import TITLES


@dataclass(frozen=True)
class Drawing:
    """A figure to a sheet, with its caption; drawn only when it is shown."""

    sheet: str  # the title of the sheet it belongs to
    caption: str
    draw: Callable[[], Figure]


def list_drawings(report: Report) -> list[Drawing]:
    """Return the figures of a report, in the order of its sheets."""
    if report.target:
        return [_draw_classes(report)]
    return [*_draw_means(report), *_draw_maps(report), *_draw_tests(report), *_draw_ranks(report)]


def _draw_means(report: Report) -> Iterator[Drawing]:
    sources: dict[str, list[Point]] = {}
    for row, numbers in zip(report.comparison.rows, report.published, strict=True):
        if not math.isnan(row.unseen.mean):
            name = f"{row.label} †" if row.peeked else row.label
            point = Point.of(name, row.unseen, numbers.unseen if numbers else math.nan)
            sources.setdefault(row.source, []).append(point)
    everything = [point for points in sources.values() for point in points]
    diamonds = " Diamonds: published." if any(not math.isnan(point.published) for point in everything) else ""
    about = f"mean {TITLES[report.comparison.metric]} over the unseen targets with its 95 % t-interval over seeds"
    for source, points in sources.items():
        draw = partial(draw_points, points, "percent", find_limits(everything))
        yield Drawing(report.sheets[0].title, f"Trained on {source}: {about}.{diamonds}", draw)


def _draw_maps(report: Report) -> Iterator[Drawing]:
    """A map of each method over sources and targets; with one source, a single one of methods and targets."""
    comparison = report.comparison
    by_method = [(label, rows, [row.source for row in rows]) for label, rows in by_label(comparison)]
    across = "source × target" if by_method else "method × target"
    labels = [row.label for row in comparison.rows]
    maps = by_method or [(f"Trained on {comparison.rows[0].source}", comparison.rows, labels)]
    means = [estimate.mean for row in comparison.rows for estimate in row.cells.values()]
    if not means or np.isnan(means).all():  # nothing was judged on its protocol's split
        return
    limits = (float(np.nanmin(means)), float(np.nanmax(means)))
    for name, rows, names in maps:
        values = np.array([[estimate.mean for estimate in row.cells.values()] for row in rows])
        seen = np.array([[column in row.seen for column in comparison.columns] for row in rows])
        title = f"{name}: {TITLES[comparison.metric]} of {across} in percent; in brackets the set it was trained on."
        draw = partial(draw_heat_map, names, comparison.columns, values, limits, seen)
        yield Drawing(report.sheets[0].title, title, draw)


def _draw_tests(report: Report) -> Iterator[Drawing]:
    pairs: dict[tuple[str, str], list[Point]] = {}
    for test in report.tests:
        sheet = f"Against {test.reference.label}, trained on {test.row.source}"
        name = f"{test.row.label} against {test.reference.label}, trained on {test.row.source}"
        point = Point(name_target(test), test.difference.mean, test.difference.low, test.difference.high)
        pairs.setdefault((sheet, name), []).append(point)
    if not pairs:
        return
    low, high = find_limits([point for points in pairs.values() for point in points])
    limits = (min(low, 0.0), max(high, 0.0))
    about = "difference of accuracy with its 95 % interval over faces; left of zero the reference is ahead"
    for (sheet, name), points in pairs.items():
        yield Drawing(sheet, f"{name}: {about}.", partial(draw_points, points, "percentage points", limits, zero=True))


def _draw_ranks(report: Report) -> Iterator[Drawing]:
    if report.ranks and not math.isnan(report.ranks.ranking.p):
        caption = "Mean ranks over pairs of source and unseen target. A bar joins methods that cannot be told apart."
        yield Drawing("Mean ranks", caption, partial(draw_ranks, report.ranks.labels, report.ranks.ranking))


def _draw_classes(report: Report) -> Drawing:
    comparison = report.comparison
    values = np.array([[estimate.mean for estimate in row.cells.values()] for row in comparison.rows])
    seen = np.array([[bool(row.seen)] * values.shape[1] for row in comparison.rows])
    labels = [f"{row.source}: {row.label}" for row in comparison.rows]
    draw = partial(draw_heat_map, labels, comparison.columns, values, (0.0, 1.0), seen)
    return Drawing(report.sheets[0].title, f"{report.title}, percent.", draw)
