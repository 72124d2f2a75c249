"""A small multilayer perceptron on the frozen features: what more capacity than a linear layer gains, and what it costs.

A baseline of this project for the question what CAFE's mask is worth; for features of 512 channels it has as many weights as
the mask of `cafe_self`.
"""

from __future__ import annotations

from torch import Tensor, nn

from cafe.data.expressions import EXPRESSIONS
from cafe.methods.features import FeatureMethod, Recipe
from cafe.methods.method import Batch, Inputs

HIDDEN = 512  # channels


class Mlp(FeatureMethod):
    """One hidden layer with a ReLU, cross-entropy; trained with CAFE's recipe and views."""

    needs = frozenset({"features"})

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.classifier = nn.Sequential(nn.Linear(self.width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(EXPRESSIONS)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, 7)."""
        return {"logits": self.classifier(self.read(batch))}
