"""Processes that decode pictures ahead of a tower.

A picture that kills whatever decodes it, by a crash of the decoder or for want of memory, costs one of them and not the
tower, and is told from all others.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

from cafe.errors import StorageError, UserError
from cafe.views.rendering import Sample, rows_of

MANY_VIEWS = 4  # of a face, from which on a GPU makes them: before, decoding it costs more
KILLER = "kills its decoder"
TRIES = 2  # of a picture; a process can also be killed by chance
DEATHS = 3  # of processes that no picture is to blame for, after which a shard is left for another time
FIRST_TO_GO = "500"  # where memory runs out: of the processes of an extraction these are the easiest to replace

Result = TypeVar("Result")
Work = Callable[[Sequence[Sample], Mapping[int, str]], Result]
Batches = Sequence[Sequence[Sample]]


class Decoders:
    """So many processes at work on batches of samples; without any, whoever asks does the work."""

    def __init__(self, processes: int) -> None:
        self.processes, self.lock = processes, Lock()
        self.pool: ProcessPoolExecutor | None = None

    def work(self, function: Work[Result], batches: Batches) -> Iterator[Result]:
        """Begin with the first batches at once; yield `function(batch, refused)` of all, in order.

        `refused` are the rows not to decode, with the reason: those that killed a process twice. Raises `OSError` where
        processes die and no picture is to blame.
        """
        if not self.processes:
            return (function(batch, {}) for batch in batches)
        self.renew(None)
        queue = _Queue(self, function, batches)
        queue.fill()
        return iter(queue)

    def start(self) -> None:
        """Begin to start the processes, for which `work` then waits and says what goes wrong."""

        def start() -> None:
            with suppress(OSError):
                self.renew(None)

        if self.processes:
            Thread(target=start, daemon=True).start()

    def renew(self, broken: ProcessPoolExecutor | None) -> None:
        """Start processes, at first or again, unless another shard that met the same death has."""
        with self.lock:
            if self.pool is broken:
                if broken:
                    broken.shutdown(wait=False)
                self.pool = _start(self.processes)

    def close(self) -> None:
        """Let all processes end after the batch they work on."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


class _Queue:
    """The batches of one shard, some of which are under way."""

    def __init__(self, decoders: Decoders, function: Work[Any], batches: Batches) -> None:
        self.decoders, self.function, self.waiting = decoders, function, deque(batches)
        self.under_way: deque[tuple[Sequence[Sample], ProcessPoolExecutor, Future[Any]]] = deque()
        self.refused: dict[int, str] = {}
        self.deaths = 0

    def fill(self) -> None:
        """Hand out batches, two for each process."""
        while self.waiting and len(self.under_way) < 2 * self.decoders.processes:
            self._submit(self.waiting.popleft())

    def __iter__(self) -> Iterator[Any]:
        while self.under_way:
            _, pool, future = self.under_way[0]
            try:
                result = future.result()
            except BrokenProcessPool:
                self._recover(pool)
                continue
            self.under_way.popleft()
            self.fill()
            yield result

    def _submit(self, batch: Sequence[Sample]) -> None:
        pool = self.decoders.pool
        assert pool is not None
        try:
            future = pool.submit(self.function, batch, dict(self.refused))
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        self.under_way.append((batch, pool, future))

    def _recover(self, broken: ProcessPoolExecutor) -> None:
        """Find out which of the pictures under way kill, and begin again with all others."""
        lost = [batch for batch, _, _ in self.under_way]
        killers = find_killers(self.function, lost)
        self.refused |= dict.fromkeys(killers, KILLER)
        self.deaths += not killers
        if self.deaths == DEATHS:
            raise OSError(f"{DEATHS} processes that decode died, and no picture is to blame: memory may be short")
        self.decoders.renew(broken)
        self.under_way.clear()
        for batch in lost:
            self._submit(batch)


def find_killers(function: Work[Any], batches: Batches) -> set[int]:
    """Return the rows whose samples kill their process each time; raise `OSError` where none can be started."""
    killers, pool = set[int](), _start(1)
    samples = [sample for batch in batches for sample in batch]
    for row in rows_of(samples):
        for _ in range(TRIES):
            try:
                pool.submit(_attempt, function, [sample for sample in samples if sample[0] == row]).result()
                break
            except BrokenProcessPool:
                pool.shutdown()
                pool = _start(1)
        else:
            killers.add(row)
    pool.shutdown()
    return killers


def _attempt(function: Work[Any], samples: Sequence[Sample]) -> None:
    with suppress(StorageError, UserError):  # whoever embeds it meets the same and says why
        function(samples, {})


def _start(processes: int) -> ProcessPoolExecutor:
    """Return processes that work; raise `OSError` where none can be started, which is no picture's fault."""
    # A fork of a process with threads can hang.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_prepare)
    try:
        pool.submit(int).result()
    except BrokenProcessPool:
        raise OSError("no process can be started to decode pictures in") from None
    return pool


def _prepare() -> None:
    """Leave interrupts to the command, end with it whatever happens to it, and go first where memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
