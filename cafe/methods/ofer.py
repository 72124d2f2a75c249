"""OFER: occluded patches are found, painted anew, and the face is read by an attentive CNN and by a transformer's latents.

"Latent-OFER: Detect, Mask, and Reconstruct with Latent Vectors for Occluded Facial Expression Recognition", ICCV 2023. Of it
the classifier and a part of the reconstruction were released; the detector, the masked autoencoder and the latents were not.

The steps, and where they deviate from the paper [P] or the released code [C]:

1. Latents: the map of the frozen tower, from the feature store. [P] takes an ImageNet MAE of patches of 16 pixels, which is
   `timm:vit_base_patch16_224.mae`, 196 latents of 768 channels; [C] holds 512 of unknown origin, most likely the decoder's.
   Any tower with a map will do. `ofer_own` takes the encoder of the small MAE of step 3 instead, and needs no tower.
   Latents are standardised by position and channel; [C] takes them raw. As in [C] a face has one set of latents, of its
   clean view (there: reconstructed), beside fresh augmentation of the image in every epoch; those of `ofer_own` are of the
   augmented image.
2. Detection: deep SVDD (`cafe.methods.occlusion`). [P] trains on faces known to be free, of KDEF; here every patch of the
   source's clean training views counts as normal; the radius is the 95 % quantile of their distances. Its layers are ours,
   and so is the single pass over the faces (docs/methods.md shows what more would do).
3. Reconstruction: a small MAE trained on the source. [P] takes one trained on ImageNet and refines its picture by a U-Net
   with self-assembly, perceptual, semantic and adversarial losses; here is no refinement. Nothing flagged, nothing changed.
   Both learn from clean views before the first epoch and stay frozen; [C] reads images reconstructed beforehand.
4. Latents of flagged patches become their position's mean over the source, since the tower never saw the refilled face;
   `ofer_own` encodes the refilled face, as [P] does.
5. Which latents: [C] takes 78 fixed ones of 14 × 14, here the same region of any grid. [P] says the half at the places of
   largest spatial attention: `--set tokens=top`, by the mean attention of the CNN's heads; the others are set to zero.
6. Classifier: as [C], but its latent layers 39,936 → 10,000 → 5,000 → 1,024 → 256 (450 M parameters) are only
   39,936 → 1,024 → 256, whatever 39,936 is for other latents.

Augmentation is that of [C] (policy `ofer`). What is flagged on the clean face is refilled where the augmented image shows
it; what is erased stays so for the CNN, as [C] erases after the reconstruction, and the painter does not look at it. [C]
keeps the best epoch on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError
from cafe.learning.networks import build_network
from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.methods.occlusion import WIDTH, MaskedAutoencoder, OcclusionDetector

HEADS = 4
SQUEEZED = 16  # the channel gate's bottleneck: 512 → 32
LATENT = (1024, 256)  # layers behind the latents


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """The released classifier's settings, and what the unreleased parts are trained with here."""

    batch_size: int = 128
    learning_rate: float = 0.1  # SGD
    momentum: float = 0.9
    gamma: float = 0.1  # the learning rate is multiplied by it …
    step: int = 10  # … after every so many epochs
    # "region": those of the face's middle (released); "top": the half that is attended to most (paper).
    tokens: Literal["region", "top"] = "region"
    quantile: float = 0.95  # of the training patches' distances: the radius beyond which a patch is occluded
    detector_epochs: int = 1  # more shrink the sphere onto the training faces, and flag the free patches of others
    mae_epochs: int = 50  # 0: flagged patches are not refilled

    follows: ClassVar = {"step": "epochs"}


