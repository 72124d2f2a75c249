"""What planning, writing, resuming, reading and verifying cost by the number of faces, with a tower that does nothing.

    python measurements/scale.py --rows 10000 --rows 100000 --repeats 3
    python measurements/scale.py --rows 10000000 --in-memory          # the manifest as one file, whatever its size
    CHANNELS=512 python measurements/scale.py --rows 10000000 --ray 2

Each step runs in a process of its own, as commands do, so that its peak of memory is its own. Manifests are made up: no
picture is read, the tower returns numbers that tell rows apart, all else is what `cafe extract` does. With `--ray` so many
workers of Ray write, and the seconds of that step are those of the clock.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cafe.data import manifest as manifests
from cafe.data import rows as tables
from cafe.data.expressions import EXPRESSIONS
from cafe.data.manifest import Manifest
from cafe.data.rows import SCHEMA, write_files
from cafe.pipeline.features import extract as extraction
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.features.store import FeatureStore, verify
from cafe.pipeline.features.worker import ShardEmbedder, TowerWorker
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.towers.facts import TowerFacts
from cafe.views.rendering import Rendered, Sample

WIDTH = int(os.environ.get("CHANNELS", "8"))  # of the tower; from the environment, which Ray's workers have, too
DRAWN = ("plan", "no-op", "resume", "write")  # what a command waits for, in memory of the driver
PARTS = 1_000_000  # rows of a manifest made at a time
SETTINGS = ExtractSettings(backbone="clip-vit-b32", decoders=0, shard_rows=4096)
FACTS = TowerFacts("null:tower", "0", WIDTH, None, 16, (0.5,) * 3, (0.5,) * 3, "tower")


@dataclass(frozen=True)
class NullRenderer:
    """In place of a `Renderer`: reads nothing and returns the rows in place of pictures."""

    pictures: object = None
    for_device: bool = False

    def __call__(self, samples: Sequence[Sample], refused: Mapping[int, str]) -> Rendered:
        """The numbers of the rows in their shard."""
        rows = np.array([row for row, _ in samples])
        return Rendered(rows, rows, {})


class NullTower:
    """In place of an `Embedder`: returns the number of the row in its shard, modulo 1000, as features."""

    renderer = NullRenderer()

    def batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """All of a shard at once."""
        return [samples]

    def embed_layers(self, rendered: Rendered, layers: Sequence[object]) -> list[dict[str, Tensor]]:
        """The numbers of the rows."""
        values = torch.from_numpy(rendered.pictures % 1000).to(torch.float16)
        return [{"pooled": values[:, None].expand(-1, WIDTH)} for _ in layers]


class NullWorker(TowerWorker):
    """A worker of an extraction with the null tower."""

    def _make(self, number: int, shared: ShardEmbedder | None) -> ShardEmbedder:
        embedder = super()._make(number, shared)
        vars(embedder)["embedder"] = NullTower()
        return embedder


def look_up_layers(workspace: Workspace, settings: ExtractSettings, names: Sequence[str]) -> list[TowerFacts]:
    """What is known of the null tower, under whatever name."""
    return [FACTS for _ in names]


def make_rows(rows: int) -> Iterator[pa.Table]:
    """Yield the rows of made-up faces, 20 of each person, with ids and digests as long as real ones, as hard to pack."""
    random = np.random.default_rng(0)
    for start in range(0, rows, PARTS):
        numbers = pa.array(np.arange(start, min(start + PARTS, rows)))
        digits = pc.utf8_lpad(numbers.cast(pa.string()), 10, "0")
        person = pc.utf8_lpad(pc.divide(numbers, 20).cast(pa.string()), 8, "0")
        names = pc.binary_join_element_wise("person", person, "/photo", digits, ".jpg", "")
        offsets = pa.py_buffer(np.arange(0, 64 * len(numbers) + 1, 64, dtype=np.int32))
        digests = pa.StringArray.from_buffers(
            len(numbers), offsets, pa.py_buffer(random.bytes(32 * len(numbers)).hex().encode())
        )
        columns = {"sample_id": names, "path": names, "label": pa.array(np.arange(len(numbers)) % 7, pa.int8())}
        columns |= dict.fromkeys(("width", "height"), pa.array(np.full(len(numbers), 100, np.int32)))
        columns |= {"split": pa.array(np.full(len(numbers), "train")), "digest": digests}
        columns |= {name: pa.nulls(len(numbers), SCHEMA.field(name).type) for name in ("group", "box", "votes", "span")}
        yield pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def make(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Write a manifest."""
    path = workspace.manifest_path("faces")
    large = rows > tables.LARGE
    table = write_files(path, make_rows(rows), EXPRESSIONS) if large else pa.concat_tables(make_rows(rows))
    Manifest("faces", "/nowhere", table).save(path)


def open_store(workspace: Workspace) -> tuple[FeatureStore, Manifest]:
    """Make or open the store, which is all that planning does."""
    manifest = workspace.load_manifest("faces")
    about = extraction.describe_store(manifest, SETTINGS, FACTS)
    return FeatureStore.create(workspace.features / "faces", about, manifest), manifest


