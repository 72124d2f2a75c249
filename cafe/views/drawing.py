"""A view: one augmented picture of one face, a pure function of (seed, sample_id, view index).

The frozen tower sees view v once, when its features are extracted; the image branch re-creates the very same view v while
training. Nothing else (worker, order, batch, machine, size of the picture) takes part, so both see the same face.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from cafe.errors import unknown
from cafe.randomness import random_generator

VERSION = 1  # part of every cache key: raise it when a view of the same name would look different
LEVELS = 2**16  # of the noise
ERASE_ATTEMPTS = 10  # as torchvision's RandomErasing
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class ViewPolicy:
    """How views 1, 2, … are drawn; view 0 is always the clean image. The defaults change nothing."""

    noise_probability: float = 0.0
    noise_variance: float = 30.0  # on the 0–255 image, before it is resized
    flip_probability: float = 0.0
    erase_probability: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.25)  # of the picture
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # height / width, log-uniform
    exclusive: bool = False  # whether a view has noise or a flip, but never both
    turn_probability: float = 0.0  # of being turned about the middle and moved; what comes in from outside is black
    turn_degrees: float = 20.0  # at most, to either side
    move: float = 32 / 224  # of the side, at most, in either direction


POLICIES = {
    "paper": ViewPolicy(noise_probability=0.5, flip_probability=0.5, erase_probability=0.5),  # CAFE, released script
    # SCN and RUL, released scripts: half of the views have noise or a flip, each as often.
    "scn": ViewPolicy(noise_probability=0.25, flip_probability=0.25, erase_probability=0.5, exclusive=True),
    # EAC, released script: it mirrors every view itself, so none is flipped by chance.
    "eac": ViewPolicy(noise_probability=0.5, erase_probability=0.5),
    # OFER, released script: torchvision's RandomApply of a rotation and a padded crop.
    "ofer": ViewPolicy(flip_probability=0.5, erase_probability=0.5, turn_probability=0.2),
    "clean": ViewPolicy(),
    "clean+flip": ViewPolicy(flip_probability=0.5),
    "flip": ViewPolicy(flip_probability=1),  # view 1 is the mirror image: for flip averaging at test time
}


@dataclass(frozen=True)
class View:
    """The drawn parameters of one view; lengths and places are fractions of the side, so they fit any size."""

    noise: np.random.Generator | None
    variance: float
    flip: bool
    erase: tuple[float, float, float, float] | None  # top and left among the free places, height, width
    turn: tuple[float, float, float] | None = None  # degrees, and how far it is moved down and right

    def render(self, image: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
        """Return the view (size, size, 3) uint8 of an image (H, W, 3) uint8: noise, resize, flip, turn (not yet erased)."""
        if self.noise is not None:
            noise = gaussian_levels(self.variance).take(self.noise.integers(0, LEVELS, image.shape, np.uint16))
            image = np.clip(image + noise, 0, 255).astype(np.uint8)
        resized = np.asarray(Image.fromarray(image).resize((size, size), INTERPOLATIONS[interpolation]))
        resized = resized[:, ::-1] if self.flip else resized
        return resized if self.turn is None else turn_picture(resized, *self.turn)

    def box(self, size: int) -> tuple[int, int, int, int]:
        """Return the erased rectangle (top, left, height, width) in pixels; all zero when nothing is erased."""
        if self.erase is None:
            return (0, 0, 0, 0)
        top, left, height, width = self.erase
        rows, columns = round(height * size), round(width * size)
        return (int(top * (size - rows + 1)), int(left * (size - columns + 1)), rows, columns)

    def placement(self) -> list[list[float]]:
        """Return the affine map (2, 3) from a place of the view to that of the clean picture it shows.

        Places are torch's (`affine_grid`): x to the right and y down, from -1 to 1.
        """
        degrees, down, right = self.turn or (0.0, 0.0, 0.0)
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        mirror = -1 if self.flip else 1
        across = [mirror * cosine, -mirror * sine, 2 * mirror * (down * sine - right * cosine)]
        return [across, [sine, cosine, -2 * (down * cosine + right * sine)]]


@dataclass(frozen=True)
class ViewPlan:
    """Everything a view needs beside its face: recorded with the features, so that the image branch sees the same."""

    policy: str
    seed: int
    views: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise `UserError` for a policy or an interpolation there is not: a record of a run may name any."""
        if self.policy not in POLICIES:
            raise unknown("view policy", self.policy, POLICIES)
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)

    @property
    def turns(self) -> bool:
        """Whether some views are turned, which no device makes."""
        return POLICIES[self.policy].turn_probability > 0

    def view_of(self, epoch: int) -> int:
        """Return the view that training epoch 1, 2, … uses: view e when there are enough, else views 1..V-1 in turn."""
        return 0 if self.views == 1 else 1 + (epoch - 1) % (self.views - 1)

    def draw(self, sample_id: str, view: int) -> View:
        """Return the parameters of a view of a sample."""
        return draw_view(POLICIES[self.policy], self.seed, sample_id, view)

    def render(self, image: np.ndarray, sample_id: str, view: int, size: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return a view's picture (size, size, 3) uint8 and its erased box, from the image (H, W, 3) uint8."""
        drawn = self.draw(sample_id, view)
        return drawn.render(image, size, self.interpolation), drawn.box(size)


@cache
def gaussian_levels(variance: float) -> np.ndarray:
    """Return Gaussian noise at `LEVELS` equally likely quantiles, rounded down to whole grey levels, int16.

    Adding it is what the released script does (add float noise, clip, truncate), five times faster than drawing normals.
    """
    from scipy.special import ndtri

    quantiles = (np.arange(LEVELS) + 0.5) / LEVELS
    return np.asarray(np.floor(math.sqrt(variance) * ndtri(quantiles)), dtype=np.int16)


def draw_view(policy: ViewPolicy, seed: int, sample_id: str, view: int) -> View:
    """Draw view number `view` of a sample, with a generator keyed by nothing but the three of them."""
    if view == 0:
        return View(None, 0.0, False, None)
    generator = random_generator(seed, view, sample_id)
    uniforms = generator.random(3)
    if policy.exclusive:  # one number decides on both: the flip's share lies behind the noise's
        uniforms[1] = (uniforms[0] - policy.noise_probability) % 1
    noise, flip, erase = uniforms < (
        policy.noise_probability,
        policy.flip_probability,
        policy.erase_probability,
    )
    box = _draw_box(policy, generator.random((ERASE_ATTEMPTS, 4))) if erase else None
    turn = _draw_turn(policy, generator.random(4)) if policy.turn_probability else None
    return View(generator if noise else None, policy.noise_variance, bool(flip), box, turn)


def _draw_turn(policy: ViewPolicy, uniforms: np.ndarray) -> tuple[float, float, float] | None:
    """Return an angle in degrees and how far to move down and right, in sides of the picture; None for most views."""
    chance, angle, down, right = uniforms.tolist()
    if chance >= policy.turn_probability:
        return None
    return policy.turn_degrees * (2 * angle - 1), policy.move * (2 * down - 1), policy.move * (2 * right - 1)


def turn_picture(picture: np.ndarray, degrees: float, down: float, right: float) -> np.ndarray:
    """Turn a picture (S, S, 3) uint8 counter-clockwise, as torchvision does, and move it; what comes in is black."""
    size = len(picture)
    turned = Image.fromarray(picture).rotate(degrees, Image.Resampling.NEAREST)
    moved = Image.new("RGB", (size, size))
    moved.paste(turned, (round(right * size), round(down * size)))
    return np.asarray(moved)


def _draw_box(policy: ViewPolicy, uniforms: np.ndarray) -> tuple[float, float, float, float] | None:
    """Return the first rectangle that fits, as torchvision's RandomErasing.get_params does, or None."""
    low, high = policy.erase_area
    log_low, log_high = math.log(policy.erase_ratio[0]), math.log(policy.erase_ratio[1])
    for area_u, ratio_u, top, left in uniforms.tolist():
        area = low + (high - low) * area_u
        ratio = math.exp(log_low + (log_high - log_low) * ratio_u)
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if height < 1 and width < 1:
            return (top, left, height, width)
    return None
