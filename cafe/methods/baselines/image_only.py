"""Image only: the image branch with its own classifier, trained by cross-entropy; what CAFE is without frozen features."""

from __future__ import annotations

from torch import Tensor, nn

from cafe.methods.method import Batch, Inputs, Method, Recipe
from cafe.networks.branches import build_network


class ImageOnly(Method):
    """The usual source-only network; trained with CAFE's recipe and views."""

    needs = frozenset({"image"})
    takes_votes = True

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.branch = build_network(inputs.network, inputs.init, scratch="pytorch")
        self.classifier = nn.Linear(self.branch.width, len(inputs.classes))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K)."""
        return {"logits": self.classifier(self.branch.pool(self.branch(batch["image"])))}
