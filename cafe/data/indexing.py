"""What all readers share: a listing of labelled files, what a complete copy holds, and the pass that opens each file once.

A reader only says which files there are and what they show; sizes, digests, broken files and splits are handled here.
"""

from __future__ import annotations

import hashlib
import io
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from upath import UPath

from cafe.data.expressions import EXPRESSIONS, OTHERS, parse_expression
from cafe.data.images import Box, UnreadableImageError, clip_box, read_bytes, read_size
from cafe.data.manifest import Face, Manifest, assign_splits, map_threads
from cafe.errors import UserError
from cafe.files import write_file

OWN_KINDS = ("folder", "synthetic", "table")  # sets of the user's own, which may be split at will
TOTAL = "all"  # stands for the expression where only the sum of a split is known


@dataclass(frozen=True)
class Expected:
    """What a split of a complete copy holds: faces per expression in the order of `EXPRESSIONS`, or their total alone.

    `source` tells where the numbers come from; `doubt`, when there is one, why they may be wrong.
    """

    split: str
    counts: tuple[int, ...]
    source: str
    doubt: str = ""


def read_expected(name: str) -> tuple[Expected, ...]:
    """Return what a complete copy of a data set holds, as counts.toml says."""
    entries = tomllib.loads(Path(__file__).with_name("counts.toml").read_text(encoding="utf-8"))[name]
    return tuple(Expected(**{**entry, "counts": tuple(entry["counts"])}) for entry in entries)


@dataclass(frozen=True)
class CountDifference:
    """A number of faces that is not the expected one; a certain difference means that the copy is not the data set."""

    split: str
    expression: str
    expected: int
    found: int
    certain: bool
    source: str


def count_differences(expected: Sequence[Expected], found: Counter[tuple[str, int]]) -> list[CountDifference]:
    """Return where the faces found per (split, label) differ from what is expected.

    A difference is certain where the numbers are known per expression and beyond doubt, or where a split is missing.
    """
    differences = []
    for split in expected:
        known = len(split.counts) == len(EXPRESSIONS)
        numbers = [found[split.split, label] for label in range(len(EXPRESSIONS))]
        certain = (known and not split.doubt) or not any(numbers)
        source = f"{split.source}; {split.doubt}" if split.doubt else split.source
        names, numbers = (EXPRESSIONS, numbers) if known else ((TOTAL,), [sum(numbers)])
        differences += [
            CountDifference(split.split, name, wanted, number, certain, source)
            for name, wanted, number in zip(names, split.counts, numbers, strict=True)
            if number != wanted
        ]
    return differences


@dataclass(frozen=True)
class LabelledFile:
    """A face before it was opened: a file, a `box` of it, or grey `pixels` (H, W) uint8 that are no file yet."""

    path: str
    label: int
    split: str = ""
    group: str | None = None
    box: Box | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)


@dataclass
class Listing:
    """The labelled files a reader finds, filled in as it goes through them.

    `files` are paths below `root`, `layout` says what was recognised there, `kind` which data set it is, `expected` what a
    complete copy holds, `packed` which archives have not been unpacked. `ignored` counts files that are no faces of the set,
    `dropped` faces that show none of the seven expressions, by reason; `rejected` names rows of label files that cannot
    be used (where, reason), `repeated` pictures that are listed more than once and count once.
    """

    root: UPath
    kind: str
    layout: str
    expected: tuple[Expected, ...] = ()
    packed: list[str] = field(default_factory=list)
    files: list[LabelledFile] = field(default_factory=list)
    ignored: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def add(self, path: str, label: int, split: str = "", **more: Any) -> None:
        """Add a face: its file below `root`, label and split, and further fields of `LabelledFile`."""
        self.files.append(LabelledFile(path, label, split, **more))

    def add_labelled(self, where: str, file: str, path: str | None, expression: str, split: str, **more: Any) -> None:
        """Add the face that a row of a label file names, or note why it cannot be used.

        `where` is the row, `file` the picture it names, `path` where that lies below `root`, `expression` a name.
        """
        if expression.casefold() in OTHERS:
            self.dropped[expression.casefold()] += 1
        elif path is None:
            self.reject(file, "file not found")
        else:
            try:
                self.add(path, parse_expression(expression), split, **more)
            except UserError as error:
                self.reject(where, str(error))

    def group_by_name(self) -> None:
        """Make the faces whose file names agree up to the first `_` a group."""
        self.files = [replace(file, group=PurePosixPath(file.path).name.split("_")[0]) for file in self.files]

    def count_ignored(self, pictures: list[str]) -> None:
        """Count the pictures below `root` that no label names."""
        self.ignored = max(0, len(pictures) - len(self.files) - self.dropped.total())

    def reject(self, where: str, reason: str) -> None:
        """Note a row of a label file that cannot be used."""
        self.rejected.append((where, reason))

    def put_into(self, split: str) -> None:
        """Put every face into one split; raise `UserError` for a published set, whose splits its protocols rely on."""
        if self.expected or self.kind not in OWN_KINDS:
            raise UserError(
                f"--split {split} has no meaning for {self.kind}, which comes split: it is for {', '.join(OWN_KINDS)}."
            )
        self.files = [replace(file, split=split) for file in self.files]

    def counts(self) -> Counter[tuple[str, int]]:
        """Files per (split, label)."""
        return Counter((file.split, file.label) for file in self.files)


