"""Batches of faces: images decoded and augmented on the fly, joined to the features of the very same views.

The order of an epoch, the view it uses and each worker's part are plain numbers, computed from the seed alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from upath import UPath

from cafe.data.images import MAX_PIXELS
from cafe.data.manifest import Pictures
from cafe.errors import IncompleteError, StorageError, UserError
from cafe.methods.method import ARRAYS, Batch, Recipe
from cafe.networks.parallel import part_sizes, rank, world_size
from cafe.randomness import random_generator
from cafe.views.device import make_views, shorten_switch_interval
from cafe.views.drawing import ViewPlan
from cafe.views.pixels import normalise
from cafe.views.rendering import Rendered, Renderer, ViewParameters

SMALLEST_BATCH = 8  # faces that a training or an adaptation needs, and that each batch of an adaptation has
THREADS = 4  # that decode and draw for a GPU
LOOK_SECONDS = 5.0  # between two looks whether processes that decode live, while they make no batch
Pixels = tuple[torch.Tensor, torch.Tensor]  # pictures (n, S, S, 3) uint8 and erased boxes (n, 4)


class FeatureSource(Protocol):
    """Where frozen features come from: a store, or the tower itself."""

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Return pooled (n, C) and, where there are maps, map (n, C, H, W) of one view of some rows."""


@runtime_checkable
class FetchingSource(FeatureSource, Protocol):
    """Features of which some may lie on a disk, which reads those of a batch while others are trained on."""

    def fetch(self, rows: np.ndarray, view: int) -> None:
        """Begin to read one view of some rows that are read next, and wait for nothing."""


@runtime_checkable
class SharedSource(FeatureSource, Protocol):
    """Features that several workers can hold together, each a part."""

    def share(self, batches: Sequence[np.ndarray]) -> FeatureSource:
        """Return what gives each worker its part of one batch after another, which all of them read together."""


class KeptPictures:
    """Pictures that remember what they decoded, as uint8, while there is `room` for it in bytes.

    So an epoch decodes no face twice, nor a training on the fly each face for both of its networks. Where there is no room
    for all, those used longest ago go first.
    """

    lock = Lock()  # one for all, since none can be sent to another process

    def __init__(self, pictures: Pictures, room: int) -> None:
        self.pictures, self.room = pictures, room
        self.kept: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()

    @property
    def sample_ids(self) -> list[str]:
        """The sample_id of every row."""
        return self.pictures.sample_ids

    @property
    def labels(self) -> np.ndarray:
        """The label of every row, (N,) int64."""
        return self.pictures.labels

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""
        return self.pictures.path(row)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8, not to be written to."""
        return self.decode_face(row, b"", channels, max_pixels)

    @property
    def remote(self) -> bool:
        """Whether any of them lies in an object store."""
        return self.pictures.remote

    def fetch(self, row: int) -> bytes:
        """Return the bytes of a face's picture, none where it is kept."""
        return b"" if (row, "rgb") in self.kept or (row, "bgr") in self.kept else self.pictures.fetch(row)

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
        """Return the pixels of a face (H, W, 3) uint8 as `read_face` does; without bytes they are fetched if need be."""
        face = self.kept.get((row, channels))
        if face is None:
            data = data or self.pictures.fetch(row)
            face = np.ascontiguousarray(self.pictures.decode_face(row, data, channels, max_pixels))
        with self.lock:
            if (row, channels) not in self.kept:  # another thread may have decoded it too
                self.kept[row, channels] = face
                self.room -= face.nbytes
            self.kept.move_to_end((row, channels))
            while self.room < 0 and self.kept:
                self.room += self.kept.popitem(last=False)[1].nbytes
        return face