class Ofer(Method):
    """Cross-entropy of the refilled face, seen by four attention heads, and of the latents of its tower."""

    needs = frozenset({"image", "map", "placement"})
    policy = "ofer"
    clean_features = True
    not_exported = "It paints as many patches as it finds hidden, more of one face than of another, which no graph can."
    recipe_type = Recipe
    # A large set teaches the frozen parts in fewer passes.
    recipe_changes: ClassVar = {
        "affectnet": {"epochs": 20, "gamma": 0.1, "prior": "balanced", "mae_epochs": 3},
        "mma": {"mae_epochs": 10},
    }
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        if not 0 < recipe.quantile <= 1:
            raise UserError(f"The setting quantile of OFER lies between 0 and 1, not at {recipe.quantile}.")
        self.mae = MaskedAutoencoder(inputs.image_size)
        width, self.grid = self.latent_shape(inputs)
        self.detector = OcclusionDetector(width, self.grid[0] * self.grid[1])
        self.region = find_region(self.grid)
        self.branch = build_network(inputs.network, inputs.init)
        self.heads = nn.ModuleList(AttentionHead(self.branch.width) for _ in range(HEADS))
        tokens = len(self.region) if recipe.tokens == "region" else self.grid[0] * self.grid[1]
        self.latent = nn.Sequential(
            nn.Linear(tokens * width, LATENT[0]), nn.Linear(*LATENT), nn.BatchNorm1d(LATENT[1])
        )  # no activations, here and below (released code)
        self.classifier = nn.Sequential(
            nn.Linear(self.branch.width + LATENT[1], 256),
            nn.Linear(256, 128),
            nn.BatchNorm1d(128),
            nn.Linear(128, len(EXPRESSIONS)),
            nn.BatchNorm1d(len(EXPRESSIONS)),
        )

    def latent_shape(self, inputs: Inputs) -> tuple[int, tuple[int, int]]:
        """Return the channels of a latent and the grid of patches."""
        assert inputs.width is not None
        assert inputs.grid is not None
        return inputs.width, inputs.grid

    def read_latents(self, batch: Batch) -> Tensor:
        """Return a batch's latents (N, P, C), patches row by row."""
        latents: Tensor = batch["map"].flatten(2).transpose(1, 2)
        return latents

    def prepare(self, load: Callable[[int], Iterable[Batch]]) -> None:
        """Teach the autoencoder, then the detector, on the clean training faces."""
        self.mae.fit(lambda number: (batch["image"] for batch in load(number)), self.recipe.mae_epochs)

        @torch.no_grad()
        def latents(number: int) -> Iterator[Tensor]:
            for batch in load(number):
                yield self.read_latents(batch)

        self.detector.fit(latents, self.recipe.detector_epochs, self.recipe.quantile)

    @torch.no_grad()
    def restore(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the refilled images (N, 3, S, S), standardised latents (N, P, C) and which patches are flagged (N, P)."""
        image, latents = batch["image"], self.read_latents(batch)
        flagged = self.detector.flag(latents)
        hidden = self.find_hidden(flagged.unflatten(1, self.grid), batch)
        refilled = self.mae.refill(image, hidden) if self.recipe.mae_epochs else image
        seen = torch.where(find_erased(image), image, refilled)  # the CNN is meant to see what is erased
        return seen, self.restore_latents(latents, flagged, refilled), flagged

    def find_hidden(self, flagged: Tensor, batch: Batch) -> Tensor:
        """Return which pixels (N, S, S) of the images are erased or show flagged patches (N, h, w) of the clean face."""
        image = batch["image"]
        shown = move(flagged.float(), batch["placement"], image.shape[2:], "nearest") > 0
        return shown | find_erased(image)[:, 0]

    def locate(self, attention: Tensor, batch: Batch) -> Tensor:
        """Return attention (N, h, w) to places of the images as attention to places of the clean face."""
        turn, shift = batch["placement"].split([2, 1], dim=2)
        back = torch.linalg.inv(turn)
        return move(attention, torch.cat([back, -back @ shift], dim=2), attention.shape[1:], "bilinear")

    def restore_latents(self, latents: Tensor, flagged: Tensor, refilled: Tensor) -> Tensor:
        """Return standardised latents (N, P, C) with those of flagged patches (N, P) at their position's mean, 0."""
        return self.detector.standardise(latents).masked_fill(flagged[..., None], 0)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, 7) and the share of patches flagged on every face (N, 1)."""
        image, latents, flagged = self.restore(batch)
        features = self.branch(image)
        seen = [head(features) for head in self.heads]
        attended = merge_heads(torch.stack([values for values, _ in seen], dim=1))  # (N, K)
        if self.recipe.tokens == "region":
            latents = latents[:, self.region]
        else:
            attention = torch.stack([attention for _, attention in seen]).mean(dim=0).detach().float()
            latents = keep_top_half(latents, self.locate(attention, batch), self.grid)
        read = self.latent(latents.flatten(1))
        return {
            "logits": self.classifier(torch.cat([attended, read], dim=1)),
            "occluded": flagged.float().mean(dim=1, keepdim=True),
        }

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy; and the share of flagged patches, for the record."""
        return {**super().losses(output, batch), "occluded": output["occluded"].mean()}

    def optimizer(self) -> torch.optim.Optimizer:
        """Stochastic gradient descent with momentum."""
        recipe = self.recipe
        return torch.optim.SGD(self.parameter_groups(), momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All but the frozen parts."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.recipe.learning_rate}]

    def learning_rate_factor(self, epoch: int) -> float:
        """A tenth after every ten epochs."""
        return float(self.recipe.gamma ** ((epoch - 1) // self.recipe.step))


class OferOwn(Ofer):
    """OFER without a tower: latents of the small autoencoder that was trained on the source, taken anew after refilling."""

    needs = frozenset({"image"})
    clean_features = False

    def latent_shape(self, inputs: Inputs) -> tuple[int, tuple[int, int]]:
        """Return the autoencoder's."""
        return WIDTH, (self.mae.grid, self.mae.grid)

    def read_latents(self, batch: Batch) -> Tensor:
        """Return the autoencoder's latents (N, P, 128) of a batch's images."""
        return self.mae.encode(batch["image"])

    def find_hidden(self, flagged: Tensor, batch: Batch) -> Tensor:
        """Return the flagged patches (N, h, w): they are those of the augmented image, what is erased among them."""
        return flagged

    def locate(self, attention: Tensor, batch: Batch) -> Tensor:
        """Return the attention (N, h, w) as it is: the latents are those of the augmented image."""
        return attention

    def restore_latents(self, latents: Tensor, flagged: Tensor, refilled: Tensor) -> Tensor:
        """Return the standardised latents (N, P, 128) of the refilled faces."""
        return self.detector.standardise(self.mae.encode(refilled))


class AttentionHead(nn.Module):
    """A channel gate, then a spatial gate, on the map of the image branch (released code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.channels = nn.Sequential(
            nn.Linear(width, width // SQUEEZED),
            nn.BatchNorm1d(width // SQUEEZED),
            nn.ReLU(),
            nn.Linear(width // SQUEEZED, width),
            nn.Sigmoid(),
        )
        self.reduce = nn.Sequential(nn.Conv2d(width, half, 1), nn.BatchNorm2d(half))
        self.square, self.row, self.column = (
            nn.Sequential(nn.Conv2d(half, width, size, padding="same"), nn.BatchNorm2d(width))
            for size in (3, (1, 3), (3, 1))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.001)
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gated features (N, K) of a map (N, K, h, w), averaged over positions, and the attention (N, h, w)."""
        gated = features * self.channels(features.mean(dim=(2, 3)))[..., None, None]
        reduced = self.reduce(gated)
        attention = (self.square(reduced) + self.row(reduced) + self.column(reduced)).relu().sum(dim=1)  # (N, h, w)
        return (gated * attention[:, None]).mean(dim=(2, 3)), attention


def move(values: Tensor, placement: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Return (N, H, W) that shows at every place the values (N, h, w) at the place where an affine map (N, 2, 3) leads."""
    places = functional.affine_grid(placement, [len(values), 1, *size], align_corners=False)
    return functional.grid_sample(values[:, None], places, mode=mode, align_corners=False)[:, 0]


def find_erased(images: Tensor) -> Tensor:
    """Return which pixels (N, 1, S, S) of images are erased: exactly 0 in all colours, which no grey level becomes."""
    return (images == 0).all(dim=1, keepdim=True)


def merge_heads(heads: Tensor) -> Tensor:
    """Return (N, K) from the features of all heads (N, 4, K): the sum of their log-softmax across heads."""
    return heads.log_softmax(dim=1).sum(dim=1)


def find_region(grid: tuple[int, int]) -> list[int]:
    """Return the patches, counted row by row, whose centres lie where the released 78 of a 14 × 14 grid lie.

    These are rows 3–11 with columns 3–10, and columns 3–8 of row 12.
    """
    places = [
        (14 * (row + 0.5) / grid[0], 14 * (column + 0.5) / grid[1])
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    return [
        number for number, (y, x) in enumerate(places) if (3 <= y < 12 and 3 <= x < 11) or (12 <= y < 13 and 3 <= x < 9)
    ]


def keep_top_half(latents: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return latents (N, P, C) with all but the half, rounded up, of largest attention (N, h, w) set to zero."""
    fitted = functional.interpolate(attention[:, None], size=grid, mode="bilinear").flatten(1)  # (N, P)
    kept = fitted.topk((fitted.shape[1] + 1) // 2, dim=1).indices
    return latents * torch.zeros_like(fitted).scatter(1, kept, 1.0)[..., None]
