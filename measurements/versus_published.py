"""The released way against the cache: what it costs to come to the same weights.

    python measurements/versus_published.py --faces 400 --epochs 10

As released, the tower runs on every augmented picture of every epoch, in every run: here a plain loop of PyTorch that takes
from this project only the views, the order of the faces and CAFE's losses. With the cache, every view goes through the tower
once, and all runs read it. Both ways must end in the same weights, bit for bit; CPU seconds and tower passes are compared
for one run and for a grid of runs on one source.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from upath import UPath

from cafe.arithmetic import set_arithmetic
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset, epoch_order
from cafe.learning.training import Training
from cafe.methods.cafe import Cafe, Recipe
from cafe.methods.method import Inputs
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.features.key import StoreInfo
from cafe.pipeline.features.store import FeatureReader, FeatureStore
from cafe.pipeline.features.stream import pack_shards
from cafe.pipeline.features.worker import ShardEmbedder
from cafe.pipeline.process import machine
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.randomness import random_generator
from cafe.synthetic.domains import write
from cafe.towers.building import FrozenBackbone, load_backbone
from cafe.views.drawing import ViewPlan
from cafe.views.pixels import normalise

SEED = 0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """Faces, how their views are drawn, and what sees them: the tower and the image branch."""

    manifest: Manifest
    plan: ViewPlan
    tower: FrozenBackbone
    recipe: Recipe
    image_size: int

    def method(self) -> Cafe:
        """Return CAFE with the initial weights of the seed."""
        torch.manual_seed(SEED)
        inputs = Inputs(self.tower.facts.width, image_size=self.image_size)
        return Cafe(self.recipe, inputs).to(memory_format=torch.channels_last)


@click.command()
@click.option("--faces", default=400, show_default=True, help="Synthetic faces to draw.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--backbone", default="imagenet-lite0", show_default=True)
@click.option("--input-size", default=128, show_default=True, help="Of the tower, pixels.")
@click.option("--image-size", default=32, show_default=True, help="Of the image branch, pixels.")
@click.option("--runs", default=15, show_default=True, help="Of the grid: methods × seeds.")
def main(faces: int, epochs: int, backbone: str, input_size: int, image_size: int, runs: int) -> None:
    """Train both ways, compare the weights, and print CPU seconds and tower passes."""
    torch.set_num_threads(machine.cores())
    set_arithmetic("fp32")
    recipe = Recipe(epochs=epochs)
    settings = ExtractSettings(
        backbone=backbone, input_size=input_size, views=epochs + 1, batch_size=recipe.batch_size, num_actors=1
    )
    with TemporaryDirectory() as folder:
        write(Path(folder), "studio", faces)
        manifest = index_files("studio", DATASETS["synthetic"](UPath(folder) / "studio")).manifest
        workspace = Workspace.at(f"{folder}/work")
        manifest.save(workspace.manifest_path("studio"))
        store, filling = fill(workspace, manifest, settings)
        tower = load_backbone(backbone, input_size=input_size).to(memory_format=torch.channels_last)
        source = Source(manifest, store.info.key.view_plan, tower, recipe, image_size)
        cached, reading = train_from_cache(source, store)
        released, running = train_as_released(source, store.info)
    same = all(torch.equal(cached[name], value) for name, value in released.items())
    click.echo(f"same weights, bit for bit: {'yes' if same else 'NO'}")
    trained, passes = len(manifest.rows("train")), len(manifest) * (epochs + 1)
    click.echo(f"{'':<12}{'as released':>24}{'with the cache':>24}{'ratio':>8}")
    for name, count in (("one run", 1), (f"{runs} runs", runs)):
        ours, theirs = filling + count * reading, count * running
        ours_passes, theirs_passes = passes, count * trained * epochs
        click.echo(f"{name:<12}{theirs:>22.1f} s{ours:>22.1f} s{theirs / ours:>8.1f}")
        click.echo(f"{'':<12}{theirs_passes:>17,} passes{ours_passes:>17,} passes{theirs_passes / ours_passes:>8.1f}")


def fill(workspace: Workspace, manifest: Manifest, settings: ExtractSettings) -> tuple[FeatureStore, float]:
    """Return a store filled by one worker in this process, and the CPU seconds that took."""
    about = describe_store(manifest, settings, look_up_tower(workspace, settings))
    store = FeatureStore.create(workspace.features / manifest.name, about, manifest)
    without_rows = replace(manifest, table=manifest.table.slice(0, 0))
    embedder = ShardEmbedder({str(store.path): store.info}, without_rows, settings, machine.cores(), "cpu")
    assert embedder.embedder.tower.facts.width == about.width  # loaded before the clock starts, as for the other way
    start = time.process_time()
    for shard in store.pending():
        packed = pack_shards(manifest, store.info, [shard])
        assert embedder({name: [value] for name, value in packed.items()})["fault"] == [""]
    return store, time.process_time() - start


def train_from_cache(source: Source, store: FeatureStore) -> tuple[dict[str, Tensor], float]:
    """Return the weights that the store's features lead to, and the CPU seconds of the training."""
    method, plan = source.method(), source.plan
    dataset = FaceDataset(source.manifest, plan, method.needs, source.image_size, FeatureReader([[store]], ["pooled"]))
    training = Training(method, method, method.optimizer(), dataset, source.manifest.rows("train"), SEED, CPU)
    start = time.process_time()
    for epoch in range(1, source.recipe.epochs + 1):
        training.run_epoch(epoch)
    return method.state_dict(), time.process_time() - start


