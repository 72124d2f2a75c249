"""`cafe` commands to be killed and interrupted, in processes forked from one that has imported what they need."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from cafe.jobs.cli import run

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload([
    "pytest", "forked", "cafe.pipeline.train", "cafe.pipeline.features.extract", "cafe.pipeline.benchmark.cells",
    "torch._dynamo", "torchvision", "open_clip", "zarr", "mlflow.store.tracking.sqlalchemy_store", "ray.data",
])  # fmt: skip


def start_command(words: Sequence[str], errors: Path, fatal: str = "") -> ForkServerProcess:
    """Start a command that writes what goes wrong to `errors`, and is killed as it is to write a file like `fatal`."""
    process = FORKED.Process(target=_run_command, args=(words, dict(os.environ), errors, fatal))
    process.start()
    return process


def die_at(fatal: str) -> None:
    """Have this process killed with -9 as it is to write a file like `fatal`, which it writes beside its place first."""

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and fnmatch(os.fspath(arguments[1]), fatal):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)


def _run_command(words: Sequence[str], environment: dict[str, str], errors: Path, fatal: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with errors.open("wb") as output:
        os.dup2(output.fileno(), sys.stderr.fileno())
    die_at(fatal)
    sys.argv = ["cafe", *words]
    run()
