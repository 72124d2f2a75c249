"""One run against its targets: predictions as Parquet and what a mask selects as numbers; pictures are drawn from these.

Training reads no target; the only training that sees one is that of an oracle, by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from upath import UPath

from cafe.arithmetic import set_arithmetic
from cafe.data.images import UnreadableImageError
from cafe.errors import UserError
from cafe.files import write_file
from cafe.inference.model import Model
from cafe.learning.adaptation import ADAPTATIONS
from cafe.learning.loading import FaceDataset
from cafe.learning.masks import measure_heat_maps, measure_masks
from cafe.learning.training import describe_faces, predict_average
from cafe.methods.method import Method
from cafe.pipeline import cluster
from cafe.pipeline.faces import Faces
from cafe.pipeline.models import build_method, build_model, load_method, make_dataset
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.runs import RunSpec
from cafe.report.figures import draw_run_figures
from cafe.results.predictions import Predictions, name_rows
from cafe.results.protocols import OPTIONS

AT_A_TIME = 256  # pictures that are in memory
Evaluate = Callable[[UPath, Faces], Future[None]]  # has the faces of a target predicted by the run in a folder


def evaluate_targets(run: UPath, targets: list[Faces], progress: Progress, evaluate: Evaluate) -> None:
    """Have each target predicted and draw its figures; `progress(done, total)` counts targets.

    Predictions that are there already are made again.
    """
    progress(0, len(targets))
    waiting = {evaluate(run, target): target for target in targets}
    for number, evaluated in enumerate(as_completed(waiting), start=1):
        if error := evaluated.exception():
            raise cluster.user_error(error) or error
        draw_figures(run, waiting[evaluated])
        progress(number, len(targets))


def evaluate_target(run: UPath, target: Faces, device: torch.device | None = None) -> None:
    """Predict the faces of one target and write what came out to the run's folder; the part that runs on a worker."""
    spec = RunSpec.load(run)
    (part,), rows = target.parts, target.rows(target.split)
    manifest, device = part.manifest, device or torch.device(cluster.device())
    set_arithmetic(spec.precision)
    readable, column = part.rows(target.split), target.column
    assert column is not None
    other = {"other_classes": str(len(readable) - len(rows)), "target_classes": json.dumps(manifest.classes)}
    samples = [target.sample_ids[row] for row in rows]
    method = dataset = None
    further = dict[str, np.ndarray]()
    if spec.exported:
        probabilities = predict_pictures(build_model([run], str(device)), target, rows)
    else:
        method = load_method(spec, run).to(device).to(memory_format=torch.channels_last)
        dataset = make_dataset(spec, target)
        probabilities = _predict(method, dataset, rows, device, column.test_time)
        if not column.test_time:
            further = describe_faces(method, dataset, rows, device)
    predictions = Predictions(
        samples,
        target.labels[rows],
        probabilities,
        {
            "run": spec.name,
            "target": target.name,
            "protocol": column.evaluated_by,
            "split": target.split,
            "channels": target.channels,
            "kind": manifest.kind,
            "manifest": manifest.digest,
            "rows": name_rows(samples),
            "without_features": str(len(manifest.rows(target.split)) - len(readable)),
            **(other if manifest.classes != spec.classes else {}),
        },
        target.groups(rows),
        spec.classes,
        None if target.votes is None else target.votes[rows],
        further,
    )
    if method and dataset:
        with only_decorates(run, target):
            for kind, numbers in _measure(method, dataset, rows, device, column.test_time):
                write_file(column.figure(run, kind, ".json"), json.dumps(numbers).encode())
    predictions.save(column.predictions(run))  # last: from here on the run is evaluated on the target


def predict_pictures(model: Model, target: Faces, rows: np.ndarray) -> np.ndarray:
    """Return what an exported model says (n, K) of some rows, from their pictures: no features need to be stored."""
    parts = [np.zeros((0, len(model.classes)), np.float32)]
    for start in range(0, len(rows), AT_A_TIME):
        pictures = []
        for row in rows[start : start + AT_A_TIME]:
            try:
                pictures.append(target.read_face(int(row), target.channels))
            except UnreadableImageError as error:
                raise UserError(
                    f"{target.path(int(row))} cannot be read ({error}): see `cafe data check {target.name}`."
                ) from None
        parts.append(model.predict(pictures))
    return np.concatenate(parts)


def _measure(
    method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device, option: str
) -> Iterator[tuple[str, object]]:
    """Yield what figures of a method with a mask are drawn from."""
    if option or not method.masking:
        return
    yield "masks", measure_masks(method, dataset, rows, device)
    if "map" in method.needs:
        yield "heat_maps", measure_heat_maps(method, dataset, rows, device)


@contextmanager
def only_decorates(run: UPath, target: Faces) -> Iterator[None]:
    """Warn where figures of a target cannot be made, such as of pictures that are gone: numbers never wait for them."""
    try:
        yield
    except (UserError, UnreadableImageError, OSError) as error:
        logging.getLogger(__name__).warning("Figures of %s on %s are not drawn: %s", run.name, target.name, error)


def _predict(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device, option: str) -> np.ndarray:
    """Return the probabilities (n, K) of rows, with an option of test time or, where it is empty, without."""
    if option in ADAPTATIONS:
        return ADAPTATIONS[option][1](method, dataset, rows, device)
    views, policy = (OPTIONS[option].views, OPTIONS[option].policy) if option else (1, "")
    if policy:
        dataset = replace(dataset, plan=replace(dataset.plan, policy=policy))
    return predict_average([method], dataset, rows, device, views)


def draw_figures(run: UPath, target: Faces) -> None:
    """Draw what a run's folder says of a target."""
    assert target.column is not None
    with only_decorates(run, target):
        for kind, ending, content in draw_run_figures(run, target.column, target.parts[0].manifest):
            write_file(target.column.figure(run, kind, ending), content)


def check_option(spec: RunSpec, option: str) -> None:
    """Raise `UserError` when a run cannot be evaluated with an option of test time."""
    if spec.exported and option:
        raise UserError(f"An exported model averages what it was exported to average: leave --test-time {option} out.")
    if option in ADAPTATIONS:
        ADAPTATIONS[option][0](build_method(spec, init="scratch"))
    if option == "views" and spec.policy == "clean":
        raise UserError(f"All views of {spec.name!r} are the clean one: evaluate it without --test-time views.")
