"""`cafe predict` on photos, in faces per second, against the bare loop: detector and tower, and nothing else.

Photos are made of real faces: each one on a plain ground, in the sizes of a camera's previews. Both sides take the same
files and start with their networks loaded; reading, decoding and finding faces are a part of both. They take turns, some
hundred photos each, so that other work on the machine slows both alike; the median of the turns counts.

    python measurements/predict.py --workspace work --run cafe-news-s0 --faces ~/faces --photos 2000
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from upath import UPath

from cafe.data.alignment import find_detector
from cafe.inference.frames import read_frames
from cafe.inference.model import BATCH_SIZE, Model
from cafe.inference.recognition import SEARCHED, Search, predict_frames
from cafe.pipeline.release.library import load_model
from cafe.views.pixels import normalise

GROUND = (96, 120, 96)
SIZE = (512, 384)  # pixels, of a photo
FACE = 240  # pixels


@click.command()
@click.option("--workspace", "-w", default="work", show_default=True)
@click.option("--run", required=True, help="Trained run, one that reads frozen features.")
@click.option("--faces", required=True, help="Folder of pictures of one face each.")
@click.option("--photos", default=2000, show_default=True)
@click.option("--turn", default=200, show_default=True, help="Photos at a time.")
def main(workspace: str, run: str, faces: str, photos: int, turn: int) -> None:
    """Compare the speed of `cafe predict` with that of a bare loop."""
    model = load_model(run, workspace, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        files = make_photos(Path(faces), Path(folder), photos)
        for rate in (rate_ours, rate_bare):
            rate(files[:BATCH_SIZE], model)  # the first pass of a network is slow
        turns = [files[start : start + turn] for start in range(0, photos, turn)]
        rates = np.array([(rate_ours(some, model), rate_bare(some, model)) for some in turns])
    ours, bare = np.median(rates, axis=0)
    ratios = rates[:, 0] / rates[:, 1]
    click.echo(
        f"{photos} photos: {ours:.1f} faces/s, a bare loop {bare:.1f}; ratio {np.median(ratios):.2f} "
        f"({ratios.min():.2f} to {ratios.max():.2f} in {len(turns)} turns)"
    )


def make_photos(faces: Path, folder: Path, count: int) -> list[UPath]:
    """Put one face into each photo, going round the faces there are; returns the files."""
    found = sorted(path for path in faces.rglob("*.*") if path.suffix.lower() in (".jpg", ".png"))
    random, files = np.random.default_rng(0), []
    for number in range(count):
        photo = Image.new("RGB", SIZE, GROUND)
        with Image.open(found[(7 * number) % len(found)]) as face:
            left, top = (int(random.integers(side - FACE + 1)) for side in SIZE)
            photo.paste(face.convert("RGB").resize((FACE, FACE)), (left, top))
        files.append(UPath(folder / f"{number:05d}.jpg"))
        with files[-1].open("wb") as file:
            photo.save(file, "JPEG", quality=92)
    return files


def rate_ours(files: Sequence[UPath], model: Model) -> float:
    """Return faces per second as the command finds, aligns and predicts them."""
    start = time.perf_counter()
    faces = sum(len(predicted.faces) for predicted in predict_frames(read_frames(files, 1.0), model, Search()))
    return faces / (time.perf_counter() - start)


def rate_bare(files: Sequence[UPath], model: Model) -> float:
    """Return faces per second of a loop that decodes, detects, cuts boxes out and embeds them: nothing is classified."""
    assert model.tower is not None
    detector, tower = find_detector(), model.tower.backbone
    side, faces = tower.facts.input_size, 0
    waiting: list[np.ndarray] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(files), SEARCHED):
            photos = [
                np.asarray(Image.open(path.open("rb")).convert("RGB")) for path in files[first : first + SEARCHED]
            ]
            for photo, found in zip(photos, detector.detect(np.stack(photos)), strict=True):
                for left, top, right, bottom in found.boxes.clip(0).astype(int):
                    crop = Image.fromarray(photo[top : bottom + 1, left : right + 1]).resize((side, side))
                    waiting.append(np.asarray(crop))
            if len(waiting) >= BATCH_SIZE or first + SEARCHED >= len(files):
                pixels, nothing = torch.from_numpy(np.stack(waiting)), torch.zeros(len(waiting), 4, dtype=torch.int64)
                images = normalise(pixels, nothing, model.tower.plan.mean, model.tower.plan.std)
                tower(images.contiguous(memory_format=torch.channels_last))
                faces += len(waiting)
                waiting = []
    return faces / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
