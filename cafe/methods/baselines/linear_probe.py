"""Linear probe: one linear layer on the frozen features, the baseline that any other use of them has to beat."""

from __future__ import annotations

from torch import Tensor, nn

from cafe.methods.heads import HeadMethod, Recipe
from cafe.methods.method import Batch, Inputs


class LinearProbe(HeadMethod):
    """Cross-entropy on the frozen features alone; trained with CAFE's recipe and views."""

    needs = frozenset({"features"})

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.classifier = self.build_classifier()

    def build_classifier(self) -> nn.Module:
        """Return what turns features (N, C) into logits (N, K)."""
        return self.build_linear()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K)."""
        return {"logits": self.classifier(self.read(batch))}
