"""Pictures of an object store, fetched side by side: one by one, each would be waited for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
from upath import UPath

from cafe.data.images import MAX_PIXELS, read_bytes
from cafe.data.manifest import Manifest

AT_ONCE = 32  # requests under way


class FetchedFaces:
    """Some rows of a manifest, each fetched once; a `Pictures` of these."""

    def __init__(self, manifest: Manifest, rows: Sequence[int]) -> None:
        self.manifest, self.pool = manifest, ThreadPoolExecutor(AT_ONCE)
        self.fetched = {row: self.pool.submit(read_bytes, manifest.path(row)) for row in rows}

    def __enter__(self) -> FetchedFaces:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    @property
    def sample_ids(self) -> list[str]:
        """The sample_id of every row."""
        return self.manifest.sample_ids

    @property
    def labels(self) -> np.ndarray:
        """The label of every row, (N,) int64."""
        return self.manifest.labels

    def path(self, row: int) -> UPath:
        """Where the image of a row lies."""
        return self.manifest.path(row)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face as its manifest does."""
        return self.manifest.decode_face(row, self.fetched[row].result(), channels, max_pixels)
