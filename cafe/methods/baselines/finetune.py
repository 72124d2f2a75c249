"""Fine-tuning: the tower itself is trained further, all of it or its last blocks, under a new linear classifier.

The usual alternative to frozen features; CAFE's paper reports it too (an ablation), but not with which settings. Here they
are CAFE's own, but for the tower's learning rate, 1e-5, as is usual for a pre-trained transformer. The tower stays in
evaluation mode (no dropout, batch norm by its pre-trained statistics), sees faces with the pixel statistics of the feature
store, and is stored whole with the run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cafe.errors import UserError
from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.towers.building import FrozenBackbone, load_backbone
from cafe.towers.names import parse_backbone

ROWS_OF_BLOCKS = ("transformer.resblocks", "blocks", "stages")  # what open_clip and timm call a tower's row of blocks
LAYERS = tuple(f"layer{number}" for number in range(1, 5))  # and a residual network's


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """CAFE's recipe with a learning rate that suits a pre-trained tower."""

    learning_rate: float = 1e-5
    classifier_learning_rate: float = 2e-4
    blocks: int = 0  # how many of the tower's last blocks learn, with all that follows them; 0: the whole tower

    follows: ClassVar = {"classifier_learning_rate": "learning_rate"}


class Finetune(Method):
    """Cross-entropy through the tower."""

    needs = frozenset({"image", "tower"})
    takes_votes = True
    recipe_type = Recipe
    recipe_changes: ClassVar = {
        "affectnet": {"epochs": 20, "gamma": 0.8, "prior": "balanced", "classifier_learning_rate": 1e-4}
    }
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        assert inputs.backbone is not None
        self.tower = load_backbone(inputs.backbone, input_size=inputs.image_size)
        for parameter in find_trained(self.tower, recipe.blocks):
            parameter.requires_grad_(True)
        self.classifier = nn.Linear(self.tower.facts.width, len(inputs.classes))

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raise `UserError` when the tower's weights are no longer where they were."""
        assert inputs.backbone is not None
        parse_backbone(inputs.backbone)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K)."""
        return {"logits": self.classifier(self.tower(batch["image"])[0])}


def find_used_blocks(tower: FrozenBackbone) -> list[nn.Module]:
    """Return the blocks that a tower runs, in order: those up to the layer it is read at."""
    ran: list[nn.Module] = []
    hooks = [block.register_forward_pre_hook(lambda block, _: ran.append(block)) for block in find_blocks(tower)]
    with torch.no_grad():
        tower(torch.zeros(1, 3, tower.facts.input_size, tower.facts.input_size))
    for hook in hooks:
        hook.remove()
    return ran


def find_blocks(tower: FrozenBackbone) -> list[nn.Module]:
    """Return a tower's blocks in order; none when it has no such row."""
    modules = dict(tower.tower.named_modules())
    for prefix in ("", "trunk."):  # open_clip wraps a tower of timm
        for name in ROWS_OF_BLOCKS:
            if prefix + name in modules:
                return list(modules[prefix + name].children())
        if all(prefix + layer in modules for layer in LAYERS):
            return [modules[prefix + layer] for layer in LAYERS]
    return []


def find_trained(tower: FrozenBackbone, blocks: int) -> list[nn.Parameter]:
    """Return the parameters of the last blocks and of all that follows them, or all in use when `blocks` is 0.

    They are those that still get a gradient when nothing passes the input of the first of these blocks; what has no part
    in the features, such as an unused head, is not among them. Raises `UserError` when the tower has fewer blocks.
    """
    row = find_used_blocks(tower)
    if blocks > len(row):
        raise UserError(
            f"The tower '{tower.name}' has {len(row)} known blocks, fewer than {blocks}: set fewer, or 0 for all of it."
        )
    parameters = list(tower.requires_grad_(True).parameters())
    cut = row[-blocks].register_forward_pre_hook(_detach) if blocks else nullcontext()
    with cut:
        features, _ = tower(torch.zeros(1, 3, tower.facts.input_size, tower.facts.input_size))
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    tower.requires_grad_(False)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _detach(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
