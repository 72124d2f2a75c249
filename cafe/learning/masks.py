"""What a mask selects: its mean over the faces of each expression, and where on a face it is open."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cafe.data.expressions import EXPRESSIONS
from cafe.learning.loading import FaceDataset
from cafe.learning.training import PREDICTION_BATCH
from cafe.methods.cafe import Cafe


def mean_masks(method: Cafe, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the mean mask (7, C) over the clean views of each expression's faces; NaN for one without faces.

    A mask with positions (N, C, H, W) is averaged over them.
    """
    sums, counts = np.zeros((len(EXPRESSIONS), method.width)), np.zeros(len(EXPRESSIONS))
    for masks, labels in _masks(method, dataset, rows, device):
        np.add.at(sums, labels, masks.reshape(*masks.shape[:2], -1).mean(axis=2))
        np.add.at(counts, labels, 1)
    means: np.ndarray = np.divide(sums, counts[:, None], out=np.full(sums.shape, np.nan), where=counts[:, None] > 0)
    return means


def heat_maps(method: Cafe, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return how open a mask with positions is at each of them, (n, H, W): its mean over channels, in 0–1."""
    return np.concatenate([masks.mean(axis=1) for masks, _ in _masks(method, dataset, rows, device)])


@torch.no_grad()
def _masks(
    method: Cafe, dataset: FaceDataset, rows: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    method.eval()
    batches = np.split(rows, range(PREDICTION_BATCH, len(rows), PREDICTION_BATCH))
    for batch in dataset.load(batches, 0, device):
        yield method.mask(batch).float().cpu().numpy(), batch["label"].cpu().numpy()


def measure_masks(method: Cafe, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> dict[str, list[float]]:
    masks = mean_masks(method, dataset, rows, device)
    return {n: m.round(4).tolist() for n, m in zip(EXPRESSIONS, masks, strict=True) if not np.isnan(m[0])}


def measure_heat_maps(method: Cafe, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> dict[str, object]:
    return {}
