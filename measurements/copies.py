"""Measure the audit on real faces: recall of each kind of copy, false alarms between two collections, and time.

python measurements/copies.py WORKSPACE fer news        # two manifests that share no picture
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cafe.data.copies import CopyIndex, draw_thumbnail
from cafe.data.images import UnreadableImageError
from cafe.data.manifest import Manifest
from cafe.pipeline.workspace import Workspace

EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda face: face,
    "mirrored": ImageOps.mirror,
    "turned by 90°": lambda face: face.rotate(90, expand=True),
    "turned by 180°": lambda face: face.rotate(180),
    "mirrored and turned by 270°": lambda face: ImageOps.mirror(face).rotate(270, expand=True),
    "brightened by 1.3": lambda face: ImageEnhance.Brightness(face).enhance(1.3),
    "brightened by 1.6": lambda face: ImageEnhance.Brightness(face).enhance(1.6),
    "darkened by 0.6": lambda face: ImageEnhance.Brightness(face).enhance(0.6),
    "mirrored and brightened by 1.3": lambda face: ImageEnhance.Brightness(ImageOps.mirror(face)).enhance(1.3),
}


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace")
    parser.add_argument("source")
    parser.add_argument("other")
    parser.add_argument("--faces", type=int, default=3000, help="faces of the source, and at most of the other")
    parser.add_argument("--copies", type=int, default=100, help="of each kind")
    arguments = parser.parse_args()
    workspace = Workspace.at(arguments.workspace)
    source, other = (workspace.load_manifest(name) for name in (arguments.source, arguments.other))
    rows = choose(source, arguments.faces)
    start = time.perf_counter()
    index = CopyIndex(read_thumbnails(source, rows))
    print(f"index of {len(rows):,} faces: {time.perf_counter() - start:.1f} s with reading", flush=True)
    for name, edit in EDITS.items():
        faces = [Image.fromarray(source.read_face(int(row))) for row in rows[: arguments.copies]]
        found = index.find(np.stack([draw_thumbnail(np.asarray(edit(face))) for face in faces]))
        recall = len(set(found.second[found.first == found.second]))
        print(f"{name}: {recall} of {len(faces)}", flush=True)
    strangers = read_thumbnails(other, choose(other, arguments.faces))
    start = time.perf_counter()
    found = index.find(strangers)
    seconds = time.perf_counter() - start
    print(f"{len(strangers):,} faces of {other.name} looked up in {seconds:.1f} s: {len(found)} false alarms")


def choose(manifest: Manifest, count: int) -> np.ndarray:
    """Return some rows, the same ones every time."""
    return np.random.default_rng(0).permutation(len(manifest))[:count]


def read_thumbnails(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return thumbnails (N, 64, 64); raise `UnreadableImageError`."""
    thumbnails = []
    for _, thumbnail in manifest.survey(rows, draw_thumbnail):
        if isinstance(thumbnail, UnreadableImageError):
            raise thumbnail
        thumbnails.append(thumbnail)
    return np.stack(thumbnails)


if __name__ == "__main__":
    main()
