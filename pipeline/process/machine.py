"""What this process may use of its machine: cores, memory and a graphics card."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

from cafe.errors import UserError

CGROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Controller, limit, use, and the line of memory.stat that says what of the use can be dropped: of versions 2 and 1.
LAYOUTS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def own_device(use_gpu: bool | None) -> str:
    """Return `cuda` where this process is to compute on a GPU, else `cpu`; raise `UserError` where there is none."""
    import torch

    there = torch.cuda.is_available()
    if use_gpu and not there:
        raise UserError("--gpu needs a GPU and this machine has none: use --cpu.")
    return "cuda" if there and use_gpu is not False else "cpu"


def cores() -> int:
    """Return the cores this process may use: fewer than the machine has where its container or its affinity say so."""
    import joblib

    return int(joblib.cpu_count())


def available_memory(cgroup: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Return the bytes that are free of this machine, or of this process's container or job where that has fewer left."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for controller, limit, used, droppable in LAYOUTS:
        for group in _find_groups(cgroup, controller, own):
            with suppress(OSError, ValueError, KeyError):  # no such file, or no limit
                numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                in_use = int((group / used).read_text()) - int(numbers[droppable])
                free = min(free, max(0, int((group / limit).read_text()) - in_use))
    return free


def free_memory() -> int:
    """Return the bytes this process may still take.

    Of several workers on a node each may take its share, which is that of its threads in the cores.
    """
    import torch

    return available_memory() * min(torch.get_num_threads(), cores()) // cores()


def _find_groups(cgroup: Path, controller: str, own: Path) -> list[Path]:
    """Return the folders of this process's group and of all above it, whose limits hold too.

    A container shows its own group as the uppermost; a batch system's job, or a service, lies below that.
    """
    place = PurePosixPath("/")
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                place = PurePosixPath(path)
    return [cgroup / controller / group.relative_to("/") for group in (place, *place.parents)]
