"""A trained method with its frozen tower, ready for faces that are in no manifest.

Faces go the way a run's own predictions went (`Embedder`, `FaceDataset`, the clean view 0), so that they get the same
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from upath import UPath

from cafe.data.images import MAX_PIXELS, UnreadableImageError, image_pixels
from cafe.errors import UserError
from cafe.learning.loading import FaceDataset
from cafe.learning.training import predict_average
from cafe.methods.method import Method
from cafe.towers.building import FrozenBackbone
from cafe.towers.embedding import Embedder
from cafe.views.drawing import ViewPlan

Picture = np.ndarray | Image.Image
BATCH_SIZE = 64  # faces per forward pass of a tower, as when features are stored


@dataclass(frozen=True)
class TowerInput:
    """A frozen tower and how it is fed: `plan` holds its pixel statistics, `dtype` the number format of its features.

    Every forward pass is filled up to `batch_size` faces; a smaller one answers sooner where few faces are asked for at a
    time, and rounds differently.
    """

    backbone: FrozenBackbone
    plan: ViewPlan
    dtype: str = "float16"
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True, repr=False)
class Model:
    """Trained methods that differ in nothing but their seed, whose probabilities are averaged; usually one.

    `plan` holds the pixel statistics of the image branch and `image_size` its side in pixels; `tower` is there where the
    method reads frozen features. All of it is on `device`. With `flip` every face is averaged with its mirror image. An
    answer whose probability is below the `threshold` is unsure; None where that is not known.
    """

    name: str
    methods: tuple[Method, ...]
    plan: ViewPlan
    image_size: int
    tower: TowerInput | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    flip: bool = False
    threshold: float | None = None

    def __repr__(self) -> str:
        seeds = f", the mean of {len(self.methods)} seeds" if len(self.methods) > 1 else ""
        return f"<Model {self.name}: {len(self.classes)} classes, on {self.device}{seeds}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its K classes, in the order of their probabilities."""
        return self.methods[0].inputs.classes

    def predict(self, images: Sequence[Picture]) -> np.ndarray:
        """Return the probabilities (N, K) float32 of N aligned faces, in the order of `classes`.

        An image is a picture of PIL or an array (H, W, 3) uint8 in RGB order, of any size; raises `UserError` for any other.
        """
        faces = FacesInMemory([read_pixels(image) for image in images])
        if not len(faces.labels):
            return np.zeros((0, len(self.classes)), np.float32)
        needs = self.methods[0].needs
        plan = replace(self.plan, policy="flip")  # which leaves the clean view 0 as it is
        dataset = FaceDataset(faces, plan, needs, self.image_size, self._embed(faces, "map" in needs))
        probabilities = predict_average(self.methods, dataset, np.arange(len(faces.labels)), self.device, 1 + self.flip)
        if not np.isfinite(probabilities).all():
            raise UserError(f"The model {self.name!r} gives probabilities that are NaN: train it again, with fp32.")
        return probabilities

    def _embed(self, faces: FacesInMemory, maps: bool) -> Embedder | None:
        if self.tower is None:
            return None
        tower, plan = self.tower, replace(self.tower.plan, policy="flip")
        return Embedder(tower.backbone, faces, plan, str(self.device), maps, tower.dtype, tower.batch_size)


@dataclass(frozen=True)
class FacesInMemory:
    """Pictures (H, W, 3) uint8 with the places of a manifest's faces: unlabelled rows."""

    pictures: list[np.ndarray]

    @property
    def sample_ids(self) -> list[str]:
        """Their numbers: the clean view does not depend on them."""
        return [str(row) for row in range(len(self.pictures))]

    @property
    def labels(self) -> np.ndarray:
        """Unknown: -1 for every row, (N,) int64."""
        return np.full(len(self.pictures), -1)

    def path(self, row: int) -> UPath:
        """What an error calls a picture: its number."""
        return UPath(str(row))

    @property
    def remote(self) -> bool:
        """They are here."""
        return False

    def fetch(self, row: int) -> bytes:
        """Nothing is left to fetch."""
        return b""

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
        """Return the pixels of a picture as `read_face` does."""
        return self.read_face(row, channels)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a picture, in the order of colours `rgb` or `bgr`."""
        return self.pictures[row] if channels == "rgb" else self.pictures[row][..., ::-1]


def read_pixels(image: Picture) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; raise `UserError` when it is no image of that form."""
    if isinstance(image, Image.Image):
        try:
            return image_pixels(image)
        except UnreadableImageError as error:
            raise UserError(f"An image cannot be used ({error}): give 8-bit RGB pixels.") from None
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise UserError(
            f"An image is a picture of PIL or an array (H, W, 3) of uint8, and one of the type {kind} is neither."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"An image is an array (H, W, 3) uint8, not {image.shape} {image.dtype}: give RGB pixels from 0 to 255."
        )
    return image
