"""The tower that knows faces: dlib's face recognition network, read from its own file into a plain torch module.

A residual network of 29 convolutions (He et al., CVPR 2016, with fewer layers and half the filters) that Davis King
trained on three million faces of 7,485 people, FaceScrub, VGG-Face and many pictures of the internet, to tell people
apart. The weights are in the public domain (CC0) and come with the package `face-recognition-models`. What the network
knows about expressions is in its middle, not at its end, which is trained to see the same person in every expression.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from upath import UPath

from cafe.errors import UserError
from cafe.files import read_file

MEAN = (122.782 / 255, 117.001 / 255, 104.298 / 255)
STD = (256 / 255,) * 3
# The network was trained at 150. At 128 it costs a quarter less and its features are as good for expressions.
INPUT_SIZE = 128
STAGES = ((32, 3), (64, 4), (128, 3), (256, 3), (256, 1))  # channels and blocks; all but the first begin by halving
IDENTITY = 128  # channels of the last layer
# SHA-256 of all bytes of the file that are not weights
SETTINGS = "e2f5042ef6e91b64c0c41cd443e2a85ef13c9ce9853d581bcdc6b170687a1c29"


class FaceResnet(nn.Module):
    """Images (N, 3, S, S) into identities (N, 128); its stages give maps of 32, 64, 128, 256 and 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STAGES[0][0], 7, stride=2)
        self.stages = nn.ModuleList()
        before = STAGES[0][0]
        for number, (channels, blocks) in enumerate(STAGES):
            rest = [_Block(channels, channels) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(_Block(before, channels, halve=number > 0), *rest))
            before = channels
        self.identity = nn.Linear(before, IDENTITY, bias=False)

    def read_stages(self, images: Tensor, count: int) -> list[Tensor]:
        """Return the maps (N, C, H, W) of the first `count` stages; the later ones are not computed."""
        features = functional.max_pool2d(self.stem(images).relu(), 3, stride=2)
        maps = []
        for stage in self.stages[:count]:
            features = stage(features)
            maps.append(features)
        return maps

    def identify(self, last: Tensor) -> Tensor:
        """Return the identities (N, 128) of the last stage's map."""
        identity: Tensor = self.identity(last.mean((2, 3)))
        return identity

    def forward(self, images: Tensor) -> Tensor:
        """Return the identities (N, 128) of normalised images (N, 3, S, S), at least 104 px wide."""
        return self.identify(self.read_stages(images, len(self.stages))[-1])


class _Block(nn.Module):
    """Two convolutions and a shortcut; one that halves the map pools the shortcut and gives it empty channels."""

    def __init__(self, before: int, channels: int, halve: bool = False) -> None:
        super().__init__()
        self.halve = halve
        self.first = nn.Conv2d(before, channels, 3, stride=2 if halve else 1, padding=0 if halve else 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the block's map; where its two ways differ by a row or column, zeros fill the smaller one."""
        main = self.second(self.first(features).relu())
        short = functional.avg_pool2d(features, 2) if self.halve else features
        size = [max(pair) for pair in zip(main.shape[1:], short.shape[1:], strict=True)]  # channels, rows, columns
        return (_fill(main, size) + _fill(short, size)).relu()


def _fill(features: Tensor, size: list[int]) -> Tensor:
    """Append zeros to channels, rows and columns up to a size."""
    channels, rows, columns = (wanted - got for wanted, got in zip(size, features.shape[1:], strict=True))
    return functional.pad(features, (0, columns, 0, rows, 0, channels)) if channels or rows or columns else features


def read_face_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of dlib's file by the names of `FaceResnet`; nothing in the file is executed.

    A convolution (filters, biases) is followed by an affine (factors, offsets) for each filter, which is folded into it.
    Raises `UserError` for a file that is damaged or of another network.
    """
    network = FaceResnet()
    convolutions = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    parts: list[tuple[bytes, tuple[torch.Size, ...]]] = []
    for layer in convolutions.values():
        each = torch.Size([layer.out_channels])
        parts += [(b"con_4", (layer.weight.shape, each)), (b"affine_", (each, each))]
    parts.append((b"fc_2", (network.identity.weight.T.shape,)))
    *values, (matrix,) = _read_parts(path, parts)
    tensors = {"identity.weight": matrix.T.contiguous()}
    for name, (filters, biases), (factors, offsets) in zip(convolutions, values[::2], values[1::2], strict=True):
        tensors[f"{name}.weight"] = filters * factors.view(-1, 1, 1, 1)
        tensors[f"{name}.bias"] = biases * factors + offsets
    return tensors


def _read_parts(path: str | Path, parts: Sequence[tuple[bytes, tuple[torch.Size, ...]]]) -> list[list[Tensor]]:
    """Return the tensors of each part of dlib's file: settings, a tag, and the tensors, one after the other.

    All bytes between the tensors must be those of the one network this module describes.
    """
    content, position, settings, result = read_file(UPath(path)), 0, hashlib.sha256(), []
    for tag, shapes in parts:
        counts = [math.prod(shape) for shape in shapes]
        sizes = (sum(counts), 1) if len(shapes) > 1 else shapes[0]
        head = b"".join(map(_encode, (2, *sizes, 1, 1)))  # a version and four sizes
        begin = content.find(head, content.find(tag, position)) + len(head)
        end = begin + 4 * sum(counts)
        if not position < begin < end <= len(content):
            raise _refuse(path)
        values = torch.from_numpy(np.frombuffer(content[begin:end], "<f4").astype(np.float32))
        result.append([part.view(shape) for part, shape in zip(values.split(counts), shapes, strict=True)])
        settings.update(content[position:begin])
        position = end
    settings.update(content[position:])
    if settings.hexdigest() != SETTINGS:
        raise _refuse(path)
    return result


def _encode(value: int) -> bytes:
    """Return a positive integer as dlib writes it: how many bytes follow, and those bytes, the lowest first."""
    length = (value.bit_length() + 7) // 8
    return bytes([length]) + value.to_bytes(length, "little")


def _refuse(path: str | Path) -> UserError:
    return UserError(
        f"The weights file '{path}' is not dlib's face recognition network, or is damaged: "
        "run 'pip install --force-reinstall face-recognition-models'."
    )
