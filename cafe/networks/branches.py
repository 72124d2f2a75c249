"""Trainable image branches: the small networks that learn the mask, and what they start from.

A branch ends in its last spatial map, because methods differ in how they pool it. The widely used MS-Celeb-1M checkpoints
load whatever wrapper or foreign classifier they carry.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError, unknown
from cafe.files import copy_here, locate
from cafe.plugins import find_entry, offer
from cafe.towers.building import load_backbone
from cafe.towers.weights import read_state_dict

Scratch = Literal["torchvision", "pytorch"]
LEAST_LOADED = 0.9  # below this share of its tensors a branch is not "pre-trained", it is another network


@dataclass(frozen=True)
class Network:
    """An image branch: how it is built, its channels, and the layers that make its last spatial map."""

    build: Callable[[], nn.Module]
    width: int
    layers: tuple[str, ...]
    fetch: Callable[[], Mapping[str, Tensor]] | None = None  # its ImageNet weights; raises `OSError`


def from_torchvision(name: str, width: int, layers: tuple[str, ...]) -> Network:
    """Return an image branch that torchvision has; it is imported when one is built, since that takes as long as torch."""

    def build() -> nn.Module:
        from torchvision.models import get_model

        network: nn.Module = get_model(name)
        return network

    def fetch() -> Mapping[str, Tensor]:
        from torchvision.models import get_model_weights

        tensors: Mapping[str, Tensor] = get_model_weights(name).IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True
        )
        return tensors

    return Network(build, width, layers, fetch)


def from_tower(name: str, tower: str, width: int, layers: tuple[str, ...]) -> Network:
    """Return an image branch of timm whose ImageNet weights are those of a tower that is installed with this package."""

    def build() -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(name)
        return network

    return Network(build, width, layers, lambda: load_backbone(tower).tower.state_dict())


RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

NETWORKS: dict[str, Network] = {
    "resnet18": from_torchvision("resnet18", 512, RESNET_LAYERS),
    "resnet50": from_torchvision("resnet50", 2048, RESNET_LAYERS),
    "mobilenet_v2": from_torchvision("mobilenet_v2", 1280, ("features",)),
    # The one whose ImageNet weights need no download.
    "efficientnet_lite0": from_tower(
        "tf_efficientnet_lite0", "imagenet-lite0", 1280, ("conv_stem", "bn1", "blocks", "conv_head", "bn2")
    ),
}
offer("networks", NETWORKS, "a Network", lambda entry: isinstance(entry, Network))


class ImageBranch(nn.Module):
    """A trainable network without its classifier: images in, last spatial map out."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """Return the last spatial map (N, C, h, w) of images (N, 3, H, W)."""
        features: Tensor = self.trunk(images)
        return features

    def map_size(self, image_size: int) -> tuple[int, int]:
        """Return (h, w) of the map of square images with a side of `image_size` pixels."""
        shapes_only = copy.deepcopy(self.trunk).to("meta").eval()
        height, width = shapes_only(torch.empty(1, 3, image_size, image_size, device="meta")).shape[2:]
        return height, width

    def pool(self, features: Tensor) -> Tensor:
        """Return the global average (N, C) of a map (N, C, h, w)."""
        return functional.adaptive_avg_pool2d(features, 1).flatten(1)


def build_network(name: str, init: str = "scratch", scratch: Scratch = "torchvision") -> ImageBranch:
    """Build an image branch, started from `scratch`, from `imagenet` weights (its library's) or from `file:PATH`.

    Without weights, convolutions are drawn as their library does, normal by their outputs (He et al., 2015), or by PyTorch's
    default for a single layer, uniform by their inputs, which networks that released scripts write themselves keep.

    A file holds its library's names, possibly wrapped in `state_dict` and prefixed with `module.`, as the MS-Celeb-1M
    ResNet-18 does. Raises UserError for an unknown name, unreachable weights, or weights that fit less than 90 %.
    """
    network = _find_network(name, init)
    weights = _read_init(name, network, init)
    model = network.build()
    trunk = nn.Sequential(OrderedDict((layer, model.get_submodule(layer)) for layer in network.layers))
    if weights is not None:
        _load(trunk, weights, name, init)
    elif scratch == "pytorch":
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    return ImageBranch(trunk, network.width)


def check_network(name: str, init: str) -> None:
    """Raise `UserError` for an unknown image branch, and for an initialisation that it has not."""
    _find_network(name, init)
    if init.startswith("file:") and not locate(init.removeprefix("file:")).is_file():
        raise UserError(f"There is no file of initial weights at {init.removeprefix('file:')!r}: check the path.")


def _find_network(name: str, init: str) -> Network:
    network: Network = find_entry("networks", name, "image branch")
    known = ("scratch", "imagenet") if network.fetch else ("scratch",)
    if init not in known and not init.startswith("file:"):
        raise unknown("initialisation", init, (*known, "file:PATH"))
    return network


def _read_init(name: str, network: Network, init: str) -> Mapping[str, Tensor] | None:
    if init == "scratch":
        return None
    if init.startswith("file:"):
        return read_state_dict(copy_here(init.removeprefix("file:")))
    assert network.fetch is not None
    try:
        return network.fetch()
    except OSError as error:
        raise UserError(
            f"Cannot fetch the imagenet weights of '{name}' ({getattr(error, 'reason', error)}): "
            f"download torchvision's file elsewhere and give it as 'file:PATH', or start from 'scratch'."
        ) from error


def _load(trunk: nn.Module, weights: Mapping[str, Tensor], name: str, init: str) -> None:
    own = trunk.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    # Batch counters carry no knowledge and older checkpoints lack them, so they do not count.
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    missing = [key for key in counted if key not in fitting]
    loaded = len(counted) - len(missing)
    if loaded < LEAST_LOADED * len(counted):
        raise UserError(
            f"Only {loaded} of the {len(counted)} tensors of '{name}' load from '{init}' "
            f"(the first missing is '{missing[0]}'): give weights of this network, by the names of its library."
        )
    trunk.load_state_dict(fitting, strict=False)
