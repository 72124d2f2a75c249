"""Pictures of one run on one target: confusion matrix, error gallery, and what the mask selects.

Every run has the first two, which Pillow draws: matplotlib takes as long to load as a small training.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cafe.data.expressions import EXPRESSIONS
from cafe.results.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = [name.capitalize() for name in EXPRESSIONS]
CAPTION = 26  # characters of a path below a face
COLUMNS = 6  # of an error gallery
FACE, GAP, HEAD = 200, 10, 44  # pixels: side of a face in it, what lies between two, and the title
CELL, MARGIN = (84, 62), 150  # pixels: a cell of a confusion matrix, and what is left of the first
LIGHT, DARK = (247, 251, 255), (8, 48, 107)  # a share of nothing and of all
STEP_ACROSS, STEP_DOWN = FACE + GAP, FACE + 80


def draw_confusion(counts: np.ndarray, title: str) -> Image.Image:
    """Draw a confusion matrix (7, 7): rows are true classes in percent of their samples, columns predicted ones."""
    support = counts.sum(axis=1)
    page = Image.new("RGB", (MARGIN + len(NAMES) * CELL[0] + GAP, HEAD + len(NAMES) * CELL[1] + 60), "white")
    pen, large, small = ImageDraw.Draw(page), _font(15), _font(12)
    middle = MARGIN + len(NAMES) * CELL[0] // 2
    pen.text((page.width / 2, HEAD / 2), title, "black", large, anchor="mm")
    pen.text((middle, page.height - GAP), "Predicted", "black", large, anchor="ms")
    pen.text((GAP, HEAD - 4), "True (samples)", "black", small, anchor="ls")
    for number, (name, samples) in enumerate(zip(NAMES, support, strict=True)):
        left, top = find_cell(number, number)
        pen.text((MARGIN - GAP, top + CELL[1] / 2), f"{name} ({samples})", "#333", small, anchor="rm")
        pen.text((left + CELL[0] / 2, HEAD + len(NAMES) * CELL[1] + 6), name, "#333", small, anchor="ma")
    for row in np.flatnonzero(support).tolist():
        for column, share in enumerate(counts[row] / support[row]):
            left, top = find_cell(row, column)
            pen.rectangle((left, top, left + CELL[0] - 1, top + CELL[1] - 1), shade(share))
            colour = "white" if share > 0.5 else "#333"
            pen.text((left + CELL[0] / 2, top + CELL[1] / 2), f"{100 * share:.0f}", colour, large, anchor="mm")
    return page


def find_cell(row: int, column: int) -> tuple[int, int]:
    """Return the left upper corner of a cell of a confusion matrix, in pixels."""
    return MARGIN + column * CELL[0], HEAD + row * CELL[1]


def shade(share: float) -> tuple[int, ...]:
    """Return the blue of a share between 0 and 1."""
    return tuple(round((1 - share) * light + share * dark) for light, dark in zip(LIGHT, DARK, strict=True))


def find_worst_mistakes(
    predictions: Predictions, count: int, classes: Sequence[int] = range(len(EXPRESSIONS))
) -> np.ndarray:
    """Return the positions (n,) of the mistakes on faces of these classes that a run was surest of, the surest first."""
    wrong = np.flatnonzero((predictions.predicted != predictions.labels) & np.isin(predictions.labels, classes))
    confidence = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


def draw_errors(predictions: Predictions, mistakes: np.ndarray, images: list[np.ndarray], title: str) -> Image.Image:
    """Lay out mistakes on a page: each image (H, W, 3) uint8 with its true label in black, the predicted one in red.

    The supplement's Fig. 1, with the path of the file and the run's confidence.
    """
    rows = max(1, -(-len(images) // COLUMNS))
    page = Image.new("RGB", (COLUMNS * STEP_ACROSS + GAP, rows * STEP_DOWN + HEAD), "white")
    pen, large, middle, small = ImageDraw.Draw(page), _font(20), _font(15), _font(9)
    pen.text((page.width / 2, HEAD / 2), title, "black", large, anchor="mm")
    for number, (position, image) in enumerate(zip(mistakes, images, strict=True)):
        left, top = GAP + number % COLUMNS * STEP_ACROSS, HEAD + number // COLUMNS * STEP_DOWN
        predicted, probability = predictions.predicted[position], predictions.probabilities[position].max()
        pen.text((left, top), NAMES[predictions.labels[position]], "black", middle)
        pen.text((left, top + 20), f"{NAMES[predicted]} {100 * probability:.0f} %", "#c00", middle)
        page.paste(ImageOps.contain(Image.fromarray(image), (FACE, FACE), Image.Resampling.NEAREST), (left, top + 42))
        path = predictions.sample_ids[position]
        caption = path if len(path) <= CAPTION else f"…{path[-CAPTION:]}"
        pen.text((left, top + 46 + FACE), caption, "#777", small)
    return page


def to_png(figure: Figure | Image.Image) -> bytes:
    """Return a figure as the content of a PNG file."""
    picture = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(picture, "PNG", compress_level=1)
    else:
        figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font at a size in pixels, as in the other figures: it knows the letters of many languages."""
    found = find_spec("matplotlib")
    assert found
    assert found.origin
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def draw_masks(masks: np.ndarray, title: str) -> Figure:
    """Draw class-mean masks (7, C) as strips, the channels that separation pools for each expression marked.

    The upper panel shows the masks, the lower how each expression's differs from the mean over all.
    """
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

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


def draw_run_figures(folder, place, manifest):  # type: ignore
    return iter(())
