"""A small multilayer perceptron on the frozen features: what more capacity than a linear layer gains, and what it costs.

A baseline of this project for the question what CAFE's mask is worth: about as many parameters as `cafe_self`'s mask for
features of 512 channels, but nothing that ties them to channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cafe.data.expressions import EXPRESSIONS
from cafe.methods import features
from cafe.methods.features import FeatureMethod
from cafe.methods.method import Batch, Inputs


@dataclass(frozen=True)
class Recipe(features.Recipe):
    """CAFE's recipe."""

    hidden: int = 512  # channels of the hidden layer


class Mlp(FeatureMethod):
    """One hidden layer with a ReLU, cross-entropy; trained with CAFE's recipe and views."""

    needs = frozenset({"features"})
    recipe_type = Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.classifier = nn.Sequential(
            nn.Linear(self.width, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, len(EXPRESSIONS))
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, 7)."""
        return {"logits": self.classifier(self.read(batch))}