@dataclass(frozen=True)
class FaceDataset:
    """The faces of a manifest as a method needs them."""

    manifest: Pictures
    plan: ViewPlan
    needs: frozenset[str]
    image_size: int
    features: FeatureSource | None = None
    channels: str = "rgb"  # bgr only for targets of the protocol `paper`
    targets: np.ndarray | None = None  # (N, K) float32, what to learn of each row where that is not its label alone
    silent_seconds: float = 300.0  # after which processes that made no batch count as stopped
    domains: np.ndarray | None = None  # (N,) the source of each row, for a method that needs it
    shared: bool = False  # whether several workers read each batch of features together

    def share(self, batches: Sequence[np.ndarray]) -> FaceDataset:
        """Return the faces whose features all workers hold together, where there are several and a store has them.

        `batches` are the whole ones whose parts are loaded, in this order, by all workers at the same time.
        """
        if world_size() == 1 or not isinstance(self.features, SharedSource):
            return self
        return replace(self, features=self.features.share(batches), shared=True)

    def load(
        self,
        batches: Sequence[np.ndarray],
        view: int,
        device: torch.device,
        workers: int = 0,
        frozen_view: int | None = None,
    ) -> Iterator[Batch]:
        """Yield batches of rows in one view, in order, on a device: row and label (n,), and what the method needs.

        `target` is (n, K) where there are targets, `domain` (n,) where there are domains.

        `image` is (n, 3, S, S), normalised on the device, `placement` (n, 2, 3) says which part of the clean picture it
        shows, `features` is (n, C), `map` (n, C, H, W), both of `frozen_view` where that is another. `workers` processes
        decode ahead; without any a GPU makes the views itself. A batch may be empty, but not the first. Raises
        `IncompleteError` when one of the processes was killed or all seem to be stopped.
        """
        pictures: Iterable[Pixels | None] = repeat(None)
        if "image" in self.needs:
            made_there = device.type == "cuda" and workers == 0
            pictures = self._make(batches, view, device) if made_there else self._decode(batches, view, device, workers)
        fetching = self.features if isinstance(self.features, FetchingSource) else None
        frozen = view if frozen_view is None else frozen_view
        for number, (rows, picture) in enumerate(zip(batches, pictures, strict=False)):
            batch = {"row": torch.from_numpy(rows), "label": torch.from_numpy(self.manifest.labels[rows])}
            if self.targets is not None:
                batch["target"] = torch.from_numpy(self.targets[rows])
            if self.domains is not None and "domain" in self.needs:
                batch["domain"] = torch.from_numpy(self.domains[rows])
            if self.features is not None:
                if len(rows) or self.shared:
                    arrays = self.features.read(rows, frozen)
                if fetching and number + 1 < len(batches):
                    fetching.fetch(batches[number + 1], frozen)
                batch |= {
                    need: torch.from_numpy(arrays[ARRAYS[need]][: len(rows)]) for need in self.needs & ARRAYS.keys()
                }
            if picture is not None and "placement" in self.needs:
                batch["placement"] = torch.tensor([self._place(row, view) for row in rows]).reshape(-1, 2, 3)
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            batch |= {need: batch[need].float() for need in self.needs & ARRAYS.keys()}  # half the bytes travel
            if picture is not None:
                pixels, boxes = picture
                image = normalise(pixels.to(device, non_blocking=True), boxes, self.plan.mean, self.plan.std)
                batch["image"] = image.contiguous(memory_format=torch.channels_last)
                if "flipped_image" in self.needs:  # the exact mirror, erased rectangle included
                    batch["flipped_image"] = image.flip(3).contiguous(memory_format=torch.channels_last)
            yield batch

    def _decode(self, batches: Sequence[np.ndarray], view: int, device: torch.device, workers: int) -> Iterator[Pixels]:
        """Yield views that Pillow makes, in `workers` processes or in this one."""
        loader = DataLoader(
            _Decoding(self._renderer, view),
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            timeout=min(LOOK_SECONDS, self.silent_seconds) if workers else 0,
        )
        for rendered in _watch(loader, self.silent_seconds) if workers else loader:
            if isinstance(rendered, Exception):
                raise rendered
            pictures, boxes, unreadable = rendered
            self._check(unreadable)
            yield pictures, boxes

    def _make(self, batches: Sequence[np.ndarray], view: int, device: torch.device) -> Iterator[Pixels]:
        """Yield views that are made on a device; threads decode and draw those of the next batches."""
        shorten_switch_interval()
        renderer = replace(self._renderer, for_device=True)
        with ThreadPoolExecutor(THREADS) as pool:
            waiting = deque(batches)
            under_way = deque[Future[Rendered | ViewParameters]]()
            while waiting or under_way:
                while waiting and len(under_way) < 2 * THREADS:
                    samples = [(row, view) for row in waiting.popleft().tolist()]
                    under_way.append(pool.submit(renderer, samples, {}))
                views = under_way.popleft().result()
                self._check(views.unreadable)
                if isinstance(views, ViewParameters):
                    pictures = make_views(views, self.image_size, self.plan, str(device))
                else:
                    pictures = torch.from_numpy(views.pictures)
                yield pictures, torch.from_numpy(views.boxes)

    @property
    def _renderer(self) -> Renderer:
        return Renderer(self.manifest, self.plan, self.image_size, self.channels)

    def _check(self, unreadable: dict[int, str]) -> None:
        for row, reason in unreadable.items():
            raise UserError(
                f"{self.manifest.path(row)} is unreadable ({reason}): fix it, or extract features once so that it is "
                "known and left out."
            )

    def _place(self, row: int, view: int) -> list[list[float]]:
        return self.plan.draw(self.manifest.sample_ids[row], view).placement()


