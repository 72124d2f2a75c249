"""What every reader shares: a listing of labelled files, and the pass that opens each of them once.

A reader only says which files there are and what they show; hashing, headers, broken files and splits happen here.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from PIL import Image
from upath import UPath

from cafe.data.counts import Expected
from cafe.data.images import Box, UnreadableImageError, clip_box, read_bytes, read_size
from cafe.data.manifest import SPLITS, Face, Manifest, assign_splits
from cafe.errors import UserError

READERS = 16  # threads
AT_ONCE = 64  # files a thread takes at a time: 300,000 single tasks would cost more than they do

Item = TypeVar("Item")
Result = TypeVar("Result")

SPLIT_ALIASES = {
    "training": "train",
    "testing": "test",
    "valid": "val",
    "validation": "val",
}


@dataclass(frozen=True)
class Listing:
    """The labelled files a reader found.

    `files` are paths below `root`, `layout` says what was recognised there, `kind` which data set it is. `ignored` counts
    files that are no faces of it, `dropped` faces that show none of the seven expressions, by reason; `rejected` names
    label rows that cannot be used (where, reason), and `packed` archives that lie there still packed. `expected` is what a
    complete copy holds, and `repeated` names what was listed more than once and counts once.
    """

    root: UPath
    files: list[LabelledFile]
    layout: str
    kind: str
    ignored: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    expected: tuple[Expected, ...] = ()
    repeated: list[str] = field(default_factory=list)

    def counts(self) -> Counter[tuple[str, int]]:
        """Files per (split, label)."""
        return Counter((file.split, file.label) for file in self.files)


@dataclass(frozen=True)
class LabelledFile:
    """A face before it was opened: a file, a `box` of it, or grey `pixels` (H, W) uint8 that are no file yet."""

    path: str
    label: int
    split: str = ""
    group: str | None = None
    box: Box | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Index:
    """A manifest and what was seen on the way: `broken` (path, reason) and `duplicates`, groups of equal files.

    `dropped` counts the faces left out because they show none of the seven expressions, by reason; `repeated` names what
    was listed more than once and counts once.
    """

    manifest: Manifest
    layout: str
    ignored: int
    broken: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of samples whose files are byte for byte the same."""
        seen: dict[str, list[str]] = {}
        columns = (self.manifest.table[name].to_pylist() for name in ("digest", "box"))
        for sample_id, digest, box in zip(self.manifest.sample_ids, *columns, strict=True):
            seen.setdefault(f"{digest} {box}", []).append(sample_id)
        return [group for group in seen.values() if len(group) > 1]

    @property
    def training_twins(self) -> Counter[str]:
        """How many faces of each other split are also in the training split, byte for byte."""
        columns = (self.manifest.table[name].to_pylist() for name in ("split", "digest", "box"))
        faces = [(split, f"{digest} {box}") for split, digest, box in zip(*columns, strict=True)]
        trained = {face for split, face in faces if split == "train"}
        return Counter(split for split, face in faces if split != "train" and face in trained)

    def counts(self) -> Counter[tuple[str, int]]:
        """Faces per (split, label)."""
        splits = self.manifest.table["split"].to_pylist()
        return Counter(zip(splits, self.manifest.labels.tolist(), strict=True))


def parse_split(name: str) -> str:
    """Return `train`, `val` or `test` for a split in any known spelling; raise `UserError`."""
    key = name.strip().lower()
    key = SPLIT_ALIASES.get(key, key)
    if key not in SPLITS:
        raise UserError(f"Unknown split {name!r}: choose {', '.join(SPLITS)}.")
    return key


def index_files(
    name: str,
    listing: Listing,
    progress: Callable[[int], None] = lambda advance: None,
    images: UPath | None = None,
) -> Index:
    """Open every listed file once and return its manifest; a file that cannot be read is named, never fatal.

    `progress` is called with the number of files opened since the last call. Faces that are pixels of a table are first
    written as PNG below `images`, which is then the manifest's root.
    """
    if any(file.pixels is not None for file in listing.files):
        assert images is not None
        for folder in {(images / file.path).parent for file in listing.files}:
            folder.mkdir(parents=True, exist_ok=True)
        listing = replace(listing, root=images)
    faces: list[Face] = []
    broken: list[tuple[str, str]] = list(listing.rejected)
    for result in _open_all(listing):
        progress(1)
        if isinstance(result, Face):
            faces.append(result)
        else:
            broken.append(result)
    if not faces:
        reason = f" (first: {broken[0][0]}: {broken[0][1]})" if broken else ""
        raise UserError(f"No readable face image below {listing.root}{reason}: give the folder that holds the faces.")
    manifest = Manifest.from_faces(name, str(listing.root), assign_splits(faces), listing.kind)
    return Index(manifest, listing.layout, listing.ignored, sorted(broken), listing.dropped, listing.repeated)


def _open_all(listing: Listing) -> Iterator[Face | tuple[str, str]]:
    def open_one(file: LabelledFile) -> Face | tuple[str, str]:
        path = listing.root / file.path
        box = file.box
        try:
            data = read_bytes(path) if file.pixels is None else _write_pixels(path, file.pixels)
            width, height = read_size(data)
            if box:
                box = clip_box(box, width, height)
                width, height = box[2:]
        except UnreadableImageError as error:
            return file.path, str(error)
        digest = hashlib.sha256(data).hexdigest()
        return Face(file.path, file.path, file.label, file.split, file.group, width, height, digest, box)

    yield from map_threads(open_one, listing.files)


def map_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `function(item)` in order, computed on threads that wait for the disk or the network."""

    def map_some(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + AT_ONCE]]

    with ThreadPoolExecutor(READERS) as pool:
        for results in pool.map(map_some, range(0, len(items), AT_ONCE)):
            yield from results


def _write_pixels(path: UPath, pixels: np.ndarray) -> bytes:
    """Write grey pixels as a PNG and return its bytes: uncompressed, so that no version of a library changes them."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=0)
    path.write_bytes(sink.getvalue())
    return sink.getvalue()
