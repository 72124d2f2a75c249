"""Work on threads, for what waits for a disk or the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cafe.spool import cut

READERS = 16  # threads that wait for the disk or the network
AT_ONCE = 16  # items a thread takes at a time: scheduling 300,000 single files would cost more than reading them
AHEAD = 2048  # results computed ahead, so that memory does not grow with the data set

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE, ahead: int = AHEAD
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed on threads, each of which takes some items at once, and no further ahead."""

    def map_some(some: Sequence[Item]) -> list[Result]:
        return [function(item) for item in some]

    waiting = deque[Future[list[Result]]]()
    with ThreadPoolExecutor(READERS) as pool:
        for some in cut(items, at_once):
            waiting.append(pool.submit(map_some, some))
            if len(waiting) * at_once >= ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
