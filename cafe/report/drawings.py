"""The figures of a report: means and heat maps of what was measured, differences of what was tested, and mean ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cafe.report.charts import POINTS, draw_heat_map, draw_points, draw_ranks, find_ties
from cafe.report.report import Report
from cafe.report.sheets.comparison import by_label
from cafe.report.sheets.tests import name_target
from cafe.results.metrics import METRICS
from cafe.results.significance.paired_tests import Ranks


class Drawing(NamedTuple):
    """A figure, its caption, and the title of the sheet it belongs to."""

    sheet: str
    caption: str
    figure: Figure


def list_drawings(report: Report) -> list[Drawing]:
    """Draw the figures of a report, in the order of its sheets."""
    return [*_draw_means(report), *_draw_maps(report), *_draw_tests(report), *_draw_ranks(report)]


def _draw_means(report: Report) -> Iterator[Drawing]:
    records = []
    for row, numbers in zip(report.comparison.rows, report.published, strict=True):
        name, mean = f"{row.label} †" if row.peeked else row.label, row.unseen.mean
        low, high = row.unseen.over_seeds
        ends = (mean, mean) if math.isnan(low) else (low, high)  # of a single seed
        published, chance = numbers.unseen if numbers else math.nan, row.unseen.chance
        records.append((row.source, row.class_set, chance, name, mean, *ends, published))
    points = pd.DataFrame(records, columns=["source", "class_set", "chance", *POINTS]).dropna(subset="value")
    shown = points[["low", "high", "published", "chance"]]
    limits = (shown.min().min(), shown.max().max())
    diamonds = " Diamonds: published." if points["published"].notna().any() else ""
    metric = METRICS[report.comparison.metric]
    about = f"mean {metric.title} over the unseen targets with its 95 % t-interval over seeds"
    for (source, class_set), own in points.groupby(["source", "class_set"], sort=False):
        over = f", {class_set}" if class_set else ""
        caption = f"Trained on {source}{over}: {about}.{diamonds}"
        figure = draw_points(own, metric.unit.name, limits, chance=own["chance"].max(), unit=metric.unit)
        yield Drawing(report.sheets[0].title, caption, figure)


def _draw_maps(report: Report) -> Iterator[Drawing]:
    """A map of each method over sources and targets; with one source, a single one of methods and targets."""
    comparison, metric = report.comparison, METRICS[report.comparison.metric]
    maps = [(label, rows, [row.source for row in rows]) for label, rows in by_label(comparison)]
    across = "source × target" if maps else "method × target"
    labels = [row.label for row in comparison.rows]
    maps = maps or [(f"Trained on {comparison.rows[0].source}", comparison.rows, labels)]
    means = [estimate.mean for row in comparison.rows for estimate in row.cells.values()]
    if not means or np.isnan(means).all():  # nothing was evaluated on its protocol's split
        return
    limits = (float(np.nanmin(means)), float(np.nanmax(means)))
    for name, rows, names in maps:
        values = np.array([[estimate.mean for estimate in row.cells.values()] for row in rows])
        seen = np.array([[column in row.seen for column in comparison.columns] for row in rows])
        caption = f"{name}: {metric.title} of {across}, {metric.unit.name}; in brackets the set it was trained on."
        figure = draw_heat_map(
            names, [column.title for column in comparison.columns], values, limits, seen, metric.unit
        )
        yield Drawing(report.sheets[0].title, caption, figure)


def _draw_tests(report: Report) -> Iterator[Drawing]:
    records = []
    for test in report.tests:
        pair = (test.row.source, test.reference.label, test.row.label)
        values = (test.difference.mean, test.difference.low, test.difference.high)
        records.append((*pair, name_target(test), *values, math.nan))
    points = pd.DataFrame(records, columns=["source", "reference", "row", *POINTS])
    limits = (min(points["low"].min(), 0.0), max(points["high"].max(), 0.0))
    about = "difference of accuracy with its 95 % interval over faces; left of zero the reference is ahead"
    for (source, reference, row), own in points.groupby(["source", "reference", "row"], sort=False):
        caption = f"{row} against {reference}, trained on {source}: {about}."
        figure = draw_points(own, "percentage points", limits, zero=True)
        yield Drawing(f"Against {reference}, trained on {source}", caption, figure)


def _draw_ranks(report: Report) -> Iterator[Drawing]:
    if report.ranks and not math.isnan(report.ranks.ranking.p):
        caption = (
            "Mean ranks over pairs of source and unseen target. A bar joins ranks that do not differ significantly."
        )
        caption += "".join(f" {sentence}" for sentence in _explain_ties(report, report.ranks))
        yield Drawing("Mean ranks", caption, draw_ranks(report.ranks.labels, report.ranks.ranking))


def _explain_ties(report: Report, ranks: Ranks) -> Iterator[str]:
    """Yield why a bar joins two methods that differ significantly by a paired test."""
    labels, joined = ranks.labels, find_ties(ranks.ranking.ranks, ranks.ranking.critical_difference)
    tied = {frozenset(pair) for first, last in joined for pair in combinations(labels[first : last + 1], 2)}
    tests = (*report.tests, *(test for verdict in report.verdicts for test in verdict.tests))
    found: dict[frozenset[str], dict[str, None]] = {}
    for test in tests:
        if test.column is None and test.holds and (pair := frozenset((test.row.label, test.reference.label))) in tied:
            found.setdefault(pair, {})[test.row.source] = None
    for pair, sources in found.items():
        yield (
            f"{' and '.join(sorted(pair))} are joined though they differ significantly by the paired test (trained on "
            f"{', '.join(sources)}): ranks count {ranks.ranking.targets} pairs of sets alike, the test every face."
        )
