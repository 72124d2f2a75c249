"""Routes: how each kind of tower gives its pooled features and its spatial map in one forward pass.

A route takes a tower and images (N, 3, S, S) and returns pooled (N, C) and the map (N, C, H, W), or None without a map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Route = Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]


def choose_open_clip_route(module: Any) -> Route:
    """Return how an open_clip visual tower gives its map."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(module, VisionTransformer) and module.attn_pool is None and module.pool_type != "none":
        module.output_tokens = True  # the tower then gives its patch tokens beside the pooled features
        return _route_open_clip_vit
    if isinstance(module, ModifiedResNet):
        return _route_open_clip_resnet
    if isinstance(module, TimmModel):
        return _route_open_clip_timm
    return _route_pooled_only


def _route_pooled_only(tower: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    return first_output(tower(images)), None


def _route_open_clip_vit(tower: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    pooled, tokens = tower(images)  # (N, C), (N, h * w, width)
    if tower.final_ln_after_pool:
        tokens = tower.ln_post(tokens)
    if tower.proj is not None:
        tokens = tokens @ tower.proj
    height, width = tower.grid_size
    return pooled, tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def _route_open_clip_resnet(tower: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    features = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
    return tower.attnpool(features), features


def _route_open_clip_timm(tower: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    pooled, features = route_timm(tower.trunk, images)
    return tower.head(pooled), features


def route_timm(tower: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return pooled features and the map of a timm model; the map is None when its layout is not known."""
    features = tower.forward_features(images)
    pooled = tower.forward_head(features)
    if not isinstance(features, Tensor):
        return pooled, None
    if features.ndim == 4:  # (N, C, h, w), or (N, h, w, C) where the model says so
        last = str(getattr(tower, "output_fmt", "NCHW")).endswith("NHWC")
        return pooled, features.permute(0, 3, 1, 2) if last else features
    grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    patches = features[:, getattr(tower, "num_prefix_tokens", 0) :]  # (N, h * w, C)
    if features.ndim != 3 or grid is None or patches.shape[1] != grid[0] * grid[1]:
        return pooled, None
    return pooled, patches.transpose(1, 2).reshape(len(patches), -1, *grid)


def first_output(output: Any) -> Tensor:
    """Return the pooled features of a tower that may give tokens beside them."""
    pooled: Tensor = output[0] if isinstance(output, tuple) else output
    return pooled
