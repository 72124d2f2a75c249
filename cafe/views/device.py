"""Views made on a device, bit for bit those that `cafe.views.drawing` makes with NumPy and Pillow.

All is whole numbers, so neither the device nor the size of a batch changes a pixel.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from cafe.views.drawing import POLICIES, ViewPlan, gaussian_levels
from cafe.views.rendering import NO_NOISE, ViewParameters
from cafe.views.resizing import resize

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 0xFFFFFFFF
SWITCH_SECONDS = 1e-4
AT_ONCE = 2**25  # values of faces in memory together


def shorten_switch_interval() -> None:
    """Have the interpreter change between threads often, for a thread that launches kernels beside others that compute.

    PyTorch lets go of the interpreter at every launch, and would wait 5 ms for it each time.
    """
    sys.setswitchinterval(SWITCH_SECONDS)


def make_views(drawn: ViewParameters, size: int, plan: ViewPlan, device: str) -> Tensor:
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
            used, faces = np.unique(drawn.face[some], return_inverse=True)
            images = send(np.stack([drawn.faces[face] for face in used]), device)
            if len(used) < len(some):
                images = images[send(faces, device)]
            if start != NO_NOISE:
                images = add_noise(images, send(drawn.keys[some].view(np.int64), device), start, variance)
            images = resize(images, size, plan.interpolation)
            flips = send(drawn.flips[some], device)[:, None, None, None]
            pictures[send(np.array(some), device)] = torch.where(flips, images.flip(2), images)
    return pictures


def add_noise(images: Tensor, keys: Tensor, start: int, variance: float) -> Tensor:
    """Return images (n, H, W, 3) uint8 with the noise of their keys (n, 2), int64 with the bits of uint64."""
    levels = _levels(variance, str(images.device))
    if images.is_cuda and find_spec("triton"):
        from cafe.views import noise_kernel

        return noise_kernel.add_noise(images, keys, start, levels)
    values = images[0].numel()
    words = philox(keys, start + -(-values // 4))[:, start:].contiguous()
    numbers = words.view(torch.int16)[:, :values].int() & 0xFFFF  # four of 16 bits a word, the lowest first
    noise = levels.take(numbers.long()).view_as(images)
    return noise.add_(images).clamp_(0, 255).to(torch.uint8)


def philox(keys: Tensor, words: int) -> Tensor:
    """Return the first `words` of 64 bits, (n, words) int64, that NumPy's `Philox` gives under each of the keys (n, 2).

    Salmon et al., SC 2011: Philox4x64 with ten rounds.
    """
    counters = torch.arange(1, -(-words // 4) + 1, device=keys.device)
    low, high = keys[:, :1], keys[:, 1:]
    first = counters[None] + torch.zeros_like(low)
    second = third = fourth = torch.zeros_like(first)
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


def send(values: np.ndarray, device: str) -> Tensor:
    """Return an array on a device, to which it travels while others compute."""
    tensor = torch.from_numpy(values)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@cache
def _levels(variance: float, device: str) -> Tensor:
    return torch.from_numpy(gaussian_levels(variance)).to(device)
