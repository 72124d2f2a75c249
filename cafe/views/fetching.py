"""Pictures of an object store, fetched side by side: one by one, each would be waited for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
from upath import UPath

from cafe.data.images import MAX_PIXELS
from cafe.data.manifest import Pictures

AT_ONCE = 32  # requests under way


class FetchedFaces:
    """Some rows of pictures, each fetched once; a `Pictures` of these."""

    remote = False

    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        self.pictures, self.pool = pictures, ThreadPoolExecutor(AT_ONCE)
        self.fetched = {row: self.pool.submit(pictures.fetch, row) for row in rows}

    def __enter__(self) -> FetchedFaces:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

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

    def fetch(self, row: int) -> bytes:
        """Return the bytes of a face's picture, waiting for them."""
        return self.fetched[row].result()

    def decode_face(self, row: int, data: bytes, channels: str, max_pixels: int) -> np.ndarray:
        """Return the pixels of a face from its bytes."""
        return self.pictures.decode_face(row, data, channels, max_pixels)

    def read_face(self, row: int, channels: str = "rgb", max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Return the pixels of a face as its manifest does."""
        return self.decode_face(row, self.fetch(row), channels, max_pixels)
