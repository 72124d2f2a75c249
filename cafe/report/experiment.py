"""The page of an experiment: its comparison, every row at close range, and how the numbers were made, in one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from upath import UPath

from cafe.report.charts import draw_curves, to_svg
from cafe.report.details import (
    CURVES,
    Confusion,
    Detail,
    Gallery,
    list_details,
    read_thumbnails,
)
from cafe.report.drawings import list_drawings
from cafe.report.figures import draw_masks, share_confusion, spread_masks, tells_apart
from cafe.report.origins import list_versions, targets_sheet, trainings_sheet
from cafe.report.pages import embed_figure, render
from cafe.report.report import Report
from cafe.report.sheets.printed import errors_sheet
from cafe.results.columns import Column
from cafe.results.comparison import Row
from cafe.results.groups import FindManifest

GALLERY = Gallery()
MASK = "The channels on which its mean mask differs most between expressions, less their mean over all of them."
FIGURES = {  # of older runs, whose numbers were not kept
    "masks": "Its mean mask over faces of each expression, and how that differs from the mean over all of them.",
    "heat_maps": "Where on a face its mask is open.",
}


def draw_experiment(
    name: str, report: Report, root: UPath, find_manifest: FindManifest, gallery: Gallery = GALLERY
) -> bytes:
    """Return the page of an experiment's comparison; it needs nothing else: no script, no font, no picture from elsewhere.

    `root` is that of the workspace, where audits lie; `find_manifest` gives the faces of the galleries.
    """
    figures: dict[str, list[tuple[str, Markup]]] = {sheet.title: [] for sheet in report.sheets}
    for number, drawing in enumerate(list_drawings(report)):
        picture = _mark_safe(to_svg(drawing.figure, f"figure{number}", drawing.caption))
        figures[drawing.sheet].append((drawing.caption, picture))
    details = list_details(report.comparison, gallery)
    thumbnails = read_thumbnails([mistake for detail in details for mistake in detail.mistakes], find_manifest)
    return render(
        "experiment.html",
        title=f"Experiment {name}",
        report=report,
        figures=figures,
        details=[_show(detail, number, thumbnails) for number, detail in enumerate(details)],
        gallery=gallery,
        errors=errors_sheet(report.comparison),
        origins=[trainings_sheet(report.comparison), targets_sheet(report.comparison, root)],
        versions=list_versions(),
    )


def _mark_safe(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704  # our own


def _show(detail: Detail, number: int, thumbnails: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Return what the template writes of a row."""
    row, epochs = detail.row, detail.epochs.dropna(axis=1, how="all")
    classes = row.runs[0].classes
    title = f"{row.label}, trained on {row.source}{' †' if row.peeked else ''}"
    curves = [name for name in CURVES if name in epochs]
    about = f"{title}: {' and '.join(CURVES[name] for name in curves)} after every epoch, a line per seed"
    return {
        "id": f"row{number}",
        "title": title,
        "columns": [_name(column, row) for column in detail.columns],
        "recalls": detail.recalls,
        "confusions": [(column.title, own.classes, _share(own)) for column, own in detail.confusions.items()],
        "evaluated": "the mean over seeds" if row.runs[0].ensemble else f"seed {row.runs[0].seed}",
        "galleries": list(_group(detail, thumbnails)),
        "classes": classes,
        "mask": _mark_safe(to_svg(draw_masks(detail.masks, classes), f"mask{number}", f"{title}: {MASK}"))
        if tells_apart(detail.masks)
        else "",
        "mask_spread": float(spread_masks(detail.masks).max()) if detail.masks else None,
        "mask_groups": _pool(detail.masks, classes) if tells_apart(detail.masks) else [],
        "figures": [(FIGURES[kind], embed_figure(path.read_bytes())) for kind, path in detail.pictures.items()],
        "curves": _mark_safe(to_svg(draw_curves(epochs, 1 / len(classes)), f"curves{number}", about)) if curves else "",
        "curve_names": [CURVES[name] for name in curves],
        "epochs": epochs.groupby("epoch")[curves].mean().reset_index().to_numpy().tolist() if curves else [],
    }


def _share(own: Confusion) -> list[tuple[str, int, list[float]]]:
    """Return of each true class that has faces its name, their number, and the shares (K,) of what was predicted."""
    shares = share_confusion(own.counts)
    return [(own.classes[label], round(own.counts[label].sum()), row) for label, row in shares.items()]


def _pool(masks: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[tuple[str, list[float], list[float]]]:
    """Return for each class its name and the means (K,) of its mask over the groups of channels that separation pools.

    Then the same as a share of the way from the smallest to the largest of all.
    """
    size = len(next(iter(masks.values()))) // len(classes)
    means = {
        name: masks[name][: size * len(classes)].reshape(-1, size).mean(axis=1) for name in classes if name in masks
    }
    low, high = (reach(list(means.values())) for reach in (np.min, np.max))
    return [(name, own.tolist(), ((own - low) / ((high - low) or 1)).tolist()) for name, own in means.items()]


def _name(column: Column, row: Row) -> str:
    return f"({column.title})" if column in row.seen else column.title


def _group(detail: Detail, thumbnails: dict[tuple[str, str], str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield each target with its mistakes, each with its picture, which is empty where there is none."""
    for column in dict.fromkeys(shown.column for shown in detail.mistakes):
        own = [shown.mistake for shown in detail.mistakes if shown.column == column]
        pictures = (thumbnails.get((column.target, mistake.sample_id), "") for mistake in own)
        yield _name(column, detail.row), list(zip(own, pictures, strict=True))
