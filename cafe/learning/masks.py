"""What a mask selects: its mean over the faces of each expression, and where on a face it is open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cafe.learning.loading import FaceDataset
from cafe.learning.training import PREDICTION_BATCH
from cafe.methods.method import Method

MASKED_FACES = 512  # that the mean masks are taken over, drawn at random
DIGITS = 4  # of a mask, where it is kept as text


def measure_masks(
    method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device
) -> dict[str, list[float]]:
    """Return the mean mask (C,) of each class that has faces by its name, over at most 512 of some rows, for JSON."""
    means = mean_masks(method, dataset, choose_faces(rows), device)
    named = zip(method.inputs.classes, means, strict=True)
    return {name: mean.round(DIGITS).tolist() for name, mean in named if not np.isnan(mean[0])}


def measure_heat_maps(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return where the mask of a face of each class is open, for JSON.

    `sample_ids` names the faces, one of each class that has any, `classes` what they show, `heats` their maps [n][H][W].
    """
    seen, pictures = choose_faces(rows), dataset.manifest
    labels = pictures.labels[seen]
    shown = np.array([seen[labels == label][0] for label in np.unique(labels)])
    return {
        "sample_ids": [pictures.sample_ids[row] for row in shown],
        "classes": [method.inputs.classes[pictures.labels[row]] for row in shown],
        "heats": heat_maps(method, dataset, shown, device).round(DIGITS).tolist(),
    }


def choose_faces(rows: np.ndarray) -> np.ndarray:
    """Return at most 512 of some rows in a random order that is always the same."""
    return np.random.default_rng(0).permutation(rows)[:MASKED_FACES]


def mean_masks(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the mean mask (K, C) over the clean views of each class's faces; NaN for one without faces.

    A mask with positions (N, C, H, W) is averaged over them.
    """
    several = [
        (masks.reshape(*masks.shape[:2], -1).mean(axis=2), labels)
        for masks, labels in _masks(method, dataset, rows, device)
    ]
    values, labels = (np.concatenate(parts) for parts in zip(*several, strict=True))  # (n, C), (n,)
    means = np.full((len(method.inputs.classes), values.shape[1]), np.nan)
    for label in np.unique(labels):
        means[label] = values[labels == label].mean(axis=0, dtype=float)
    return means


def heat_maps(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return how open a mask with positions is at each of them, (n, H, W): its mean over channels, in 0–1."""
    return np.concatenate([masks.mean(axis=1) for masks, _ in _masks(method, dataset, rows, device)])


@torch.no_grad()
def _masks(
    method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    method.eval()
    batches = np.split(rows, range(PREDICTION_BATCH, len(rows), PREDICTION_BATCH))
    for batch in dataset.load(batches, 0, device):
        yield method.make_mask(batch).float().cpu().numpy(), batch["label"].cpu().numpy()
