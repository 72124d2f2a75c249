"""Pictures of one run on one target, drawn with matplotlib: confusion matrix, error gallery, and what the mask selects."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cafe.data.expressions import EXPRESSIONS
from cafe.results.predictions import Predictions

NAMES = [name.capitalize() for name in EXPRESSIONS]
CAPTION = 26  # characters of a path below a face
COLUMNS = 6  # of an error gallery
FACE, GAP, HEAD = 200, 10, 44  # pixels: side of a face in it, what lies between two, and the title
STEP_ACROSS, STEP_DOWN = FACE + GAP, FACE + 80


def draw_confusion(counts: np.ndarray, title: str) -> Figure:
    """Draw a confusion matrix (7, 7): rows are true classes in percent of their samples, columns predicted ones."""
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    figure = Figure(figsize=(6.4, 5.6))
    axes = figure.add_axes((0.29, 0.2, 0.69, 0.73))  # a layout that is worked out takes half of the time
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


def find_worst_mistakes(
    predictions: Predictions, count: int, classes: Sequence[int] = range(len(EXPRESSIONS))
) -> np.ndarray:
    """Return the positions (n,) of the mistakes on faces of these classes that a run was surest of, the surest first."""
    wrong = np.flatnonzero((predictions.predicted != predictions.labels) & np.isin(predictions.labels, classes))
    sureness = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-sureness, kind="stable")[:count]]


def draw_errors(predictions: Predictions, mistakes: np.ndarray, images: list[np.ndarray], title: str) -> Image.Image:
    """Lay out mistakes on a page: each image (H, W, 3) uint8 with its true label in black, the predicted one in red.

    The supplement's Fig. 1, with the path of the file and the run's confidence. Drawn without matplotlib, whose many axes
    take a second.
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


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font at a size in pixels, as in the other figures: it knows the letters of many languages."""
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


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
