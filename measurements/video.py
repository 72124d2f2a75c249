"""How much memory `cafe predict` needs for a long video: the same run on a short and on a two-minute video of 720p.

The videos are made of real faces that wander over a background, several at a time, at 25 frames a second. The command runs
in a process of its own; its largest resident memory and its rate are printed for each length. Memory that is bounded is the
same for both.

    python measurements/video.py --workspace work --run cafe-news-s0 --faces ~/faces
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import click
import numpy as np
import pandas as pd
from PIL import Image

SIZE = (1280, 720)  # pixels
FACE = 200  # pixels
FRAMES_PER_SECOND = 25


@click.command()
@click.option("--workspace", "-w", default="work", show_default=True)
@click.option("--run", required=True, help="Trained run, or a folder of `cafe export`.")
@click.option("--faces", required=True, help="Folder of pictures of one face each.")
@click.option("--people", default=4, show_default=True, help="Faces in every frame.")
@click.option("--rate", default=5.0, show_default=True, help="Frames a second that are predicted.")
@click.option("--seconds", default=(10, 120), multiple=True, show_default=True, help="Length of a video; several.")
def main(workspace: str, run: str, faces: str, people: int, rate: float, seconds: tuple[int, ...]) -> None:
    """Print memory and rate for each length."""
    found = sorted(path for path in Path(faces).rglob("*.*") if path.suffix.lower() in (".jpg", ".png"))
    with tempfile.TemporaryDirectory() as folder:
        for length in seconds:
            video, output = Path(folder) / f"{length}.mp4", Path(folder) / f"{length}.csv"
            make_video(video, [found[(7 * number) % len(found)] for number in range(people)], length)
            command = [sys.executable, "-m", "cafe.jobs.cli", "-w", workspace, "predict", run, str(video)]
            start = time.perf_counter()
            process = subprocess.Popen([*command, "--rate", str(rate), "--output", str(output)])
            _, status, usage = os.wait4(process.pid, 0)  # of this process alone
            taken = time.perf_counter() - start
            if status:
                raise SystemExit(f"`cafe predict` ended with exit code {os.waitstatus_to_exitcode(status)}.")
            rows = pd.read_csv(output)
            frames, predicted = rows["frame"].nunique(), int(rows["expression"].notna().sum())
            click.echo(
                f"{length} s of {SIZE[0]} × {SIZE[1]}: {frames} frames, {predicted} faces in {taken:.0f} s "
                f"({frames / taken:.1f} frames/s), {usage.ru_maxrss / 2**20:.2f} GiB at most"
            )


def make_video(file: Path, photos: list[Path], seconds: int) -> None:
    """Write a video in which the faces of photos wander over a background, each on an orbit of its own."""
    width, height = SIZE
    across, down = np.meshgrid(np.linspace(40, 120, width), np.linspace(60, 140, height))
    ground = np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8)
    faces = [np.asarray(Image.open(photo).convert("RGB").resize((FACE, FACE))) for photo in photos]
    lane = width // len(faces)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(FRAMES_PER_SECOND))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 8_000_000
        for number in range(seconds * FRAMES_PER_SECOND):
            picture = ground.copy()
            for place, face in enumerate(faces):
                angle = number / FRAMES_PER_SECOND * (0.5 + 0.2 * place)
                left = int(place * lane + (lane - FACE) * (1 + np.cos(angle)) / 2)
                top = int((height - FACE) * (1 + np.sin(angle)) / 2)
                picture[top : top + FACE, left : left + FACE] = face
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
