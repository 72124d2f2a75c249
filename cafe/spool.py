"""A spool: a long list that lies on disk, for what is gone through several times and may be longer than memory is large.

A few thousand items are in memory at a time. The file has no name, so that a kill leaves nothing; it lies where the system
keeps temporary files (`TMPDIR`).
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any, TypeVar, overload

from cafe.errors import StorageError

AT_ONCE = 1024  # items that are written and read together; of a shorter list nothing is
SORTED_AT_ONCE = 2**14  # items that are sorted in memory,
MERGED_AT_ONCE = 32  # and so many lists of them merged

Item = TypeVar("Item")


def cut(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield some items in lists of one size, the last of which may be smaller."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


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
        try:
            self.file = self.file or TemporaryFile(prefix="cafe-")  # noqa: SIM115  # it lives as long as this list
            self._places.append((self.file.seek(0, os.SEEK_END), len(content)))
            self.file.write(content)
            self.file.flush()
        except OSError as error:
            raise StorageError(
                f"{gettempdir()} cannot be written ({error.strerror}): make room there, or name another folder in TMPDIR."
            ) from None
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
