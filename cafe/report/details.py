"""What the page of an experiment shows of each row: recalls, confusions, the mistakes it was surest of, and its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.errors import unknown
from cafe.files import list_folder, read_json
from cafe.report.figures import find_worst_mistakes
from cafe.report.pages import embed
from cafe.results.comparison import Comparison, Row, compare_classes
from cafe.results.metrics import Estimate, confusion
from cafe.results.protocols import find_protocol

CURVES = {"train/total": "loss", "train/accuracy": "accuracy", "selection/accuracy": "held-out accuracy"}
PICTURED = ("masks", "heat_maps")  # what was drawn of a mask when the run was judged; it has numbers, too, since then

FindManifest = Callable[[str, str], Manifest | None]  # by name and digest


@dataclass(frozen=True)
class Gallery:
    """Which mistakes are shown of each row: how many at most, of faces of which expressions (none: of all)."""

    count: int = 24
    expressions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.expressions:
            if name not in EXPRESSIONS:
                raise unknown("expression", name, EXPRESSIONS)


class Mistake(NamedTuple):
    """A face a run was wrong about, and how sure it was (0–1); `manifest` is the digest of the target's manifest."""

    target: str
    manifest: str
    sample_id: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Detail:
    """One row at close range: all numbers are over its seeds, the mistakes those of its first seed.

    `recalls` holds by expression, then `overall` and `mean`, an estimate for each of the row's `targets`; `confusions` the
    mean counts (7, 7) of true × predicted by target; `epochs` the columns seed, epoch and those of `CURVES`; `masks` the
    mean mask (C,) over faces of each expression, of the first seed that has one. Judged with an option of test time, a row
    has the training and the masks of its plain row, which are shown there.
    """

    row: Row
    targets: list[str]
    recalls: dict[str, list[Estimate]]
    confusions: dict[str, np.ndarray]
    mistakes: list[Mistake]
    epochs: pd.DataFrame
    masks: dict[str, np.ndarray]
    pictures: dict[str, UPath]  # of its mask, by kind


def list_details(comparison: Comparison, gallery: Gallery) -> list[Detail]:
    """Return the details of every row that was judged on anything, from the same scores and predictions as its cells."""
    runs = [run for row in comparison.rows for run in row.runs]
    classes: dict[tuple[str, str], Row] = {}  # by target and group of runs
    for target in (name for name in comparison.columns if name in comparison.kinds):
        for row in compare_classes(runs, comparison.scores, target, comparison.protocol).rows:
            classes[target, row.runs[0].group] = row
    return [_describe(row, classes, comparison.protocol, gallery) for row in comparison.rows if _judged(row, classes)]


def _judged(row: Row, classes: dict[tuple[str, str], Row]) -> list[str]:
    return [name for name, cell in row.cells.items() if cell.count and (name, row.runs[0].group) in classes]


def _describe(row: Row, classes: dict[tuple[str, str], Row], protocol: str, gallery: Gallery) -> Detail:
    targets = _judged(row, classes)
    drawn = [] if row.test_time else [*sorted(row.seen), *targets]
    place = find_figure(row, drawn, protocol, "masks", ".json")
    masks = (read_json(place) if place else None) or {}
    pictures = {kind: find_figure(row, drawn, protocol, kind, ".png") for kind in PICTURED}
    cells = [classes[target, row.runs[0].group].cells for target in targets]
    return Detail(
        row,
        targets,
        {name: [own[name] for own in cells] for name in cells[0]},
        {target: count_confusions(row, target, protocol) for target in targets},
        find_mistakes(row, [name for name in targets if name not in row.seen] or targets, protocol, gallery),
        read_epochs(row),
        {name: np.array(masks[name]) for name in EXPRESSIONS if name in masks},
        {kind: place for kind, place in pictures.items() if place and not (kind == "masks" and masks)},
    )


def count_confusions(row: Row, target: str, protocol: str) -> np.ndarray:
    """Return the counts (7, 7) of true × predicted expressions on a target, their mean over the seeds of a row."""
    judging = [run for run in row.runs if run.judges(target)]
    found = (run.load_predictions(protocol, named=False).get(target) for run in judging)
    return np.asarray(np.mean([confusion(predictions) for predictions in found if predictions], axis=0))


def find_mistakes(row: Row, targets: Sequence[str], protocol: str, gallery: Gallery) -> list[Mistake]:
    """Return the mistakes a row's first seed was surest of, taken in turn from the targets and then put target by target."""
    wanted = [EXPRESSIONS.index(name) for name in gallery.expressions] or range(len(EXPRESSIONS))
    ranked = []
    for number, target in enumerate(targets):
        run = next(run for run in row.runs if run.judges(target))
        predictions = run.load_predictions(protocol).get(target)
        if predictions is None:  # the first seed was not judged on it
            continue
        for rank, place in enumerate(find_worst_mistakes(predictions, gallery.count, wanted)):
            label, predicted = (EXPRESSIONS[classes[place]] for classes in (predictions.labels, predictions.predicted))
            confidence, digest = float(predictions.probabilities[place].max()), predictions.about.get("manifest", "")
            mistake = Mistake(target, digest, predictions.sample_ids[place], label, predicted, confidence)
            ranked.append((rank, number, mistake))
    shown = sorted(ranked, key=lambda entry: entry[:2])[: gallery.count]
    return [mistake for _, _, mistake in sorted(shown, key=lambda entry: (entry[1], entry[0]))]


def read_thumbnails(mistakes: Sequence[Mistake], find_manifest: FindManifest) -> dict[tuple[str, str], str]:
    """Return the face of each mistake by target and sample as a data URI; a face that is gone or unreadable is left out."""
    wanted: dict[tuple[str, str], dict[str, None]] = {}
    for mistake in mistakes:
        wanted.setdefault((mistake.target, mistake.manifest), {})[mistake.sample_id] = None
    thumbnails = {}
    for (target, digest), samples in wanted.items():
        manifest = find_manifest(target, digest)
        if manifest is None:
            continue
        rows = {sample: row for row, sample in enumerate(manifest.sample_ids) if sample in samples}
        for row, picture in manifest.survey(list(rows.values()), embed):
            if isinstance(picture, str):
                thumbnails[target, manifest.sample_ids[row]] = picture
    return thumbnails


def read_epochs(row: Row) -> pd.DataFrame:
    """Return what the runs of a row noted after each epoch; empty where nothing was trained by epochs, or for this row."""
    records = [
        {"run": run.name, "seed": run.seed, "epoch": int(path.stem), **(read_json(path) or {})}
        for run in ([] if row.test_time else row.runs)
        for path in list_folder(run.folder / "epochs")
        if path.stem.isdecimal()
    ]
    return pd.DataFrame(records, columns=["run", "seed", "epoch", *CURVES])


def find_figure(row: Row, targets: Sequence[str], protocol: str, kind: str, ending: str) -> UPath | None:
    """Return what was drawn of a kind for a row's first seed that has any, on the first of these targets."""
    places = (
        run.folder / "figures" / kind / find_protocol(protocol).prefix / f"{target}{ending}"
        for run in row.runs
        for target in targets
    )
    return next((place for place in places if place.exists()), None)
