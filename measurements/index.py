"""How long indexing takes and what it needs, for several sizes of a data set: time per face must not grow with their number.

    python measurements/index.py --faces 75000 300000

Lays out faces as MMA does, all links to a few small pictures, so that it measures our own work and not the disk's.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers.mma import read_mma

FOLDERS = [f"{split}/{name}" for split in ("train", "valid", "test") for name in ("angry", "happy", "neutral", "sad")]
LINKS = 30_000  # of one file; file systems allow 65,000


def lay_out(root: Path, faces: int) -> None:
    """Write that many faces into folders of splits and expressions."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48), np.uint8)).save(sink, "JPEG", quality=80)
    for number in range(faces):
        original, place = root / f"{number // LINKS}.bin", root / FOLDERS[number % len(FOLDERS)] / f"{number}.jpg"
        if number % LINKS == 0:
            original.write_bytes(sink.getvalue())
        os.link(original, place)


@contextmanager
def measure(name: str, faces: int) -> Iterator[None]:
    """Print how long a step took, per face, and the most memory this process ever needed."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{faces:>9,} {name:<22} {seconds:8.2f} s {1e6 * seconds / faces:8.1f} µs/face {peak:8.0f} MB\n")
    sys.stdout.flush()


def run(faces: int) -> None:
    """Index, save and load that many faces and read every path."""
    with TemporaryDirectory() as folder:
        root, file = Path(folder) / "MMAFEDB", UPath(folder) / "mma.parquet"
        lay_out(root, faces)
        with measure("start", faces):
            pass
        with measure("list", faces):
            listing = read_mma(UPath(root))
        with measure("open and index", faces):
            manifest = index_files("mma", listing, place=file).manifest
        with measure("save", faces):
            manifest.save(file)
        with measure("load", faces):
            manifest = Manifest.load(file)
        with measure("path of every row", faces):
            for row in range(faces):
                manifest.path(row)
        with measure("digest", faces):
            assert len(manifest.digest) == 64
        with measure("rows of a split", faces):
            assert len(manifest.rows("train")) == len([file for file in listing.files if file.split == "train"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=int, nargs="+", default=[75_000, 300_000])
    sizes = parser.parse_args().faces
    if len(sizes) == 1:
        run(sizes[0])
    else:
        for size in sizes:  # each in a process of its own, for the sake of its peak memory
            subprocess.run([sys.executable, __file__, "--faces", str(size)], check=True)
