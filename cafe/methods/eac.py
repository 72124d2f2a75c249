"""EAC: the network must look at the same places of a face and of its mirror image, with parts of both erased.

"Learn From All: Erasing Attention Consistency for Noisy Label Facial Expression Recognition", ECCV 2022. Minimised are the
cross-entropy of the erased view and, five times, the mean squared difference between its attention maps and those of its
exact mirror image, mirrored back. Deviations: docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.networks.branches import build_network


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """EAC's published settings; epochs, batch and optimiser are those that CAFE took over."""

    consistency: float = 5.0  # λ, weight of the flip consistency; 0 switches it off


class Eac(Method):
    """An image branch whose class attention maps must be mirrored when the face is."""

    needs = frozenset({"image", "flipped_image"})
    policy = "eac"
    recipe_type = Recipe
    recipe_changes: ClassVar = {"affectnet": {"epochs": 20, "gamma": 0.8, "prior": "balanced"}}
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.branch = build_network(inputs.network, inputs.init)
        self.classifier = nn.Linear(self.branch.width, len(inputs.classes))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K) and, while training, the attention (N, K, h, w) of the view and of its mirror image."""
        features = self.branch(batch["image"])
        output = {"logits": self.classifier(self.branch.pool(features))}
        if self.training:
            # Two passes, so that batch norm sees view and mirror image apart (released script).
            flipped = self.branch(batch["flipped_image"])
            output["attention"] = attend(features, self.classifier.weight)
            output["flipped_attention"] = attend(flipped, self.classifier.weight)
        return output

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Classification of the view + λ flip consistency."""
        attention, flipped = output["attention"], output["flipped_attention"]
        return eac_losses(output["logits"], attention, flipped, batch["label"], self.recipe)


def attend(features: Tensor, weight: Tensor) -> Tensor:
    """Return every class's attention map (N, K, h, w): the map (N, C, h, w) weighed by its classifier weights (K, C).

    The consistency shapes the features only: no gradient reaches the weights through the maps, and the bias is left out.
    """
    return functional.conv2d(features, weight.detach()[:, :, None, None])


def eac_losses(
    logits: Tensor, attention: Tensor, flipped_attention: Tensor, labels: Tensor, recipe: Recipe
) -> dict[str, Tensor]:
    """Return classification, consistency and total for logits (N, K), attention maps (N, K, h, w) and labels (N,)."""
    classification = functional.cross_entropy(logits, labels)
    consistency = functional.mse_loss(attention, flipped_attention.flip(3))
    total = classification + recipe.consistency * consistency
    return {"total": total, "classification": classification, "consistency": consistency}
