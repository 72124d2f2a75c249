"""CAFE with one mask for all faces, a learned vector instead of the image branch: what does a mask of each face gain?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cafe.methods.cafe import Cafe
from cafe.methods.method import Batch


class CafeVector(Cafe):
    """F~ = sigmoid(vector) * frozen features; all else is CAFE's. No picture is decoded and no image branch trained."""

    needs = frozenset({"features"})
    published_tower = ""

    def build_mask(self) -> None:
        """Start with every channel half open, about where an untrained image branch starts."""
        self.vector = nn.Parameter(torch.zeros(self.width))

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the mask before its sigmoid, the same row (C,) for every face: (N, C)."""
        return self.vector.expand(batch["features"].shape[0], -1)
