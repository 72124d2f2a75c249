"""One run against every target: predictions as Parquet, and from those files alone every number and figure.

Targets are read here and nowhere else; training never sees one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from upath import UPath

from cafe.figures import draw_confusion
from cafe.manifest import Manifest
from cafe.metrics import Predictions, confusion, score
from cafe.training import predict
from pipeline import cluster
from pipeline.runs import RunSpec, Target
from pipeline.tracking import Tracker
from pipeline.workspace import Workspace, list_folder, locate

Progress = Callable[[int, int], None]


def predict_targets(
    run: UPath, workspace: Workspace, targets: list[Target], split: str, use_gpu: bool | None, progress: Progress
) -> None:
    """Predict a split of each target on the connected cluster; `progress(done, total)` counts targets.

    Predictions that are there already are made again.
    """
    import ray

    gpu = cluster.count("GPU") > 0 if use_gpu is None else use_gpu
    task = ray.remote(predict_target).options(num_cpus=1, num_gpus=int(gpu))
    waiting = []
    for target in targets:
        store = str(target.store) if target.store else None
        manifest = str(workspace.manifest_path(target.manifest.name))
        waiting.append(task.remote(str(run), manifest, store, target.about, split))
    while waiting:
        progress(len(targets) - len(waiting), len(targets))
        done, waiting = ray.wait(waiting)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise cluster.user_error(error) or error from None
    progress(len(targets), len(targets))


def predict_target(run: str, manifest: str, store: str | None, about: Any, split: str) -> None:
    """Predict a split of one target and write it to the run's folder; the part that runs on a worker."""
    path = locate(run)
    spec = RunSpec.load(path)
    target = Target(Manifest.load(locate(manifest)), locate(store) if store else None, about)
    rows = target.rows(split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = spec.load_model(path).to(device).to(memory_format=torch.channels_last)
    dataset = spec.dataset(target.manifest, target.open_store(), views=[0])
    predictions = Predictions(
        [target.manifest.sample_ids[row] for row in rows],
        target.manifest.labels[rows],
        predict(method, dataset, rows, device),
        {
            "run": spec.name,
            "target": target.manifest.name,
            "split": split,
            "manifest": target.manifest.digest,
            "without_features": str(len(target.manifest.rows(split)) - len(rows)),
        },
    )
    predictions.save(path / "predictions" / f"{prediction_name(target.manifest.name, split)}.parquet")


def prediction_name(target: str, split: str) -> str:
    """Return how a target is called in files and metrics: by its name, with the split when it is not the test split."""
    return target if split == "test" else f"{target}@{split}"


def load_predictions(run: UPath) -> dict[str, Predictions]:
    """Return all predictions of a run by target."""
    return {path.stem: Predictions.load(path) for path in list_folder(run / "predictions")}


def summarise(source: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return flat metrics from {target: {metric: value}}: every target's, and the means over targets.

    `unseen/` averages the test splits of all targets but the source; `all/` includes it, as published tables do.
    """
    flat = {f"target/{target}/{name}": value for target, values in scores.items() for name, value in values.items()}
    tests = [target for target in scores if "@" not in target]
    unseen = [target for target in tests if target != source]
    for group, members in (("unseen", unseen), ("all", tests if source in tests else [])):
        for name in ("accuracy", "mean_class_accuracy", "macro_f1") if members else ():
            flat[f"{group}/{name}"] = float(np.mean([scores[target][name] for target in members]))
    return flat


def is_judged(run: UPath, target: Target) -> bool:
    """Whether there are predictions of a run for the target's test split as its manifest lists it now."""
    path = run / "predictions" / f"{target.manifest.name}.parquet"
    return path.exists() and Predictions.load(path).about["manifest"] == target.manifest.digest


def log_results(run: UPath, tracker: Tracker, further: Mapping[str, float] | None = None) -> dict[str, float]:
    """Compute every metric and figure of a run from its predictions and log them to MLflow; return the metrics.

    `further` metrics are logged with them.
    """
    spec = RunSpec.load(run)
    predictions = load_predictions(run)
    metrics = summarise(spec.source, {target: score(rows) for target, rows in predictions.items()})
    metrics |= further or {}
    run_id = tracker.start(spec.name, spec.parameters(), spec.tags())
    tracker.log(run_id, {name.replace("@", ":"): value for name, value in metrics.items()})
    for target, rows in predictions.items():
        title = f"{spec.method} trained on {spec.source}, judged on {target}"
        tracker.log_figure(run_id, draw_confusion(confusion(rows), title), f"confusion/{target}.png")
        tracker.log_file(run_id, run / "predictions" / f"{target}.parquet", "predictions")
    tracker.finish(run_id)
    return metrics
