"""What every adaptation at test time shares: faces in a fixed order, batch by batch, and what a method must have for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cafe.errors import UserError
from cafe.learning.loading import SMALLEST_BATCH, FaceDataset
from cafe.methods.method import Batch, Method
from cafe.randomness import random_generator


def measure_entropy(logits: Tensor) -> Tensor:
    """Return the entropy (n,) of each row's class probabilities, in nats."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def find_norms(method: Method, option: str) -> list[_BatchNorm]:
    """Return the batch norms of a method; raise `UserError` when none has a scale and a shift."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    if not any(norm.affine for norm in norms):
        raise UserError(
            f"{option.upper()} adapts batch norms, and {name_method(method)} has none: evaluate it without --test-time "
            f"{option}."
        )
    return norms


def find_classifier(method: Method, does: str, option: str) -> nn.Linear:
    """Return the linear layer that gives a method's logits; raise `UserError` when they come from anything else.

    `does` says what the option does with it.
    """
    last = getattr(method, "classifier", None)
    last = last[-1] if isinstance(last, nn.Sequential) else last
    if not isinstance(last, nn.Linear):
        raise UserError(
            f"{option.upper()} {does} a last linear layer, and the logits of {name_method(method)} come from none: evaluate "
            f"it without --test-time {option}."
        )
    return last


def name_method(method: Method) -> str:
    """Return what messages call a method."""
    return type(method).__name__


def order_faces(rows: np.ndarray) -> np.ndarray:
    """Return the places of rows in the order in which they come, drawn from a fixed seed; raise `UserError` for too few."""
    if len(rows) < SMALLEST_BATCH:
        raise UserError(f"{len(rows)} faces are too few to adapt to: at least {SMALLEST_BATCH} are needed.")
    return random_generator("test time").permutation(len(rows))


def split_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Return rows in batches of a size; a short rest joins the last one."""
    return np.split(rows, range(size, len(rows) - SMALLEST_BATCH + 1, size))


def evaluate_online(
    evaluate: Callable[[Batch], Tensor], dataset: FaceDataset, rows: np.ndarray, size: int, device: torch.device
) -> np.ndarray:
    """Return the probabilities (n, K) of rows that `evaluate` gives, batch by batch in a fixed order."""
    order = order_faces(rows)
    with torch.no_grad():
        batches = dataset.load(split_batches(rows[order], size), 0, device)
        return unshuffle(order, (evaluate(batch) for batch in batches))


def unshuffle(order: np.ndarray, parts: Iterable[Tensor]) -> np.ndarray:
    """Return the probabilities (n, K) of rows from those of batches in the order in which they came."""
    shuffled = torch.cat([part.cpu() for part in parts]).numpy()
    probabilities = np.empty_like(shuffled)
    probabilities[order] = shuffled
    return probabilities
