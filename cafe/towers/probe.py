"""What the layers of a tower cost and how well they tell expressions apart, so that one can be chosen without any target.

A layer is evaluated by a linear classifier on faces that are held out of the source's training faces.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from cafe.data.manifest import Manifest, hold_out_rows
from cafe.errors import UserError
from cafe.towers.building import FrozenBackbone
from cafe.towers.embedding import Embedder
from cafe.towers.facts import resolve_normalisation
from cafe.towers.names import END, FINAL, Layer
from cafe.views.drawing import ViewPlan

GRIDS = ("1x1", "2x2", "3x3", "4x4")
WIDEST = 4096  # channels; a wider layer takes minutes to fit
HELD_OUT = 0.25  # of the faces taken
INVERSE_PENALTY = 0.01  # C of the logistic regression; at 0.001 rare expressions are missed
TIMED = 16  # faces to a pass whose cost is measured


@dataclass(frozen=True)
class ProbeResult:
    """How well a layer tells expressions apart, in 0–1; `error` is the standard error of the accuracy."""

    layer: Layer
    width: int
    accuracy: float
    error: float
    mean_class_accuracy: float


def choose_faces(manifest: Manifest, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return about `count` training faces at most, to fit on and to test on: stratified by class, groups kept together."""
    rows = manifest.rows("train")
    if len(rows) > count:
        _, rows = hold_out_rows(manifest, rows, count / len(rows))
    fitted, tested = hold_out_rows(manifest, rows, HELD_OUT)
    if not len(tested) or len(np.unique(manifest.labels[fitted])) < 2:
        raise UserError(f"{manifest.name!r} has too few training faces to hold some out: name a larger source.")
    return fitted, tested


def list_candidates(tower: FrozenBackbone) -> list[Layer]:
    """Return every layer of a tower at every grid that its map allows and that is not too wide to fit."""
    candidates = dict.fromkeys([tower.layer, END])
    for name in tower.layers:
        shape = tower.describe(END if name == FINAL else Layer(name, "1x1")).map_shape
        if shape is None:
            continue
        for grid in GRIDS:
            side = int(grid[0])
            if side <= min(shape[1:]) and shape[0] * side**2 <= WIDEST and (name, side) != (FINAL, 1):
                candidates[Layer(name, grid)] = None
    return list(candidates)


def probe_layers(
    tower: FrozenBackbone,
    manifest: Manifest,
    fitted: np.ndarray,
    tested: np.ndarray,
    device: str,
    progress: Callable[[int, int], None],
) -> list[ProbeResult]:
    """Return how well every layer and grid of a tower does; `progress(done, total)` counts faces and layers."""
    layers, rows = list_candidates(tower), np.concatenate([fitted, tested])
    plan = ViewPlan("clean", 0, 1, "bilinear", *resolve_normalisation(tower.facts))
    embedder = Embedder(tower, manifest, plan, device, dtype="float32")
    parts: list[list[np.ndarray]] = [[] for _ in layers]
    for start in range(0, len(rows), embedder.batch_size):
        for part, read in zip(parts, embedder.read_layers(rows[start:][: embedder.batch_size], 0, layers), strict=True):
            part.append(read["pooled"])
        progress(min(start + embedder.batch_size, len(rows)), len(rows) + len(layers))
    results = []
    for number, (layer, part) in enumerate(zip(layers, parts, strict=True), start=1):
        features = np.concatenate(part)
        results.append(_test_layer(layer, features, manifest.labels[rows], len(fitted)))
        progress(len(rows) + number, len(rows) + len(layers))
    return results


def _test_layer(layer: Layer, features: np.ndarray, labels: np.ndarray, fitted: int) -> ProbeResult:
    """Fit a linear classifier on the first faces and test it on the others."""
    scaler = StandardScaler().fit(features[:fitted])
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=300, tol=1e-3)
    classifier.fit(scaler.transform(features[:fitted]), labels[:fitted])
    truth, predicted = labels[fitted:], classifier.predict(scaler.transform(features[fitted:]))
    accuracy = float(accuracy_score(truth, predicted))
    error = math.sqrt(accuracy * (1 - accuracy) / len(truth))
    return ProbeResult(layer, features.shape[1], accuracy, error, float(balanced_accuracy_score(truth, predicted)))


def time_layer(tower: FrozenBackbone, layer: Layer) -> float:
    """Return the seconds per face up to a layer on this machine: the best of three passes."""
    size = tower.facts.input_size
    images = torch.zeros(TIMED, 3, size, size).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            tower.read(images, [layer])
            seconds.append((time.perf_counter() - start) / TIMED)
    return min(seconds[1:])
