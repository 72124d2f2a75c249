"""CAFE: a sigmoid mask, learned by the image branch, selects the expression channels of frozen face features.

"Generalizable Facial Expression Recognition", ECCV 2024. Equation numbers are the paper's; where the paper and the released
script differ, the script's form is the default because the published numbers came from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods import method
from cafe.methods.heads import HeadMethod, HiddenRecipe
from cafe.methods.method import Batch, Inputs, find_targets, widen
from cafe.networks.branches import build_network


@dataclass(frozen=True)
class Recipe(HiddenRecipe):
    """CAFE's published settings, with its ablations as switches."""

    mask: Literal["sigmoid", "linear", "none"] = "sigmoid"  # "none": the frozen features as they are
    # "separation": each class's largest channel is its logit; "mlp": a hidden layer, of which the paper has none
    classifier: Literal["linear", "separation", "mlp"] = "linear"
    separation: float = 1.5  # λ of Eq. 9; 0 switches the loss off
    diverse: float = 5.0  # β of Eq. 9; 0 switches the loss off
    diverse_form: Literal["mean", "sum"] = "mean"  # the released script; "sum" over classes is Eq. 8 read literally
    dropped: float = 10 / 73  # share of a group's channels that separation drops (10 of 73, released script)

    def __post_init__(self) -> None:
        """Raise `UserError` also for settings of a hidden layer where there is none."""
        super().__post_init__()
        if self.classifier != "mlp" and (self.hidden, self.dropout) != (HiddenRecipe.hidden, HiddenRecipe.dropout):
            raise UserError(
                f"hidden and dropout are settings of a hidden layer, which classifier={self.classifier} has not: set "
                "classifier=mlp too, or leave them out."
            )


class Cafe(HeadMethod):
    """Eq. 2: F~ = sigmoid(image branch) * frozen features; one linear layer classifies F~."""

    needs = frozenset({"image", "features"})
    published_tower = "clip-vit-b32"
    recipe_type = Recipe
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        classes = len(inputs.classes)
        if self.width < classes:
            raise UserError(
                f"CAFE needs a channel of the frozen features for each of {classes} classes, and has {self.width}: take a "
                "wider tower or layer."
            )
        self.build_mask()
        if recipe.classifier == "linear":
            self.classifier = self.build_linear()
        elif recipe.classifier == "mlp":
            self.classifier = self.build_hidden(recipe)

    @classmethod
    def check_recipe(cls, recipe: method.Recipe, name: str) -> None:
        """Raise `UserError` for settings by which separation has no channel, and for a dropout in front of no layer."""
        super().check_recipe(recipe, name)
        own = cast("Recipe", recipe)
        if own.dropped >= 1:
            raise UserError(
                f"dropped is the share of its channels that each class loses in a step, and {own.dropped} is all of them: "
                "leave it out, which drops 10 of 73, or give a share below 1."
            )
        if own.classifier == "separation" and own.input_dropout:
            raise UserError(
                "input_dropout is a setting of a layer, which classifier=separation has not: leave it out, or take another "
                "classifier."
            )

    def build_mask(self) -> None:
        """Build the part that computes the mask."""
        self.branch = build_network(self.inputs.network, self.inputs.init, scratch="pytorch")

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the mask before its sigmoid, (N, C) as the frozen features."""
        pooled = widen(self.branch.pool(self.branch(batch["image"])))  # (N, width of the branch)
        return resize_channels(pooled, self.width)

    @property
    def masking(self) -> bool:
        """Whether its mask is one that opens and closes: neither linear nor left out."""
        return self.recipe.mask == "sigmoid"

    def make_mask(self, batch: Batch) -> Tensor:
        """Return the mask as the features are multiplied by it."""
        return apply_mask(torch.ones(()), self.mask_logits(batch), self.recipe.mask)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K) and the masked features (N, C)."""
        masked = apply_mask(self.read(batch), self.mask_logits(batch), self.recipe.mask)
        return {"logits": self.classify(masked), "masked": masked}

    def classify(self, masked: Tensor) -> Tensor:
        """Return the logits (N, K) of masked features (N, C)."""
        if self.recipe.classifier == "separation":
            return pool_groups(masked, len(self.inputs.classes))
        logits: Tensor = self.classifier(masked)
        return logits

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Eq. 9: classification + λ separation + β diverse."""
        masked, targets, classes = output["masked"], find_targets(batch), len(self.inputs.classes)
        keep = draw_kept_channels(masked.shape[1], classes, self.recipe.dropped, batch["generator"]).to(masked.device)
        return cafe_losses(output["logits"], masked, targets, keep, self.recipe, batch["log_prior"])


def resize_channels(values: Tensor, width: int) -> Tensor:
    """Fit (N, W) to (N, width): channel-wise averaging down or interpolation up (supplement, Alg. 1 line 6)."""
    if values.shape[1] >= width:
        return functional.adaptive_avg_pool1d(values, width)  # identity when the widths agree
    return functional.interpolate(values[:, None], size=width, mode="linear", align_corners=False)[:, 0]


def apply_mask(features: Tensor, mask_logits: Tensor, mask: str) -> Tensor:
    """Eq. 2, F~ = M * F, for features and mask logits of one shape."""
    if mask == "none":
        return features + 0 * mask_logits  # the image branch stays in the graph, unused
    return features * (mask_logits.sigmoid() if mask == "sigmoid" else mask_logits)


def draw_kept_channels(width: int, classes: int, dropped: float, generator: torch.Generator) -> Tensor:
    """Draw which channels separation keeps, (C,) of 0 and 1: the same share dropped at random in every class's group.

    The channels left over by C // K belong to the last group's draw, as in the released script (63 of 73 kept, and 64 of
    the last 74, for 512 channels and 7 classes).
    """
    size = width // classes
    keep = torch.ones(width)
    for group in range(classes):
        start, end = group * size, (group + 1) * size if group < classes - 1 else width
        order = torch.randperm(end - start, generator=generator)
        keep[start + order[: round(dropped * size)]] = 0
    return keep


def pool_groups(masked: Tensor, classes: int) -> Tensor:
    """Max over the channels of each class's group, (N, C) → (N, K); the remainder of C / K is left out."""
    size = masked.shape[1] // classes
    return masked[:, : classes * size].reshape(-1, classes, size).amax(dim=2)


def cafe_losses(
    logits: Tensor, masked: Tensor, targets: Tensor, keep: Tensor, recipe: Recipe, log_prior: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Eq. 3–9 for logits (N, K), masked features (N, C), labels (N,) or shares (N, K), and the kept channels (C,).

    `log_prior` (K,), which the logits already contain, is added to the separation's; as published it is 0.
    """
    classes = logits.shape[1]
    classification = functional.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)  # Eq. 3
    separation = functional.cross_entropy(pool_groups(masked * keep, classes) + log_prior, targets)  # Eq. 4–6
    peaks = pool_groups(masked, classes)  # Eq. 7, (N, K)
    peak = peaks.mean() if recipe.diverse_form == "mean" else peaks.sum(dim=1).mean()
    diverse = 1 - peak / (masked.shape[1] // classes)  # Eq. 8
    total = classification + recipe.separation * separation + recipe.diverse * diverse  # Eq. 9
    return {"total": total, "classification": classification, "separation": separation, "diverse": diverse}
