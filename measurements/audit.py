"""Measure the audit: recall and precision on planted copies, time and memory at 20,000 and 200,000 faces.

    python measurements/audit.py FOLDER                    # draws twice 20,000 synthetic faces into FOLDER, once
    python measurements/audit.py FOLDER --index 200000     # times an index of 200,000 thumbnails, mixed from those faces

Copies are cropped by 0–4 % on every side, resized by ½ to 1½, half of them greyed, and compressed as JPEG of quality 30–90.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from pathlib import Path

import numpy as np
from copies import read_thumbnails
from PIL import Image
from upath import UPath

from cafe.data.copies import CopyIndex, draw_thumbnail
from cafe.data.images import decode_image
from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.synthetic.domains import DOMAINS, write


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faces", type=int, default=20_000, help="faces of either set")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--crop", type=float, default=0.04, help="most that is cropped of each side")
    parser.add_argument("--index", type=int, help="time an index of so many mixed thumbnails instead")
    parser.add_argument("--targets", type=int, default=2000, help="faces looked up in it")
    arguments = parser.parse_args()
    source, start = load(arguments.folder, 0, arguments.faces), time.perf_counter()
    if arguments.index:
        time_index(read(source), arguments.index, arguments.targets)
        return
    first = read(source)
    report(f"read {len(first):,} faces", start)
    second = read(load(arguments.folder, 1, arguments.faces))
    originals, copies = plant(source, arguments.copies, arguments.crop)
    measure(first, second, originals, copies)


def load(folder: Path, seed: int, faces: int) -> list[Manifest]:
    """Return the five domains drawn with a seed, which are drawn when they are not there."""
    root = folder / f"faces-{faces}-{seed}"
    for domain in DOMAINS:
        if not (root / domain).is_dir():
            write(root, domain, faces // len(DOMAINS), seed)
    return [index_files(domain, DATASETS["synthetic"](UPath(root / domain))).manifest for domain in DOMAINS]


def read(manifests: list[Manifest]) -> np.ndarray:
    """Return the thumbnails of all faces, (N, 64, 64)."""
    return np.concatenate([read_thumbnails(manifest, manifest.rows("all")) for manifest in manifests])


def plant(manifests: list[Manifest], count: int, crop: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of `count` faces among all and the thumbnails of a copy of each."""
    rng = np.random.default_rng(0)
    places = [(manifest, row) for manifest in manifests for row in range(len(manifest))]
    originals = np.sort(rng.choice(len(places), count, replace=False))
    faces = (manifest.read_face(row) for manifest, row in (places[place] for place in originals))
    return originals, np.stack([draw_thumbnail(copy(pixels, crop, rng)) for pixels in faces])


def copy(pixels: np.ndarray, crop: float, rng: np.random.Generator) -> np.ndarray:
    """Return a cropped, resized, perhaps greyed and recompressed copy of a picture."""
    height, width = pixels.shape[:2]
    left, right, top, bottom = rng.uniform(0, crop, 4)
    picture = Image.fromarray(pixels).crop(
        (
            round(left * width),
            round(top * height),
            width - round(right * width),
            height - round(bottom * height),
        )
    )
    scale = max(rng.uniform(0.5, 1.5), 40 / min(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = picture.convert("L")
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=int(rng.integers(30, 91)))
    return decode_image(data.getvalue())


def measure(first: np.ndarray, second: np.ndarray, originals: np.ndarray, copies: np.ndarray) -> None:
    """Print recall and precision of finding the copies, planted among the faces of the second set."""
    start = time.perf_counter()
    index = CopyIndex(first)
    report(f"index of {len(first):,}", start)
    start = time.perf_counter()
    found = index.find(np.concatenate([second, copies]))
    report(f"{len(second) + len(copies):,} faces looked up", start)
    planted = found.second >= len(second)
    right = planted & (found.first == originals[np.where(planted, found.second - len(second), 0)])
    faces = len(np.unique(found.second[right]))
    wrong = np.setdiff1d(found.second, found.second[right])
    print(f"recall {faces}/{len(copies)} = {faces / len(copies):.4f}")
    print(f"precision {faces / (faces + len(wrong)):.4f} of faces, {right.mean():.4f} of {len(found)} pairs")
    report("all", start)


def time_index(thumbnails: np.ndarray, count: int, targets: int) -> None:
    """Print time and memory of an index of `count` thumbnails, each a mixture of two faces, some mirrored."""
    rng = np.random.default_rng(0)
    one, two = (thumbnails[rng.integers(len(thumbnails), size=count + targets)] for _ in range(2))
    two[::2] = two[::2, :, ::-1]
    mixed = one // 2 + two // 2
    del one, two
    start = time.perf_counter()
    index = CopyIndex(mixed[:count])
    report(f"index of {count:,}", start)
    start = time.perf_counter()
    found = index.find(mixed[count:])
    report(f"{targets:,} faces looked up, {len(found)} pairs", start)


def report(what: str, start: float) -> None:
    """Print how long something took and the most memory used so far."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - start:.1f} s, at most {memory:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
