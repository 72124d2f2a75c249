"""A lease: one driver at a time works on a run, a feature store or a benchmark, wherever the others run.

The file `.lease.json` in the folder, which listings leave out, says who holds it and changes as long as that driver lives.
No two machines need to agree on the time or on the numbers of processes: whoever wants a folder watches its lease by a clock
of its own, and takes over one that did not change for `STALE_SECONDS`. Only where the holder is a process that the same
kernel counts the same way, its end is seen at once.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

from upath import UPath

from cafe.errors import UserError
from cafe.files import create_file, encode_json, read_json, remove_file, write_json
from cafe.records import check_record

STALE_SECONDS = 120.0  # more than a storage is tried again before it counts as failing
RENEW_SECONDS = 10.0
WAIT_SECONDS = 2.0  # between two looks at a lease that another holds
SETTLE_SECONDS = 0.5  # after which the last of several that take over a stale lease at once has it
LONGEST_LOOK = 3  # times `WAIT_SECONDS` that count between two looks: while the storage was away, nobody could renew
BOOT = Path("/proc/sys/kernel/random/boot_id")
PROC = Path("/proc")


def find_kernel() -> str:
    """Name the boot of this machine and the namespaces that number its processes; empty where the system does not say."""
    try:
        if str((PROC / "self").readlink()) != str(os.getpid()):  # another namespace's view
            return ""
        kinds = [PROC / "self" / "ns" / kind for kind in ("pid", "time")]  # the second since Linux 5.6
        spaces = [str(kind.readlink()) for kind in kinds if kind.is_symlink()]
        return " ".join([BOOT.read_text().strip(), *spaces])
    except OSError:
        return ""


def find_start(process: int) -> int | None:
    """Return when a process began, in ticks since the boot, None where it has ended; raise `OSError` where nobody says."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it lives, as another user
        pass
    try:
        # After the name, which may hold brackets itself: the state first, the start as the 20th.
        state, *values = (PROC / str(process) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:  # it ended meanwhile
        return None
    return None if state in "ZX" else int(values[18])


def _own_start() -> int:
    try:
        return find_start(os.getpid()) or 0
    except OSError:
        return 0


@dataclass(frozen=True)
class Lease:
    """Who works on a folder, and a number that changes as long as they do.

    Earlier versions wrote no kernel, and seconds since 1970 as the number, which change as well.
    """

    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    renewed: float = 0  # times that it was
    kernel: str = ""
    ticks: int = 0  # from the boot to the start of the process

    @property
    def alive(self) -> bool | None:
        """Whether its process runs, None where that cannot be seen from here."""
        if not self.kernel or self.kernel != find_kernel() or self.host != socket.gethostname():
            return None
        try:
            return find_start(self.process) == self.ticks
        except OSError:
            return None


class _Watch:
    """What one who waits has seen of a lease by a clock of their own."""

    def __init__(self) -> None:
        self.seen: tuple[str, float] | None = None
        self.watched, self.last = 0.0, time.monotonic()

    def look(self, lease: Lease) -> bool | None:
        """Return whether the holder of a lease lives, None as long as that is not known."""
        before, self.seen = self.seen, (lease.owner, lease.renewed)
        now = time.monotonic()
        passed, self.last = now - self.last, now
        if (alive := lease.alive) is not None:
            return alive
        if before != self.seen:
            self.watched = 0.0
            return True if before and before[0] == lease.owner else None
        self.watched += min(passed, LONGEST_LOOK * WAIT_SECONDS)
        return False if self.watched >= STALE_SECONDS else None


def find_holder(folder: UPath) -> str:
    """Return who works on a folder, as far as one look can say; empty when nobody does."""
    lease = _read(folder / ".lease.json")
    return f"process {lease.process} on {lease.host}" if lease and lease.alive is not False else ""


@contextmanager
def hold(folder: UPath, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Hold the lease of a folder; yields what raises `UserError` once another has taken it over, to be called now and then.

    Raises `UserError` naming the holder as soon as it is seen to live, or waits until it is done.
    """
    path, mine = folder / ".lease.json", Lease(kernel=find_kernel(), ticks=_own_start())
    _take(path, mine, folder, wait)
    ended, lost = Event(), Event()

    def renew() -> None:
        times = 0
        while not ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # one that cannot be renewed for long enough is lost
                if _holder(path) not in (None, mine.owner):
                    lost.set()
                    return
                times += 1
                write_json(path, asdict(replace(mine, renewed=times)))

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


def _take(path: UPath, mine: Lease, folder: UPath, wait: bool) -> None:
    """Write a lease once no other lives; only one of several at a time succeeds."""
    watch, announced = _Watch(), False
    while (holder := _try(path, mine, watch)) is not None:
        lease, alive = holder
        who = f"rocess {lease.process} on {lease.host}"
        if alive and not wait:
            raise UserError(f"P{who} works on {folder}: wait until it is done (--wait does), or end it.")
        if alive is None and not announced:
            announced = True
            logging.getLogger(__name__).warning(
                "Watching for up to %.0f seconds whether p%s still works on %s.", STALE_SECONDS, who, folder
            )
        time.sleep(WAIT_SECONDS)


def _try(path: UPath, mine: Lease, watch: _Watch) -> tuple[Lease, bool | None] | None:
    """Write a lease unless another may live, which is returned with whether it does."""
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
    if there is not None and (alive := watch.look(there)) is not False:
        return there, alive
    write_json(path, asdict(mine))
    time.sleep(SETTLE_SECONDS)
    there = _read(path)
    return None if there is None or there.owner == mine.owner else (there, watch.look(there))


def _read(path: UPath) -> Lease | None:
    record = read_json(path)
    return check_record(record, Lease, str(path)) if record else None


def _holder(path: UPath) -> str | None:
    lease = _read(path)
    return lease.owner if lease else None
