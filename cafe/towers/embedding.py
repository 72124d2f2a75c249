"""A frozen tower over the faces of a manifest: (row, view) in, features out.

Extraction fills the store with it and a training that runs the tower on the fly reads from it, so that both give the same
numbers.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from cafe.arithmetic import arithmetic
from cafe.data.images import MAX_PIXELS, MissingImageError, UnreadableImageError, is_gone
from cafe.data.manifest import Pictures
from cafe.errors import StorageError, UserError
from cafe.learning.views import ViewPlan, normalise
from cafe.towers.building import FrozenBackbone
from cafe.towers.names import Layer

Sample = tuple[int, int]  # manifest row, view


class Rendered(NamedTuple):
    """Views as a tower takes them: pictures (n, S, S, 3) uint8, erased boxes (n, 4), and why rows are unreadable."""

    pictures: np.ndarray
    boxes: np.ndarray
    unreadable: dict[int, str]


class Embedder:
    """Features of views as `FeatureReader` gives them, computed when they are asked for.

    Every forward pass is filled up to `batch_size`: arithmetic libraries round differently for different sizes, and a
    feature must not depend on how many neighbours it had.
    """

    def __init__(
        self,
        tower: FrozenBackbone,
        manifest: Pictures,
        plan: ViewPlan,
        device: str,
        maps: bool = False,
        dtype: str = "float16",
        batch_size: int = 64,
        channels: str = "rgb",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.tower = tower.to(device).to(memory_format=torch.channels_last)  # convolutions are 1.6 × faster
        self.manifest, self.plan, self.device, self.channels = manifest, plan, device, channels
        self.max_pixels, self.refused = max_pixels, dict[int, str]()  # rows not to decode, with the reason
        self.maps, self.dtype, self.batch_size = maps, np.dtype(dtype), batch_size

    def batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """Part samples into forward passes."""
        return [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]

    def render(self, samples: Sequence[Sample]) -> Rendered:
        """Decode and augment the samples of one forward pass; an unreadable image is black there."""
        side = self.tower.facts.input_size
        pictures = np.zeros((len(samples), side, side, 3), np.uint8)
        boxes = np.zeros((len(samples), 4), np.int64)
        unreadable = {row: self.refused[row] for row, _ in samples if row in self.refused}
        decoded: tuple[int, np.ndarray] | None = None  # views of one face follow each other
        for position, (row, view) in enumerate(samples):
            if row in unreadable:
                continue
            try:
                if decoded is None or decoded[0] != row:
                    decoded = (row, self.manifest.read_face(row, self.channels, self.max_pixels))
            except UnreadableImageError as error:
                self._check_gone(row, error)
                unreadable[row] = str(error)
                continue
            sample_id = self.manifest.sample_ids[row]
            pictures[position], boxes[position] = self.plan.render(decoded[1], sample_id, view, side)
        return Rendered(pictures, boxes, unreadable)

    def _check_gone(self, row: int, error: UnreadableImageError) -> None:
        """Raise `StorageError` for a picture that is missing where its folder does not show that it is gone."""
        path = self.manifest.path(row)
        if isinstance(error, MissingImageError) and not is_gone(path):
            raise StorageError(
                f"{path} is missing with its whole folder on node {socket.gethostname()}: mount its root there, or index "
                "the set again if its faces are gone."
            )

    def embed_layers(self, rendered: Rendered, layers: Sequence[Layer]) -> list[dict[str, np.ndarray]]:
        """Run the tower once; return each layer's pooled (n, C) and, if asked for, map (n, C, H, W), in the store's type."""
        count = len(rendered.pictures)
        missing = self.batch_size - count
        with torch.inference_mode(), arithmetic(self.tower.precision):
            pictures = torch.from_numpy(rendered.pictures).to(self.device)
            images = normalise(pictures, torch.from_numpy(rendered.boxes), self.plan.mean, self.plan.std)
            images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
            images = images.contiguous(memory_format=torch.channels_last)
            read = self.tower.read(images, layers, with_map=self.maps)
        return [
            {
                name: values[:count].cpu().numpy().astype(self.dtype, order="C")
                for name, values in (("pooled", pooled), ("map", spatial if self.maps else None))
                if values is not None
            }
            for pooled, spatial in read
        ]

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return the features of one view of some rows; raise `UserError` for an unreadable image."""
        return self.read_layers(rows, view, [self.tower.layer])[0]

    def read_layers(self, rows: np.ndarray, view: int, layers: Sequence[Layer]) -> list[dict[str, np.ndarray]]:
        """Return what `read` gives for each of several layers."""
        parts = []
        for batch in self.batches([(int(row), view) for row in rows]):
            rendered = self.render(batch)
            for row, reason in rendered.unreadable.items():
                raise UserError(f"{self.manifest.path(row)} is unreadable ({reason}): mend it or leave it out.")
            parts.append(self.embed_layers(rendered, layers))
        return [
            {name: np.concatenate([part[name] for part in layer]) for name in layer[0]}
            for layer in zip(*parts, strict=True)
        ]
