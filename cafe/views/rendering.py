"""The pixels of views: faces decoded once each, their views drawn and, where no device is to do it, made.

NumPy and Pillow alone, so that a process that only decodes starts fast.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from cafe.data.images import MAX_PIXELS, MissingImageError, UnreadableImageError, is_gone
from cafe.data.manifest import Pictures
from cafe.errors import StorageError
from cafe.views.drawing import View, ViewPlan
from cafe.views.fetching import FetchedFaces

Sample = tuple[int, int]  # manifest row, view

LARGEST_DRAWN = 512 * 512  # pixels of a face that is sent to a device; what is larger is made small first
NO_NOISE = -1


class Rendered(NamedTuple):
    """Views as a tower takes them: pictures (n, S, S, 3) uint8, erased boxes (n, 4), and why rows are unreadable."""

    pictures: np.ndarray
    boxes: np.ndarray
    unreadable: dict[int, str]


class ViewParameters(NamedTuple):
    """Views that are drawn and not yet made, which `cafe.views.device` does.

    `faces` are (H, W, 3) uint8, and `face` (n,) says which of them a view shows, -1 for an unreadable one. Its noise are the
    numbers of Philox under `keys` (n, 2) uint64 from word `starts` (n,) on, of 64 bits each; `NO_NOISE` without any.
    `flips` (n,) bool; boxes (n, 4) and `unreadable` are those of `Rendered`.
    """

    faces: list[np.ndarray]
    face: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    flips: np.ndarray
    boxes: np.ndarray
    unreadable: dict[int, str]


@dataclass(frozen=True)
class Renderer:
    """Makes the views of `plan` at `side` × `side` pixels from pictures of at most `max_pixels`.

    `for_device`: they are only drawn, where a device can make them.
    """

    pictures: Pictures
    plan: ViewPlan
    side: int
    channels: str = "rgb"
    max_pixels: int = MAX_PIXELS
    for_device: bool = False

    def __call__(self, samples: Sequence[Sample], refused: Mapping[int, str]) -> Rendered | ViewParameters:
        """Render or draw samples; the rows `refused` are not decoded, for the reason given."""
        if self.for_device and not self.plan.turns:
            return self.draw(samples, refused)
        return self.render(samples, refused)

    def render(self, samples: Sequence[Sample], refused: Mapping[int, str]) -> Rendered:
        """Decode samples and make their views; an unreadable image is black there."""
        if self.pictures.remote:
            with FetchedFaces(self.pictures, self._wanted(samples, refused)) as fetched:
                return replace(self, pictures=fetched).render(samples, refused)
        pictures = np.zeros((len(samples), self.side, self.side, 3), np.uint8)
        boxes, unreadable = np.zeros((len(samples), 4), np.int64), dict[int, str]()
        for row, group in groupby(enumerate(samples), key=lambda sample: sample[1][0]):
            if (face := self._decode(row, refused, unreadable)) is not None:
                for position, (_, view) in group:
                    pictures[position], boxes[position] = self.plan.render(
                        face, self.pictures.sample_ids[row], view, self.side
                    )
        return Rendered(pictures, boxes, unreadable)

    def draw(self, samples: Sequence[Sample], refused: Mapping[int, str]) -> ViewParameters | Rendered:
        """Decode samples and draw their views for a device to make; they are made here where a face is large."""
        if self.pictures.remote:
            with FetchedFaces(self.pictures, self._wanted(samples, refused)) as fetched:
                return replace(self, pictures=fetched).draw(samples, refused)
        faces, unreadable, count = list[np.ndarray](), dict[int, str](), len(samples)
        face, flips = np.full(count, -1), np.zeros(count, bool)
        keys, starts = np.zeros((count, 2), np.uint64), np.full(count, NO_NOISE)
        boxes = np.zeros((count, 4), np.int64)
        for row, group in groupby(enumerate(samples), key=lambda sample: sample[1][0]):
            pixels = self._decode(row, refused, unreadable)
            if pixels is None:
                continue
            if pixels.shape[0] * pixels.shape[1] > LARGEST_DRAWN:
                return self.render(samples, refused)
            for position, (_, view) in group:
                drawn = self.plan.draw(self.pictures.sample_ids[row], view)
                face[position], flips[position], boxes[position] = len(faces), drawn.flip, drawn.box(self.side)
                keys[position], starts[position] = find_noise(drawn)
            faces.append(pixels)
        return ViewParameters(faces, face, keys, starts, flips, boxes, unreadable)

    def _wanted(self, samples: Sequence[Sample], refused: Mapping[int, str]) -> list[int]:
        return [row for row in rows_of(samples) if row not in refused]

    def _decode(self, row: int, refused: Mapping[int, str], unreadable: dict[int, str]) -> np.ndarray | None:
        """Return the pixels of a face, or say why there are none."""
        if row in refused:
            unreadable[row] = refused[row]
            return None
        try:
            return self.pictures.read_face(row, self.channels, self.max_pixels)
        except UnreadableImageError as error:
            self._check_gone(row, error)
            unreadable[row] = str(error)
            return None

    def _check_gone(self, row: int, error: UnreadableImageError) -> None:
        """Raise `StorageError` for a picture that is missing where its folder does not show that it is gone."""
        path = self.pictures.path(row)
        if isinstance(error, MissingImageError) and not is_gone(path):
            raise StorageError(
                f"{path} is missing with its whole folder on node {socket.gethostname()}: mount its root there, or index "
                "the set again if its faces are gone."
            )


def find_noise(view: View) -> tuple[np.ndarray, int]:
    """Return the key (2,) uint64 of a view's noise and its first word in the stream of that key, or `NO_NOISE`."""
    if view.noise is None:
        return np.zeros(2, np.uint64), NO_NOISE
    state = view.noise.bit_generator.state  # of Philox: words come in blocks of four, the first of which has counter 1
    return state["state"]["key"], 4 * (int(state["state"]["counter"][0]) - 1) + state["buffer_pos"]


def rows_of(samples: Iterable[Sample]) -> list[int]:
    """Return the rows of samples, each once, in order."""
    return list(dict.fromkeys(row for row, _ in samples))