@dataclass(frozen=True)
class _Decoding(Dataset[Any]):
    """What decoding processes work on: pictures, erased boxes and unreadable rows of a batch in one view."""

    renderer: Renderer
    view: int

    def __getitems__(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]] | Exception:
        try:
            rendered = self.renderer.render([(row, self.view) for row in rows], {})
        except (UserError, StorageError) as error:  # raised in a decoding process, it would arrive as a traceback
            return error
        return torch.from_numpy(rendered.pictures), torch.from_numpy(rendered.boxes), rendered.unreadable


def _as_is(batch: Any) -> Any:
    return batch


def _watch(loader: DataLoader[Any], seconds: float) -> Iterator[Any]:
    """Yield what processes make; end them all where one has ended, or nothing came for that many seconds."""
    with ThreadPoolExecutor(1) as pool:  # started by the main thread, torch would raise the end of one anywhere there
        batches, waited = pool.submit(iter, loader).result(), 0.0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):  # else it is torch's own, which has no class for it
                raise
            waited += loader.timeout
            if "timed out" in str(error) and waited < seconds:
                continue
            for process in batches._workers:  # type: ignore[attr-defined]  # one that is stopped hears nothing else
                process.kill()
            raise IncompleteError(
                f"A process that decodes pictures was killed, or stopped for {seconds:.0f} seconds: give the same command "
                "again, with fewer --loader-workers where memory is short."
            ) from None
        waited = 0.0
        yield batch


def epoch_order(
    rows: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    seed: int,
    epoch: int,
    smallest: int = 1,
    domains: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return the batches of rows of a training epoch, the same for any number of workers.

    The prior `balanced` draws as many rows with replacement, each class equally often on average. A last batch of fewer
    rows than `smallest` is left out. With `domains` (N,), which number the source of every row of the manifest, the sources
    take turns: face i of the epoch is of source i mod D, so that each source has equally many faces in the epoch (±1) and in
    every batch (exactly, where D divides the batch size). A source gives its faces in one random order after another: of a
    small one each is met several times, of a large one some are not.
    """
    if len(rows) < SMALLEST_BATCH:
        raise UserError(f"{len(rows)} training faces are too few: at least {SMALLEST_BATCH} are needed.")
    generator = random_generator(seed, "order", epoch)
    if domains is None:
        order = _draw(rows, labels, recipe.prior, generator)
    else:
        sources = [rows[domains[rows] == number] for number in np.unique(domains[rows])]
        order = np.empty_like(rows)
        for number, source in enumerate(sources):
            place = np.arange(number, len(rows), len(sources))
            rounds = [_draw(source, labels, recipe.prior, generator) for _ in range(-(-len(place) // len(source)))]
            order[place] = np.concatenate(rounds)[: len(place)]
    batches = np.split(order, range(recipe.batch_size, len(order), recipe.batch_size))
    return batches[:-1] if len(batches[-1]) < smallest else batches


def _draw(rows: np.ndarray, labels: np.ndarray, prior: str, generator: np.random.Generator) -> np.ndarray:
    """Return rows in random order: each once or, with the prior `balanced`, as many drawn with replacement."""
    if prior != "balanced":
        return generator.permutation(rows)
    weights = 1 / np.bincount(labels[rows])[labels[rows]]
    return generator.choice(rows, size=len(rows), p=weights / weights.sum())


def smallest_batch(sources: int) -> int:
    """Return how many faces a batch holds at least where a method compares sources within it: two of each."""
    return 2 * sources


def own_part(batch: np.ndarray) -> np.ndarray:
    """Return this worker's consecutive part of a batch."""
    sizes = part_sizes(len(batch))
    start = sum(sizes[: rank()])
    return batch[start : start + sizes[rank()]]
