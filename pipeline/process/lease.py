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
from itertools import count
from pathlib import Path
from threading import Event

from upath import UPath

from cafe.errors import UserError
from cafe.files import create_file, encode_json, parse_json, place_below, read_file, replace_file
from cafe.pipeline.process import beside
from cafe.records import check_record

STALE_SECONDS = 120.0  # more than a storage is tried again before it counts as failing
RENEW_SECONDS = 10.0
WAIT_SECONDS = 2.0  # between two looks at a lease that another holds
SETTLE_SECONDS = 0.5  # after which the last of several has a lease that they take over in a store without conditions
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
    _, lease = _read(folder / ".lease.json")
    return f"process {lease.process} on {lease.host}" if lease and lease.alive is not False else ""


@contextmanager
def hold(folder: UPath, wait: bool = False, file: str = "") -> Iterator[Callable[[], None]]:
    """Hold the lease of a folder, or of one `file` in it, whose name is ours.

    Yields what raises `UserError` once another has taken it over, to be called now and then. Raises `UserError` naming the
    holder as soon as it is seen to live, or waits until it is done.
    """
    place = place_below(folder, file) if file else folder
    path = place_below(folder, f".{file}.lease.json") if file else folder / ".lease.json"
    mine = Lease(kernel=find_kernel(), ticks=_own_start())
    _take(path, mine, place, wait, hint="" if file else " (--wait does)")
    lost, times = Event(), count(1)

    def renew() -> None:
        if lost.is_set():
            return
        with suppress(OSError):  # one that cannot be renewed for long enough is lost
            content, there = _read(path)
            if there and there.owner != mine.owner:
                lost.set()
                return
            renewed = encode_json(asdict(replace(mine, renewed=next(times))))
            create_file(path, renewed) if content is None else replace_file(path, content, renewed)

    def check() -> None:
        if lost.is_set():
            raise UserError(f"Another process has taken over {place}, since this one was silent for too long: end it.")

    try:
        with beside.repeat(renew, RENEW_SECONDS):
            yield check
    finally:
        content, there = _read(path)
        if content and there and there.owner == mine.owner:
            replace_file(path, content, None)


def _take(path: UPath, mine: Lease, place: UPath, wait: bool, hint: str) -> None:
    """Write a lease once no other lives; only one of several at a time succeeds."""
    watch, announced = _Watch(), False
    while (holder := _try(path, mine, watch)) is not None:
        lease, alive = holder
        who = f"rocess {lease.process} on {lease.host}"
        if alive and not wait:
            raise UserError(f"P{who} works on {place}: wait until it is done{hint}, or end it.")
        if alive is None and not announced:
            announced = True
            logging.getLogger(__name__).warning(
                "Watching for up to %.0f seconds whether p%s still works on %s.", STALE_SECONDS, who, place
            )
        time.sleep(WAIT_SECONDS)


def _try(path: UPath, mine: Lease, watch: _Watch) -> tuple[Lease, bool | None] | None:
    """Write a lease unless another may live, which is returned with whether it does."""
    try:
        create_file(path, encode_json(asdict(mine)))
        return None
    except FileExistsError:
        pass
    content, there = _read(path)
    if there is not None and there.owner == mine.owner:  # made by a request whose answer was lost
        return None
    if there is None:  # just removed, about to be written, or damaged
        time.sleep(SETTLE_SECONDS)
        content, there = _read(path)
    if there is not None and (alive := watch.look(there)) is not False:
        return there, alive
    if content is None:
        return _try(path, mine, watch)
    taken = replace_file(path, content, encode_json(asdict(mine)))
    if taken and not path.protocol:
        return None
    time.sleep(SETTLE_SECONDS)  # not every store keeps the condition, and the answer of one that does may be lost
    _, there = _read(path)
    if there is None:
        return _try(path, mine, watch)
    return None if there.owner == mine.owner else (there, watch.look(there))


def _read(path: UPath) -> tuple[bytes | None, Lease | None]:
    """Return a lease as it is written and what it says, None where there is none, or where it is none."""
    try:
        content = read_file(path)
    except FileNotFoundError:
        return None, None
    record = parse_json(content)
    return content, check_record(record, Lease, str(path)) if record else None
