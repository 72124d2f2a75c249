"""`cafe doctor`: whether this machine can do what is asked of it, before hours are spent."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

import click

from cafe.errors import IncompleteError, UserError, quote
from cafe.jobs.tables import show_records
from cafe.jobs.terminal import json_option, open_workspace

if TYPE_CHECKING:
    from cafe.pipeline.workspace import Workspace

LIBRARIES = ("torch", "torchvision", "ray", "zarr", "mlflow", "open_clip_torch", "timm", "pyarrow")
HUB = ("huggingface.co", 443)
HUB_SECONDS = 3.0
LEAST_MEMORY = 4 * 2**30  # a worker with torch, and Ray beside it
LEAST_DISK = 2 * 2**30

Finding = tuple[str, str, str]  # what was looked at, what was found, and what is wrong with it, if anything


@click.command()
@click.argument("file", required=False)
@json_option
def doctor(file: str | None, as_json: bool) -> None:
    """Look at this machine, and at what a benchmark needs.

    \b
    cafe doctor
    cafe doctor table1.toml

    Versions, processor, memory, GPUs, the workspace, and whether weights can be fetched. Exit code 1 when something is
    wrong.
    """
    workspace = open_workspace()
    findings = [*_software(), *_hardware(), *_storage(workspace), _hub()]
    if file:
        findings += _needs(workspace, file)
    records = [dict(zip(("point", "found", "problem"), finding, strict=True)) for finding in findings]
    show_records(records, as_json, words=3)
    problems = [problem for _, _, problem in findings if problem]
    if problems:
        raise IncompleteError(f"{len(problems)} of {len(findings)} points need attention: see the last column.")


def _software() -> Iterator[Finding]:
    from cafe.pipeline.process.versions import code_version

    yield "cafe", code_version(), ""
    yield "Python", f"{platform.python_version()} on {platform.platform(terse=True)}", ""
    yield "libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES), ""


def _hardware() -> Iterator[Finding]:
    import torch

    from cafe.arithmetic import computes_bf16
    from cafe.pipeline.process.machine import available_memory, cores

    yield "processor", f"{cores()} cores", ""
    free = available_memory()
    low = f"less than {_size(LEAST_MEMORY)}: close other programs" if free < LEAST_MEMORY else ""
    yield "free memory", _size(free), low
    yield "bfloat16", "in hardware" if computes_bf16() else "in software: slower than fp32", ""
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    yield "GPUs", ", ".join(f"{gpu.name} ({_size(gpu.total_memory)})" for gpu in names) or "none", ""


def _storage(workspace: Workspace) -> Iterator[Finding]:
    """Write, read and remove a small file where results would go."""
    from cafe.files import read_file, remove_file, write_file

    probe = workspace.root / ".doctor"
    try:
        write_file(probe, b"cafe")
        readable = read_file(probe) == b"cafe"
        remove_file(probe)
    except UserError as error:  # of a storage that fails: it says which file, and why
        yield "workspace", str(workspace.root), str(error)
        return
    except OSError as error:
        yield (
            "workspace",
            str(workspace.root),
            f"cannot be written ({error.strerror or quote(error)}): choose another with -w",
        )
        return
    yield "workspace", str(workspace.root), "" if readable else "what was written reads otherwise"
    if workspace.local:
        free = shutil.disk_usage(str(workspace.root)).free
        yield "free disk", _size(free), f"less than {_size(LEAST_DISK)}" if free < LEAST_DISK else ""


def _hub() -> Finding:
    try:
        socket.create_connection(HUB, HUB_SECONDS).close()
    except OSError:
        return "hub of weights", f"{HUB[0]} does not answer: name files (TOWER@FILE), or use an installed tower", ""
    return "hub of weights", f"{HUB[0]} answers", ""


def _needs(workspace: Workspace, file: str) -> Iterator[Finding]:
    """Say what a benchmark still has to compute and store, and whether it fits on the disk."""
    from cafe.jobs.runs import describe_cost, find_file
    from cafe.pipeline.benchmark.file import read_benchmark
    from cafe.pipeline.benchmark.missing import estimate_cost, list_missing
    from cafe.pipeline.benchmark.plan import plan_benchmark
    from cafe.pipeline.features.extract import describe_store, look_up_tower
    from cafe.pipeline.settings import BenchmarkSettings

    benchmark = read_benchmark(find_file(file))
    missing = list_missing(workspace, benchmark)
    yield from ((what, "missing", remedy) for what, remedy in missing)
    yield "cost", describe_cost(estimate_cost(workspace, benchmark)), ""
    if any(one.what.startswith("manifest ") for one in missing):
        return
    plan = plan_benchmark(workspace, benchmark, BenchmarkSettings())
    needed = 0
    for store in plan.missing_stores:
        try:
            needed += describe_store(store.manifest, store.settings, look_up_tower(workspace, store.settings)).bytes
        except UserError as error:
            yield f"features of {store.manifest.name}", store.settings.backbone, str(error)
    free = shutil.disk_usage(str(workspace.root)).free if workspace.local else needed
    yield "features to store", _size(needed), f"more than the free {_size(free)}" if needed > free else ""
    for reason in dict.fromkeys(cell.obstacle for cell in plan.cells if cell.obstacle):
        yield "cells", f"{sum(cell.obstacle == reason for cell in plan.cells)} of {len(plan.cells)} cannot run", reason


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GB"
