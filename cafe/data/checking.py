"""The pictures of a data set: sizes, brightness, colour, unreadable and repeated ones, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pandas as pd

from cafe.data.images import MAX_PIXELS, UnreadableImageError
from cafe.data.manifest import Manifest
from cafe.data.rows import SPLITS

GREY_SPREAD = 10  # how far compression alone drives the channels of a grey picture apart, of 255
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SIDES = (0, 32, 48, 64, 96, 128, 224, 384, 640)  # edges of the size histogram in pixels
BRIGHTNESS = tuple(range(0, 256, 32))


class Look(NamedTuple):
    """What a picture is like: its size, mean luma (0–255), whether it is grey, and a digest of its pixels."""

    width: int
    height: int
    brightness: float
    grey: bool
    pixels: str


def look_at(pixels: np.ndarray) -> Look:
    """Describe a picture (H, W, 3); it counts as grey when 95 % of its pixels have nearly equal channels."""
    height, width = pixels.shape[:2]
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    digest = blake2b(pixels.tobytes(), digest_size=16, key=f"{width}×{height}".encode()).hexdigest()
    brightness = float(pixels.reshape(-1, 3).mean(axis=0) @ LUMA)
    return Look(width, height, brightness, bool(np.quantile(spread, 0.95) <= GREY_SPREAD), digest)


@dataclass(frozen=True)
class Check:
    """The state of a data set's pictures.

    `faces` has a row per face in manifest order: sample_id, expression, split, and the fields of `Look`, empty where the
    picture cannot be read. `broken` lists those as (sample_id, reason).
    """

    manifest: Manifest
    faces: pd.DataFrame
    broken: list[tuple[str, str]]

    @property
    def seen(self) -> pd.DataFrame:
        """The faces that can be read."""
        return self.faces.dropna(subset="pixels")

    @property
    def duplicates(self) -> list[pd.DataFrame]:
        """Groups of faces with the same pixels, in manifest order."""
        return [group for _, group in self.seen.groupby("pixels", sort=False) if len(group) > 1]

    @property
    def histograms(self) -> dict[str, list[tuple[str, int]]]:
        """How many pictures have their shorter side in pixels, and their mean luma, in each named range."""
        return {
            "shorter side": _count(self.seen[["width", "height"]].min(axis=1), SIDES, ""),
            "brightness": _count(self.seen["brightness"], BRIGHTNESS, "255"),
        }

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return a header and a line per expression and for all: faces per split, grey share, brightness, size, broken."""
        splits = [split for split in SPLITS if split in set(self.faces["split"])]
        lines = []
        for name in (*self.manifest.classes, "all"):
            own = self.faces if name == "all" else self.faces[self.faces["expression"] == name]
            seen = own.dropna(subset="pixels")
            counts = [*((own["split"] == split).sum() for split in splits), len(own)]
            lines.append([name, *(f"{count:,}" for count in counts), *_describe(seen), f"{len(own) - len(seen):,}"])
        return ["expression", *splits, "faces", "grey", "brightness", "median size", "unreadable"], lines


def check_pictures(manifest: Manifest, progress: Callable[[int, int], None], max_pixels: int = MAX_PIXELS) -> Check:
    """Decode every picture of a manifest of at most `max_pixels`; `progress(done, total)` counts them."""
    faces = pd.DataFrame({
        "sample_id": manifest.sample_ids,
        "expression": manifest.name_classes(manifest.rows("all")),
        "split": manifest.table["split"].to_pylist(),
    })  # fmt: skip
    looks, broken = {}, []
    for row, look in manifest.survey(manifest.rows("all"), look_at, progress, max_pixels):
        if isinstance(look, UnreadableImageError):
            broken.append((manifest.sample_ids[row], str(look)))
        else:
            looks[row] = look
    return Check(manifest, faces.join(pd.DataFrame.from_dict(looks, orient="index", columns=Look._fields)), broken)


def _describe(seen: pd.DataFrame) -> tuple[str, str, str]:
    if seen.empty:
        return "–", "–", "–"
    middle = seen[["brightness", "width", "height"]].median()
    size = f"{middle['width']:.0f}×{middle['height']:.0f}"
    return f"{100 * seen['grey'].astype(bool).mean():.0f} %", f"{middle['brightness']:.0f}", size


def _count(values: pd.Series[float], edges: tuple[int, ...], end: str) -> list[tuple[str, int]]:
    """Return how many values lie in [edge, next edge), the last without an end, each with its name."""
    counts, _ = np.histogram(values.to_numpy(float), [*edges, np.inf])
    ends = [*(str(edge - 1) for edge in edges[1:]), end]
    names = [f"{low}–{high}" if high else f"{low} or more" for low, high in zip(edges, ends, strict=True)]
    return list(zip(names, counts.tolist(), strict=True))