def plan(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Find out what is to be computed, which makes the store where there is none."""
    assert open_store(workspace)[0].pending()


def extract(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Do what `cafe extract` does."""
    with no_bar("", "") as progress:
        extraction.extract(workspace, [workspace.load_manifest("faces")], settings, progress)


def resume(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Go on after a kill in the last shard."""
    store = find_store(workspace)
    store.receipts.discard([store.info.shards - 1])
    extract(workspace, settings, rows)


def read(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Read a view, with the labels and the rows that are trained on."""
    store, manifest = find_store(workspace), workspace.load_manifest("faces")
    view = store.read_view("pooled", 0)
    assert (view[:, 0] == np.arange(rows) % store.info.shard_rows % 1000).all()
    assert len(manifest.labels) == len(manifest.rows("train")) == rows


def check(workspace: Workspace, settings: ExtractSettings, rows: int) -> None:
    """Read every byte of the store back."""
    assert not verify(find_store(workspace).path)


def find_store(workspace: Workspace) -> FeatureStore:
    """Open the store."""
    ((path, info),) = find_stores(workspace.features, "faces")
    return FeatureStore(path, info)


STEPS: dict[str, Callable[[Workspace, ExtractSettings, int], None]] = {
    "import": lambda *_: None,
    "make": make,
    "first plan": plan,
    "plan": plan,
    "write": extract,
    "no-op": extract,
    "resume": resume,
    "read": read,
    "verify": check,
}


def run_step(name: str, folder: str, rows: int, workers: int) -> dict[str, float]:
    """Take a step in this process; return its seconds of cores, which neighbours do not change, and its peak in MB."""
    clock = time.monotonic if workers and name == "write" else time.process_time
    settings, since = replace(SETTINGS, num_actors=workers or 1), clock()
    with patch.multiple(extraction, look_up_layers=look_up_layers, TowerWorker=NullWorker):
        STEPS[name](Workspace.at(folder), settings, rows)
    return {"s": clock() - since, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def measure(rows: int, in_memory: bool, workers: int, steps: Sequence[str]) -> dict[str, dict[str, float]]:
    """Take all steps, one after another, each in a process of its own."""
    options = ["--ray", str(workers), *(["--in-memory"] if in_memory else [])]
    with TemporaryDirectory() as folder:
        return {name: take_step(name, folder, rows, options) for name in steps}


def take_step(
    name: str, folder: str, rows: int, options: Sequence[str] = (), channels: int = WIDTH
) -> dict[str, float]:
    """Take a step in a process of its own; return its seconds and its peak in MB."""
    command = [sys.executable, __file__, "--step", name, "--folder", folder, "--rows", str(rows), *options]
    environment = os.environ | {"CHANNELS": str(channels)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def draw(measured: Mapping[str, Mapping[str, Mapping[str, float]]], place: Path) -> None:
    """Draw seconds and megabytes of the steps by faces, with the slope of each over the largest two sizes."""
    sizes = sorted(map(int, measured))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, unit, name in zip(
        figure.subplots(1, 2), ("s", "MB"), ("seconds of one core", "peak of memory, MB"), strict=True
    ):
        for step in DRAWN:
            values = [max(measured[str(size)][step][unit], 1e-3) for size in sizes]
            slopes = np.diff(np.log(values)) / np.diff(np.log(sizes))
            slope = f", slope {slopes[-1]:.2f}" if len(slopes) else ""
            axes.loglog(sizes, values, marker="o", label=step + slope)
        axes.set_xlabel("faces")
        axes.set_ylabel(name)
        axes.legend(fontsize="small")
    figure.savefig(place)


@click.command()
@click.option("--rows", multiple=True, type=int, default=(10_000, 100_000), show_default=True, help="Faces.")
@click.option("--repeats", default=1, show_default=True)
@click.option("--planning-only", is_flag=True, help="Plan, and compute nothing.")
@click.option("--in-memory", is_flag=True, help="Read the manifest whole, of whatever size.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON to add the medians to; beside it they are drawn.")
@click.option("--ray", "workers", default=0, help="Workers of Ray that write; 0: this process does.")
@click.option("--step", hidden=True)
@click.option("--folder", hidden=True)
def main(
    rows: tuple[int, ...],
    repeats: int,
    planning_only: bool,
    in_memory: bool,
    workers: int,
    output: Path | None,
    step: str | None,
    folder: str,
) -> None:
    """Print the median of each measurement for each size."""
    if step:
        assert folder
        whole = rows[0] if in_memory else tables.LARGE  # rows of the largest manifest that is one file
        with patch.object(manifests, "LARGE", whole), patch.object(tables, "LARGE", whole):
            print(json.dumps(run_step(step, folder, rows[0], workers)))
        return
    steps = list(STEPS)[:4] if planning_only else list(STEPS)
    for size in rows:
        runs = [measure(size, in_memory, workers, steps) for _ in range(repeats)]
        medians = {
            name: {unit: statistics.median(run[name][unit] for run in runs) for unit in ("s", "MB")} for name in steps
        }
        for name, median in medians.items():
            print(f"{size:>12,}  {name:10}  {median['s']:9,.2f} s  {median['MB']:8,.0f} MB", flush=True)
        if output:
            known = json.loads(output.read_text()) if output.exists() else {}
            output.write_text(json.dumps(known | {str(size): medians}, indent=1))
            draw(known | {str(size): medians}, output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