@dataclass(frozen=True)
class Index:
    """A manifest, the listing it was made from, and every file or row that could not be used: `broken` (where, reason)."""

    manifest: Manifest
    listing: Listing
    broken: list[tuple[str, str]]

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of samples whose files are byte for byte the same."""
        same: dict[str, list[str]] = {}
        for sample_id, content in zip(self.manifest.sample_ids, self._contents, strict=True):
            same.setdefault(content, []).append(sample_id)
        return [group for group in same.values() if len(group) > 1]

    @property
    def training_twins(self) -> Counter[str]:
        """How many faces of each other split are also in the training split, byte for byte."""
        faces = list(zip(self.manifest.table["split"].to_pylist(), self._contents, strict=True))
        trained = {content for split, content in faces if split == "train"}
        return Counter(split for split, content in faces if split != "train" and content in trained)

    @property
    def _contents(self) -> list[str]:
        digests, boxes = (self.manifest.table[name].to_pylist() for name in ("digest", "box"))
        return [f"{digest} {box}" for digest, box in zip(digests, boxes, strict=True)]

    def counts(self) -> Counter[tuple[str, int]]:
        """Faces per (split, label)."""
        return Counter(zip(self.manifest.table["split"].to_pylist(), self.manifest.labels.tolist(), strict=True))


def index_files(
    name: str,
    listing: Listing,
    progress: Callable[[int, int], None] = lambda done, total: None,
    images: UPath | None = None,
) -> Index:
    """Open every listed file once and return its manifest; a file that cannot be read is named, never fatal.

    `progress(done, total)` counts files. Faces that are pixels of a table are first written as PNG below `images`, which
    is then the manifest's root. Raises `UserError` when not one file can be read.
    """
    root = listing.root
    if any(file.pixels is not None for file in listing.files):
        assert images is not None
        root = images
    faces, broken = [], list(listing.rejected)
    for done, result in enumerate(map_threads(lambda file: _open(root, file), listing.files), start=1):
        if isinstance(result, Face):
            faces.append(result)
        else:
            broken.append(result)
        progress(done, len(listing.files))
    if not faces:
        reason = f" (first: {broken[0][0]}: {broken[0][1]})" if broken else ""
        raise UserError(f"No readable face image below {root}{reason}: give the folder that holds the faces.")
    manifest = Manifest.from_faces(name, str(root), assign_splits(faces), listing.kind)
    return Index(manifest, listing, sorted(broken))


def _open(root: UPath, file: LabelledFile) -> Face | tuple[str, str]:
    """Return a face with its size and digest, or (path, reason) when its file cannot be read."""
    path, box = root / file.path, file.box
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


def _write_pixels(path: UPath, pixels: np.ndarray) -> bytes:
    """Write grey pixels as a PNG and return its bytes: uncompressed, so that no version of a library changes them."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=0)
    write_file(path, sink.getvalue())
    return sink.getvalue()
