"""Both stages on a GPU, each as a share of a bare loop over data that lies on the device already.

Stage one: `--faces` JPEG files of 224 pixels (those of a folder, copied until there are so many), 61 views of each, through
ViT-B/32 with random weights, in bf16, against its bare forward pass. Stage two: epochs of CAFE at 224 pixels on what stage
one stored, against the bare step of the same method; and several such trainings at once, as processes that share the GPU.
Views made on the device are compared with those that Pillow makes, bit for bit.

    python measurements/gpu.py FOLDER --faces 4096
"""

from __future__ import annotations

import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset, KeptPictures
from cafe.learning.training import Training, autocast
from cafe.methods.cafe import Cafe, Recipe
from cafe.methods.method import Inputs
from cafe.pipeline.features.extract import Extraction, extract
from cafe.pipeline.features.store import FeatureReader, FeatureStore
from cafe.pipeline.settings import ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.towers.building import load_backbone
from cafe.views.device import make_views
from cafe.views.drawing import ViewPlan
from cafe.views.rendering import Renderer, ViewParameters

MODEL, SIDE, VIEWS, BATCH = "ViT-B-32-quickgelu", 224, 61, 512
CUDA = torch.device("cuda")
STEPS = 50
REPEATS = 3


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--faces", default=4096, show_default=True)
@click.option("--train-faces", default=2048, show_default=True, help="Of an epoch of stage two.")
@click.option("--parallel", default=4, show_default=True, help="Trainings at once.")
def main(folder: Path, faces: int, train_faces: int, parallel: int) -> None:
    """Print every rate and its share of the bare one."""
    with TemporaryDirectory() as place:
        root, workspace = Path(place), Workspace.at(f"{place}/work")
        manifest = copy_faces(folder, root / "faces", faces)
        manifest.save(workspace.manifest_path(manifest.name))
        model = open_clip.create_model(MODEL)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, root / "vit.safetensors")
        backbone = f"open_clip:{MODEL}@{root}/vit.safetensors"
        settings = ExtractSettings(backbone=backbone, views=VIEWS, precision="bf16", batch_size=BATCH)

        click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(manifest)} faces of 224 pixels")
        compare_views(manifest)
        bare = statistics.median(rate_forward(backbone) for _ in range(REPEATS))
        click.echo(f"bare forward pass {bare:,.0f} views/s")
        for decoders in (4, 4, 4, 2):
            shutil.rmtree(str(workspace.features), ignore_errors=True)
            done, rate = rate_extraction(workspace, manifest, replace(settings, decoders=decoders))
            click.echo(
                f"stage one, {decoders} processes decode: {rate:,.0f} views/s, {rate / bare:.2f} of the bare pass"
            )

        store, rows = FeatureStore(done.store, done.info), np.arange(train_faces)
        for precision in ("fp32", "bf16"):
            step = statistics.median(rate_step(store, precision) for _ in range(REPEATS))
            click.echo(f"bare step in {precision} {step:,.0f} faces/s")
            training = make_training(manifest, store, rows, precision)
            rates = [training.run_epoch(epoch)["faces_per_second"] for epoch in range(1, 2 + REPEATS)]
            shares = ", ".join(f"{rate:,.0f} ({rate / step:.2f})" for rate in rates)
            click.echo(f"stage two in {precision}, epoch by epoch: {shares} faces/s")
        for count in (2, parallel):
            with ProcessPoolExecutor(count, get_context("spawn")) as pool:
                rates = list(
                    pool.map(train_apart, *zip(*[(manifest, store.path, store.info, rows)] * count, strict=True))
                )
            click.echo(f"{count} trainings at once, fp32: {sum(rates):,.0f} faces/s together")


def copy_faces(folder: Path, to: Path, count: int) -> Manifest:
    """Copy the files of a folder in turn until there are so many, as seven expressions, and index them."""
    files = sorted(path for path in folder.rglob("*.jpg"))
    for number, path in enumerate(islice(cycle(files), count)):
        expression = to / ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")[number % 7]
        expression.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, expression / f"{number}.jpg")
    return index_files("copies", DATASETS["folder"](UPath(to))).manifest


