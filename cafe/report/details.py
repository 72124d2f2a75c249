"""What the page of an experiment shows of each row: recalls, confusions, the worst mistakes, its mask and its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from upath import UPath

from cafe.errors import unknown
from cafe.report import MISTAKES
from cafe.report.figures import Mistake, find_worst_mistakes, read_faces, read_masks
from cafe.report.pages import embed
from cafe.results.columns import MEAN, OVERALL, Column
from cafe.results.comparison import NOTHING, Comparison, Row, compare_classes
from cafe.results.groups import FindManifest
from cafe.results.metrics import Estimate, confusion
from cafe.results.predictions import Answers
from cafe.results.runs import list_epochs, read_epoch

CURVES = {"train/total": "loss", "train/accuracy": "accuracy", "selection/accuracy": "held-out accuracy"}
# What was drawn of a mask when the run was evaluated; it has numbers, too, since then.
PICTURED = ("masks", "heat_maps")


@dataclass(frozen=True)
class Gallery:
    """Which mistakes are shown of each row: how many at most, of faces of which classes (none: of all)."""

    count: int = MISTAKES
    classes: tuple[str, ...] = ()


class ShownMistake(NamedTuple):
    """A mistake and where its face is: in a column's target, by the digest of the manifest it was evaluated with."""

    column: Column
    manifest: str
    mistake: Mistake


class Confusion(NamedTuple):
    """The mean counts (K, K) of true × predicted classes over the seeds of a row."""

    classes: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True)
class Detail:
    """One row at close range: all numbers are over its seeds, the mistakes those of its first seed.

    `recalls` holds by class, then `overall` and `mean`, an estimate for each of the row's `columns`; `epochs` the columns
    seed, epoch and those of `CURVES`; `masks` the mean mask (C,) over faces of each class, of the first seed that has one.
    Evaluated with an option of test time, a row has the training and the masks of its plain row, which are shown there.
    """

    row: Row
    columns: list[Column]
    recalls: dict[str, list[Estimate]]
    confusions: dict[Column, Confusion]
    mistakes: list[ShownMistake]
    epochs: pd.DataFrame
    masks: dict[str, np.ndarray]
    pictures: dict[str, UPath]  # of its mask, by kind


def list_details(comparison: Comparison, gallery: Gallery) -> list[Detail]:
    """Return the details of every row that was evaluated on anything, from the same predictions as its cells.

    Raises `UserError` when the gallery is to show a class that no run has.
    """
    runs = [run for row in comparison.rows for run in row.runs]
    known = {name for run in runs for name in run.classes}
    for name in gallery.classes:
        if name not in known:
            raise unknown("expression", name, known)
    classes: dict[tuple[str, str], Row] = {}  # by target and group of runs
    for target in comparison.targets:
        for row in compare_classes(runs, comparison.scores, target, comparison.protocol, comparison.kept).rows:
            classes[target, row.runs[0].group] = row
    return [_describe(row, classes, comparison, gallery) for row in comparison.rows if _evaluated(row)]


def _evaluated(row: Row) -> list[Column]:
    return [column for column, cell in row.cells.items() if cell.count and not column.leak_free]


def _describe(row: Row, classes: dict[tuple[str, str], Row], comparison: Comparison, gallery: Gallery) -> Detail:
    columns = _evaluated(row)
    unseen_first = sorted(columns, key=lambda column: column in row.seen)
    seeds = comparison.list_answers(row)
    confusions = {column: count_confusions([one[column] for one in seeds if column in one]) for column in columns}
    names = dict.fromkeys(name for own in confusions.values() for name in own.classes)
    cells = [
        {place.part: cell for place, cell in classes[column.name, row.runs[0].group].cells.items() if cell.count}
        for column in columns
    ]
    drawn = [] if row.test_time else [*sorted(row.seen), *columns]
    masked = find_figure(row, drawn, "masks", ".json")
    masks = read_masks(*masked) if masked else {}
    pictures = {kind: find_figure(row, drawn, kind, ".png") for kind in PICTURED if not (kind == "masks" and masks)}
    return Detail(
        row,
        columns,
        {name: [own.get(name, NOTHING) for own in cells] for name in (*names, OVERALL, MEAN)},
        confusions,
        list_mistakes(seeds[0], unseen_first, gallery),
        read_epochs(row),
        masks,
        {kind: found[1].figure(found[0], kind, ".png") for kind, found in pictures.items() if found},
    )


def count_confusions(several: Sequence[Answers]) -> Confusion:
    """Return the mean counts of true × predicted classes of several runs on one target."""
    counts = np.mean([confusion(predictions) for predictions in several], axis=0)
    return Confusion(several[0].classes, np.asarray(counts))


def list_mistakes(seed: dict[Column, Answers], columns: Sequence[Column], gallery: Gallery) -> list[ShownMistake]:
    """Return the mistakes of highest confidence of a seed, taken in turn from the columns and then put column by column."""
    ranked = []
    for number, column in enumerate(columns):
        if column not in seed:  # it was not evaluated there
            continue
        digest = seed[column].about.get("manifest", "")
        worst = find_worst_mistakes(seed[column], gallery.count, gallery.classes or None)
        ranked += [(rank, number, ShownMistake(column, digest, mistake)) for rank, mistake in enumerate(worst)]
    shown = sorted(ranked, key=lambda entry: entry[:2])[: gallery.count]
    return [mistake for _, _, mistake in sorted(shown, key=lambda entry: (entry[1], entry[0]))]


def read_thumbnails(mistakes: Sequence[ShownMistake], find_manifest: FindManifest) -> dict[tuple[str, str], str]:
    """Return the face of each mistake by target and sample as a data URI; a face that is gone or unreadable is left out."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for column, digest, mistake in mistakes:
        wanted.setdefault((column.target, digest), []).append(mistake.sample_id)
    thumbnails: dict[tuple[str, str], str] = {}
    for (target, digest), samples in wanted.items():
        if manifest := find_manifest(target, digest):
            faces = read_faces(manifest, samples)
            thumbnails |= {(target, sample): embed(pixels) for sample, pixels in faces.items()}
    return thumbnails


def read_epochs(row: Row) -> pd.DataFrame:
    """Return what the runs of a row noted after each epoch; empty where nothing was trained by epochs, or for this row."""
    records = [
        {"run": run.name, "seed": run.seed, "epoch": epoch, **read_epoch(path)}
        for run in ([] if row.test_time else row.runs)
        for epoch, path in list_epochs(run.folder).items()
    ]
    return pd.DataFrame(records, columns=["run", "seed", "epoch", *CURVES])


def find_figure(row: Row, columns: Sequence[Column], kind: str, ending: str) -> tuple[UPath, Column] | None:
    """Return the folder of a row's first seed that has a figure of a kind, and the first of these columns it has it for."""
    places = ((run.folder, column) for run in row.runs for column in columns)
    return next(((run, column) for run, column in places if column.figure(run, kind, ending).exists()), None)
