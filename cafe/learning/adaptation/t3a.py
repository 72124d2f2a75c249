"""T3A: the classifier's weights are replaced by means of the target's faces."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.learning.adaptation.online import evaluate_online, find_classifier, measure_entropy
from cafe.learning.loading import FaceDataset
from cafe.methods.method import Batch, Method

BATCH, KEPT = 32, 100  # released script; M of the published grid 1, 5, 20, 50, 100, all


def check_t3a(method: Method) -> nn.Linear:
    """Return the last linear layer of a method; raise `UserError` where there is none."""
    return find_classifier(method, "adjusts", "t3a")


def predict_t3a(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return probabilities (n, K) by T3A: each class's prototype is the mean of the faces of lowest entropy taken for it.

    "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", Iwasawa and Matsuo, NeurIPS 2021. A
    batch joins the supports before it is predicted, as in the released code. Raises `UserError` for a method that does not
    end in a linear layer.
    """
    classifier, features = check_t3a(method.eval()), list[Tensor]()
    supports = Supports(classifier)
    hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))

    def evaluate(batch: Batch) -> Tensor:
        logits = method(batch)["logits"].float()
        return supports.evaluate(features.pop(), logits).softmax(dim=1)

    try:
        return evaluate_online(evaluate, dataset, rows, BATCH, device)
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
        kept = torch.cat([order[self.classes[order] == number][:KEPT] for number in range(self.count)])
        self.features, self.classes, self.entropies = self.features[kept], self.classes[kept], self.entropies[kept]
        members = functional.one_hot(self.classes, self.count).to(features)  # (S, K)
        prototypes = functional.normalize(members.T @ functional.normalize(self.features, dim=1), dim=1)  # (K, C)
        return features @ prototypes.T
