"""One run against every target: predictions as Parquet, and from those files alone every number and figure.

Targets are read here and nowhere else; training never sees one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import replace

import numpy as np
import torch
from upath import UPath

from cafe.arithmetic import set_arithmetic
from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError
from cafe.files import locate, write_file
from cafe.learning.adaptation import ADAPTATIONS
from cafe.learning.loading import FaceDataset
from cafe.learning.masks import heat_maps, mean_masks
from cafe.learning.training import predict_average
from cafe.methods.cafe import Cafe
from cafe.methods.method import Method
from cafe.pipeline import cluster
from cafe.pipeline.faces import Faces
from cafe.pipeline.models import build_method, load_method, make_dataset
from cafe.pipeline.progress import Progress
from cafe.pipeline.runs import RunSpec
from cafe.results.metrics import confusion
from cafe.results.predictions import Predictions
from cafe.results.protocols import OPTIONS, find_protocol

MISTAKES = 24  # faces of the error gallery
MASKED_FACES = 512  # that the mean masks are taken over, drawn at random

Judge = Callable[[str, Faces], Future[None]]  # has a target predicted, given the run's folder


def predict_targets(run: UPath, targets: list[Faces], progress: Progress, judge: Judge) -> None:
    """Predict the judged split of each target; `progress(done, total)` counts targets.

    Predictions that are there already are made again.
    """
    progress(0, len(targets))
    waiting = [judge(str(run), target) for target in targets]
    for number, judged in enumerate(as_completed(waiting), start=1):
        if error := judged.exception():
            raise cluster.user_error(error) or error
        progress(number, len(targets))


def judge_anywhere(use_gpu: bool | None) -> Judge:
    """Return what has targets predicted side by side, wherever the connected cluster has room."""
    import ray

    task = ray.remote(predict_target).options(num_cpus=1, num_gpus=int(cluster.wants_gpu(use_gpu)))
    return lambda run, target: task.remote(run, target).future()


def predict_target(run: str, target: Faces, device: torch.device | None = None) -> None:
    """Predict the judged split of one target and write it to the run's folder; the part that runs on a worker."""
    path = locate(run)
    spec = RunSpec.load(path)
    rows, manifest = target.rows(target.split), target.manifest
    device = device or torch.device(cluster.device())
    set_arithmetic(spec.precision)
    method = load_method(spec, path).to(device).to(memory_format=torch.channels_last)
    dataset = make_dataset(spec, target)
    predictions = Predictions(
        [manifest.sample_ids[row] for row in rows],
        manifest.labels[rows],
        _judge(method, dataset, rows, device, find_protocol(target.protocol).option),
        {
            "run": spec.name,
            "target": target.name,
            "protocol": target.protocol,
            "split": target.split,
            "channels": target.channels,
            "kind": manifest.kind,
            "manifest": manifest.digest,
            "without_features": str(len(manifest.rows(target.split)) - len(rows)),
        },
        manifest.table["group"].take(rows).to_pylist(),
    )
    place = target.predictions_path(path)
    for kind, ending, content in draw_figures(spec, method, dataset, rows, predictions, device):
        folder = path / "figures" / kind / find_protocol(target.protocol).prefix
        write_file(folder / f"{place.stem}{ending}", content)
    predictions.save(place)  # last: from here on the target is judged


def check_option(spec: RunSpec, option: str) -> None:
    """Raise `UserError` when a run cannot be judged with an option of test time."""
    if option in ADAPTATIONS:
        ADAPTATIONS[option][0](build_method(spec, init="scratch"))
    if option == "views" and spec.policy == "clean":
        raise UserError(f"All views of {spec.name!r} are the clean one: judge it without --test-time views.")


def _judge(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device, option: str) -> np.ndarray:
    """Return the probabilities (n, 7) of rows, with an option of test time or, where it is empty, without."""
    if option in ADAPTATIONS:
        return ADAPTATIONS[option][1](method, dataset, rows, device)
    views, policy = (OPTIONS[option].views, OPTIONS[option].policy) if option else (1, "")
    if policy:
        dataset = replace(dataset, plan=replace(dataset.plan, policy=policy))
    return predict_average([method], dataset, rows, device, views)


def draw_figures(
    spec: RunSpec,
    method: Method,
    dataset: FaceDataset,
    rows: np.ndarray,
    predictions: Predictions,
    device: torch.device,
) -> Iterator[tuple[str, str, bytes]]:
    """Yield the pictures of a run on a target by kind and ending: confusion, errors, and for CAFE what its mask selects.

    They are PNG; the mean masks by expression are given in numbers too, as JSON.
    """
    from cafe.report import figures

    title = f"{spec.method} trained on {spec.source}, judged on {predictions.about['target']}"
    option = find_protocol(predictions.about["protocol"]).option
    title += f" ({option})" if option else ""
    manifest = dataset.manifest
    yield "confusion", ".png", figures.to_png(figures.draw_confusion(confusion(predictions), title))
    mistakes = figures.find_worst_mistakes(predictions, MISTAKES)
    images = [manifest.read_face(rows[position]) for position in mistakes]
    errors = figures.draw_errors(predictions, mistakes, images, f"{title}: the mistakes it was surest of")
    yield "errors", ".png", figures.to_png(errors)
    if option or not isinstance(method, Cafe) or spec.recipe["mask"] != "sigmoid":
        return
    seen = np.random.default_rng(0).permutation(rows)[:MASKED_FACES]
    masks = mean_masks(method, dataset, seen, device)
    yield "masks", ".png", figures.to_png(figures.draw_masks(masks, f"{title}: what the mask selects"))
    numbers = {
        name: mask.round(4).tolist() for name, mask in zip(EXPRESSIONS, masks, strict=True) if not np.isnan(mask[0])
    }
    yield "masks", ".json", json.dumps(numbers).encode()
    if "map" in method.needs:
        shown = [int(seen[manifest.labels[seen] == label][0]) for label in np.unique(manifest.labels[seen])]
        heats = heat_maps(method, dataset, np.array(shown), device)
        names = [EXPRESSIONS[label].capitalize() for label in manifest.labels[shown]]
        images = [manifest.read_face(row) for row in shown]
        drawn = figures.draw_heat_maps(images, heats, names, f"{title}: where the mask is open")
        yield "heat_maps", ".png", figures.to_png(drawn)


def is_judged(run: UPath, target: Faces) -> bool:
    """Whether there are predictions of a run for the target's judged split as its manifest lists it now."""
    predictions = Predictions.load(target.predictions_path(run))
    if predictions is None:
        return False
    about = predictions.about
    return (about.get("manifest"), about.get("split")) == (target.digest, target.split)
