"""A small multilayer perceptron on the frozen features: what more capacity than a linear layer gains, and what it costs.

A baseline of this project, to compare CAFE's mask with; for features of 512 channels it has as many weights as the mask of
`cafe_self`.
"""

from __future__ import annotations

from torch import nn

from cafe.methods.baselines.linear_probe import LinearProbe
from cafe.methods.draws import Choice, Distribution
from cafe.methods.heads import HiddenRecipe


class Mlp(LinearProbe):
    """One hidden layer with a ReLU, cross-entropy; trained with CAFE's recipe and views."""

    recipe_type = HiddenRecipe
    recipe: HiddenRecipe

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep."""
        return {**super().distributions(), "dropout": Choice((0.0, 0.1, 0.5))}

    def build_classifier(self) -> nn.Module:
        """Return the two layers."""
        return self.build_hidden(self.recipe)
