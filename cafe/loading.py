"""Batches of faces: images decoded and augmented on the fly, joined to the features of the very same views.

A sample is asked for as (row, view), so the order of an epoch, the view it uses and each worker's part are plain lists,
computed from the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cafe.errors import UserError
from cafe.images import UnreadableImageError
from cafe.manifest import Manifest
from cafe.methods.method import Batch, Recipe
from cafe.parallel import part_sizes, rank
from cafe.randomness import random_generator
from cafe.views import ViewPlan, normalise

SMALLEST_BATCH = 8  # a shorter last batch is left out: its batch statistics would be noise

Sample = tuple[int, int]  # manifest row, view


@dataclass(frozen=True)
class FaceDataset(Dataset[Batch]):
    """The faces of a manifest as a method needs them; `features` is (N, views, C), memory-mapped or in memory."""

    manifest: Manifest
    plan: ViewPlan
    needs: frozenset[str]
    image_size: int
    features: np.ndarray | None = None
    channels: str = "rgb"  # bgr only for targets of the protocol `paper`

    def __getitems__(self, samples: list[Sample]) -> Batch:
        """Return one batch: row, label, and of what is needed features (n, C), picture (n, S, S, 3) uint8, box (n, 4)."""
        rows = np.array([row for row, _ in samples])
        batch: Batch = {"row": torch.from_numpy(rows), "label": torch.from_numpy(self.manifest.labels[rows])}
        if "features" in self.needs:
            assert self.features is not None
            values = self.features[rows, [view for _, view in samples]]
            batch["features"] = torch.from_numpy(values.astype(np.float32))
        if "image" in self.needs:
            pictures, boxes = zip(*(self._picture(row, view) for row, view in samples), strict=True)
            batch["picture"] = torch.from_numpy(np.stack(pictures))
            batch["box"] = torch.tensor(boxes)
        return batch

    def _picture(self, row: int, view: int) -> tuple[np.ndarray, tuple[int, ...]]:
        try:
            image = self.manifest.read_face(row, self.channels)
        except UnreadableImageError as error:
            raise UserError(
                f"{self.manifest.path(row)} is unreadable ({error}): mend it, or extract features once so that it is "
                "known and left out."
            ) from None
        return self.plan.render(image, self.manifest.sample_ids[row], view, self.image_size)

    def load(self, batches: list[list[Sample]], device: torch.device, workers: int) -> Iterator[Batch]:
        """Yield the batches in order on a device, with `image` (n, 3, S, S) normalised there; `workers` decode ahead."""
        loader = DataLoader(
            self, batch_sampler=batches, collate_fn=_as_is, num_workers=workers, pin_memory=device.type == "cuda"
        )
        for batch in loader:
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            if "picture" in batch:
                image = normalise(batch.pop("picture"), batch.pop("box"), self.plan.mean, self.plan.std)
                batch["image"] = image.contiguous(memory_format=torch.channels_last)
            yield batch


def _as_is(batch: Any) -> Any:
    return batch


def epoch_order(rows: np.ndarray, labels: np.ndarray, recipe: Recipe, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of rows of a training epoch, the same for any number of workers.

    `balanced` draws as many rows with replacement, each class equally often on average.
    """
    generator = random_generator(seed, "order", epoch)
    if recipe.sampler == "balanced":
        weights = 1 / np.bincount(labels[rows])[labels[rows]]
        order = generator.choice(rows, size=len(rows), p=weights / weights.sum())
    else:
        order = generator.permutation(rows)
    batches = np.split(order, range(recipe.batch_size, len(order), recipe.batch_size))
    whole = [batch for batch in batches if len(batch) >= min(SMALLEST_BATCH, recipe.batch_size)]
    if not whole:
        raise UserError(f"{len(rows)} training faces are too few: at least {SMALLEST_BATCH} are needed.")
    return whole


def own_part(batch: np.ndarray) -> np.ndarray:
    """Return this worker's consecutive part of a batch."""
    sizes = part_sizes(len(batch))
    start = sum(sizes[: rank()])
    return batch[start : start + sizes[rank()]]
