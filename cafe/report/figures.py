"""Pictures of one run on one target: confusion matrix, error gallery, and what the mask selects.

All are drawn from the predictions and the numbers in the run's folder, for that folder, for MLflow and for pages. Every
run has the first two, which Pillow draws: matplotlib takes as long to load as a small training.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from upath import UPath

from cafe.data.manifest import Manifest
from cafe.files import read_json
from cafe.report import MISTAKES
from cafe.results.columns import Column
from cafe.results.metrics import confusion
from cafe.results.predictions import Answers, Predictions
from cafe.results.runs import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = 26  # characters of a path below a face
COLUMNS = 6  # of an error gallery
FACE, GAP, HEAD = 200, 10, 44  # pixels: side of a face in it, what lies between two, and the title
CELL, MARGIN = (84, 62), 150  # pixels: a cell of a confusion matrix, and what is left of the first
CHANNELS, SEEN = 48, 0.01  # of a mask that are drawn, and how far on a channel it differs at least to be drawn
LIGHT, DARK = (247, 251, 255), (8, 48, 107)  # a share of nothing and of all
STEP_ACROSS, STEP_DOWN = FACE + GAP, FACE + 80


class Mistake(NamedTuple):
    """A face a run was wrong about, and its confidence (0–1)."""

    sample_id: str
    label: str
    predicted: str
    confidence: float


def draw_run_figures(folder: UPath, column: Column, manifest: Manifest | None) -> Iterator[tuple[str, str, bytes]]:
    """Yield the pictures of a run on a target by kind and ending, drawn from what its folder holds.

    They are PNG: `confusion`, `errors`, and for a method whose mask was measured `masks` and `heat_maps`. Faces are read
    from the target's manifest; those that cannot be read are left out, and without a manifest the pictures made of them.
    """
    run, predictions = read_run(folder), Predictions.load(column.predictions(folder))
    if run is None or predictions is None:
        return
    option = f" ({column.test_time})" if column.test_time else ""
    title = f"{run.method} trained on {run.source}, evaluated on {column.name}{option}"
    yield "confusion", ".png", to_png(draw_confusion(confusion(predictions), predictions.classes, title))
    if manifest is not None:
        mistakes = find_worst_mistakes(predictions, MISTAKES)
        faces = read_faces(manifest, [mistake.sample_id for mistake in mistakes])
        yield "errors", ".png", to_png(draw_errors(mistakes, faces, f"{title}: the mistakes of highest confidence"))
    if tells_apart(masks := read_masks(folder, column)):
        figure = draw_masks(masks, predictions.classes, f"{title}: what the mask selects")
        yield "masks", ".png", to_png(figure)
    heat_maps = read_json(column.figure(folder, "heat_maps", ".json"))
    if heat_maps and manifest is not None:
        samples, names = heat_maps["sample_ids"], heat_maps["classes"]
        faces = read_faces(manifest, samples)
        there = [place for place, sample in enumerate(samples) if sample in faces]
        if there:
            heats = np.array([heat_maps["heats"][place] for place in there])
            images, titles = ([faces[samples[place]] for place in there], [names[place] for place in there])
            yield "heat_maps", ".png", to_png(draw_heat_maps(images, heats, titles, f"{title}: where the mask is open"))


def read_faces(manifest: Manifest, samples: Collection[str]) -> dict[str, np.ndarray]:
    """Return the pictures (H, W, 3) uint8 of samples by their ids.

    Those that are gone or unreadable are left out, with a warning that names the first.
    """
    wanted = set(samples)
    rows = [row for row, sample in enumerate(manifest.sample_ids) if sample in wanted]
    found = list(manifest.survey(rows, lambda pixels: pixels))
    if lacking := [(row, reason) for row, reason in found if not isinstance(reason, np.ndarray)]:
        row, reason = lacking[0]
        logging.getLogger(__name__).warning(
            "%d pictures of %s are not shown, the first is %s: %s.",
            len(lacking),
            manifest.name,
            manifest.path(row),
            reason,
        )
    return {manifest.sample_ids[row]: pixels for row, pixels in found if isinstance(pixels, np.ndarray)}


def read_masks(folder: UPath, column: Column) -> dict[str, np.ndarray]:
    """Return the mean masks (C,) of a run over the faces of each class of a target, empty where none were measured."""
    masks = read_json(column.figure(folder, "masks", ".json")) or {}
    return {name: np.array(mask) for name, mask in masks.items()}


def draw_confusion(counts: np.ndarray, classes: Sequence[str], title: str) -> Image.Image:
    """Draw a confusion matrix (K, K): rows are true classes in percent of their samples, columns predicted ones."""
    names, support = [name.capitalize() for name in classes], counts.sum(axis=1)
    page = Image.new("RGB", (MARGIN + len(names) * CELL[0] + GAP, HEAD + len(names) * CELL[1] + 60), "white")
    pen, large, small = ImageDraw.Draw(page), _font(15), _font(12)
    middle = MARGIN + len(names) * CELL[0] // 2
    pen.text((page.width / 2, HEAD / 2), title, "black", large, anchor="mm")
    pen.text((middle, page.height - GAP), "Predicted", "black", large, anchor="ms")
    pen.text((GAP, HEAD - 4), "True (samples)", "black", small, anchor="ls")
    for number, (name, samples) in enumerate(zip(names, support, strict=True)):
        left, top = find_cell(number, number)
        beside, below = _fold(f"{name} ({samples})", MARGIN - 2 * GAP, small), _fold(name, CELL[0], small)
        pen.text((MARGIN - GAP, top + CELL[1] / 2), beside, "#333", small, anchor="rm")
        pen.text((left + CELL[0] / 2, HEAD + len(names) * CELL[1] + 6), below, "#333", small, anchor="ma")
    for row, shares in share_confusion(counts).items():
        for column, share in enumerate(shares):
            left, top = find_cell(row, column)
            pen.rectangle((left, top, left + CELL[0] - 1, top + CELL[1] - 1), shade(share))
            colour = "white" if share > 0.5 else "#333"
            pen.text((left + CELL[0] / 2, top + CELL[1] / 2), f"{100 * share:.0f}", colour, large, anchor="mm")
    return page


def _fold(text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    """Return a text as it is where it fits into some pixels, else with each word on a line of its own."""
    return text if font.getlength(text) <= room else text.replace(" ", "\n")


def share_confusion(counts: np.ndarray) -> dict[int, list[float]]:
    """Return for each true class that has faces the shares (K,) of them that were taken for each class."""
    return {label: (own / own.sum()).tolist() for label, own in enumerate(counts) if own.sum()}


def find_cell(row: int, column: int) -> tuple[int, int]:
    """Return the left upper corner of a cell of a confusion matrix, in pixels."""
    return MARGIN + column * CELL[0], HEAD + row * CELL[1]


def shade(share: float) -> tuple[int, ...]:
    """Return the blue of a share between 0 and 1."""
    return tuple(round((1 - share) * light + share * dark) for light, dark in zip(LIGHT, DARK, strict=True))


def find_worst_mistakes(
    predictions: Predictions | Answers, count: int, classes: Collection[str] | None = None
) -> list[Mistake]:
    """Return the mistakes of highest confidence on faces of these classes (default: of all), the highest first."""
    names = predictions.classes
    wanted = [label for label, name in enumerate(names) if classes is None or name in classes]
    wrong = np.flatnonzero((predictions.predicted != predictions.labels) & np.isin(predictions.labels, wanted))
    confidence = predictions.confidence[wrong]
    order = np.argsort(-confidence, kind="stable")[:count]
    return [
        Mistake(
            predictions.sample_ids[place],
            names[predictions.labels[place]],
            names[predictions.predicted[place]],
            float(predictions.confidence[place]),
        )
        for place in wrong[order]
    ]


def draw_errors(mistakes: Sequence[Mistake], faces: Mapping[str, np.ndarray], title: str) -> Image.Image:
    """Lay out mistakes on a page: each face (H, W, 3) uint8 with its true label in black, the predicted one in red.

    The supplement's Fig. 1, with the path of the file and the run's confidence. A mistake without a face is left out.
    """
    shown = [mistake for mistake in mistakes if mistake.sample_id in faces]
    rows = max(1, -(-len(shown) // COLUMNS))
    page = Image.new("RGB", (COLUMNS * STEP_ACROSS + GAP, rows * STEP_DOWN + HEAD), "white")
    pen, large, middle, small = ImageDraw.Draw(page), _font(20), _font(15), _font(9)
    pen.text((page.width / 2, HEAD / 2), title, "black", large, anchor="mm")
    for number, (path, label, predicted, confidence) in enumerate(shown):
        left, top = GAP + number % COLUMNS * STEP_ACROSS, HEAD + number // COLUMNS * STEP_DOWN
        pen.text((left, top), label.capitalize(), "black", middle)
        pen.text((left, top + 20), f"{predicted.capitalize()} {100 * confidence:.0f} %", "#c00", middle)
        face = Image.fromarray(faces[path])
        page.paste(ImageOps.contain(face, (FACE, FACE), Image.Resampling.NEAREST), (left, top + 42))
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
    assert found is not None
    assert found.origin is not None
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def tells_apart(masks: Mapping[str, np.ndarray]) -> bool:
    """Whether mean masks (C,) by class differ on any channel by as much as can be seen."""
    return len(masks) > 1 and spread_masks(masks).max() >= SEEN


def spread_masks(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return how far the mean masks of the classes lie apart on every channel, (C,)."""
    spread: np.ndarray = np.ptp(np.array(list(masks.values())), axis=0)
    return spread


