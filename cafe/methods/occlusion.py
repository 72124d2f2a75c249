"""Occlusions: patches that are unlike those of all training faces are detected and painted anew from the rest of the face.

Both parts learn from unlabelled faces of the source alone and are frozen afterwards. The detector works on the latents of
any tower; the painter is a small masked autoencoder of this project's own, which also gives latents where no tower does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Load = Callable[[int], Iterable[Tensor]]  # pass 0, 1, … over the training faces → their tensors, batch by batch

HIDDEN, EMBEDDING = 256, 64  # channels of the detector
SMALLEST = 0.1  # of the centre's coordinates: at 0 the embedding could shrink to nothing (Deep SVDD, released code)
DECAY = 1e-6  # λ of the objective
RATE = 1e-3  # of Adam, with which both learn
WIDTH, HEADS, LAYERS = 128, 4, (4, 2)  # of the autoencoder: its encoder's and its decoder's layers
MASKED = 0.75  # share of patches the autoencoder must guess (MAE)


class OcclusionDetector(nn.Module):
    """Deep SVDD on patch latents: one sphere around the embeddings of all training patches; outside is occluded.

    "Deep One-Class Classification", ICML 2018: minimise mean ‖Φ(x) − c‖² + λ/2 Σ‖W‖² for a Φ without biases and c the mean
    of its first embeddings. Latents x are first freed of their position's mean over the training faces, and divided by their
    channel's deviation: what is usual at the chin is not at the eyes. Before `fit` the radius is infinite.
    """

    mean: Tensor  # (P, C) of every position
    scale: Tensor  # (C,) standard deviation around it
    centre: Tensor  # (64,)
    radius: Tensor  # () the squared one

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(width, HIDDEN, bias=False), nn.LeakyReLU(0.1), nn.Linear(HIDDEN, EMBEDDING, bias=False)
        ).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(places, width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("centre", torch.zeros(EMBEDDING))
        self.register_buffer("radius", torch.tensor(torch.inf))

    def standardise(self, latents: Tensor) -> Tensor:
        """Return latents (N, P, C) as multiples of their channel's deviation from their position's mean."""
        return (latents.float() - self.mean) / self.scale

    def forward(self, latents: Tensor) -> Tensor:
        """Return the squared distance (N, P) of the latents (N, P, C) from the centre."""
        embedded: Tensor = self.embed(self.standardise(latents))
        distances: Tensor = (embedded.float() - self.centre).square().sum(dim=2)
        return distances

    def flag(self, latents: Tensor) -> Tensor:
        """Return which patches (N, P) of latents (N, P, C) are occluded."""
        flags: Tensor = self(latents) > self.radius
        return flags

    def fit(self, load: Load, passes: int, quantile: float) -> None:
        """Learn from the latents (n, P, C) of training faces, all of whose patches count as normal.

        The radius is that quantile of their distances, so that a share of 1 - quantile is flagged among them. λ reaches the
        weights as the optimiser's weight decay.
        """
        self._measure(load)
        with torch.enable_grad():
            weights = list(self.embed.requires_grad_(True).parameters())
            optimizer = torch.optim.Adam(weights, lr=RATE, weight_decay=DECAY)
            for number in range(passes):
                for latents in load(number):
                    optimizer.zero_grad()
                    self(latents).mean().backward()
                    optimizer.step()
            self.embed.requires_grad_(False)
        distances = [self(latents).flatten().cpu().numpy() for latents in load(0)]
        self.radius.fill_(float(np.quantile(np.concatenate(distances), quantile)))

    @torch.no_grad()
    def _measure(self, load: Load) -> None:
        """Take the means and deviations of latents, and the centre of their first embeddings."""
        count, sums = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(sums)
        for latents in load(0):
            count += len(latents)
            sums += latents.double().sum(dim=0)
            squares += latents.double().square().sum(dim=0)
        mean = sums / count
        self.mean.copy_(mean)
        variance = (squares / count - mean.square()).mean(dim=0)
        self.scale.copy_(variance.clamp(min=1e-12).sqrt())
        embedded = [self.embed(self.standardise(latents)).flatten(0, 1).double().sum(dim=0) for latents in load(0)]
        centre = torch.stack(embedded).sum(dim=0) / (count * len(self.mean))
        near = centre.abs() < SMALLEST
        self.centre.copy_(torch.where(near, torch.where(centre < 0, -SMALLEST, SMALLEST), centre))


class MaskedAutoencoder(nn.Module):
    """Guesses the hidden patches of a face from the others: "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

    The encoder sees visible patches only, the decoder all places. Unlike the paper's: a hundredth of its size, one width for
    both parts, and pixels as they are, not normalised patch by patch, since they are to be looked at. Images of any size are
    cut into `grid` × `grid` patches of 16 pixels, or of 8 where there are fewer than 160.
    """

    places: Tensor  # (P, 128) sine and cosine of every patch's place

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.patch = 16 if image_size >= 160 else 8
        self.grid = max(2, round(image_size / self.patch))
        values = 3 * self.patch**2
        self.embed = nn.Linear(values, WIDTH)
        self.encoder, self.decoder = (build_transformer(layers) for layers in LAYERS)
        self.unknown = nn.Parameter(torch.randn(WIDTH) * 0.02)  # stands for a hidden patch
        self.paint = nn.Linear(WIDTH, values)
        self.register_buffer("places", place_codes(self.grid), persistent=False)
        self.requires_grad_(False)

    def encode(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the latents (N, P, 128) of images (N, 3, S, S); those of hidden patches (N, P) hold their place alone."""
        patches = self.cut(images)
        tokens = self.embed(patches) + self.places  # (N, P, 128)
        if hidden is None:
            encoded: Tensor = self.encoder(tokens)
            return encoded
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # the visible ones first
        visible = (~hidden).sum(dim=1)
        shown = order[:, : int(visible.max()), None].expand(-1, -1, WIDTH)
        padding = torch.arange(shown.shape[1], device=images.device) >= visible[:, None]
        encoded = self.encoder(tokens.gather(1, shown), src_key_padding_mask=padding)
        whole = torch.zeros_like(tokens).scatter(1, shown, encoded.to(tokens.dtype))
        return torch.where(hidden[..., None], self.unknown, whole)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Return the guessed patches (N, P, values) of images (N, 3, S, S) of which `hidden` (N, P) are not looked at."""
        guessed: Tensor = self.paint(self.decoder(self.encode(images, hidden) + self.places))
        return guessed

    def cut(self, images: Tensor) -> Tensor:
        """Return the patches (N, P, values) of images (N, 3, S, S), resized to whole patches where they are not."""
        side = self.grid * self.patch
        if images.shape[2] != side:
            images = functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        return functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def refill(self, images: Tensor, occluded: Tensor) -> Tensor:
        """Return images (N, 3, S, S) with the occluded cells (N, h, w) of any grid painted anew; others stay as they are.

        So does a face that is occluded all over: nothing is left to guess from.
        """
        size, side = images.shape[2], self.grid * self.patch
        cells = occluded[:, None].float()
        pixels = functional.interpolate(cells, size=(size, size)) > 0  # (N, 1, S, S)
        covered = functional.max_pool2d(functional.interpolate(cells, size=(side, side)), self.patch)
        hidden = covered.flatten(1) > 0  # (N, P)
        some = hidden.any(dim=1) & ~hidden.all(dim=1)
        if not some.any():
            return images
        guessed = self(images[some], hidden[some]).float().transpose(1, 2)
        painted = functional.fold(guessed, (side, side), self.patch, stride=self.patch)
        if side != size:
            painted = functional.interpolate(painted, size=(size, size), mode="bilinear", antialias=True)
        refilled = images.clone()
        refilled[some] = torch.where(pixels[some], painted.to(images.dtype), images[some])
        return refilled

    def fit(self, load: Load, passes: int) -> None:
        """Learn from images (n, 3, S, S) of training faces, mirrored in every second pass; the rate falls as a cosine."""
        with torch.enable_grad():
            weights = list(self.requires_grad_(True).parameters())
            optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)  # MAE's
            for number in range(passes):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 + math.cos(math.pi * number / passes)) / 2
                for images in load(number):
                    optimizer.zero_grad()
                    self.loss(images.flip(3) if number % 2 else images).backward()
                    nn.utils.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
            self.requires_grad_(False)

    def loss(self, images: Tensor) -> Tensor:
        """Return the mean squared error of a random three quarters of the patches, guessed from the others."""
        patches = self.cut(images)
        ranks = torch.rand(patches.shape[:2], device=images.device).argsort(dim=1)
        hidden = ranks < round(MASKED * patches.shape[1])
        return functional.mse_loss(self(images, hidden)[hidden], patches[hidden])


def build_transformer(layers: int) -> nn.TransformerEncoder:
    """Return that many pre-norm layers and a last norm; tokens (N, P, 128) → (N, P, 128)."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def place_codes(grid: int) -> Tensor:
    """Return MAE's fixed codes (grid², 128): sines and cosines of row and column, from fine to coarse."""
    waves = 10_000 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(grid)[:, None] * waves  # (grid, 32)
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, 64)
    rows, columns = codes[:, None].expand(-1, grid, -1), codes[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)
