"""Pillow's resizing of 8-bit pictures in tensors, bit for bit: for devices, and for graphs that run without Pillow.

Pillow shrinks or stretches a picture along one side and then along the other, with weights of 22 bits, and rounds after
each.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cafe.views.drawing import INTERPOLATIONS

UNIT = 1 << 22  # of the fixed-point numbers that Pillow's weights are
BICUBIC = -0.5  # Pillow's free parameter of the cubic
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # how far a filter reaches, in pixels of the smaller picture


class Resize(nn.Module):
    """Pillow's resizing of 8-bit pictures, to the last bit where they are square.

    Of others Pillow resizes the height first where that is less work, which can differ by a grey level, here always last.
    """

    def __init__(self, size: int, interpolation: str) -> None:
        super().__init__()
        self.size, self.interpolation, self.support = size, interpolation, SUPPORT[interpolation]

    def forward(self, pictures: Tensor) -> Tensor:
        """Return whole numbers of 0–255 (N, 3, S, S) float64 from pictures (N, H, W, 3) uint8."""
        pixels = pictures.permute(0, 3, 1, 2).to(torch.float64)
        narrowed = round_pixels(pixels @ self.weights(pictures.shape[2]).T)
        return round_pixels(self.weights(pictures.shape[1]) @ narrowed)

    def weights(self, length: int) -> Tensor:
        """Return what each of `length` pixels of a line gives to each of S pixels, (S, length), in fixed point."""
        ratio = torch.scalar_tensor(length, dtype=torch.float64) / self.size
        wide = ratio.clamp(min=1)
        centres = ((torch.arange(self.size, dtype=torch.float64) + 0.5) * ratio)[:, None]
        places = torch.arange(length, dtype=torch.float64)
        reach = self.support * wide
        reached = (places >= (centres - reach + 0.5).floor()) & (places < (centres + reach + 0.5).floor())
        shares = torch.where(reached, self.filter(((places - centres + 0.5) / wide).abs()), 0.0)
        fixed = shares / shares.sum(dim=1, keepdim=True) * UNIT
        return (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc()

    def filter(self, distance: Tensor) -> Tensor:
        """Return the weight of pixels at a distance from the middle."""
        if self.interpolation == "bilinear":
            return (-distance + 1).clamp(min=0)
        near = ((BICUBIC + 2) * distance - (BICUBIC + 3)) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * BICUBIC
        return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def round_pixels(fixed: Tensor) -> Tensor:
    """Return fixed-point sums as whole numbers of 0–255."""
    return (fixed / UNIT + 0.5).floor().clamp(0, 255)


def resize(pictures: Tensor, size: int, interpolation: str) -> Tensor:
    """Return pictures (N, H, W, 3) uint8 on any device as the installed Pillow resizes them to (N, size, size, 3)."""
    height, width = pictures.shape[1:3]
    axes = (1, 2) if _is_height_first(height, width, size, interpolation) else (2, 1)
    for axis in axes:
        if pictures.shape[axis] != size:
            weights = _weights(pictures.shape[axis], size, interpolation, pictures.device)
            lines = pictures.movedim(axis, -1).to(torch.float64)
            pictures = round_pixels(lines @ weights.T).to(torch.uint8).movedim(-1, axis)
    return pictures


@cache
def _weights(length: int, size: int, interpolation: str, device: torch.device) -> Tensor:
    return Resize(size, interpolation).weights(length).to(device)


@cache
def _is_height_first(height: int, width: int, size: int, interpolation: str) -> bool:
    """Whether Pillow begins with the height, as versions from 13 on do with tall pictures: ask the one that is installed."""
    if height <= max(width, size):
        return False
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(picture).resize((size, size), INTERPOLATIONS[interpolation]))
    across_first = Resize(size, interpolation)(torch.from_numpy(picture)[None])[0].permute(1, 2, 0)
    return not np.array_equal(across_first.numpy(), wanted)
