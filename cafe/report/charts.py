"""Charts drawn with matplotlib for a page: values with intervals, heat maps, mean ranks and training curves.

They have no background and one ink, which the page replaces by the colour of its text, light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cafe.results.significance.statistics import Ranking
from cafe.results.units import PERCENT, Unit

INK, ACCENT = "#010203", "#c8763a"  # nothing else has the ink's colour, so that it can be replaced
COOL = "#4a86c5"  # of what is below a mean, where the accent is above it
LINE = 0.3  # height of a chart's line in inches
LETTER = 0.08  # and the width of a letter
WIDTH = 5.4
POINTS = ["name", "value", "low", "high", "published"]  # columns of what `draw_points` draws


def draw_points(
    points: pd.DataFrame,
    label: str,
    limits: tuple[float, float],
    zero: bool = False,
    chance: float = math.nan,
    unit: Unit = PERCENT,
) -> Figure:
    """Draw values with their intervals in a unit, one to a line; `zero` marks where nothing differs, a dashed line chance.

    `points` has the columns `POINTS`, published NaN where there is none; `limits` are the ends of the axis, the same for all
    figures that are to be compared. All numbers are as they were computed, shares from 0 to 1.
    """
    figure = Figure(figsize=(WIDTH, len(points) * LINE + 0.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(points))
    values, lows, highs, published = (unit.scale * points[name].to_numpy(float) for name in POINTS[1:])
    reach = [values - lows, highs - values]
    axes.errorbar(values, places, xerr=reach, fmt="o", color=ACCENT, markersize=5.5, elinewidth=1.6, capsize=3)
    axes.plot(published, places, "D", color="none", markeredgecolor=INK, markersize=6, markeredgewidth=1.1)
    axes.set_yticks(places, points["name"])
    axes.set_ylim(len(points) - 0.5, -0.5)
    margin = 0.04 * (limits[1] - limits[0]) or 0.01
    axes.set_xlim(unit.scale * (limits[0] - margin), unit.scale * (limits[1] + margin))
    axes.set_xlabel(label, color=INK)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
    if zero:
        axes.axvline(0, color=INK, linewidth=1)
    if not math.isnan(chance):
        axes.axvline(unit.scale * chance, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        axes.set_xlabel(f"{label}; dashed: chance, {unit.write(chance)}", color=INK)
    ink(axes)
    return figure


def draw_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    limits: tuple[float, float],
    seen: np.ndarray,
    unit: Unit = PERCENT,
) -> Figure:
    """Draw values (rows, columns) as coloured cells, written in a unit; those `seen` in training in brackets.

    `limits` are the values of the palest and the strongest colour, the same for all maps of a page.
    """
    size = (0.95 + 0.078 * max(map(len, rows)) + 0.72 * len(columns), 0.75 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    low, high = limits
    # Cells, not an image, so that they print sharp at any size.
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high, edgecolors="none")
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30, ha="left", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = f"({unit.write(value)})" if seen[row, column] else unit.write(value)
            colour = "white" if (value - low) < 0.6 * (high - low) else "#111"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=colour)
    ink(axes)
    return figure


def draw_ranks(labels: Sequence[str], ranking: Ranking) -> Figure:
    """Draw mean ranks along a line as Demšar does, the best on the left.

    Bars join methods that do not differ significantly.
    """
    ranks, count, critical = ranking.ranks, len(labels), ranking.critical_difference
    bars = find_ties(ranks, critical)
    left = math.ceil(count / 2)  # names hang below the line, the better half to its left and the others to its right
    depth = 0.5 + 0.28 * len(bars)
    line = max(2.2, 0.3 * (count - 1))  # inches from the first rank to the last
    sides = [0.3 + LETTER * (5 + max(map(len, names))) for names in (labels[:left], labels[left:])]
    figure = Figure(figsize=(line + sum(sides), 0.8 + 0.3 * (depth / 0.5 + left)), layout="constrained")
    axes = figure.subplots()
    unit = (count - 1) / line  # ranks in an inch
    axes.set_xlim(1 - unit * sides[0], count + unit * sides[1])
    axes.set_ylim(depth + 0.5 * left, -1.1)
    axes.plot([1, count], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, -0.15], color=INK, linewidth=1.2)
        axes.text(tick, -0.25, str(tick), ha="center", va="bottom", color=INK, fontsize=9)
    for place, (label, rank) in enumerate(zip(labels, ranks, strict=True)):
        depth_here = depth + 0.5 * min(place, count - 1 - place)
        end, gap, side = (1 - 0.1 * unit, -0.05, "right") if place < left else (count + 0.1 * unit, 0.05, "left")
        axes.plot([rank, rank, end], [0, depth_here, depth_here], color=INK, linewidth=0.9)
        text = f"{label}  {rank:.2f}"
        axes.text(end + gap * unit, depth_here, text, ha=side, va="center", color=INK, fontsize=9.5)
    for number, (first, last) in enumerate(bars):
        height = 0.3 + 0.28 * number
        axes.plot([ranks[first] - 0.03, ranks[last] + 0.03], [height, height], color=ACCENT, linewidth=4)
    if not math.isnan(critical):
        axes.plot([1, 1 + critical], [-0.85, -0.85], color=ACCENT, linewidth=2, marker="|")
        axes.text(1 + critical + 0.05, -0.85, "critical difference", va="center", color=INK, fontsize=9)
    axes.axis("off")
    return figure


def draw_curves(epochs: pd.DataFrame, chance: float) -> Figure:
    """Draw how the trainings of a row went, a line per run: the loss, and the accuracy in percent; dashed where held out.

    A dotted line shows what guessing among K classes would give, `chance` (0–1).

    `epochs` has the columns run, epoch and any of train/total, train/accuracy and selection/accuracy (0–1).
    """
    figure = Figure(figsize=(2 * WIDTH, 2.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for _, own in epochs.groupby("run"):
        for axes, name, scale, style in (
            (panels[0], "train/total", 1, "-"),
            (panels[1], "train/accuracy", 100, "-"),
            (panels[1], "selection/accuracy", 100, "--"),
        ):
            if name in own:
                axes.plot(own["epoch"], scale * own[name], style, marker=".", color=ACCENT, linewidth=1.4, markersize=5)
    panels[1].axhline(100 * chance, color=INK, linewidth=1, linestyle=":", alpha=0.6)
    for axes, label in zip(panels, ("loss", "accuracy, percent"), strict=True):
        axes.set_xlabel("epoch", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        ink(axes)
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
    """Return a figure as an SVG element for a page, its ids made the page's own by `name`; `about` is for screen readers."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1)


def ink(axes: Axes) -> None:
    """Write the labels of axes in the one ink, without a frame."""
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
