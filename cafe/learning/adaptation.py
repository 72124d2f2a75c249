"""Test-time adaptation: TENT and T3A, which learn from the unlabelled faces they evaluate.

Whoever adapts has seen the target (transductive): such numbers are no generalisation to a set that nobody has seen. Faces
come once, in an order drawn from a fixed seed, since manifests list them class by class; evaluated again, they get the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from cafe.errors import UserError
from cafe.learning.loading import SMALLEST_BATCH, FaceDataset
from cafe.methods.method import Batch, Method
from cafe.randomness import random_generator

TENT_BATCH, TENT_RATE = 200, 1e-3  # released configuration for CIFAR-10-C: Adam without weight decay, one step
T3A_BATCH, T3A_KEPT = 32, 100  # released script; M of the published grid 1, 5, 20, 50, 100, all


def predict_tent(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by TENT: batch norms take the statistics of each batch, their scale and shift its entropy.

    "Tent: Fully Test-Time Adaptation by Entropy Minimization", Wang et al., ICLR 2021. Each batch is predicted, then one
    step is taken. Only batch norms are in training mode: dropout stays off. Raises `UserError` for a method without any.
    """
    method = copy.deepcopy(method).eval().requires_grad_(False)
    for norm in find_norms(method):
        norm.train().requires_grad_(True)
    affine = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(affine, lr=TENT_RATE, betas=(0.9, 0.999))

    def evaluate(batch: Batch) -> Tensor:
        with torch.enable_grad():
            logits: Tensor = method(batch)["logits"].float()
            optimizer.zero_grad()
            measure_entropy(logits).mean().backward()
        optimizer.step()
        return logits

    return _evaluate_online(evaluate, dataset, rows, TENT_BATCH, device)


def predict_t3a(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by T3A: each class's prototype is the mean of the faces of lowest entropy taken for it.

    "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", Iwasawa and Matsuo, NeurIPS 2021. A
    batch joins the supports before it is predicted, as in the released code. Raises `UserError` for a method that does not
    end in a linear layer.
    """
    classifier, features = find_classifier(method.eval()), list[Tensor]()
    supports = Supports(classifier)
    hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))

    def evaluate(batch: Batch) -> Tensor:
        logits = method(batch)["logits"].float()
        return supports.evaluate(features.pop(), logits)

    try:
        return _evaluate_online(evaluate, dataset, rows, T3A_BATCH, device)
    finally:
        hook.remove()


class Supports:
    """What stands for each class, at first its weights in the classifier: features (S, C), classes and entropies (S,)."""

    def __init__(self, classifier: nn.Linear) -> None:
        self.features = classifier.weight.detach().float()
        self.classes = torch.arange(len(self.features), device=self.features.device)
        self.entropies = measure_entropy(classifier(classifier.weight).detach().float())
        self.count = len(self.features)

    def evaluate(self, features: Tensor, logits: Tensor) -> Tensor:
        """Take faces (n, C) in, keep those of lowest entropy of each class; return the logits (n, K) by its prototypes."""
        self.features = torch.cat([self.features, features])
        self.classes = torch.cat([self.classes, logits.argmax(dim=1)])
        self.entropies = torch.cat([self.entropies, measure_entropy(logits)])
        order = self.entropies.argsort(stable=True)
        kept = torch.cat([order[self.classes[order] == number][:T3A_KEPT] for number in range(self.count)])
        self.features, self.classes, self.entropies = self.features[kept], self.classes[kept], self.entropies[kept]
        members = functional.one_hot(self.classes, self.count).to(features)  # (S, K)
        prototypes = functional.normalize(members.T @ functional.normalize(self.features, dim=1), dim=1)  # (K, C)
        return features @ prototypes.T


def measure_entropy(logits: Tensor) -> Tensor:
    """Return the entropy (n,) of each row's class probabilities, in nats."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def find_norms(method: Method) -> list[_BatchNorm]:
    """Return the batch norms of a method; raise `UserError` when none has a scale and a shift."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    if not any(norm.affine for norm in norms):
        raise UserError(f"TENT adapts batch norms, and {_name(method)} has none: evaluate it without --test-time tent.")
    return norms


def find_classifier(method: Method) -> nn.Linear:
    """Return the linear layer that gives a method's logits; raise `UserError` when they come from anything else."""
    last = getattr(method, "classifier", None)
    last = last[-1] if isinstance(last, nn.Sequential) else last
    if not isinstance(last, nn.Linear):
        raise UserError(
            f"T3A adjusts a last linear layer, and the logits of {_name(method)} come from none: evaluate it without "
            "--test-time t3a."
        )
    return last


def _name(method: Method) -> str:
    return type(method).__name__


def _evaluate_online(
    evaluate: Callable[[Batch], Tensor], dataset: FaceDataset, rows: np.ndarray, size: int, device: torch.device
) -> np.ndarray:
    """Return the probabilities (n, K) of rows, batch by batch in a fixed order; a short rest joins the last batch."""
    if len(rows) < SMALLEST_BATCH:
        raise UserError(f"{len(rows)} faces are too few to adapt to: at least {SMALLEST_BATCH} are needed.")
    order = random_generator("test time").permutation(len(rows))
    starts = range(size, len(rows) - SMALLEST_BATCH + 1, size)
    batches = [rows[places] for places in np.split(order, starts)]
    with torch.no_grad():
        parts = [evaluate(batch).detach().softmax(dim=1).cpu() for batch in dataset.load(batches, 0, device)]
    probabilities = np.empty((len(rows), parts[0].shape[1]), np.float32)
    probabilities[order] = torch.cat(parts).numpy()
    return probabilities


ADAPTATIONS: dict[str, tuple[Callable[[Method], object], Callable[..., np.ndarray]]] = {
    "tent": (find_norms, predict_tent),  # what it needs of a method, and how it evaluates
    "t3a": (find_classifier, predict_t3a),
}