def train_as_released(source: Source, about: StoreInfo) -> tuple[dict[str, Tensor], float]:
    """Return the weights that the tower at work in every step leads to, and the CPU seconds of the training."""
    method = source.method()
    method.train()
    optimizer, rates = method.optimizer(), source.recipe.learning_rate
    start = time.process_time()
    for epoch in range(1, source.recipe.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = rates * source.recipe.gamma ** (epoch - 1)
        for step, (images, frozen, labels) in enumerate(_batches(source, about, epoch)):
            seed = int(random_generator(SEED, "step", epoch, step).integers(2**62))
            torch.default_generator.manual_seed(seed)
            output = method({"image": images, "features": frozen})
            targets = {"label": labels, "epoch": epoch, "generator": torch.Generator().manual_seed(seed)}
            loss = method.losses(output, {**targets, "log_prior": torch.zeros(7)})["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return method.state_dict(), time.process_time() - start


def _batches(source: Source, about: StoreInfo, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images (n, 3, S, S), frozen features (n, C), rounded as in the store, and labels (n,) of an epoch."""
    manifest, plan, tower = source.manifest, source.plan, source.tower
    view = plan.view_of(epoch)
    for rows in epoch_order(manifest.rows("train"), manifest.labels, source.recipe, SEED, epoch, smallest=2):
        seen = []
        for size, (mean, std) in (
            (tower.facts.input_size, about.key.normalisation),
            (source.image_size, (plan.mean, plan.std)),
        ):
            drawn = [
                plan.render(manifest.read_face(row), manifest.sample_ids[row], view, size) for row in rows.tolist()
            ]
            pictures, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
            seen.append(normalise(pictures, boxes, mean, std).contiguous(memory_format=torch.channels_last))
        with torch.inference_mode():
            # Libraries round otherwise for other sizes of a batch, so that the last one is filled up, as in the store.
            filled = functional.pad(seen[0], (0, 0, 0, 0, 0, 0, 0, about.batch_size - len(rows)))
            pooled, _ = tower.read(filled.contiguous(memory_format=torch.channels_last), [tower.layer], with_map=False)[
                0
            ]
        frozen = pooled[: len(rows)].half().float().clone()
        yield seen[1], frozen, torch.from_numpy(manifest.labels[rows])


if __name__ == "__main__":
    main()
