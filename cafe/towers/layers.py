"""Layers: how each kind of tower gives the maps of its layers, and how they are pooled.

The middle of a tower often knows more of expressions than its end, and where a feature stands on the face matters as much
as which it is. A reader runs a tower no further than the last layer asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.towers.names import WHOLE, Layer


class Pass(NamedTuple):
    """What a pass through a whole tower gives: pooled (N, C), the map (N, C, H, W) if it is known, maps of layers."""

    pooled: Tensor
    final: Tensor | None = None
    maps: Sequence[Tensor] = ()


class Reader:
    """How one kind of tower is read; this kind gives its pooled features and nothing else."""

    layers: tuple[str, ...] = ()  # before the end of the tower, from the first

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps (N, C, H, W) of some layers, in order, and stop behind the last of them."""
        raise NotImplementedError

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower."""
        return Pass(first_output(tower(images)))


class TimmReader(Reader):
    """A tower of timm: its layers are the stages of a network that halves its map, the blocks of one that does not."""

    def __init__(self, tower: Any) -> None:
        layers = list(getattr(tower, "feature_info", ())) if hasattr(tower, "forward_intermediates") else []
        kind = "block" if len({layer["reduction"] for layer in layers}) == 1 else "stage"
        self.layers = _number(kind, len(layers))

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps of some layers."""
        maps: list[Tensor] = tower.forward_intermediates(
            images, indices=indices, stop_early=True, intermediates_only=True
        )
        return maps

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower; the map is None when its layout is not known."""
        if indices:
            features, maps = tower.forward_intermediates(images, indices=indices)
        else:
            features, maps = tower.forward_features(images), []
        return Pass(tower.forward_head(features), _spread(tower, features), maps)


def _spread(tower: Any, features: Any) -> Tensor | None:
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4:  # (N, C, h, w), or (N, h, w, C) where the model says so
        last = str(getattr(tower, "output_fmt", "NCHW")).endswith("NHWC")
        return features.permute(0, 3, 1, 2) if last else features
    grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    patches = features[:, getattr(tower, "num_prefix_tokens", 0) :]  # (N, h * w, C)
    if features.ndim != 3 or grid is None or patches.shape[1] != grid[0] * grid[1]:
        return None
    return patches.transpose(1, 2).reshape(len(patches), -1, *grid)


class WrappedTimmReader(TimmReader):
    """A tower of timm inside open_clip."""

    def __init__(self, tower: Any) -> None:
        super().__init__(tower.trunk)

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps of some layers."""
        return super().read(tower.trunk, images, indices)

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower."""
        whole = super().finish(tower.trunk, images, indices)
        return whole._replace(pooled=tower.head(whole.pooled))


class OpenClipResnetReader(Reader):
    """A residual network of open_clip: the stem and four stages; the last is what its attention pools."""

    layers = tuple(f"stage{number}" for number in range(1, 6))

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps of some layers."""
        maps: list[Tensor] = tower.forward_intermediates(images, indices=indices, intermediates_only=True)[
            "image_intermediates"
        ]
        return maps

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower."""
        last = len(self.layers) - 1
        maps = dict(zip(wanted := sorted({*indices, last}), self.read(tower, images, wanted), strict=True))
        return Pass(tower.attnpool(maps[last]), maps[last], [maps[index] for index in indices])


class OpenClipVitReader(Reader):
    """A vision transformer of open_clip: its blocks, whose map are the patch tokens."""

    def __init__(self, tower: Any) -> None:
        self.layers = _number("block", len(tower.transformer.resblocks))

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps of some layers."""
        maps: list[Tensor] = tower.forward_intermediates(
            images, indices=indices, stop_early=True, intermediates_only=True
        )["image_intermediates"]
        return maps

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower; its map are the last tokens, taken into the space of the pooled features."""
        last = len(self.layers) - 1
        whole = tower.forward_intermediates(images, indices=sorted({*indices, last}))
        maps: list[Tensor] = whole["image_intermediates"]
        if tower.attn_pool is not None or tower.pool_type == "none":  # its pooled features are no mean of tokens
            return Pass(whole["image_features"], None, maps[: len(indices)])
        tokens = tower.ln_post(maps[-1].flatten(2).transpose(1, 2))  # (N, h * w, C)
        if tower.proj is not None:
            tokens = tokens @ tower.proj
        final = tokens.transpose(1, 2).reshape(len(tokens), -1, *tower.grid_size)
        return Pass(whole["image_features"], final, maps[: len(indices)])


class FaceReader(Reader):
    """dlib's face network: five stages; its end is the identity, whose map is that of the last stage."""

    layers = tuple(f"stage{number}" for number in range(1, 6))

    def read(self, tower: Any, images: Tensor, indices: list[int]) -> Sequence[Tensor]:
        """Return the maps of some layers."""
        maps = tower.read_stages(images, indices[-1] + 1)
        return [maps[index] for index in indices]

    def finish(self, tower: Any, images: Tensor, indices: list[int]) -> Pass:
        """Run the whole tower."""
        maps = tower.read_stages(images, len(self.layers))
        return Pass(tower.identify(maps[-1]), maps[-1], [maps[index] for index in indices])


def choose_open_clip_reader(tower: Any) -> Reader:
    """Return how a visual tower of open_clip is read."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        return OpenClipVitReader(tower)
    if isinstance(tower, ModifiedResNet):
        return OpenClipResnetReader()
    return WrappedTimmReader(tower) if isinstance(tower, TimmModel) else Reader()


def read_layers(
    reader: Reader, tower: Any, images: Tensor, layers: Sequence[Layer], with_map: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Return features (N, C) and map (N, C, H, W) of each layer in one pass; float32, pooled after that.

    The map of the tower's end is None unless `with_map`, and where it is not known.
    """
    indices = sorted({layer.index for layer in layers if layer.index is not None})
    ends = [layer for layer in layers if layer.index is None]
    if not ends:
        whole, maps = None, reader.read(tower, images, indices)
    elif indices or with_map or any(layer.grid for layer in ends):
        whole = reader.finish(tower, images, indices)
        maps = whole.maps
    else:
        whole, maps = Pass(first_output(tower(images))), ()
    return [_take(layer, whole, dict(zip(indices, maps, strict=True))) for layer in layers]


def _take(layer: Layer, whole: Pass | None, maps: dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
    if layer.index is not None:
        features = maps[layer.index].float()
        return pool_map(layer, features), features
    assert whole is not None
    final = None if whole.final is None else whole.final.float()
    if not layer.grid:
        return whole.pooled.float(), final
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


def _number(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number}" for number in range(1, count + 1))
