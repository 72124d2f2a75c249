"""One run against every target: predictions as Parquet, and from those files alone every number and figure.

Targets are read here and nowhere else; training never sees one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.learning.loading import FaceDataset
from cafe.learning.masks import heat_maps, mean_masks
from cafe.learning.training import predict
from cafe.methods.cafe import Cafe
from cafe.methods.method import Method
from cafe.report.figures import draw_confusion, draw_errors, draw_heat_maps, draw_masks, find_worst_mistakes
from cafe.results.metrics import confusion, score
from cafe.results.predictions import Predictions, load_predictions
from cafe.results.protocols import PROTOCOLS, find_protocol
from pipeline import cluster
from pipeline.progress import Progress
from pipeline.runs import RunSpec, Target
from pipeline.tracking import Tracker
from pipeline.workspace import Workspace, locate

MISTAKES = 24  # faces of the error gallery
MASKED_FACES = 512  # that the mean masks are taken over, drawn at random


def predict_targets(
    run: UPath, workspace: Workspace, targets: list[Target], use_gpu: bool | None, progress: Progress
) -> None:
    """Predict the judged split of each target on the connected cluster; `progress(done, total)` counts targets.

    Predictions that are there already are made again.
    """
    import ray

    gpu = cluster.count("GPU") > 0 if use_gpu is None else use_gpu
    task = ray.remote(predict_target).options(num_cpus=1, num_gpus=int(gpu))
    waiting = []
    for target in targets:
        store = str(target.store) if target.store else None
        manifest = str(workspace.manifest_path(target.manifest.name))
        how = (target.protocol, target.split, target.title)
        waiting.append(task.remote(str(run), manifest, store, target.about, how))
    while waiting:
        progress(len(targets) - len(waiting), len(targets))
        done, waiting = ray.wait(waiting)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise cluster.user_error(error) or error from None
    progress(len(targets), len(targets))


def predict_target(run: str, manifest: str, store: str | None, about: Any, how: tuple[str, str, str]) -> None:
    """Predict the judged split of one target and write it to the run's folder; the part that runs on a worker."""
    path = locate(run)
    spec = RunSpec.load(path)
    target = Target(Manifest.load(locate(manifest)), locate(store) if store else None, about, *how)
    rows = target.rows(target.split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = spec.load_model(path).to(device).to(memory_format=torch.channels_last)
    dataset = spec.dataset(target)
    predictions = Predictions(
        [target.manifest.sample_ids[row] for row in rows],
        target.manifest.labels[rows],
        predict(method, dataset, rows, device),
        {
            "run": spec.name,
            "target": target.manifest.name,
            "protocol": target.protocol,
            "split": target.split,
            "channels": target.channels,
            "kind": target.manifest.kind,
            "manifest": target.manifest.digest,
            "without_features": str(len(target.manifest.rows(target.split)) - len(rows)),
        },
        target.manifest.table["group"].take(rows).to_pylist(),
    )
    place = target.predictions_path(path)
    predictions.save(place)
    for kind, figure in draw_figures(spec, method, dataset, rows, predictions, device):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        folder = path / "figures" / kind / find_protocol(target.protocol).prefix
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place.stem}.png").write_bytes(picture.getvalue())


def draw_figures(
    spec: RunSpec,
    method: Method,
    dataset: FaceDataset,
    rows: np.ndarray,
    predictions: Predictions,
    device: torch.device,
) -> Iterator[tuple[str, Figure]]:
    """Yield by kind the pictures of a run on a target: confusion, errors, and for CAFE what its mask selects."""
    title = f"{spec.method} trained on {spec.source}, judged on {predictions.about['target']}"
    manifest = dataset.manifest
    yield "confusion", draw_confusion(confusion(predictions), title)
    mistakes = find_worst_mistakes(predictions, MISTAKES)
    images = [manifest.read_face(rows[position]) for position in mistakes]
    yield "errors", draw_errors(predictions, mistakes, images, f"{title}: the mistakes it was surest of")
    if not isinstance(method, Cafe) or spec.recipe["mask"] != "sigmoid":
        return
    seen = np.random.default_rng(0).permutation(rows)[:MASKED_FACES]
    yield "masks", draw_masks(mean_masks(method, dataset, seen, device), f"{title}: what the mask selects")
    if "map" in method.needs:
        shown = [int(seen[manifest.labels[seen] == label][0]) for label in np.unique(manifest.labels[seen])]
        heats = heat_maps(method, dataset, np.array(shown), device)
        names = [EXPRESSIONS[label].capitalize() for label in manifest.labels[shown]]
        images = [manifest.read_face(row) for row in shown]
        yield "heat_maps", draw_heat_maps(images, heats, names, f"{title}: where the mask is open")


def summarise(source: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return flat metrics from {target: {metric: value}}: every target's, and the means over targets.

    `unseen/` averages all targets but the source, `all/` includes it, as published tables do; both leave out what was judged
    on another split than the protocol's, as `target@split`.
    """
    flat = {f"target/{target}/{name}": value for target, values in scores.items() for name, value in values.items()}
    tests = [target for target in scores if "@" not in target]
    unseen = [target for target in tests if target != source]
    for group, members in (("unseen", unseen), ("all", tests if source in tests else [])):
        for name in ("accuracy", "mean_class_accuracy", "macro_f1") if members else ():
            flat[f"{group}/{name}"] = float(np.mean([scores[target][name] for target in members]))
    return flat


def is_judged(run: UPath, target: Target) -> bool:
    """Whether there are predictions of a run for the target's judged split as its manifest lists it now."""
    path = target.predictions_path(run)
    if not path.exists():
        return False
    predictions = Predictions.load(path)
    if predictions is None:
        return False
    about = predictions.about
    return (about["manifest"], about["split"]) == (target.manifest.digest, target.split)


def log_results(run: UPath, tracker: Tracker, further: Mapping[str, float] | None = None) -> dict[str, float]:
    """Compute every metric of a run from its predictions and log them to MLflow with its pictures; return the metrics.

    Those of another protocol than `clean` have its name in front, and a tag tells by which protocols the run was judged.
    `further` metrics are logged with them.
    """
    spec = RunSpec.load(run)
    run_id = tracker.start(spec.name, spec.parameters(), spec.tags())
    metrics = dict(further or {})
    judged = {protocol: predictions for protocol in PROTOCOLS if (predictions := load_predictions(run, protocol))}
    for protocol, predictions in judged.items():
        prefix = find_protocol(protocol).prefix
        scores = summarise(spec.source, {target: score(rows) for target, rows in predictions.items()})
        metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
        for target in predictions:
            tracker.log_file(
                run_id, run / "predictions" / f"{prefix}{target}.parquet", f"predictions/{prefix}".rstrip("/")
            )
    tracker.log(run_id, {name.replace("@", ":"): value for name, value in metrics.items()})
    tracker.tag(run_id, "cafe.protocols", ", ".join(judged))
    figures = run / "figures"
    for picture in sorted(figures.rglob("*.png")) if figures.exists() else ():
        tracker.log_file(run_id, picture, str(picture.parent.relative_to(figures)))
    tracker.finish(run_id)
    return metrics
