"""RUL: faces are mixed in pairs, and the more uncertain face of a pair must get the larger share of the mixture.

"Relative Uncertainty Learning for Facial Expression Recognition", NeurIPS 2021, as in the released script, which mixes
features and classifies the mixture. Here the logits are mixed: the classifier is linear and the two shares add up to 1, so
that these are the same numbers, and no parameter is used outside the forward pass that several workers share. Other
deviations: docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method, widen
from cafe.networks.branches import build_network
from cafe.networks.parallel import GlobalDropout

EMBEDDING = 64  # channels of the mean and of the variance (released script)
EPSILON = 2e-5  # of the heads' batch norms (released script)


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """RUL's published settings (released script)."""

    batch_size: int = 64
    classifier_learning_rate: float = 2e-3
    dropout: float = 0.4

    follows: ClassVar = {"classifier_learning_rate": "learning_rate"}
    shares: ClassVar[tuple[str, ...]] = ("dropout",)


class Rul(Method):
    """Two heads on the last map give a face's mean and variance; training classifies mixtures, prediction the mean."""

    needs = frozenset({"image"})
    policy = "scn"
    recipe_type = Recipe
    recipe_changes: ClassVar = {"affectnet": {"epochs": 20, "gamma": 0.8, "prior": "balanced"}}
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.branch = build_network(inputs.network, inputs.init, scratch="pytorch")
        height, width = self.branch.map_size(inputs.image_size)
        self.mean, self.log_variance = (
            build_head(self.branch.width, height * width, recipe.dropout) for _ in ("mean", "log_variance")
        )
        self.classifier = nn.Linear(EMBEDDING, len(inputs.classes))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the logits (N, K) of the mean and, while training, the uncertainty (N, 1) of every face."""
        features = self.branch(batch["image"])
        output = {"logits": self.classifier(self.mean(features))}
        if self.training:
            output["uncertainty"] = measure_uncertainty(widen(self.log_variance(features)))
        return output

    def describe_faces(self, batch: Batch) -> dict[str, Tensor]:
        """Return the `uncertainty` of every face: the mean variance that prediction does not need."""
        log_variance = widen(self.log_variance(self.branch(batch["image"])))
        return {"uncertainty": measure_uncertainty(log_variance).squeeze(1)}

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Mix every face with a random other one of the batch and ask for both labels."""
        partner = torch.randperm(len(batch["label"]), generator=batch["generator"]).to(batch["label"].device)
        mixed = mix(output["logits"], output["uncertainty"], partner)
        return {"total": add_up_loss(mixed, batch["label"], partner)}


def build_head(channels: int, places: int, dropout: float) -> nn.Sequential:
    """Return a head that turns a map (N, channels, h, w), h · w = places, into an embedding (N, 64)."""
    return nn.Sequential(
        nn.BatchNorm2d(channels, eps=EPSILON, affine=False),
        GlobalDropout(dropout),
        nn.Flatten(),
        nn.Linear(channels * places, EMBEDDING),
        nn.BatchNorm1d(EMBEDDING, eps=EPSILON),
    )


def measure_uncertainty(log_variance: Tensor) -> Tensor:
    """Return the mean variance (N, 1) over the channels of (N, C)."""
    return log_variance.exp().mean(dim=1, keepdim=True)


def mix(values: Tensor, uncertainty: Tensor, partner: Tensor) -> Tensor:
    """Add the values (N, C) of two faces, each with its share of their uncertainty (N, 1); `partner` is (N,)."""
    share = uncertainty / (uncertainty + uncertainty[partner])
    return share * values + (1 - share) * values[partner]


def add_up_loss(mixed: Tensor, labels: Tensor, partner: Tensor) -> Tensor:
    """Return the mean cross-entropy of mixed logits (N, K) with the labels (N,) of both faces."""
    first, second = (functional.cross_entropy(mixed, wanted) for wanted in (labels, labels[partner]))
    return (first + second) / 2
