"""What this process may use of its machine: cores, memory and a graphics card."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cafe.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
# Limit, use and the line of the statistics that says what of the use can be dropped: of version 2 and of version 1.
LAYOUTS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
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


def free_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes this process may still take of its machine or container.

    Of several workers on a node each may take its share, which is that of its threads in the cores.
    """
    import psutil
    import torch

    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, droppable in LAYOUTS:
        with suppress(OSError, ValueError, KeyError):  # no such file, or no limit
            numbers = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
            in_use = int((cgroup / used).read_text()) - int(numbers[droppable])
            free = min(free, max(0, int((cgroup / limit).read_text()) - in_use))
    return free * min(torch.get_num_threads(), cores()) // cores()
