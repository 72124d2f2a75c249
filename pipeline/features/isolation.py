"""Pictures that kill whatever decodes them, by a crash of the decoder or for want of memory, told from all others.

Each is decoded in a process of its own kind, whose death says which picture it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context

from upath import UPath

from cafe.data.images import MAX_PIXELS, UnreadableImageError, decode_image, read_bytes
from cafe.errors import StorageError

TRIES = 2  # a process can also be killed by chance


def find_killers(paths: Sequence[UPath], max_pixels: int = MAX_PIXELS) -> set[int]:
    """Return the positions of pictures that kill their decoder each time; raise `OSError` where nothing can be tried."""
    killers, pool = set(), _start()
    for position, path in enumerate(paths):
        for _ in range(TRIES):
            try:
                pool.submit(_decode, path, max_pixels).result()
                break
            except BrokenProcessPool:
                pool.shutdown()
                pool = _start()
        else:
            killers.add(position)
    pool.shutdown()
    return killers


def _start() -> ProcessPoolExecutor:
    """Return a process that works; raise `OSError` where none can be started, which is no picture's fault."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))  # a fork of a process with threads can hang
    try:
        pool.submit(int).result()
    except BrokenProcessPool:
        raise OSError("no process can be started to try pictures in") from None
    return pool


def _decode(path: UPath, max_pixels: int) -> None:
    with suppress(UnreadableImageError, StorageError):  # whoever embeds it meets the same and says why
        decode_image(read_bytes(path), max_pixels)
