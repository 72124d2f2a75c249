"""A frozen tower over the faces of a manifest: (row, view) in, features out.

Extraction fills the store with it and a training that runs the tower on the fly reads from it, so that both give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cafe.arithmetic import arithmetic
from cafe.data.images import MAX_PIXELS
from cafe.data.manifest import Pictures
from cafe.errors import UserError
from cafe.towers.building import FrozenBackbone
from cafe.towers.names import Layer
from cafe.views.device import make_views, send
from cafe.views.drawing import ViewPlan
from cafe.views.pixels import normalise
from cafe.views.rendering import Rendered, Renderer, Sample, ViewParameters


class Embedder:
    """Features of views as `FeatureSource` gives them, computed when they are asked for.

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
        self.recorded: dict[tuple[Layer, ...], Recorded] = {}
        self.maps, self.dtype, self.batch_size = maps, getattr(torch, dtype), batch_size

    def batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """Part samples into forward passes."""
        return [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]

    def embed_layers(self, views: Rendered | ViewParameters, layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
        """Run the tower once; return each layer's pooled (n, C) and, if asked for, map (n, C, H, W), on the device."""
        with torch.inference_mode(), arithmetic(self.tower.precision):
            pictures = self._make(views)
            images = normalise(pictures, torch.from_numpy(views.boxes), self.plan.mean, self.plan.std)
            if missing := self.batch_size - len(pictures):
                images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
            read = self._read(images.contiguous(memory_format=torch.channels_last), tuple(layers))
            return [
                {
                    name: values[: len(pictures)].to(self.dtype, copy=True)
                    for name, values in (("pooled", pooled), ("map", spatial if self.maps else None))
                    if values is not None
                }
                for pooled, spatial in read
            ]

    def _read(self, images: Tensor, layers: tuple[Layer, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """Run the tower over a full batch; what it returns holds until the next one."""
        read = partial(self.tower.read, layers=layers, with_map=self.maps)
        if not images.is_cuda:
            return read(images)
        if layers not in self.recorded:
            self.recorded[layers] = Recorded(read, images)
        return self.recorded[layers](images)

    def _make(self, views: Rendered | ViewParameters) -> Tensor:
        """Return the pictures (n, S, S, 3) uint8 on the device."""
        if isinstance(views, ViewParameters):
            return make_views(views, self.tower.facts.input_size, self.plan, self.device)
        return send(views.pictures, self.device)

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
                raise UserError(f"{path} is unreadable ({reason}): fix it or leave it out.")
            parts.append(self.embed_layers(rendered, layers))
        return [join_batches([part[number] for part in parts]) for number in range(len(layers))]


class Recorded:
    """A tower's pass over batches of one size, recorded as a CUDA graph: one launch instead of hundreds."""

    def __init__(self, read: Callable[[Tensor], list[tuple[Tensor, Tensor | None]]], images: Tensor) -> None:
        self.images, self.graph = images.clone(memory_format=torch.channels_last), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first pass chooses and allocates must not be part of the record
            read(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = read(self.images)

    def __call__(self, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return what the tower gives, which the next call overwrites."""
        self.images.copy_(images)
        self.graph.replay()
        return self.result


def join_batches(batches: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return {array: (n, …)} of what was read of one layer batch by batch; all of it is waited for here."""
    return {name: torch.cat([batch[name].contiguous() for batch in batches]).cpu().numpy() for name in batches[0]}
