"""What a training from features costs that do not fit in the memory it may take, against one whose features fit.

    python measurements/memory.py --gigabytes 2 --limit 0.4 --folder /tmp/memory

A linear probe on made-up features of 512 channels in 16 bits, in a process of its own, first with the memory there is and
then in a control group that may take so much, which counts what the system keeps of files too. Both have to end in the same
weights. The folder needs twice the size of the features: the store, and the scratch file that they are read into.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyarrow as pa
from scale import FACTS, make_rows

from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.data.rows import LARGE, write_files
from cafe.pipeline.features.extract import describe_store
from cafe.pipeline.features.store import FeatureStore
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.towers.facts import TowerFacts

WIDTH, BYTES = 512, 2
SHARD_ROWS = 4096
SETTINGS = ExtractSettings(backbone="clip-vit-b32", shard_rows=SHARD_ROWS)
GROUPS = Path("/sys/fs/cgroup/memory")


def write_store(workspace: Workspace, rows: int) -> None:
    """Write a manifest and a store of features that are drawn around the mean of their class."""
    path = workspace.manifest_path("faces")
    large = rows > LARGE
    table = write_files(path, make_rows(rows), EXPRESSIONS) if large else pa.concat_tables(make_rows(rows))
    manifest = Manifest("faces", "/nowhere", table)
    manifest.save(path)
    manifest = workspace.load_manifest("faces")
    tower = TowerFacts(**{**vars(FACTS), "width": WIDTH})
    store = FeatureStore.create(workspace.features / "faces", describe_store(manifest, SETTINGS, tower), manifest)
    random = np.random.default_rng(0)
    means, labels = random.standard_normal((len(EXPRESSIONS), WIDTH), np.float32), manifest.labels
    noise = random.standard_normal((4 * SHARD_ROWS, WIDTH), np.float32)
    for shard in store.pending():
        own = store.info.rows_of(shard)
        start = int(random.integers(3 * SHARD_ROWS))
        values = 0.3 * means[labels[own.start : own.stop]] + noise[start : start + len(own)]
        store.write_shard(shard, {"pooled": values.astype(np.float16)[:, None]}, {})
    store.finish()


@contextmanager
def limited(gigabytes: float | None) -> Iterator[list[str]]:
    """Yield what to put before a command so that it may take so much memory, of files that are kept of the disk too."""
    if gigabytes is None:
        yield []
        return
    if not GROUPS.exists():  # version 2, whose groups systemd keeps
        yield [
            "systemd-run",
            "--scope",
            "--quiet",
            "-p",
            f"MemoryMax={int(gigabytes * 2**30)}",
            "-p",
            "MemorySwapMax=0",
        ]
        return
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    group = GROUPS / own.split(":")[2].lstrip("/") / f"measured-{time.time_ns()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(int(gigabytes * 2**30)))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    finally:
        group.rmdir()


def train(workspace: Path, limit: float | None, batch_size: int, tag: str) -> dict[str, Any]:
    """Train for two epochs, and return the faces per second of each, the seconds of the command and its cores, and more."""
    command = [sys.executable, "-m", "cafe.jobs.cli", "--workspace", str(workspace), "train", "--source", "faces"]
    command += ["--method", "linear_probe", "--targets", "none", "--epochs", "2", "--num-cpus", "1", "--tag", tag]
    command += ["--set", f"batch_size={batch_size}", "--backbone", SETTINGS.backbone, "--cpu"]
    before, since, spent = _count_read(), time.monotonic(), _count_spent()
    with limited(limit) as prefix:
        environment = {**os.environ, "TMPDIR": str(workspace.parent)}
        subprocess.run([*prefix, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
    (run,) = (path.parent for path in workspace.glob("runs/*/result.json") if tag in path.parent.name)
    return {
        "rates": [json.loads(path.read_text())["faces_per_second"] for path in sorted((run / "epochs").iterdir())],
        "seconds": time.monotonic() - since,
        "spent": _count_spent() - spent,
        "read": _count_read() - before,
        "weights": digest((run / "model.safetensors").read_bytes())[:12],
    }


def _count_read() -> float:
    """Return the gigabytes that all disks have read so far."""
    counters = psutil.disk_io_counters()
    assert counters
    return float(counters.read_bytes) / 2**30


def _count_spent() -> float:
    """Return the seconds of cores that the commands which have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True, help="Size of the features.")
@click.option("--limit", default=0.4, show_default=True, help="Gigabytes of memory for them.")
@click.option("--base", default=0.8, show_default=True, help="Gigabytes that the process needs besides.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--only-limited", is_flag=True, help="Leave the training out whose features fit.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where to work; what is there is used.")
def main(gigabytes: float, limit: float, base: float, batch_size: int, only_limited: bool, folder: Path) -> None:
    """Print faces per second of both."""
    workspace = folder / f"w{gigabytes:g}"
    rows = int(gigabytes * 2**30 / WIDTH / BYTES)
    if not workspace.exists():
        write_store(Workspace.at(str(workspace)), rows)
    shutil.rmtree(workspace / "runs", ignore_errors=True)
    found = {}
    for name, memory in (("fits", None), ("limited", limit + base)):
        if name == "fits" and only_limited:
            continue
        result = found[name] = train(workspace, memory, batch_size, name)
        rates = ", ".join(f"{rate:,.0f}" for rate in result["rates"])
        print(
            f"{rows:,} faces, {name}: {rates} faces/s by epoch, {result['seconds']:.0f} s, "
            f"{result['spent']:.0f} s of a core, {result['read']:.2f} GB read from disks, weights {result['weights']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
