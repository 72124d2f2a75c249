"""What Ray Data costs an extraction: two towers of `map_batches` on this machine against one in the command's own process.

    OMP_WAIT_POLICY=PASSIVE python measurements/stream.py --faces 640 --repeats 3

All compute the same shards with two cores, in turn: one tower of two threads in this process; two of one thread under Ray,
fed by its stream; and two processes of one thread without Ray, each with half the shards. What the first differs in from
the last is what two towers cost, what the last differs in from Ray's is what Ray costs. Views a second of the clock, and a
second of the processors' time of all processes, which other programs disturb least, between the first and the last shard
that end, so that no start is counted; both as shares of the first. The stores must come out alike, byte for byte. The
variable keeps waiting threads from spinning, as in every command.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import psutil
from speed import BACKBONE, INPUT_SIZE
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.files import list_files
from cafe.pipeline import cluster
from cafe.pipeline.features.extract import extract
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.synthetic.domains import write

CORES = 2
SETTINGS = ExtractSettings(backbone=BACKBONE, input_size=INPUT_SIZE, views=2, shard_rows=16, batch_size=32)
KINDS = ("clock", "processors")

Rates = tuple[float, float]  # views per second of the clock, and of the processors' time


def count_seconds() -> float:
    """Return the processors' time that this process and all it started have taken so far."""
    total, own = 0.0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def rate(folder: str, manifest: Manifest, settings: ExtractSettings) -> Rates:
    """Return the rates of an extraction between the first and the last shard that end."""
    ends: list[tuple[int, float, float]] = []

    def note(done: int, total: int, /, **facts: float) -> None:
        ends.append((done, time.perf_counter(), count_seconds()))

    extract(Workspace.at(folder), [manifest], settings, note)
    first, last = ends[0], ends[-1]
    views = (last[0] - first[0]) * settings.views
    return views / (last[1] - first[1]), views / (last[2] - first[2])


def rate_here(folder: str, manifest: Manifest, cores: int = CORES) -> Rates:
    """Return the rates of one tower in this process, with a thread for each of so many cores."""
    return rate(folder, manifest, replace(SETTINGS, num_cpus=cores))


def rate_ray(folder: str, manifest: Manifest) -> Rates:
    """Return the rates of two towers of one thread under Ray, the processes of Ray itself counted."""
    settings = replace(SETTINGS, num_cpus=CORES, num_actors=CORES)
    with cluster.connect(settings):
        return rate(folder, manifest, settings)


def rate_processes(folder: str, manifest: Manifest) -> Rates:
    """Return the rates of two processes without Ray, each of which extracts half the faces by one thread."""
    half = len(manifest) // 2
    halves = [replace(manifest, name=f"half{n}", table=manifest.table.slice(n * half, half)) for n in range(2)]
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        each = list(pool.map(rate_here, [folder] * CORES, halves, [1] * CORES))
    return sum(clock for clock, _ in each), CORES / sum(1 / own for _, own in each)


WAYS: dict[str, Callable[[str, Manifest], Rates]] = {
    "one tower in the command": rate_here,
    "two towers of map_batches": rate_ray,
    "two processes without Ray": rate_processes,
}


def read_features(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Return the files of the features of a manifest in a workspace."""
    files = list_files(UPath(folder) / "features" / manifest.name)
    return {str(file).partition("/pooled/")[2]: file.read_bytes() for file in files if "/pooled/" in str(file)}


@click.command()
@click.option("--faces", default=640, show_default=True, help="Synthetic faces to draw.")
@click.option("--repeats", default=3, show_default=True)
def main(faces: int, repeats: int) -> None:
    """Print the rates as shares of that of the command's own process: medians and their spread."""
    rates: dict[str, list[Rates]] = {name: [] for name in WAYS}
    with TemporaryDirectory() as place:
        write(Path(place), "studio", faces)
        manifest = index_files("studio", DATASETS["synthetic"](UPath(place) / "studio")).manifest
        for number in range(repeats):
            for name, way in WAYS.items():
                rates[name].append(way(f"{place}/{number} {name}", manifest))
                click.echo(f"  {name}: {rates[name][-1]}", err=True)
            here, ray = (read_features(Path(place) / f"{number} {name}", manifest) for name in list(WAYS)[:2])
            assert here
            assert here == ray
    click.echo(f"load now {os.getloadavg()[0]:.1f}")
    for name, own in rates.items():
        shares = np.array(own) / np.array(rates["one tower in the command"])  # (repeats, 2)
        for kind, values in zip(KINDS, shares.T.tolist(), strict=True):
            spread = f"{min(values):.2f} – {max(values):.2f}"
            click.echo(f"{name:<28}{kind:<12}{statistics.median(values):>6.2f}  {spread}")


if __name__ == "__main__":
    main()
