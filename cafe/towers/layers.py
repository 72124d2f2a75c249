"""Layers: how each kind of tower gives the maps of its layers, and how they are pooled.

The middle of a tower often knows more of expressions than its end, and where a feature stands on the face matters as much
as which it is. A reader runs a tower no further than the last layer asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.towers.face import STAGES, FaceResnet
from cafe.towers.names import WHOLE, Layer


class Pass(NamedTuple):
    """What a pass through a tower gives: maps (N, C, H, W) of layers and, of its end, pooled (N, C) and the map if known."""

    maps: Sequence[Tensor] = ()
    pooled: Tensor | None = None
    final: Tensor | None = None


@dataclass(frozen=True)
class Reader:
    """How one kind of tower is read: the names of its layers before its end, from the first, and the way through it.

    `run(tower, images, indices, whole)` gives the maps of some layers, in order. It stops behind the last of them, or runs
    the whole tower; without layers that is the only way.
    """

    layers: tuple[str, ...]
    run: Callable[[Any, Tensor, list[int], bool], Pass]


def choose_timm_reader(tower: Any) -> Reader:
    """Return how timm's towers are read: by stage where the map is halved on its way, else by block."""
    layers = list(getattr(tower, "feature_info", ())) if hasattr(tower, "forward_intermediates") else []
    kind = "block" if len({layer["reduction"] for layer in layers}) == 1 else "stage"
    return Reader(_number(kind, len(layers)), _run_timm)


def _run_timm(tower: Any, images: Tensor, indices: list[int], whole: bool) -> Pass:
    if not whole:
        return Pass(tower.forward_intermediates(images, indices, stop_early=True, intermediates_only=True))
    if indices:
        features, maps = tower.forward_intermediates(images, indices)
    else:
        features, maps = tower.forward_features(images), []
    return Pass(maps, tower.forward_head(features), _spread(tower, features))


def _spread(tower: Any, features: Any) -> Tensor | None:
    """Return the map of what a tower of timm ends in; None when its layout is not known."""
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4:  # (N, C, h, w), or (N, h, w, C) where the model says so
        last = str(getattr(tower, "output_fmt", "NCHW")).endswith("NHWC")
        return features.permute(0, 3, 1, 2) if last else features
    grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    patches = features[:, getattr(tower, "num_prefix_tokens", 0) :]  # (N, h * w, C)
    if features.ndim != 3 or grid is None or patches.shape[1] != grid[0] * grid[1]:
        return None
    return patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid)


def choose_open_clip_reader(tower: Any) -> Reader:
    """Return how a visual tower of open_clip is read: a transformer by block, a residual network by its five stages."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        return Reader(_number("block", len(tower.transformer.resblocks)), _run_vit)
    if isinstance(tower, ModifiedResNet):
        return Reader(_number("stage", 5), _run_resnet)
    if isinstance(tower, TimmModel):
        return Reader(choose_timm_reader(tower.trunk).layers, _run_trunk)
    return Reader((), lambda tower, images, *_: Pass((), first_output(tower(images))))


def _run_vit(tower: Any, images: Tensor, indices: list[int], whole: bool) -> Pass:
    """Run a transformer; the map of its end are the last patches, taken into the space of the pooled features."""
    if not whole:
        return Pass(_read_open_clip(tower, images, indices))
    last = len(tower.transformer.resblocks) - 1
    read = tower.forward_intermediates(images, sorted({*indices, last}))
    pooled, maps = read["image_features"], read["image_intermediates"]
    if tower.attn_pool is not None or tower.pool_type == "none":  # its pooled features are no mean of patches
        return Pass(maps[: len(indices)], pooled)
    patches = tower.ln_post(maps[-1].flatten(2).transpose(1, 2))  # (N, h * w, C)
    if tower.proj is not None:
        patches = patches @ tower.proj
    # In a graph, len(patches) would be the number of faces it was made with.
    spread = patches.transpose(1, 2).reshape(patches.shape[0], -1, *tower.grid_size)
    return Pass(maps[: len(indices)], pooled, spread)


def _run_resnet(tower: Any, images: Tensor, indices: list[int], whole: bool) -> Pass:
    if not whole:
        return Pass(_read_open_clip(tower, images, indices))
    maps = _read_open_clip(tower, images, [0, 1, 2, 3, 4])
    return Pass([maps[index] for index in indices], tower.attnpool(maps[-1]), maps[-1])


def _read_open_clip(tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
    read = tower.forward_intermediates(images, indices, stop_early=True, intermediates_only=True)
    maps: list[Tensor] = read["image_intermediates"]
    return maps


def _run_trunk(tower: Any, images: Tensor, indices: list[int], whole: bool) -> Pass:
    read = _run_timm(tower.trunk, images, indices, whole)
    return read._replace(pooled=tower.head(read.pooled)) if whole else read


def _run_face(tower: FaceResnet, images: Tensor, indices: list[int], whole: bool) -> Pass:
    maps = tower.read_stages(images, len(tower.stages) if whole else indices[-1] + 1)
    chosen = [maps[index] for index in indices]
    return Pass(chosen, tower.identify(maps[-1]), maps[-1]) if whole else Pass(chosen)


def _number(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number}" for number in range(1, count + 1))


FACE_READER = Reader(_number("stage", len(STAGES)), _run_face)


def read_layers(
    reader: Reader, tower: Any, images: Tensor, layers: Sequence[Layer], with_map: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Return features (N, C) and map (N, C, H, W) of each layer in one pass; float32, pooled after that.

    Layers side by side have their channels one after another, and no map. The map of the tower's end is None unless
    `with_map`, and where it is not known.
    """
    single = [part for layer in layers for part in layer.parts]
    indices = sorted({layer.index for layer in single if layer.index is not None})
    ends = [layer for layer in single if layer.index is None]
    if indices or with_map or any(layer.grid for layer in ends):
        read = reader.run(tower, images, indices, bool(ends))
    else:
        read = Pass((), first_output(tower(images)))
    maps = dict(zip(indices, read.maps, strict=True))
    return [
        (torch.cat([_take(part, read, maps)[0] for part in layer.parts], dim=1), None)
        if layer.beside
        else _take(layer, read, maps)
        for layer in layers
    ]


def _take(layer: Layer, read: Pass, maps: dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
    if layer.index is not None:
        features = maps[layer.index].float()
        return pool_map(layer, features), features
    assert read.pooled is not None
    final = None if read.final is None else read.final.float()
    if not layer.grid:
        return read.pooled.float(), final
    if final is None:
        raise UserError(f"The end of this tower has no known map to pool to '{layer.grid}': write #final alone.")
    return pool_map(layer, final), final


def pool_map(layer: Layer, features: Tensor) -> Tensor:
    """Return a map (N, C, H, W) averaged to the layer's grid and flattened: (N, C·h·w), channel by channel."""
    if layer.grid == WHOLE:
        return features.flatten(1)
    rows, columns = map(int, layer.grid.split("x"))
    if rows > features.shape[2] or columns > features.shape[3]:
        there = "x".join(map(str, features.shape[2:]))
        raise UserError(f"The map of the layer '{layer.name}' is {there}: choose no finer grid than that, or 'all'.")
    return functional.adaptive_avg_pool2d(features, (rows, columns)).flatten(1)


def first_output(output: Any) -> Tensor:
    """Return the pooled features of a tower that may give tokens beside them."""
    pooled: Tensor = output[0] if isinstance(output, tuple) else output
    return pooled
