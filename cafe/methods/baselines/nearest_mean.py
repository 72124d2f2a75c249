"""Nearest class mean: the expression whose training faces lie closest on average; one pass over the features, no training.

The rule of "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, with all training faces as exemplars:
features are L2-normalised, averaged for each class, normalised again, and compared by cosine, which ranks unit vectors as
Euclidean distance does. Faces are taken in their clean view 0, so the augmentation plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cafe.methods import features
from cafe.methods.features import FeatureMethod
from cafe.methods.method import Batch, Inputs


@dataclass(frozen=True)
class Recipe(features.Recipe):
    """Nothing is trained."""

    epochs: int = 0
    scale: float = 100.0  # of cosines to logits, as in CLIP: sets how confident predictions are, not which they are


class NearestClassMean(FeatureMethod):
    """Cosines between the frozen features and the mean of every expression's."""

    needs = frozenset({"features"})
    trained = False
    recipe_type = Recipe
    recipe: Recipe
    means: Tensor  # (K, C), unit vectors
    absent: Tensor  # (K,), 0, or -inf for an expression without training faces, which is never predicted

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.register_buffer("means", torch.zeros(len(inputs.classes), self.width))
        self.register_buffer("absent", torch.zeros(len(inputs.classes)))

    def fit(self, batches: Iterable[Batch]) -> None:
        """Average the features of every expression."""
        sums = torch.zeros_like(self.means, dtype=torch.float64)
        for batch in batches:
            members = functional.one_hot(batch["label"], len(self.means)).double()  # (n, K)
            sums += members.T @ functional.normalize(self.read(batch).double(), dim=1)
        self.means.copy_(functional.normalize(sums, dim=1))
        self.absent.masked_fill_(~sums.any(dim=1), -torch.inf)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K)."""
        cosines = functional.linear(functional.normalize(self.read(batch), dim=1), self.means)
        return {"logits": self.recipe.scale * cosines + self.absent}
