"""What planning, writing, resuming, reading and verifying cost by the number of faces, with a tower that does nothing.

    python measurements/scale.py --rows 10000 --rows 100000 --repeats 3
    python measurements/scale.py --rows 10000000 --repeats 3 --ray 2

Each size runs in a process of its own, so that its peak of memory is its own. Manifests are made up: no picture is read, the
tower returns numbers that tell rows apart, all else is what `cafe extract` does. With `--ray` so many workers of Ray write,
and the seconds of `extract` are those of the clock.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cafe.data.manifest import SCHEMA, Manifest
from cafe.pipeline.features import extract as extraction
from cafe.pipeline.features.store import FeatureStore, verify
from cafe.pipeline.features.stream import pack_shards
from cafe.pipeline.features.worker import ShardEmbedder, TowerWorker
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.towers.facts import TowerFacts
from cafe.views.rendering import Rendered, Sample

WIDTH = 512
PARTS = 1_000_000  # rows of a manifest made at a time
SETTINGS = ExtractSettings(backbone="clip-vit-b32", decoders=0)
FACTS = TowerFacts("null:tower", "0", WIDTH, None, 1, (0.5,) * 3, (0.5,) * 3, "tower")


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


def peak() -> int:
    """Return the peak of this process's memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_manifest(rows: int) -> Manifest:
    """Return a manifest of made-up faces, 20 of each person, with ids and digests as long as real ones."""
    parts = []
    for start in range(0, rows, PARTS):
        numbers = pa.array(np.arange(start, min(start + PARTS, rows)))
        digits = pc.utf8_lpad(numbers.cast(pa.string()), 10, "0")
        person = pc.utf8_lpad(pc.divide(numbers, 20).cast(pa.string()), 8, "0")
        names = pc.binary_join_element_wise("person", person, "/photo", digits, ".jpg", "")
        columns = {"sample_id": names, "path": names, "label": pa.array(np.arange(len(numbers)) % 7, pa.int8())}
        columns |= dict.fromkeys(("width", "height"), pa.array(np.full(len(numbers), 100, np.int32)))
        columns |= {"split": pa.array(np.full(len(numbers), "train")), "digest": pc.utf8_lpad(digits, 64, "0")}
        columns |= {name: pa.nulls(len(numbers), SCHEMA.field(name).type) for name in ("group", "box")}
        parts.append(pa.table(columns).select(SCHEMA.names).cast(SCHEMA))
    return Manifest("faces", "/nowhere", pa.concat_tables(parts))


def fill_store(workspace: Workspace, rows: int) -> FeatureStore:
    """Return a new store of made-up faces."""
    manifest = make_manifest(rows)
    about = extraction.describe_store(manifest, SETTINGS, FACTS)
    store = FeatureStore.create(workspace.features / manifest.name, about, manifest)
    write(store, manifest)
    return store


def write(store: FeatureStore, manifest: Manifest) -> None:
    """Compute all shards as the driver and a worker do, without Ray between them."""
    without = replace(manifest, table=manifest.table.slice(0, 0))
    worker = NullWorker([({str(store.path): store.info}, without, [])], SETTINGS, 1, "cpu")
    for shard in store.pending():
        packed = {"pass": 0, **pack_shards(manifest, store.info, [shard])}
        done = worker({name: [value] for name, value in packed.items()})
        assert done["fault"] == [""]
    store.finish()


def extract(workspace: Workspace, manifest: Manifest, settings: ExtractSettings) -> None:
    """Do what `cafe extract` does."""
    extraction.extract(workspace, [manifest], settings, lambda done, total: None)


def measure(rows: int, planning_only: bool, workers: int) -> dict[str, float]:
    """Return seconds of this process's cores, which neighbours do not change, and megabytes of each step for one size."""
    measured: dict[str, float] = {"rows": rows}

    def timed(name: str, step: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> Any:
        since = clock()
        result = step()
        measured[f"{name} s"] = clock() - since
        return result

    extraction.look_up_layers = lambda workspace, settings, names: [FACTS for _ in names]  # type: ignore[assignment]
    settings = replace(SETTINGS, num_actors=workers or None)
    with TemporaryDirectory() as folder:
        workspace = Workspace.at(folder)
        subprocess.run([sys.executable, __file__, "--make", folder, "--rows", str(rows)], check=True)
        manifest = timed("load", lambda: workspace.load_manifest("faces"))
        about = timed("digest", lambda: extraction.describe_store(manifest, settings, FACTS))
        store = timed("create", lambda: FeatureStore.create(workspace.features / "faces", about, manifest))
        timed("pending", store.pending)
        measured["planning MB"] = peak()
        if not planning_only:
            if workers:
                extraction.TowerWorker = NullWorker  # type: ignore[misc]
                timed("extract", lambda: extract(workspace, manifest, settings), time.monotonic)
            else:
                timed("write", lambda: write(store, manifest))
            timed("no-op", lambda: extract(workspace, manifest, settings))
            measured["writing MB"] = peak()
            view = timed("read", lambda: store.read_view("pooled", 0))
            assert (view[:, 0] == np.arange(rows) % store.info.shard_rows % 1000).all()
            timed("verify", lambda: verify(store.path))
    return measured


@click.command()
@click.option("--rows", multiple=True, type=int, default=(10_000, 100_000), show_default=True, help="Faces.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--planning-only", is_flag=True, help="Plan, and compute nothing.")
@click.option("--ray", "workers", default=0, help="Workers of Ray that write; 0: this process does.")
@click.option("--one", is_flag=True, hidden=True)
@click.option("--make", hidden=True)
def main(rows: tuple[int, ...], repeats: int, planning_only: bool, workers: int, one: bool, make: str | None) -> None:
    """Print the median of each measurement for each size."""
    if make:
        make_manifest(rows[0]).save(Workspace.at(make).manifest_path("faces"))
        return
    if one:
        print(json.dumps(measure(rows[0], planning_only, workers)))
        return
    for size in rows:
        command = [
            sys.executable,
            __file__,
            "--one",
            "--rows",
            str(size),
            "--ray",
            str(workers),
            *(["--planning-only"] if planning_only else []),
        ]
        output = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
        runs = [json.loads(text.splitlines()[-1]) for text in output]
        print("  ".join(f"{name} {statistics.median(run[name] for run in runs):,.2f}" for name in runs[0]), flush=True)


if __name__ == "__main__":
    main()
