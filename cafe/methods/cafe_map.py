"""CAFE on the spatial map of the frozen tower: every position of the face has a mask of its own.

A variant of "Generalizable Facial Expression Recognition" (ECCV 2024) that the paper does not have: for ViT-B/32 the 7 × 7
patch tokens are exactly ResNet-18's 7 × 7 grid at 224 pixels. Masked positions are averaged; the rest is CAFE unchanged.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cafe.methods.cafe import Cafe, apply_mask, resize_channels
from cafe.methods.method import Batch, widen


class CafeMap(Cafe):
    """F~ = mean over positions of sigmoid(resize(map of the image branch)) * map of the frozen tower."""

    needs = frozenset({"image", "map"})
    published_tower = ""

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the mask before its sigmoid, (N, C, H, W) as the tower's map."""
        return resize_map(widen(self.branch(batch["image"])), batch["map"].shape[1:])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K) and the masked features, averaged over positions (N, C)."""
        masked = apply_mask(self.read(batch), self.mask_logits(batch), self.recipe.mask).mean(dim=(2, 3))
        return {"logits": self.classify(masked), "masked": masked}


def resize_map(values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Fit (N, W, h, w) to (N, C, H, W): positions are averaged down or interpolated up, then channels as CAFE's are."""
    width, grid = shape[0], shape[1:]
    if grid[0] <= values.shape[2] and grid[1] <= values.shape[3]:
        values = functional.adaptive_avg_pool2d(values, grid)  # identity when the grids agree
    else:
        values = functional.interpolate(values, size=grid, mode="bilinear", align_corners=False)
    positions = values.permute(0, 2, 3, 1)  # (N, H, W, channels)
    resized = resize_channels(positions.flatten(0, 2), width)
    return resized.reshape(*positions.shape[:3], width).permute(0, 3, 1, 2)
