"""Temperature scaling: one number that makes a method's confidence what its accuracy is on faces held out of the source.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Sec. 4.2. It changes no ranking of the classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.learning.loading import FaceDataset
from cafe.learning.training import split_rows
from cafe.methods.method import Method

BOUNDS = (0.05, 20.0)  # of a temperature


def calibrate(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> dict[str, float]:
    """Fit the temperature of a trained method on rows that it was not trained on, and return it for the record.

    Raises `UserError` when no row is held out.
    """
    if not len(rows):
        raise UserError("No face of the source is held out to calibrate by: leave calibration out.")
    method.eval()
    frozen_view, logits, labels = 0 if method.clean_features else None, list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch in dataset.load(split_rows(rows), 0, device, frozen_view=frozen_view):
            logits.append(method(batch)["logits"].double().cpu())
            labels.append(batch["label"].cpu())
    temperature = fit_temperature(torch.cat(logits), torch.cat(labels))
    method.temperature.fill_(temperature)
    return {"temperature": temperature}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the number by which logits (N, K) divided have the least cross-entropy with labels (N,)."""
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        return float(functional.cross_entropy(logits / np.exp(logarithm), labels))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6}).x))
