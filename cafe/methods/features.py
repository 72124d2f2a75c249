"""Frozen features as methods read them: as the tower gives them, or standardised by the source's statistics.

CLIP's features are centred and of one scale. Those of a ReLU network are not: each channel has its own mean and deviation,
which the layers behind it would first have to learn to undo.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method

DEVIATION = 0.5  # of a standardised channel
CONSTANT = 1e-10  # a channel whose variance is this share of its mean square does not vary but by rounding


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """The recipe of a method that reads frozen features or maps."""

    features: Literal["raw", "standardised"] = "raw"  # "raw": as published


class FeatureMethod(Method):
    """A method that reads frozen features (N, C) or maps (N, C, H, W)."""

    recipe_type = Recipe
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        assert inputs.width is not None
        self.width = inputs.width
        standardised = recipe.features == "standardised"
        self.standardise = Standardisation(inputs.width) if standardised else nn.Identity()

    @classmethod
    def array(cls) -> str:
        """Return the name of the frozen array it reads of a batch: "features" or "map"."""
        return "map" if "map" in cls.needs else "features"

    def read(self, batch: Batch) -> Tensor:
        """Return a batch's frozen features (N, C) or maps (N, C, H, W), standardised if the recipe says so."""
        frozen: Tensor = self.standardise(batch[self.array()])
        return frozen


class Standardisation(nn.Module):
    """Brings every channel to mean 0 and deviation .5 over the clean training faces of the source.

    A channel that is the same for all of them becomes 0 for every face: nothing could be learned from it.
    """

    mean: Tensor  # (C,)
    std: Tensor  # (C,), infinite for a channel that does not vary

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, C) or maps (N, C, H, W) standardised channel by channel."""
        shape = (-1, *[1] * (features.dim() - 2))
        return (features - self.mean.view(shape)) / self.std.view(shape) * DEVIATION

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Take mean and deviation of every channel over features (n, C), or over faces and positions of maps."""
        count, sums = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(sums)
        for features in batches:
            values = features.double().flatten(2) if features.dim() > 2 else features.double()[..., None]  # (n, C, P)
            count += values.shape[0] * values.shape[2]
            sums += values.sum(dim=(0, 2))
            squares += values.square().sum(dim=(0, 2))
        mean, mean_square = sums / count, squares / count
        variance = mean_square - mean.square()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > CONSTANT * mean_square, variance.clamp(min=0).sqrt(), torch.inf))
