"""Pictures of a comparison, drawn with matplotlib to be set into a page: accuracy, heat maps, differences and mean ranks.

They are drawn on nothing in one ink, which a page replaces by the colour of its text, light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cafe.results.metrics import Estimate
from cafe.results.statistics import Ranking

INK, ACCENT = "#010203", "#c8763a"  # the ink is a colour nothing else has, so that it can be replaced
LINE = 0.3  # inches of a line of a chart
WIDTH = 5.4


@dataclass(frozen=True)
class Point:
    """A line of a chart: a name, a value with its interval (0–1), and the published value, NaN without one."""

    name: str
    value: float
    low: float
    high: float
    published: float = math.nan

    @classmethod
    def of(cls, name: str, estimate: Estimate, published: float = math.nan) -> Point:
        """Return the line of an estimate over seeds; a single one has no interval."""
        half_width = 0 if math.isnan(estimate.half_width) else estimate.half_width
        return cls(name, estimate.mean, estimate.mean - half_width, estimate.mean + half_width, published)


def draw_points(points: Sequence[Point], label: str, limits: tuple[float, float], zero: bool = False) -> Figure:
    """Draw values with their intervals in percent, a line each; `zero` marks where nothing differs.

    `limits` are the ends of the axis in 0–1, the same for all figures that are to be compared.
    """
    figure = Figure(figsize=(WIDTH, len(points) * LINE + 0.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(points))
    values, lows, highs = (100 * np.array([getattr(p, name) for p in points]) for name in ("value", "low", "high"))
    axes.errorbar(
        values,
        places,
        xerr=[values - lows, highs - values],
        fmt="o",
        color=ACCENT,
        markersize=5.5,
        elinewidth=1.6,
        capsize=3,
    )
    published = 100 * np.array([point.published for point in points])
    axes.plot(published, places, "D", color="none", markeredgecolor=INK, markersize=6, markeredgewidth=1.1)
    axes.set_yticks(places, [point.name for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    margin = 0.04 * (limits[1] - limits[0]) or 0.01
    axes.set_xlim(100 * (limits[0] - margin), 100 * (limits[1] + margin))
    axes.set_xlabel(label, color=INK)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
    if zero:
        axes.axvline(0, color=INK, linewidth=1)
    _ink(axes)
    return figure


def find_limits(points: Sequence[Point]) -> tuple[float, float]:
    """Return the smallest and the largest of what points show."""
    shown = np.array([[point.low, point.high, point.published] for point in points])
    return float(np.nanmin(shown)), float(np.nanmax(shown))


def draw_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, limits: tuple[float, float], seen: np.ndarray
) -> Figure:
    """Draw values (rows, columns) in 0–1 as coloured cells with their percent; those `seen` in training in brackets.

    `limits` are the values of the palest and the strongest colour, the same for all maps of a page.
    """
    longest = max(map(len, rows))
    figure = Figure(
        figsize=(0.95 + 0.078 * longest + 0.72 * len(columns), 0.75 + 0.42 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    low, high = limits
    # Cells, not an image, so that they print sharp at any size.
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high, edgecolors="none")
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30, ha="left", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if not np.isnan(value):
            text = f"({100 * value:.1f})" if seen[row, column] else f"{100 * value:.1f}"
            dark = (value - low) < 0.6 * (high - low)
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color="white" if dark else "#111"
            )
    _ink(axes)
    return figure


def draw_ranks(labels: Sequence[str], ranking: Ranking) -> Figure:
    """Draw mean ranks on a line, the best on the left, as Demšar does: bars join what cannot be told apart."""
    ranks, count = ranking.ranks, len(labels)
    bars = find_ties(ranks, ranking.critical_difference)
    left = math.ceil(count / 2)  # names hang below the line, the better half to its left and the others to its right
    depth = 0.5 + 0.28 * len(bars)
    figure = Figure(figsize=(WIDTH, 0.8 + 0.3 * (depth / 0.5 + left)), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(1 - 0.75 * (count - 1) / 2, count + 0.75 * (count - 1) / 2)
    axes.set_ylim(depth + 0.5 * left, -1.1)
    axes.plot([1, count], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, -0.15], color=INK, linewidth=1.2)
        axes.text(tick, -0.25, str(tick), ha="center", va="bottom", color=INK, fontsize=9)
    for place, (label, rank) in enumerate(zip(labels, ranks, strict=True)):
        near = place < left
        line = depth + 0.5 * (place if near else count - 1 - place)
        end = 0.9 if near else count + 0.1
        axes.plot([rank, rank, end], [0, line, line], color=INK, linewidth=0.9)
        side = "right" if near else "left"
        gap = (-0.04 if near else 0.04) * count / 3
        axes.text(end + gap, line, f"{label}  {rank:.2f}", ha=side, va="center", color=INK, fontsize=9.5)
    for number, (first, last) in enumerate(bars):
        height = 0.3 + 0.28 * number
        axes.plot([ranks[first] - 0.03, ranks[last] + 0.03], [height, height], color=ACCENT, linewidth=4)
    if not math.isnan(ranking.critical_difference):
        axes.plot([1, 1 + ranking.critical_difference], [-0.85, -0.85], color=ACCENT, linewidth=2, marker="|")
        axes.text(
            1 + ranking.critical_difference + 0.05, -0.85, "critical difference", va="center", color=INK, fontsize=9
        )
    axes.axis("off")
    return figure


def find_ties(ranks: Sequence[float], critical_difference: float) -> list[tuple[int, int]]:
    """Return the longest stretches (first, last) of ascending ranks that lie within the critical difference."""
    stretches: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = max(place for place, other in enumerate(ranks) if place == first or other - rank < critical_difference)
        if last > first and not (stretches and stretches[-1][1] >= last):
            stretches.append((first, last))
    return stretches


def to_svg(figure: Figure, name: str, about: str) -> str:
    """Return a figure as an SVG element for a page, its ids made the page's own by `name`; `about` is read out."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1)


def _ink(axes: Axes) -> None:
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
