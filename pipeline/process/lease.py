"""A lease: one driver at a time works on a run, a feature store or a benchmark, wherever the others run.

The file `.lease.json` in the folder, which listings leave out, says who holds it and is renewed as long as that driver
lives. One that was not renewed for `STALE_SECONDS`, or whose process has ended on this machine, is taken over.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from threading import Event, Thread

import psutil
from upath import UPath

from cafe.errors import UserError
from cafe.files import create_file, encode_json, read_json, remove_file, write_json
from cafe.records import check_record

STALE_SECONDS = 120.0  # far more than clocks of a cluster differ
RENEW_SECONDS = 20.0
WAIT_SECONDS = 2.0  # between two looks at a lease that another holds
SETTLE_SECONDS = 0.5  # after which the last of several that take over a stale lease at once has it


@dataclass(frozen=True)
class Lease:
    """Who works on a folder: a process by its number and start, so that its end can be seen on the same machine."""

    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    started: float = field(default_factory=lambda: psutil.Process().create_time())
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    renewed: float = field(default_factory=time.time)

    @property
    def alive(self) -> bool:
        """Whether whoever holds it may still be at work."""
        if self.host != socket.gethostname():
            return time.time() - self.renewed < STALE_SECONDS
        try:
            return bool(abs(psutil.Process(self.process).create_time() - self.started) < 1)
        except psutil.NoSuchProcess:
            return False


def find_holder(folder: UPath) -> str:
    """Return who works on a folder, empty when nobody does."""
    lease = _read(folder / ".lease.json")
    return f"process {lease.process} on {lease.host}" if lease and lease.alive else ""


@contextmanager
def hold(folder: UPath, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the lease of a folder; yields what raises `UserError` once another has taken it over, to be called now and then.

    Raises `UserError` naming the holder when there is one, or waits until it is done.
    """
    path, mine = folder / ".lease.json", Lease()
    while holder := _take(path, mine):
        if not wait:
            raise UserError(
                f"Process {holder.process} on {holder.host} works on {folder}: wait until it is done (--wait does), or end "
                f"it; if that machine is gone, its lease ends after {STALE_SECONDS:.0f} seconds."
            )
        time.sleep(WAIT_SECONDS)
    ended, lost = Event(), Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # one that cannot be renewed for long enough is lost
                if _holder(path) not in (None, mine.owner):
                    lost.set()
                    return
                write_json(path, asdict(replace(mine, renewed=time.time())))

    def check() -> None:
        if lost.is_set():
            raise UserError(f"Another process has taken over {folder}, since this one was silent for too long: end it.")

    thread = Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        if _holder(path) == mine.owner:
            remove_file(path)


def _take(path: UPath, mine: Lease) -> Lease | None:
    """Write a lease unless another lives, which is returned; only one of several at a time succeeds."""
    try:
        create_file(path, encode_json(asdict(mine)))
        return None
    except FileExistsError:
        pass
    there = _read(path)
    if there is not None and there.owner == mine.owner:  # made by a request whose answer was lost
        return None
    if there is None:  # just removed, or about to be written
        time.sleep(SETTLE_SECONDS)
        there = _read(path)
    if there is not None and there.alive:
        return there
    write_json(path, asdict(mine))
    time.sleep(SETTLE_SECONDS)
    there = _read(path)
    return None if there is None or there.owner == mine.owner else there


def _read(path: UPath) -> Lease | None:
    record = read_json(path)
    return check_record(record, Lease, str(path)) if record else None


def _holder(path: UPath) -> str | None:
    lease = _read(path)
    return lease.owner if lease else None
