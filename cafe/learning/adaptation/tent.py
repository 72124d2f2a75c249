"""TENT: batch norms take the statistics of the target's faces, and learn to make their predictions confident."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from cafe.learning.adaptation.online import evaluate_online, find_norms, measure_entropy
from cafe.learning.loading import FaceDataset
from cafe.methods.method import Batch, Method

BATCH, RATE = 200, 1e-3  # released configuration for CIFAR-10-C: Adam without weight decay, one step


def check_tent(method: Method) -> None:
    """Raise `UserError` for a method without batch norms."""
    find_norms(method, "tent")


def predict_tent(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by TENT: batch norms take the statistics of each batch, their scale and shift its entropy.

    "Tent: Fully Test-Time Adaptation by Entropy Minimization", Wang et al., ICLR 2021. Each batch is predicted, then one
    step is taken. Only batch norms are in training mode: dropout stays off. Raises `UserError` for a method without any.
    """
    method = copy.deepcopy(method).eval().requires_grad_(False)
    for norm in find_norms(method, "tent"):
        norm.train().requires_grad_(True)
    affine = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(affine, lr=RATE, betas=(0.9, 0.999))

    def evaluate(batch: Batch) -> Tensor:
        with torch.enable_grad():
            logits: Tensor = method(batch)["logits"].float()
            optimizer.zero_grad()
            measure_entropy(logits).mean().backward()
        optimizer.step()
        return method.to_probabilities(logits.detach())

    return evaluate_online(evaluate, dataset, rows, BATCH, device)
