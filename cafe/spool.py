"""Spools: long lists that lie on disk, for what is gone through several times and may be longer than memory is large.

A few thousand items are in memory at a time. The file has no name, so that a kill leaves nothing; it lies where the system
keeps temporary files (`TMPDIR`).
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import merge
from itertools import islice
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any, TypeVar, overload

import numpy as np

from cafe.errors import StorageError

AT_ONCE = 1024  # items that are written and read together; of a shorter list nothing is
SORTED_AT_ONCE = 2**14  # items that are sorted in memory
MERGED_AT_ONCE = 32  # sorted lists that are merged

Item = TypeVar("Item")


def cut(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield some items in lists of one size, the last of which may be smaller."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


@contextmanager
def writing() -> Iterator[None]:
    """Raise `StorageError`, in one sentence, where the folder of temporary files cannot be written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{gettempdir()} cannot be written ({error.strerror}): make room there, or name another folder in TMPDIR."
        ) from None


class Spool(Sequence[Item]):
    """Items in the order in which they were added, on disk but for the last ones; those it returns are copies.

    Several may share a `file`.
    """

    def __init__(self, items: Iterable[Item] = (), file: IO[bytes] | None = None) -> None:
        self.file = file
        self._places: list[tuple[int, int]] = []  # offset and bytes of each `AT_ONCE` items
        self._last: list[Item] = []
        self._looked_up: tuple[int, list[Item]] = (-1, [])  # the items around one that was asked for by its number
        for self._last in cut(items, AT_ONCE):
            self._write()

    def append(self, item: Item) -> None:
        """Add an item."""
        self._last.append(item)
        self._write()

    def _write(self) -> None:
        if len(self._last) < AT_ONCE:
            return
        content = pickle.dumps(self._last, pickle.HIGHEST_PROTOCOL)
        with writing():
            self.file = self.file or TemporaryFile(prefix="cafe-")  # noqa: SIM115  # it lives as long as this list
            self._places.append((self.file.seek(0, os.SEEK_END), len(content)))
            self.file.write(content)
            self.file.flush()
        self._last = []

    def _read(self, number: int) -> list[Item]:
        assert self.file is not None
        offset, size = self._places[number]
        content = os.pread(self.file.fileno(), size, offset)
        collects = gc.isenabled()
        gc.disable()  # else it looks several times for circles among the items, which takes as long as to make them
        try:
            items: list[Item] = pickle.loads(content)  # noqa: S301  # of our own file
        finally:
            if collects:
                gc.enable()
        return items

    def __len__(self) -> int:
        return len(self._places) * AT_ONCE + len(self._last)

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self._places)):
            yield from self._read(number)
        yield from self._last

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number, position = divmod(range(len(self))[place], AT_ONCE)
        if number == len(self._places):
            return self._last[position]
        if number != self._looked_up[0]:
            self._looked_up = number, self._read(number)
        return self._looked_up[1][position]


def sort(items: Iterable[Item], key: Callable[[Item], Any]) -> Spool[Item]:
    """Return items in the order of a key, equal ones as they came: sorted some at a time, then merged."""
    runs = list[Spool[Item]]()
    for some in cut(items, SORTED_AT_ONCE):
        runs.append(Spool(sorted(some, key=key), runs[0].file if runs else None))
    while len(runs) > MERGED_AT_ONCE:
        runs = [Spool(merge(*some, key=key), runs[0].file) for some in cut(runs, MERGED_AT_ONCE)]
    return Spool(merge(*runs, key=key)) if len(runs) > 1 else runs[0] if runs else Spool()


class ArraySpool:
    """Arrays of one shape and number format in the order in which they were added, on disk; those it returns are copies.

    It is asked for a slice or for an array of numbers (n,), as a NumPy array is, and returns (n, *shape).
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        with writing():
            self._file = TemporaryFile(prefix="cafe-", buffering=2**18)  # noqa: SIM115  # it lives as long as this list
        self._count = 0

    def extend(self, values: np.ndarray) -> None:
        """Add arrays, (n, *shape)."""
        if values.shape[1:] != self.shape:
            raise ValueError(f"Arrays of {values.shape[1:]} among those of {self.shape}.")
        with writing():
            self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self._count += len(values)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        with writing():
            self._file.flush()
        if isinstance(places, slice):
            chosen = range(len(self))[places]
            if chosen.step != 1:
                raise ValueError("Arrays of a slice lie side by side: ask for others by their numbers.")
            return self._read(chosen.start, len(chosen))
        found = np.empty((len(places), *self.shape), self.dtype)
        for number, place in enumerate(places):
            found[number] = self._read(int(place), 1)[0]
        return found

    def _read(self, start: int, count: int) -> np.ndarray:
        found = np.empty((count, *self.shape), self.dtype)
        if found.size:
            size = self.dtype.itemsize * int(np.prod(self.shape))
            there = os.preadv(self._file.fileno(), [found.reshape(-1).view(np.uint8).data], start * size)
            if there < found.nbytes:
                raise IndexError(
                    f"Arrays {start} to {start + count - 1} cannot be read as a whole: there are {len(self)}."
                )
        return found
