"""CAFE with a mask that one linear layer makes of the frozen features themselves, instead of the image branch."""

from __future__ import annotations

from torch import Tensor, nn

from cafe.methods.cafe import Cafe
from cafe.methods.method import Batch


class CafeSelf(Cafe):
    """F~ = sigmoid(linear layer of the frozen features) * frozen features; all else is CAFE's."""

    needs = frozenset({"features"})

    def build_mask(self) -> None:
        """Build the layer that reads all channels and masks each."""
        self.gate = nn.Linear(self.width, self.width)

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the mask before its sigmoid, (N, C)."""
        logits: Tensor = self.gate(self.read(batch))
        return logits
