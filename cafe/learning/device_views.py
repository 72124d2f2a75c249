"""Views made on a device, bit for bit those that `cafe.learning.views` makes with NumPy and Pillow.

All is whole numbers: NumPy's Philox in 64 bits, and Pillow's resize with its weights of 22 bits and its rounding after each
of two passes. So neither the device nor the size of a batch changes a pixel.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cafe.learning.rendering import NO_NOISE, Drawn
from cafe.learning.views import INTERPOLATIONS, POLICIES, ViewPlan, gaussian_levels

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 0xFFFFFFFF
PRECISION = 22  # bits of Pillow's weights
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
AT_ONCE = 2**25  # values of faces in memory together


def make_views(drawn: Drawn, size: int, plan: ViewPlan, device: str) -> Tensor:
    """Return pictures (n, S, S, 3) uint8 on a device of views that are drawn; an unreadable one is black.

    Views of faces of one size are made together.
    """
    variance = POLICIES[plan.policy].noise_variance
    pictures = torch.zeros((len(drawn.face), size, size, 3), dtype=torch.uint8, device=device)
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for position, face in enumerate(drawn.face):
        if face >= 0:
            kind = (*drawn.faces[face].shape[:2], int(drawn.starts[position]))
            kinds.setdefault(kind, []).append(position)
    for (height, width, start), positions in kinds.items():
        most = max(1, AT_ONCE // (height * width * 3))
        for some in (positions[first : first + most] for first in range(0, len(positions), most)):
            used, which = np.unique(drawn.face[some], return_inverse=True)
            faces = torch.from_numpy(np.stack([drawn.faces[face] for face in used])).to(device)
            images = faces[torch.from_numpy(which).to(device)]
            if start != NO_NOISE:
                keys = torch.from_numpy(drawn.keys[some].view(np.int64)).to(device)
                images = add_noise(images, keys, start, variance)
            images = resize(images, size, plan.interpolation)
            flips = torch.from_numpy(drawn.flips[some]).to(device)
            images = torch.where(flips[:, None, None, None], images.flip(2), images)
            pictures[torch.tensor(some, device=device)] = images
    return pictures


def add_noise(images: Tensor, keys: Tensor, start: int, variance: float) -> Tensor:
    """Return images (n, H, W, 3) uint8 with the noise of their keys (n, 2), int64 with the bits of uint64."""
    values = images[0].numel()
    words = philox(keys, start + -(-values // 4))[:, start:]
    # Four numbers of 16 bits a word, the lowest first.
    numbers = torch.stack([(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=2)
    noise = _levels(variance, str(images.device))[numbers.flatten(1)[:, :values]]
    return (images + noise.view_as(images)).clamp_(0, 255).to(torch.uint8)


def philox(keys: Tensor, words: int) -> Tensor:
    """Return the first `words` of 64 bits, (n, words) int64, that NumPy's `Philox` gives under each of the keys (n, 2).

    Salmon et al., SC 2011: Philox4x64 with ten rounds.
    """
    blocks = -(-words // 4)
    first = torch.arange(1, blocks + 1, device=keys.device).expand(len(keys), -1)
    second = third = fourth = torch.zeros_like(first)
    low, high = keys[:, :1], keys[:, 1:]
    for number in range(ROUNDS):
        if number:
            low, high = low + _signed(KEY_STEPS[0]), high + _signed(KEY_STEPS[1])
        first, second, third, fourth = (
            _high_product(third, MULTIPLIERS[1]) ^ second ^ low,
            third * _signed(MULTIPLIERS[1]),
            _high_product(first, MULTIPLIERS[0]) ^ fourth ^ high,
            first * _signed(MULTIPLIERS[0]),
        )
    return torch.stack([first, second, third, fourth], dim=2).flatten(1)[:, :words]


def _signed(word: int) -> int:
    """Return the int64 with the bits of a word of 64."""
    return word - 2**64 if word >= 2**63 else word


def _high_product(words: Tensor, factor: int) -> Tensor:
    """Return the upper 64 of the 128 bits of a product of unsigned words, from products of their halves."""
    low, high = words & LOW, (words >> 32) & LOW
    factor_low, factor_high = factor & LOW, factor >> 32
    middle = high * factor_low + (((low * factor_low) >> 32) & LOW)
    lower = low * factor_high + (middle & LOW)
    return high * factor_high + ((middle >> 32) & LOW) + ((lower >> 32) & LOW)


def resize(images: Tensor, size: int, interpolation: str) -> Tensor:
    """Return images (n, H, W, 3) uint8 as Pillow resizes them to (n, size, size, 3), in two passes."""
    for axis in (1, 2) if _down_first(*images.shape[1:3], size, interpolation) else (2, 1):
        images = _resample(images, axis, size, interpolation)
    return images


@cache
def _down_first(height: int, width: int, size: int, interpolation: str) -> bool:
    """Whether Pillow shrinks the height before the width, which versions from 13 on do with tall pictures: ask this one."""
    if height <= max(width, size):
        return False
    probe = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(probe).resize((size, size), INTERPOLATIONS[interpolation]))
    down = _resample(torch.from_numpy(probe)[None], 1, size, interpolation)
    return np.array_equal(_resample(down, 2, size, interpolation)[0].numpy(), wanted)


def _resample(images: Tensor, axis: int, size: int, interpolation: str) -> Tensor:
    if images.shape[axis] == size:
        return images
    places, weights = resampling(images.shape[axis], size, interpolation, str(images.device))
    shape = [1, 1, 1, 1]
    shape[axis] = size
    total = torch.full((), 1 << (PRECISION - 1), dtype=torch.int32, device=images.device)
    for place, weight in zip(places, weights, strict=True):
        total = total + images.index_select(axis, place) * weight.view(shape)
    return (total >> PRECISION).clamp_(0, 255).to(torch.uint8)


@cache
def resampling(length: int, size: int, interpolation: str, device: str) -> tuple[Tensor, Tensor]:
    """Return which places of a line of that length make each of `size` pixels, and their weights, (taps, size) both.

    The weights are int32 in units of 2^-22, computed as Pillow does (`precompute_coeffs`, `normalize_coeffs_8bpc`).
    """
    scale = length / size
    stretch = max(scale, 1.0)  # of the filter, which sees all pixels where the picture shrinks
    support = SUPPORT[interpolation] * stretch
    lines = []
    for pixel in range(size):
        centre = (pixel + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        line = [FILTERS[interpolation]((place - centre + 0.5) / stretch) for place in range(first, last)]
        whole = [weight / sum(line) * (1 << PRECISION) for weight in line]
        lines.append((first, [math.floor(abs(weight) + 0.5) * (-1 if weight < 0 else 1) for weight in whole]))
    taps = max(len(line) for _, line in lines)
    places = [[min(first + tap, length - 1) for first, _ in lines] for tap in range(taps)]
    weights = [[line[tap] if tap < len(line) else 0 for _, line in lines] for tap in range(taps)]
    return torch.tensor(places, device=device), torch.tensor(weights, dtype=torch.int32, device=device)


def _bilinear(place: float) -> float:
    return max(0.0, 1 - abs(place))


def _bicubic(place: float, sharpness: float = -0.5) -> float:
    distance = abs(place)
    if distance < 1:
        return ((sharpness + 2) * distance - (sharpness + 3)) * distance * distance + 1
    if distance < 2:
        return (((distance - 5) * distance + 8) * distance - 4) * sharpness
    return 0.0


FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}


@cache
def _levels(variance: float, device: str) -> Tensor:
    return torch.from_numpy(gaussian_levels(variance)).to(device)
