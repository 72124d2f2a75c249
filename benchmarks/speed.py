"""What the pipeline costs and what its cache saves, each as a ratio to a bare loop timed beside it.

    python benchmarks/speed.py --faces 600

Stage one: `cafe extract` on one core, from its first finished shard to its last, against a loop that decodes, resizes and
embeds pictures and keeps nothing. Stage two: an epoch of CAFE from the cache, and one with the tower on the fly, against a
loop over torchvision's transforms and the image branch alone. On a shared machine only the ratios mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from PIL import Image
from torch.nn import functional
from torchvision import models, transforms
from upath import UPath

from cafe.data import DATASETS
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.learning.loading import FaceDataset, FeatureReader
from cafe.learning.training import Training
from cafe.learning.views import ViewPlan
from cafe.methods.cafe import Cafe, Recipe
from cafe.methods.method import Inputs
from cafe.synthetic.domains import write
from cafe.towers.building import FrozenBackbone, load_backbone
from cafe.towers.embedding import Embedder
from pipeline import cluster
from pipeline.features.extract import extract
from pipeline.features.reader import FeatureReader as StoredFeatures
from pipeline.features.store import FeatureStore
from pipeline.settings import ExtractSettings
from pipeline.workspace import Workspace

BATCH = 64  # of the tower
VIEWS = 2
CPU = torch.device("cpu")


@click.command()
@click.option("--faces", default=600, show_default=True, help="Synthetic faces to draw.")
@click.option("--backbone", default="imagenet-lite0", show_default=True)
@click.option("--input-size", default=128, show_default=True, help="Of the tower, pixels.")
@click.option("--image-size", default=64, show_default=True, help="Of the image branch, pixels.")
@click.option("--repeats", default=3, show_default=True)
def main(faces: int, backbone: str, input_size: int, image_size: int, repeats: int) -> None:
    """Time both stages and the bare loops in turn and print the medians."""
    torch.set_num_threads(1)
    settings = ExtractSettings(
        backbone=backbone, input_size=input_size, views=VIEWS, shard_rows=BATCH // VIEWS, batch_size=BATCH, num_cpus=1
    )
    with TemporaryDirectory() as folder, cluster.connect(settings):
        write(Path(folder), "studio", faces)
        manifest = index_files("studio", DATASETS["synthetic"](UPath(folder) / "studio")).manifest
        places = [Workspace.at(f"{folder}/work{number}") for number in range(repeats)]
        for place in places:
            manifest.save(place.manifest_path("studio"))
        tower = load_backbone(backbone, input_size=input_size)
        first = [
            (rate_extraction(place, manifest, settings), rate_bare_tower(manifest, tower, input_size))
            for place in places
        ]
        ours, bare = (statistics.median(rates) for rates in zip(*first, strict=True))
        click.echo(f"stage one: {ours:.0f} views/s, {ours / bare:.2f} of a bare loop's ({bare:.0f})")

        (done,) = extract(places[0], [manifest], settings, lambda done, total: None)
        cached = StoredFeatures(FeatureStore(done.store, done.about), ["pooled"])
        live = Embedder(tower, manifest, done.about.key.view_plan, "cpu", batch_size=BATCH)
        names = ("from the cache", "tower on the fly", "image branch alone")
        epochs: Sequence[Callable[[], float]] = (
            lambda: rate_epoch(manifest, cached, done.about.key.view_plan, tower.facts.width, image_size),
            lambda: rate_epoch(manifest, live, done.about.key.view_plan, tower.facts.width, image_size),
            lambda: rate_bare_branch(manifest, image_size),
        )
        rates = [
            statistics.median(column)
            for column in zip(*([run() for run in epochs] for _ in range(repeats)), strict=True)
        ]
        for name, rate in zip(names, rates, strict=True):
            click.echo(f"stage two, {name}: {rate:.0f} faces/s, {rate / rates[-1]:.2f} of the bare loop's")


def rate_extraction(place: Workspace, manifest: Manifest, settings: ExtractSettings) -> float:
    """Return views per second between the first and the last shard that end: starting a tower is not counted."""
    ends: list[tuple[float, int]] = []
    extract(place, [manifest], settings, lambda done, total: ends.append((time.perf_counter(), done)))
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


def rate_epoch(manifest: Manifest, features: FeatureReader, plan: ViewPlan, width: int, image_size: int) -> float:
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
