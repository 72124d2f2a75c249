"""A frozen tower over the faces of a manifest: (row, view) in, features out.

Extraction fills the store with it and a training that runs the tower on the fly reads from it, so that both give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cafe.arithmetic import arithmetic
from cafe.data.images import MAX_PIXELS
from cafe.data.manifest import Pictures
from cafe.errors import UserError
from cafe.learning.device_views import make_views
from cafe.learning.pixels import normalise
from cafe.learning.rendering import Drawn, Rendered, Renderer, Sample
from cafe.learning.views import ViewPlan
from cafe.towers.building import FrozenBackbone
from cafe.towers.names import Layer


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
        self.plan, self.device = plan, device
        self.renderer = Renderer(manifest, plan, tower.facts.input_size, channels, max_pixels)
        self.maps, self.dtype, self.batch_size = maps, getattr(torch, dtype), batch_size

    def batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """Part samples into forward passes."""
        return [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]

    def embed_layers(self, views: Rendered | Drawn, layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
        """Run the tower once; return each layer's pooled (n, C) and, if asked for, map (n, C, H, W), on the device."""
        with torch.inference_mode(), arithmetic(self.tower.precision):
            pictures = self._make(views)
            missing = self.batch_size - len(pictures)
            images = normalise(pictures, torch.from_numpy(views.boxes), self.plan.mean, self.plan.std)
            images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
            images = images.contiguous(memory_format=torch.channels_last)
            read = self.tower.read(images, layers, with_map=self.maps)
            return [
                {
                    name: values[: len(pictures)].to(self.dtype)
                    for name, values in (("pooled", pooled), ("map", spatial if self.maps else None))
                    if values is not None
                }
                for pooled, spatial in read
            ]

    def _make(self, views: Rendered | Drawn) -> Tensor:
        """Return the pictures (n, S, S, 3) uint8 on the device."""
        if isinstance(views, Drawn):
            return make_views(views, self.tower.facts.input_size, self.plan, self.device)
        pictures = torch.from_numpy(views.pictures)
        return (
            pictures.to(self.device)
            if self.device == "cpu"
            else pictures.pin_memory().to(self.device, non_blocking=True)
        )

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return the features of one view of some rows; raise `UserError` for an unreadable image."""
        return self.read_layers(rows, view, [self.tower.layer])[0]

    def read_layers(self, rows: np.ndarray, view: int, layers: Sequence[Layer]) -> list[dict[str, np.ndarray]]:
        """Return what `read` gives for each of several layers."""
        parts = []
        for batch in self.batches([(int(row), view) for row in rows]):
            rendered = self.renderer(batch, {})
            for row, reason in rendered.unreadable.items():
                path = self.renderer.pictures.path(row)
                raise UserError(f"{path} is unreadable ({reason}): mend it or leave it out.")
            parts.append(self.embed_layers(rendered, layers))
        return [join_batches([part[number] for part in parts]) for number in range(len(layers))]


def join_batches(batches: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return {array: (n, …)} of what was read of one layer batch by batch; all of it is waited for here."""
    return {name: torch.cat([batch[name].contiguous() for batch in batches]).cpu().numpy() for name in batches[0]}
