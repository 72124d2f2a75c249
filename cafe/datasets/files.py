"""What every reader shares: a listing of labelled files, and the pass that opens each of them once.

A reader only says which files there are and what they show; hashing, headers, broken files and splits happen here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from upath import UPath

from cafe.errors import UserError
from cafe.images import UnreadableImageError, read_bytes, read_size
from cafe.manifest import SPLITS, Face, Manifest, assign_splits

READERS = 16  # threads: opening files waits for the disk or the network

SPLIT_ALIASES = {
    "training": "train",
    "testing": "test",
    "valid": "val",
    "validation": "val",
}


@dataclass(frozen=True)
class Listing:
    """The labelled files a reader found: `files` are paths below `root`; `ignored` counts what is no image."""

    root: UPath
    files: list[LabelledFile]
    layout: str
    ignored: int = 0


@dataclass(frozen=True)
class LabelledFile:
    """A file before it was opened."""

    path: str
    label: int
    split: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Index:
    """A manifest and what was seen on the way: `broken` (path, reason) and `duplicates`, groups of equal files."""

    manifest: Manifest
    layout: str
    ignored: int
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of samples whose files are byte for byte the same."""
        seen: dict[str, list[str]] = {}
        for sample_id, digest in zip(self.manifest.sample_ids, self.manifest.table["digest"].to_pylist(), strict=True):
            seen.setdefault(digest, []).append(sample_id)
        return [group for group in seen.values() if len(group) > 1]

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


def index_files(name: str, listing: Listing, progress: Callable[[int], None] = lambda advance: None) -> Index:
    """Open every listed file once and return its manifest; a file that cannot be read is named, never fatal.

    `progress` is called with the number of files opened since the last call.
    """
    faces: list[Face] = []
    broken: list[tuple[str, str]] = []
    for result in _open_all(listing):
        progress(1)
        if isinstance(result, Face):
            faces.append(result)
        else:
            broken.append(result)
    if not faces:
        reason = f" (first: {broken[0][0]}: {broken[0][1]})" if broken else ""
        raise UserError(f"No readable face image below {listing.root}{reason}: give the folder that holds the faces.")
    manifest = Manifest.from_faces(name, str(listing.root), assign_splits(faces))
    return Index(manifest, listing.layout, listing.ignored, sorted(broken))


def _open_all(listing: Listing) -> Iterator[Face | tuple[str, str]]:
    def open_one(file: LabelledFile) -> Face | tuple[str, str]:
        try:
            data = read_bytes(listing.root / file.path)
            width, height = read_size(data)
        except UnreadableImageError as error:
            return file.path, str(error)
        digest = hashlib.sha256(data).hexdigest()
        return Face(file.path, file.path, file.label, file.split, file.group, width, height, digest)

    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(open_one, listing.files)
