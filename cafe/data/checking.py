"""The pictures of a data set: sizes, brightness, colour, unreadable and repeated ones, as numbers.

What is found of each face lies on disk, so that memory does not grow with their number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from cafe.data.images import MAX_PIXELS, UnreadableImageError
from cafe.data.manifest import Manifest
from cafe.data.rows import SPLITS, read_values
from cafe.spool import Spool, sort

GREY_SPREAD = 10  # how far compression alone drives the channels of a grey picture apart, of 255
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SIDES = (0, 32, 48, 64, 96, 128, 224, 384, 640)  # edges of the size histogram in pixels
BRIGHTNESS = tuple(range(0, 256, 32))
ALL = "all"  # stands for the expression where all faces are meant


class Look(NamedTuple):
    """What a picture is like: its size, mean luma (0–255), whether it is grey, and a digest of its pixels."""

    width: int
    height: int
    brightness: float
    grey: bool
    pixels: bytes


def look_at(pixels: np.ndarray) -> Look:
    """Describe a picture (H, W, 3); it counts as grey when 95 % of its pixels have nearly equal channels."""
    height, width = pixels.shape[:2]
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    digest = blake2b(pixels.tobytes(), digest_size=16, key=f"{width}×{height}".encode()).digest()
    brightness = float(pixels.reshape(-1, 3).mean(axis=0) @ LUMA)
    return Look(width, height, brightness, bool(np.quantile(spread, 0.95) <= GREY_SPREAD), digest)


class CheckedFace(NamedTuple):
    """A face whose picture can be read: its row of the manifest, and what that says of it."""

    row: int
    sample_id: str
    expression: str
    split: str
    look: Look


@dataclass(frozen=True)
class Check:
    """The state of a data set's pictures.

    `seen` are the faces that can be read, in manifest order, `broken` lists the others as (sample_id, reason); `counts` says
    how many faces there are per (split, expression), whether they can be read or not. How many can be read, and how many of
    these are grey, is counted per expression and for `ALL`.
    """

    manifest: Manifest
    seen: Spool[CheckedFace] = field(default_factory=Spool)
    broken: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    readable: Counter[str] = field(default_factory=Counter)
    grey: Counter[str] = field(default_factory=Counter)

    @cached_property
    def duplicates(self) -> Spool[list[CheckedFace]]:
        """Groups of faces with the same pixels, in manifest order."""
        alike = (list(group) for _, group in groupby(sort(self.seen, _name_pixels), _name_pixels))
        return sort((group for group in alike if len(group) > 1), lambda group: group[0].row)

    @cached_property
    def histograms(self) -> dict[str, list[tuple[str, int]]]:
        """How many pictures have their shorter side in pixels, and their mean luma, in each named range."""
        return {
            "shorter side": _count((min(face.look[:2]) for face in self.seen), SIDES, ""),
            "brightness": _count((face.look.brightness for face in self.seen), BRIGHTNESS, "255"),
        }

    @cached_property
    def summary(self) -> tuple[list[str], list[list[str]]]:
        """A header and a line per expression and for all: faces per split, grey share, brightness, size, broken."""
        splits = [split for split in SPLITS if any(count for (own, _), count in self.counts.items() if own == split)]
        measures = ("brightness", "width", "height")
        brightness, widths, heights = (self._find_medians(measure) for measure in measures)
        lines = []
        for name in (*self.manifest.classes, ALL):
            own = [name] if name != ALL else self.manifest.classes
            faces = [sum(self.counts[split, expression] for expression in own) for split in splits]
            described = ("–", "–", "–")
            if seen := self.readable[name]:
                size = f"{widths[name]:.0f}×{heights[name]:.0f}"
                described = (f"{100 * (self.grey[name] / seen):.0f} %", f"{brightness[name]:.0f}", size)
            counts = (f"{count:,}" for count in (*faces, sum(faces)))
            lines.append([name, *counts, *described, f"{sum(faces) - seen:,}"])
        return ["expression", *splits, "faces", "grey", "brightness", "median size", "unreadable"], lines

    def _find_medians(self, measure: str) -> dict[str, float]:
        """Return the median of a field of `Look` over the faces of each expression, and over all."""
        ordered = sort(((getattr(face.look, measure), face.expression) for face in self.seen), itemgetter(0))
        middle, place = defaultdict[str, list[float]](list), Counter[str]()
        for value, expression in ordered:
            for name in (expression, ALL):
                if place[name] in ((self.readable[name] - 1) // 2, self.readable[name] // 2):
                    middle[name].append(value)
                place[name] += 1
        return {name: sum(values) / len(values) for name, values in middle.items()}


def check_pictures(manifest: Manifest, progress: Callable[[int, int], None], max_pixels: int = MAX_PIXELS) -> Check:
    """Decode every picture of a manifest of at most `max_pixels`; `progress(done, total)` counts them."""
    check, said = Check(manifest), read_values(manifest.table, "sample_id", "label", "split")
    looks = manifest.survey(range(len(manifest)), look_at, progress, max_pixels)
    for (sample, label, split), (row, look) in zip(said, looks, strict=True):
        expression = manifest.classes[label]
        check.counts[split, expression] += 1
        if isinstance(look, UnreadableImageError):
            check.broken.append((sample, str(look)))
            continue
        check.seen.append(CheckedFace(row, sample, expression, split, look))
        for name in (expression, ALL):
            check.readable[name] += 1
            check.grey[name] += look.grey
    return check


def _name_pixels(face: CheckedFace) -> bytes:
    return face.look.pixels


def _count(values: Iterable[float], edges: tuple[int, ...], end: str) -> list[tuple[str, int]]:
    """Return how many values lie in [edge, next edge), the last without an end, each with its name."""
    counts = Counter(bisect_right(edges, value) - 1 for value in values)
    ends = [*(str(edge - 1) for edge in edges[1:]), end]
    names = [f"{low}–{high}" if high else f"{low} or more" for low, high in zip(edges, ends, strict=True)]
    return [(name, counts[place]) for place, name in enumerate(names)]
