"""A frozen tower over the faces of a manifest: (row, view) in, features out.

Stage one fills the store with it; a training that runs the tower on the fly reads from it. One code, so that both give the
same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from cafe.backbones import FrozenBackbone
from cafe.errors import UserError
from cafe.images import UnreadableImageError, decode_image, read_bytes
from cafe.manifest import Manifest
from cafe.views import ViewPlan, normalise

Sample = tuple[int, int]  # manifest row, view


class Rendered(NamedTuple):
    """Views as a tower takes them: pictures (n, S, S, 3) uint8, erased boxes (n, 4), and why rows are unreadable."""

    pictures: np.ndarray
    boxes: np.ndarray
    unreadable: dict[int, str]


class Embedder:
    """Features of views as `FeatureReader` gives them, computed when they are asked for."""

    def __init__(
        self, tower: FrozenBackbone, manifest: Manifest, plan: ViewPlan, device: str, maps: bool, dtype: str
    ) -> None:
        self.tower = tower.to(device).to(memory_format=torch.channels_last)  # convolutions are 1.6 × faster
        self.manifest, self.plan, self.device, self.maps, self.dtype = manifest, plan, device, maps, np.dtype(dtype)

    def render(self, samples: Iterable[Sample]) -> Rendered:
        """Decode and augment samples; an unreadable image stays in the batch as black.

        So its neighbours' features are the same with and without it.
        """
        samples = list(samples)
        side = self.tower.input_size
        pictures = np.zeros((len(samples), side, side, 3), np.uint8)
        boxes = np.zeros((len(samples), 4), np.int64)
        unreadable: dict[int, str] = {}
        decoded: tuple[int, np.ndarray] | None = None  # views of one face follow each other
        for position, (row, view) in enumerate(samples):
            if row in unreadable:
                continue
            try:
                if decoded is None or decoded[0] != row:
                    decoded = (row, decode_image(read_bytes(self.manifest.path(row))))
            except UnreadableImageError as error:
                unreadable[row] = str(error)
                continue
            sample_id = self.manifest.sample_ids[row]
            pictures[position], boxes[position] = self.plan.render(decoded[1], sample_id, view, side)
        return Rendered(pictures, boxes, unreadable)

    def embed(self, rendered: Rendered) -> dict[str, np.ndarray]:
        """Run the tower: pooled (n, C) and, when asked for, map (n, C, H, W), in the number format of the store."""
        with torch.inference_mode():
            pictures = torch.from_numpy(rendered.pictures).to(self.device)
            images = normalise(pictures, torch.from_numpy(rendered.boxes), self.plan.mean, self.plan.std)
            pooled, spatial = self.tower(images.contiguous(memory_format=torch.channels_last), with_map=self.maps)
        features = {"pooled": pooled} if spatial is None else {"pooled": pooled, "map": spatial}
        return {name: values.cpu().numpy().astype(self.dtype) for name, values in features.items()}

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return the features of one view of some rows; raise `UserError` for an unreadable image."""
        rendered = self.render((int(row), view) for row in rows)
        for row, reason in rendered.unreadable.items():
            raise UserError(f"{self.manifest.path(row)} is unreadable ({reason}): mend it or leave it out.")
        return self.embed(rendered)
