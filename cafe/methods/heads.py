"""Heads: what classifies frozen features, masked or as they are, and the settings by which it is trained.

The defaults are those of CAFE's released script: Adam, a rate that falls from epoch to epoch, no regularisation but weight
decay.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods import features, method
from cafe.methods.features import FeatureMethod
from cafe.methods.method import Batch, find_targets


@dataclass(frozen=True)
class Recipe(features.Recipe):
    """How a linear head is trained."""

    optimizer: Literal["adam", "adamw"] = "adam"  # "adamw": decoupled weight decay (Loshchilov and Hutter, ICLR 2019)
    schedule: Literal["exponential", "cosine"] = "exponential"  # by `gamma`, or half a cosine over all epochs
    label_smoothing: float = 0.0  # share of a label that goes to all classes alike (Szegedy et al., CVPR 2016)
    input_dropout: float = 0.0  # share of the channels that are 0 in a training step
    # α of Beta(α, α), from which each step draws how two faces' features and targets are mixed ("mixup: Beyond Empirical
    # Risk Minimization", Zhang et al., ICLR 2018); 0: they are not.
    mixup: float = 0.0

    shares: ClassVar[tuple[str, ...]] = ("label_smoothing", "input_dropout")


@dataclass(frozen=True)
class HiddenRecipe(Recipe):
    """How a head with a hidden layer is trained."""

    hidden: int = 512  # channels of the hidden layer
    dropout: float = 0.0  # share of the hidden channels that are 0 in a training step

    shares: ClassVar[tuple[str, ...]] = (*Recipe.shares, "dropout")

    def __post_init__(self) -> None:
        """Raise `UserError` also for a hidden layer without channels."""
        super().__post_init__()
        if self.hidden < 1:
            raise UserError(f"A hidden layer has at least one channel, not {self.hidden}: give 512, for example.")


class HeadMethod(FeatureMethod):
    """A method that classifies frozen features by a head."""

    recipe_type = Recipe
    recipe: Recipe
    takes_votes = True

    @classmethod
    def check_recipe(cls, recipe: method.Recipe, name: str) -> None:
        """Raise `UserError` for a mixture of the features of a method that looks at their pictures too."""
        super().check_recipe(recipe, name)
        if getattr(recipe, "mixup", 0) and "image" in cls.needs:
            raise UserError(f"{name} reads pictures beside their features, which are not mixed: leave mixup out.")

    def build_linear(self) -> nn.Module:
        """Return one linear layer from features (N, C) to logits (N, K)."""
        linear = nn.Linear(self.width, len(self.inputs.classes))
        return nn.Sequential(self._drop_channels(), linear) if self.recipe.input_dropout else linear

    def build_hidden(self, recipe: HiddenRecipe) -> nn.Module:
        """Return two layers with a ReLU between them from features (N, C) to logits (N, K)."""
        # Layers with weights keep the names they have without dropout.
        return nn.Sequential(
            OrderedDict(
                {
                    "input_dropout": self._drop_channels(),
                    "0": nn.Linear(self.width, recipe.hidden),
                    "1": nn.ReLU(),
                    "dropout": nn.Dropout(recipe.dropout),
                    "2": nn.Linear(recipe.hidden, len(self.inputs.classes)),
                }
            )
        )

    def augment(self, batch: Batch) -> Batch:
        """Mix each face of a worker's part with another one of it, as the recipe says."""
        alpha, labels = self.recipe.mixup, batch["label"]
        if not alpha:
            return batch
        kept = float(torch.distributions.Beta(alpha, alpha).sample())
        partner = torch.randperm(len(labels)).to(labels.device)
        targets = batch.get("target", functional.one_hot(labels, len(self.inputs.classes)).float())
        mixed = {self.array(): batch[self.array()], "target": targets}
        return {**batch, **{name: kept * values + (1 - kept) * values[partner] for name, values in mixed.items()}}

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with labels that are smoothed as the recipe says."""
        smoothing = self.recipe.label_smoothing
        return {"total": functional.cross_entropy(output["logits"], find_targets(batch), label_smoothing=smoothing)}

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the recipe."""
        kind = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
        return kind(self.parameter_groups(), weight_decay=self.recipe.weight_decay, fused=True)

    def learning_rate_factor(self, epoch: int) -> float:
        """What the optimiser's learning rates are multiplied by in epoch 1, 2, …"""
        if self.recipe.schedule == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * (epoch - 1) / self.recipe.epochs)
        return super().learning_rate_factor(epoch)

    def _drop_channels(self) -> nn.Module:
        return nn.Dropout(self.recipe.input_dropout)