def compare_views(manifest: Manifest) -> None:
    """Check that views made on the device are those that Pillow makes, bit for bit, and say how fast they are."""
    for interpolation in ("bilinear", "bicubic"):
        plan = ViewPlan("paper", 0, VIEWS, interpolation, (0.5,) * 3, (0.5,) * 3)
        for side in (48, 96, 224):
            samples = [(row, view) for row in range(8) for view in range(VIEWS)]
            renderer = Renderer(manifest, plan, side)
            drawn, rendered = renderer.draw(samples, {}), renderer.render(samples, {})
            assert isinstance(drawn, ViewParameters)
            made = make_views(drawn, side, plan, "cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            make_views(drawn, side, plan, "cuda")
            torch.cuda.synchronize()
            took = time.perf_counter() - start
            assert np.array_equal(made.cpu().numpy(), rendered.pictures), (interpolation, side)
            click.echo(
                f"{len(samples)} views of {side} pixels, {interpolation}: equal; {len(samples) / took:,.0f} views/s"
            )


def rate_forward(backbone: str) -> float:
    """Return views per second of the tower on pictures that lie on the device."""
    tower = load_backbone(backbone, "bf16", SIDE).to("cuda").to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for step in range(STEPS + 5):
            if step == 5:
                torch.cuda.synchronize()
                start = time.perf_counter()
            tower.read(images, [tower.layer])
        torch.cuda.synchronize()
    return BATCH * STEPS / (time.perf_counter() - start)


def rate_extraction(workspace: Workspace, manifest: Manifest, settings: ExtractSettings) -> tuple[Extraction, float]:
    """Return views per second between the first and the last shard that end: starting a tower is not counted."""
    ends: list[tuple[float, int]] = []

    def note(done: int, total: int, /, **facts: float) -> None:
        ends.append((time.perf_counter(), done))

    (done,) = extract(workspace, [manifest], settings, note)
    (start, before), (end, after) = ends[0], ends[-1]
    return done, (after - before) * settings.views / (end - start)


def make_training(manifest: Manifest, store: FeatureStore, rows: np.ndarray, precision: str) -> Training:
    """Return a training of CAFE, as published but for its data."""
    torch.manual_seed(0)
    method = Cafe(Recipe(), Inputs(store.info.width, image_size=SIDE)).to(CUDA).to(memory_format=torch.channels_last)
    features = FeatureReader([[store]], ["pooled"])
    dataset = FaceDataset(KeptPictures(manifest, 2**34), store.info.key.view_plan, method.needs, SIDE, features)
    return Training(method, method, method.optimizer(), dataset, rows, 0, CUDA, precision)


def rate_step(store: FeatureStore, precision: str) -> float:
    """Return faces per second of the method's step on a batch that lies on the device."""
    torch.manual_seed(0)
    method = Cafe(Recipe(), Inputs(store.info.width, image_size=SIDE)).to(CUDA).to(memory_format=torch.channels_last)
    optimizer, size = method.optimizer(), Recipe.batch_size
    images = torch.randn(size, 3, SIDE, SIDE, device=CUDA).contiguous(memory_format=torch.channels_last)
    batch = {"image": images, "flipped_image": images.flip(3), "label": torch.arange(size, device=CUDA) % 7}
    batch |= {"features": torch.randn(size, store.info.width, device=CUDA), "row": torch.arange(size, device=CUDA)}
    targets = {
        **batch,
        "epoch": 1,
        "generator": torch.Generator().manual_seed(0),
        "log_prior": torch.zeros(7, device=CUDA),
    }
    for step in range(STEPS + 5):
        if step == 5:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with autocast(CUDA, precision):
            output = method(batch)
        losses = method.losses({name: value.float() for name, value in output.items()}, targets)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    torch.cuda.synchronize()
    return size * STEPS / (time.perf_counter() - start)


def train_apart(manifest: Manifest, path: UPath, about: object, rows: np.ndarray) -> float:
    """Return faces per second of the second epoch in a process of its own."""
    training = make_training(manifest, FeatureStore(path, about), rows, "fp32")  # type: ignore[arg-type]
    return [training.run_epoch(epoch)["faces_per_second"] for epoch in (1, 2)][-1]


if __name__ == "__main__":
    main()
