"""What the pipeline costs, each part as a multiple of a bare loop timed beside it: `make bench`, three minutes.

Commands are compared with `import torch`; stage one with a loop that decodes, resizes and embeds pictures and keeps nothing;
stage two, from the cache and with the tower on the fly, with a loop over torchvision's transforms and the branch alone;
a read of the store with a read of the same bytes; a cell of a benchmark with `import torch` again. `speed.json` holds the
multiples of the machine it names: what exceeds them by more than noise is marked. `--write` renews it.

Commands are measured in CPU seconds of their own process, which other programs disturb least; the rest by the clock.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from PIL import Image
from scale import find_store, take_step
from torch.nn import functional
from torchvision import models, transforms
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset, FeatureSource
from cafe.learning.training import Training
from cafe.methods.cafe import Cafe, Recipe
from cafe.methods.method import Inputs
from cafe.pipeline import cluster
from cafe.pipeline.benchmark.cells import run_benchmark
from cafe.pipeline.benchmark.file import read_benchmark
from cafe.pipeline.benchmark.plan import plan_benchmark
from cafe.pipeline.features.extract import extract
from cafe.pipeline.features.store import FeatureReader, FeatureStore
from cafe.pipeline.process import machine
from cafe.pipeline.process.progress import no_bar
from cafe.pipeline.settings import BenchmarkSettings, ExtractSettings
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.workspace import Workspace
from cafe.synthetic.domains import write
from cafe.towers.building import FrozenBackbone, load_backbone
from cafe.towers.embedding import Embedder
from cafe.views.drawing import ViewPlan

KNOWN = Path(__file__).with_name("speed.json")
NOISE = 1.25  # what a multiple may exceed the known one by, and its own spread
BACKBONE, INPUT_SIZE, IMAGE_SIZE = "imagenet-lite0", 128, 64
BATCH = 64  # of the tower
VIEWS = 2
STORED, READS = 50_000, 5  # faces of a store, and how often a view of them is read for one measurement
CPU = torch.device("cpu")
GRID = """
sources = ["studio"]
targets = ["studio"]
seeds = 4
methods = ["linear_probe"]
towers = ["imagenet-lite0"]
views = 1
[features]
input_size = 128
[train]
epochs = 1
"""


@dataclass(frozen=True)
class Place:
    """A workspace with drawn faces in it, and the settings of their extraction."""

    workspace: Workspace
    manifest: Manifest
    settings: ExtractSettings

    @classmethod
    def make(cls, folder: Path, manifest: Manifest) -> Place:
        """Put a manifest into a new workspace."""
        workspace = Workspace.at(str(folder))
        manifest.save(workspace.manifest_path(manifest.name))
        settings = ExtractSettings(
            backbone=BACKBONE,
            input_size=INPUT_SIZE,
            views=VIEWS,
            shard_rows=BATCH // VIEWS,
            batch_size=BATCH,
            num_cpus=1,
        )
        return cls(workspace, manifest, settings)


@click.command()
@click.option("--faces", default=300, show_default=True, help="Synthetic faces to draw.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--write", "renew", is_flag=True, help="Keep what is measured as what is known of this machine.")
def main(faces: int, repeats: int, renew: bool) -> None:
    """Measure all parts several times in turn and print the medians beside those that are known."""
    torch.set_num_threads(1)
    os.chdir(Path(__file__).parents[1])
    found: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        write(Path(folder), "studio", faces)
        manifest = index_files("studio", DATASETS["synthetic"](UPath(folder) / "studio")).manifest
        tower = load_backbone(BACKBONE, input_size=INPUT_SIZE)
        for number in range(repeats):
            place = Place.make(Path(folder) / f"work{number}", manifest)
            for name, multiple in measure(place, tower):
                found.setdefault(name, []).append(multiple)
                click.echo(f"  {name}: {multiple:.2f}", err=True)
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {"multiples": {}}
    click.echo(f"known of: {known.get('machine', 'no machine')}; load now {os.getloadavg()[0]:.1f}")
    click.echo(f"{'times the bare baseline':<28}{'median':>8}{'spread':>16}{'known':>8}")
    for name, values in found.items():
        middle, there = statistics.median(values), known["multiples"].get(name)
        slow = there is not None and middle > NOISE * there * max(values) / middle
        spread, shown = f"{min(values):.2f} – {max(values):.2f}", "" if there is None else f"{there:.2f}"
        click.echo(f"{name:<28}{middle:>8.2f}{spread:>16}{shown:>8}{'  slower than known' if slow else ''}")
    if renew:
        described = f"{platform.machine()}, {machine.cores()} cores, torch {torch.__version__}"
        multiples = {name: round(statistics.median(values), 3) for name, values in found.items()}
        KNOWN.write_text(json.dumps({"machine": described, "multiples": multiples}, indent=1) + "\n")


def measure(place: Place, tower: FrozenBackbone) -> Iterator[tuple[str, float]]:
    """Yield the name of every part and its multiple of the bare baseline."""
    settings, manifest = place.settings, place.manifest
    with cluster.connect(settings):
        ours = rate_extraction(place.workspace, manifest, settings)
        yield "stage one", rate_bare_tower(manifest, tower, INPUT_SIZE) / ours
    with no_bar("", "") as progress:
        (done,) = extract(place.workspace, [manifest], settings, progress)
    starting = cpu_seconds("-c", "import torch")
    for name, command in {
        "cafe --help": ("--help",),
        "extract, nothing to do": ("extract", "studio", "--backbone", BACKBONE, "--input-size", "128", "--views", "2"),
        "train, new workspace": ("train", "--source", "studio", "--method", "linear_probe", "--epochs", "1"),
        "train, nothing to do": ("train", "--source", "studio", "--method", "linear_probe", "--epochs", "1"),
        "compare": ("compare",),
    }.items():
        yield name, cpu_seconds("-m", "cafe.jobs.cli", "--workspace", str(place.workspace.root), *command) / starting

    yield "cell of a benchmark", seconds_per_cell(place) / starting

    yield "store, read of a view", seconds_of_reads(place)
    store = FeatureStore(done.store, done.info)
    cached, plan, width = FeatureReader([[store]], ["pooled"]), done.info.key.view_plan, tower.facts.width
    live = Embedder(tower, manifest, plan, "cpu", batch_size=BATCH)
    bare = rate_bare_branch(manifest, IMAGE_SIZE)
    yield "stage two, cache", bare / rate_epoch(manifest, cached, plan, width, IMAGE_SIZE)
    yield "stage two, on the fly", bare / rate_epoch(manifest, live, plan, width, IMAGE_SIZE)


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU seconds of a Python process and of what it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def seconds_per_cell(place: Place) -> float:
    """Return the seconds between the ends of two cells that train for a moment, one after another."""
    file, ends = Path(f"{place.workspace.root}/grid.toml"), list[float]()
    file.write_text(GRID)
    plan = plan_benchmark(place.workspace, read_benchmark(file), BenchmarkSettings(parallel=1, num_cpus=1))
    failures = run_benchmark(plan, Mirror(place.workspace), no_bar, lambda text: ends.append(time.perf_counter()))
    assert not failures
    return statistics.median(np.diff(ends).tolist())


def seconds_of_reads(place: Place) -> float:
    """Return how much longer a view of a large store takes, with its checksums, than the same bytes of a file."""
    for step in ("make", "write"):
        take_step(step, str(place.workspace.root), STORED, channels=512)
    store = find_store(place.workspace)
    plain = Path(f"{store.path}/plain.bin")
    store.read_view("pooled", 0).tofile(plain)
    times = []
    for read in (lambda: store.read_view("pooled", 0), lambda: np.fromfile(plain, np.float16)):
        start = time.perf_counter()
        for _ in range(READS):
            read()
        times.append(time.perf_counter() - start)
    plain.unlink()
    return times[0] / times[1]


def rate_extraction(place: Workspace, manifest: Manifest, settings: ExtractSettings) -> float:
    """Return views per second between the first and the last shard that end: starting a tower is not counted."""
    ends: list[tuple[float, int]] = []

    def note(done: int, total: int, /, **facts: float) -> None:
        ends.append((time.perf_counter(), done))

    extract(place, [manifest], settings, note)
    (start, before), (end, after) = ends[0], ends[-1]
    return (after - before) * settings.views / (end - start)


def rate_bare_tower(manifest: Manifest, tower: FrozenBackbone, input_size: int) -> float:
    """Return pictures per second of a loop that decodes, resizes, normalises and embeds them."""
    prepare = transforms.Compose(
        [
            transforms.Resize((input_size, input_size)),
            transforms.ToTensor(),
            transforms.Normalize(tower.facts.mean, tower.facts.std),
        ]
    )
    tower.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(manifest), BATCH):
            rows = range(first, min(first + BATCH, len(manifest)))
            images = torch.stack([prepare(_open(manifest, row)) for row in rows])
            tower(images.contiguous(memory_format=torch.channels_last))
    return len(manifest) / (time.perf_counter() - start)


def rate_epoch(manifest: Manifest, features: FeatureSource, plan: ViewPlan, width: int, image_size: int) -> float:
    """Return faces per second of an epoch of CAFE on an augmented view."""
    torch.manual_seed(0)
    method = Cafe(Recipe(), Inputs(width, image_size=image_size)).to(memory_format=torch.channels_last)
    dataset = FaceDataset(manifest, plan, method.needs, image_size, features)
    training = Training(method, method, method.optimizer(), dataset, manifest.rows("train"), 0, CPU)
    return training.run_epoch(1)["faces_per_second"]


def rate_bare_branch(manifest: Manifest, image_size: int) -> float:
    """Return faces per second of a plain loop that trains the image branch with torchvision's transforms."""
    augment = transforms.Compose(
        [
            transforms.Resize((image_size, image_size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            transforms.RandomErasing(),
        ]
    )
    torch.manual_seed(0)
    network = models.resnet18(num_classes=7).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    rows = manifest.rows("train")
    start = time.perf_counter()
    for batch in torch.randperm(len(rows)).split(Recipe.batch_size):
        images = torch.stack([augment(_open(manifest, int(rows[place]))) for place in batch])
        labels = torch.from_numpy(manifest.labels[rows[batch.numpy()]]).long()
        loss = functional.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(rows) / (time.perf_counter() - start)


def _open(manifest: Manifest, row: int) -> Image.Image:
    with manifest.path(row).open("rb") as file:
        return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
