"""Pictures of an object store, fetched ahead of whoever decodes them: one by one, each would be waited for."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType

import numpy as np
from upath import UPath

from cafe.data.images import MAX_PIXELS, read_bytes
from cafe.data.manifest import Manifest

AT_ONCE = 32  # requests under way
AHEAD = 64  # pictures that may lie in memory


class FetchedFaces:
    """The faces of a manifest, read in the order of their rows by one thread or several; a `Pictures`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.next, self.lock = manifest, 0, Lock()
        self.pool, self.fetched = ThreadPoolExecutor(AT_ONCE), dict[int, Future[bytes]]()

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
        """Return the pixels of a face as its manifest does, and have the next ones fetched."""
        with self.lock:
            for ahead in range(self.next, min(row + AHEAD, len(self.manifest))):
                self.fetched[ahead] = self.pool.submit(read_bytes, self.path(ahead))
                self.next = ahead + 1
            fetched = self.fetched.pop(row, None)  # none where its views are parted between two batches
        data = fetched.result() if fetched else read_bytes(self.path(row))
        return self.manifest.decode_face(row, data, channels, max_pixels)
