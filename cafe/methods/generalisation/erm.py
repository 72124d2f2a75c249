"""ERM, and the network that all algorithms of domain generalisation train: a mask, a hidden layer, a linear classifier.

Empirical risk minimisation (Vapnik, 1998) is what the others have to beat: cross-entropy, wherever a face is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods import features, method
from cafe.methods.cafe import apply_mask
from cafe.methods.draws import Choice, Distribution
from cafe.methods.features import FeatureMethod
from cafe.methods.method import Batch, Inputs, find_targets


@dataclass(frozen=True)
class Recipe(features.Recipe):
    """How the network is trained, by DomainBed's defaults for small images: Adam, a constant rate, no weight decay."""

    batch_size: int = 128  # of all sources together; DomainBed takes 64 of each
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    gamma: float = 1.0
    # What the features are multiplied by before all else: CAFE's mask, a learned vector as in `cafe_vector`, or made of the
    # features by one layer as in `cafe_self`.
    mask: Literal["none", "vector", "features"] = "none"
    hidden: int = 512  # channels of the hidden layer, which ends in a ReLU; 0: there is none
    dropout: float = 0.0  # share of these that are 0 in a training step

    shares: ClassVar[tuple[str, ...]] = ("dropout",)


class Erm(FeatureMethod):
    """Cross-entropy of the pooled faces. A subclass is another algorithm: losses of the same network's outputs."""

    needs = frozenset({"features"})
    takes_votes = True
    recipe_type = Recipe
    recipe: Recipe
    recipe_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # DomainBed's, whatever the data sets
    moves: ClassVar[str] = ""  # what it does with learned features, where it cannot do without any

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.mask: Any = None
        if recipe.mask == "vector":
            self.mask = nn.Parameter(torch.zeros(self.width))
        elif recipe.mask == "features":
            self.mask = nn.Linear(self.width, self.width)
        self.learned_width = recipe.hidden or self.width
        if recipe.hidden:
            self.hidden = nn.Sequential(nn.Linear(self.width, recipe.hidden), nn.ReLU(), nn.Dropout(recipe.dropout))
        self.classifier = nn.Linear(self.learned_width, len(inputs.classes))

    @classmethod
    def check_recipe(cls, recipe: method.Recipe, name: str) -> None:
        """Raise `UserError` for an algorithm about learned features where there are none."""
        super().check_recipe(recipe, name)
        own = cast("Recipe", recipe)
        if cls.moves and own.mask == "none" and not own.hidden:
            raise UserError(
                f"{name} {cls.moves}, and frozen ones stay as they are: set hidden=512, or mask=vector or mask=features."
            )
        if own.dropout and not own.hidden:
            raise UserError(
                "dropout is a setting of the hidden layer, and hidden is 0: leave it out, or set hidden=512."
            )

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "dropout": Choice((0.0, 0.1, 0.5))}

    def represent(self, batch: Batch) -> Tensor:
        """Return what is learned in front of the classifier, (N, learned_width)."""
        found = self.read(batch)
        if self.recipe.mask == "vector":
            found = apply_mask(found, self.mask.expand_as(found), "sigmoid")
        elif self.recipe.mask == "features":
            found = apply_mask(found, self.mask(found), "sigmoid")
        return self.hidden(found) if self.recipe.hidden else found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K) and the learned features (N, learned_width)."""
        learned = self.represent(batch)
        return {"logits": self.classifier(learned), "learned": learned}


def split_sources(values: Tensor, batch: Batch) -> list[Tensor]:
    """Return the values (N, …) of the faces of each source in a whole batch, in the order of the sources."""
    domains = batch["domain"]
    return [values[domains == number] for number in domains.unique().tolist()]


def measure_risks(output: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the faces of each source (D,)."""
    logits, targets = (split_sources(values, batch) for values in (output["logits"], find_targets(batch)))
    return torch.stack([functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)])
