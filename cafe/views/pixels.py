"""Pixels as networks take them: scaled by the statistics of a tower or an image branch, erased where a view says so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def normalise(pictures: Tensor, boxes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return views as a tower takes them: (N, 3, S, S) float32 from (N, S, S, 3) uint8 and boxes (N, 4).

    Erased pixels are 0 after normalisation, that is, the mean colour. The same numbers as `scale` gives, in one place of
    memory.
    """
    images = pictures.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    images = images.sub_(_colours(tuple(mean), images.device)).div_(_colours(tuple(std), images.device))
    top, left, rows, columns = boxes.to(images.device, non_blocking=True)[:, :, None, None].unbind(1)
    across = torch.arange(images.shape[2], device=images.device)
    down = across[:, None]
    erased = (down >= top) & (down < top + rows) & (across >= left) & (across < left + columns)  # (N, S, S)
    return images.masked_fill_(erased[:, None], 0)  # one step for all, where a device waits for every single one


def scale(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pixels (N, 3, S, S) of 0–255 by the statistics of a tower or an image branch, float32."""
    images = pixels.to(torch.float32).div(255)
    images = images.sub(torch.tensor(mean, device=images.device).view(3, 1, 1))
    return images.div(torch.tensor(std, device=images.device).view(3, 1, 1))


@cache
def _colours(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1)