def draw_masks(masks: Mapping[str, np.ndarray], classes: Sequence[str], title: str = "") -> Figure:
    """Draw where mean masks (C,) by class differ: the channels that differ most, each less its mean over the classes.

    Warm where the mask is more open for an expression than for the mean of them, cool where it is less; the bar says by how
    much. Channels stand together by the expression that opens them most.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from cafe.report.charts import ACCENT, COOL, INK, WIDTH, ink

    names = [name for name in classes if name in masks]
    values = np.array([masks[name] for name in names])
    differences = values - values.mean(axis=0)
    most = np.argsort(-spread_masks(masks), kind="stable")[:CHANNELS]
    most = most[np.lexsort((-differences.max(axis=0)[most], differences.argmax(axis=0)[most]))]
    reach = float(np.abs(differences[:, most]).max()) or 1.0
    figure = Figure(figsize=(2 * WIDTH, 1.5 + 0.3 * len(values)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("mask", [COOL, "#f4f1ec", ACCENT])
    mesh = axes.pcolormesh(differences[:, most], cmap=colours, vmin=-reach, vmax=reach, edgecolors="none")
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set_xticks(np.arange(len(most)) + 0.5, most, rotation=90)
    axes.invert_yaxis()
    axes.set_xlabel("channel", color=INK)
    ink(axes)
    axes.tick_params(axis="x", labelsize=7)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label("mask less its mean", color=INK)
    ink(bar.ax)
    return figure


def draw_heat_maps(images: list[np.ndarray], heats: np.ndarray, titles: list[str], title: str) -> Figure:
    """Draw faces (H, W, 3) uint8, and below each how open the mask is over it, from heats (n, h, w), on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(images) + 0.8, 3.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(2, len(images), squeeze=False)
    # A nearly constant mask is not stretched into noise.
    middle, spread = (heats.max() + heats.min()) / 2, max(heats.max() - heats.min(), 0.01)
    for column, (image, heat, name) in enumerate(zip(images, heats, titles, strict=True)):
        height, width = image.shape[:2]
        for axes in grid[:, column]:
            axes.imshow(image)
            axes.axis("off")
        shades = grid[1, column].imshow(
            heat, "plasma", alpha=0.5, extent=(0, width, height, 0), interpolation="bilinear",
            vmin=middle - spread / 2, vmax=middle + spread / 2,
        )  # fmt: skip
        grid[0, column].set_title(name.capitalize(), fontsize=9)
    figure.colorbar(shades, ax=grid, pad=0.01, label="mean of the mask")
    return figure
