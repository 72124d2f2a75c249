"""Pictures of one run on one target, drawn with matplotlib: confusion matrix, error gallery, and what the mask selects."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from cafe.data.expressions import EXPRESSIONS
from cafe.results.predictions import Predictions

NAMES = [name.capitalize() for name in EXPRESSIONS]
CAPTION = 26  # characters of a path below a face


def draw_confusion(counts: np.ndarray, title: str) -> Figure:
    """Draw a confusion matrix (7, 7): rows are true classes in percent of their samples, columns predicted ones."""
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(NAMES)), [f"{name}  ({n})" for name, n in zip(NAMES, support[:, 0], strict=True)])
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True (samples)")
    axes.set_title(title, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.ndindex(*counts.shape):
        if support[row]:
            share = shares[row, column]
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.55 else "#333"
            )
    return figure


def find_worst_mistakes(predictions: Predictions, count: int) -> np.ndarray:
    """Return the positions (n,) of the mistakes a run was most confident in, the most confident first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    sureness = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-sureness, kind="stable")[:count]]


def draw_errors(predictions: Predictions, mistakes: np.ndarray, images: list[np.ndarray], title: str) -> Figure:
    """Lay out mistakes on a page: each image (H, W, 3) uint8 with its true label in black, the predicted one in red.

    The supplement's Fig. 1, with the path of the file and the run's confidence.
    """
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(10.5, 2.25 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, position, image in zip(grid.flat, mistakes, images, strict=False):
        axes.imshow(image)
        predicted, probability = predictions.predicted[position], predictions.probabilities[position].max()
        axes.text(0, 1.12, NAMES[predictions.labels[position]], transform=axes.transAxes, fontsize=9, color="black")
        axes.text(
            0, 1.02, f"{NAMES[predicted]} {100 * probability:.0f} %", transform=axes.transAxes, fontsize=9, color="#c00"
        )
        path = predictions.sample_ids[position]
        caption = path if len(path) <= CAPTION else f"…{path[-CAPTION:]}"
        axes.text(0, -0.02, caption, transform=axes.transAxes, fontsize=5.5, color="#777", va="top")
    return figure


def draw_masks(masks: np.ndarray, title: str) -> Figure:
    """Draw class-mean masks (7, C) as strips, the channels that separation pools for each expression marked.

    The upper panel shows the masks, the lower how each expression's differs from the mean over all.
    """
    width = masks.shape[1]
    size = width // len(EXPRESSIONS)
    differences = masks - np.nanmean(masks, axis=0)
    largest = float(np.nanmax(np.abs(differences))) or 1.0
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2, 1)
    limits: tuple[tuple[float, float, str], ...] = ((0, 1, "viridis"), (-largest, largest, "RdBu_r"))
    for axes, values, (low, high, colours) in zip(panels, (masks, differences), limits, strict=True):
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.01)
        axes.set_yticks(range(len(NAMES)), NAMES)
        axes.set_xticks([size * (group + 0.5) - 0.5 for group in range(len(NAMES))], NAMES)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for group in range(1, len(NAMES) + 1):
            axes.axvline(group * size - 0.5, color="white" if colours == "viridis" else "#444", linewidth=1)
    panels[0].set_ylabel("mean mask of faces showing")
    panels[1].set_ylabel("difference from their mean")
    panels[1].set_xlabel(f"channels, in the groups that separation pools ({size} of {width} each)")
    return figure


def draw_heat_maps(images: list[np.ndarray], heats: np.ndarray, titles: list[str], title: str) -> Figure:
    """Draw faces (H, W, 3) uint8, and below each how open the mask is over it, from heats (n, h, w), on one scale."""
    figure = Figure(figsize=(1.6 * len(images) + 0.8, 3.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(2, len(images), squeeze=False)
    middle, spread = (
        (heats.max() + heats.min()) / 2,
        max(heats.max() - heats.min(), 0.01),
    )  # a nearly constant mask is not stretched into noise
    for column, (image, heat, name) in enumerate(zip(images, heats, titles, strict=True)):
        height, width = image.shape[:2]
        for axes in grid[:, column]:
            axes.imshow(image)
            axes.axis("off")
        shades = grid[1, column].imshow(
            heat, "plasma", alpha=0.5, extent=(0, width, height, 0), interpolation="bilinear",
            vmin=middle - spread / 2, vmax=middle + spread / 2,
        )  # fmt: skip
        grid[0, column].set_title(name, fontsize=9)
    figure.colorbar(shades, ax=grid, pad=0.01, label="mean of the mask")
    return figure
