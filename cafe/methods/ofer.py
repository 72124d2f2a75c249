"""OFER: occluded patches are found and painted anew; an attentive CNN and a transformer's latents then read the face.

"Latent-OFER: Detect, Mask, and Reconstruct with Latent Vectors for Occluded Facial Expression Recognition", ICCV 2023. Of it
the classifier and a part of the reconstruction were released; the detector, the masked autoencoder and the latents were not.
docs/methods.md says for each part what the paper and the released code do and what is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.methods.occlusion import WIDTH, MaskedAutoencoder, OcclusionDetector
from cafe.networks.branches import build_network

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

    def __post_init__(self) -> None:
        """Raise `UserError` for a radius that is no quantile, and a rate that falls after no epoch."""
        super().__post_init__()
        if not 0 < self.quantile <= 1:
            raise UserError(
                f"The setting quantile of OFER lies between 0 and 1, not at {self.quantile}: give 0.95, for example."
            )
        if self.step < 1:
            raise UserError(f"The setting step of OFER is at least one epoch, not {self.step}: give 10, for example.")


class Ofer(Method):
    """Cross-entropy of the refilled face, seen by four attention heads, and of the latents of its tower."""

    needs = frozenset({"image", "map", "placement"})
    policy = "ofer"
    clean_features = True
    not_exported = "It paints as many patches as it finds hidden, more of one face than of another, which no graph can."
    recipe_type = Recipe
    # On a large set the frozen parts need fewer passes.
    recipe_changes: ClassVar = {
        "affectnet": {"epochs": 20, "prior": "balanced", "mae_epochs": 3},
        "mma": {"mae_epochs": 10},
    }
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.mae = MaskedAutoencoder(inputs.image_size)
        width, self.grid = self.latent_shape(inputs)
        self.detector = OcclusionDetector(width, self.grid[0] * self.grid[1])
        self.region = find_region(self.grid)
        self.branch = build_network(inputs.network, inputs.init)
        self.heads = nn.ModuleList(AttentionHead(self.branch.width) for _ in range(HEADS))
        tokens = len(self.region) if recipe.tokens == "region" else self.grid[0] * self.grid[1]
        # No activations, here and below (released code).
        self.latent = nn.Sequential(nn.Linear(tokens * width, LATENT[0]), nn.Linear(*LATENT), nn.BatchNorm1d(LATENT[1]))
        self.classifier = nn.Sequential(
            nn.Linear(self.branch.width + LATENT[1], 256),
            nn.Linear(256, 128),
            nn.BatchNorm1d(128),
            nn.Linear(128, len(inputs.classes)),
            nn.BatchNorm1d(len(inputs.classes)),
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
        """Train the autoencoder, then the detector, on the clean training faces."""
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
        """Return logits (N, K) and the share of patches flagged on every face (N, 1)."""
        image, latents, flagged = self.restore(batch)
        features = self.branch(image)
        seen = [head(features) for head in self.heads]
        attended = merge_heads(torch.stack([values for values, _ in seen], dim=1))  # (N, W)
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
        """Return the gated features (N, W) of a map (N, W, h, w), averaged over positions, and the attention (N, h, w)."""
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
    """Return (N, W) from the features of all heads (N, 4, W): the sum of their log-softmax across heads."""
    return heads.log_softmax(dim=1).sum(dim=1)


def find_region(grid: tuple[int, int]) -> list[int]:
    """Return the patches, counted row by row, whose centres lie where the released 78 of a 14 × 14 grid lie.

    These are rows 3–11 with columns 3–10, and columns 3–8 of row 12.
    """
    down, across = (14 * (torch.arange(count) + 0.5) / count for count in grid)  # in patches of the released grid
    y, x = torch.meshgrid(down, across, indexing="ij")
    middle = (y >= 3) & (y < 12) & (x >= 3) & (x < 11)
    chin = (y >= 12) & (y < 13) & (x >= 3) & (x < 9)
    region: list[int] = (middle | chin).flatten().nonzero().flatten().tolist()
    return region


def keep_top_half(latents: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return latents (N, P, C) with all but the half, rounded up, of largest attention (N, h, w) set to zero."""
    fitted = functional.interpolate(attention[:, None], size=grid, mode="bilinear").flatten(1)  # (N, P)
    kept = fitted.topk((fitted.shape[1] + 1) // 2, dim=1).indices
    return latents * torch.zeros_like(fitted).scatter(1, kept, 1.0)[..., None]
