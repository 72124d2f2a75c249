"""The noise of views as one kernel of Triton, for graphics cards: what `cafe.views.device` does in a dozen steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

BLOCKS = 256  # of four words of 64 bits, for each program


def add_noise(images: Tensor, keys: Tensor, start: int, levels: Tensor) -> Tensor:
    """Return images (n, H, W, 3) uint8 with the noise of their keys (n, 2) int64 from word `start` on.

    `levels` (65536,) int16 are what each number of 16 bits adds.
    """
    images, noisy = images.contiguous(), torch.empty_like(images, memory_format=torch.contiguous_format)
    values = images[0].numel()
    blocks = triton.cdiv(start + triton.cdiv(values, 4), 4)
    _kernel[(len(images), triton.cdiv(blocks, BLOCKS))](images, noisy, keys, levels, start, values, BLOCKS)
    return noisy


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(images, noisy, keys, levels, start, values, blocks: tl.constexpr):  # type: ignore[no-untyped-def]
    face = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * blocks + tl.arange(0, blocks)
    zero = tl.zeros([blocks], tl.uint64)
    low = tl.load(keys + 2 * face).to(tl.uint64, bitcast=True)
    high = tl.load(keys + 2 * face + 1).to(tl.uint64, bitcast=True)
    words = philox_impl((block + 1).to(tl.uint64), zero, zero, zero, zero + low, zero + high, 10)
    for lane in tl.static_range(4):
        for part in tl.static_range(4):
            value = 4 * (4 * block + lane - start) + part
            inside = (value >= 0) & (value < values)
            number = ((words[lane] >> (16 * part)) & 0xFFFF).to(tl.int32)
            place = face * values + value
            pixel = tl.load(images + place, mask=inside, other=0).to(tl.int32)
            pixel += tl.load(levels + number, mask=inside, other=0).to(tl.int32)
            tl.store(noisy + place, tl.minimum(tl.maximum(pixel, 0), 255).to(tl.uint8), mask=inside)
