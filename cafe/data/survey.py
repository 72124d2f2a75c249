"""One pass over the pictures of a manifest: each is decoded once, several at a time, and an unreadable one says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from cafe.data.images import UnreadableImageError
from cafe.data.indexing import READERS
from cafe.data.manifest import Manifest

AHEAD = 2048  # pictures waited for at once, so that memory does not grow with the data set
GREY_SPREAD = 10  # levels between the channels that compression alone puts into a grey picture
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

Result = TypeVar("Result")


def survey(
    manifest: Manifest,
    rows: Sequence[int] | np.ndarray,
    look: Callable[[np.ndarray], Result],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, Result | UnreadableImageError]]:
    """Yield (row, what `look` returns of its pixels) in order, with the error in place of an unreadable picture.

    `progress(done, total)` counts pictures.
    """

    def look_at(row: int) -> Result | UnreadableImageError:
        try:
            return look(manifest.read_face(row))
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), AHEAD):
            part = [int(row) for row in rows[start : start + AHEAD]]
            for done, result in enumerate(zip(part, pool.map(look_at, part), strict=True), start=start + 1):
                yield result
                progress(done, len(rows))


@dataclass(frozen=True)
class Look:
    """What a picture is like: its size, mean luma (0–255), whether it is grey, and a digest of its pixels."""

    width: int
    height: int
    brightness: float
    grey: bool
    digest: str


def look_at(pixels: np.ndarray) -> Look:
    """Describe a picture (H, W, 3); it is grey when 95 of 100 pixels have nearly equal channels."""
    height, width = pixels.shape[:2]
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    digest = blake2b(pixels.tobytes(), digest_size=16, key=f"{width}×{height}".encode()).hexdigest()
    brightness = float(pixels.reshape(-1, 3).mean(axis=0) @ LUMA)
    return Look(width, height, brightness, bool(np.quantile(spread, 0.95) <= GREY_SPREAD), digest)


@dataclass(frozen=True)
class Condition:
    """The state of a data set's pictures: `looks` by manifest row, and `broken` rows with the reason."""

    manifest: Manifest
    looks: dict[int, Look]
    broken: dict[int, str]

    @property
    def duplicates(self) -> list[list[int]]:
        """Groups of rows with the same pixels, in manifest order."""
        same: dict[str, list[int]] = {}
        for row, look in self.looks.items():
            same.setdefault(look.digest, []).append(row)
        return [group for group in same.values() if len(group) > 1]

    def histogram(self, measure: Callable[[Look], float], edges: Sequence[int]) -> list[int]:
        """Count the pictures whose measure lies in [edge, next edge); the last is open."""
        bins = Counter(int(np.searchsorted(edges, measure(look), side="right")) - 1 for look in self.looks.values())
        return [bins[number] for number in range(len(edges))]


def check_pictures(manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None) -> Condition:
    """Decode every picture of a manifest and describe it."""
    looks: dict[int, Look] = {}
    broken: dict[int, str] = {}
    for row, result in survey(manifest, manifest.rows("all"), look_at, progress):
        if isinstance(result, UnreadableImageError):
            broken[row] = str(result)
        else:
            looks[row] = result
    return Condition(manifest, looks, broken)
