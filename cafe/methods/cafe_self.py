"""CAFE with a mask that one linear layer makes of the frozen features themselves, instead of the image branch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cafe.methods import cafe
from cafe.methods.cafe import Cafe
from cafe.methods.method import Batch


@dataclass(frozen=True)
class Recipe(cafe.Recipe):
    """CAFE's settings, and how many weights make the mask."""

    # Channels between two layers, as in squeeze and excitation (Hu et al., CVPR 2018); 0: one layer, with C · C weights.
    mask_channels: int = 0


class CafeSelf(Cafe):
    """F~ = sigmoid(linear layer of the frozen features) * frozen features; all else is CAFE's."""

    needs = frozenset({"features"})
    published_tower = ""
    recipe_type = Recipe
    recipe: Recipe

    def build_mask(self) -> None:
        """Build the layer, or the two, that read all channels and mask each."""
        width, between = self.width, self.recipe.mask_channels
        self.gate: nn.Module = nn.Linear(width, width)
        if between:
            self.gate = nn.Sequential(nn.Linear(width, between), nn.ReLU(), nn.Linear(between, width))

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the mask before its sigmoid, (N, C)."""
        logits: Tensor = self.gate(self.read(batch))
        return logits
