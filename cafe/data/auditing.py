"""Which faces of one data set are copies of another's, counted by split and kept as a list of pairs.

What is read of the faces lies on disk, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cafe.data.copies import THUMBNAIL, CopyIndex, Pairs, Progress, draw_thumbnail
from cafe.data.images import UnreadableImageError
from cafe.data.manifest import Manifest
from cafe.data.rows import SPLITS, read_values
from cafe.seals import encode_table
from cafe.spool import ArraySpool


@dataclass
class SplitThumbnails:
    """The readable faces of a split: manifest `rows` (N,) and `pictures` (N, 64, 64); `faces` counts all of the split.

    `broken` lists the unreadable ones as (sample, reason).
    """

    rows: ArraySpool = field(default_factory=lambda: ArraySpool((), np.int64))
    pictures: ArraySpool = field(default_factory=lambda: ArraySpool((THUMBNAIL, THUMBNAIL), np.uint8))
    faces: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SplitPair:
    """Copies between a split of the source and one of the target: `copied` target faces among `faces`, in `pairs`."""

    source_split: str
    target_split: str
    faces: int
    pairs: int
    copied: int
    relabelled: int  # target faces with a copy under another label


@dataclass(frozen=True)
class Audit:
    """The copies between two manifests: `pairs` holds manifest rows; `broken` the (sample, reason) left out."""

    source: Manifest
    target: Manifest
    pairs: Pairs
    splits: list[SplitPair]
    broken: list[tuple[str, str]]


def audit(source: Manifest, targets: list[Manifest], reading: Progress, comparing: Progress) -> Iterator[Audit]:
    """Compare the source's splits with each other, then with every target; yield each result once it is known.

    `reading` counts pictures and `comparing` faces of one manifest.
    """
    own = _read_thumbnails(source, reading)
    indexes = {split: CopyIndex(one.pictures) for split, one in own.items() if len(one.rows)}
    for target in [source, *(target for target in targets if target.name != source.name)]:
        itself = target is source
        read = own if itself else _read_thumbnails(target, reading)
        found, splits = [], []
        for source_split, index in indexes.items():
            for target_split, faces in read.items():
                if not len(faces.rows) or (itself and SPLITS.index(source_split) >= SPLITS.index(target_split)):
                    continue
                pairs = index.find(faces.pictures, comparing)
                pairs = Pairs(own[source_split].rows[pairs.first], faces.rows[pairs.second], pairs.similarity)
                relabelled = pairs.second[_name_classes(source, pairs.first) != _name_classes(target, pairs.second)]
                copied = (len(np.unique(numbers)) for numbers in (pairs.second, relabelled))
                splits.append(SplitPair(source_split, target_split, faces.faces, len(pairs), *copied))
                found.append(pairs)
        parts = [*own.values(), *(() if itself else read.values())]
        broken = [entry for part in parts for entry in part.broken]
        yield Audit(source, target, Pairs.concatenate(found), splits, broken)


def _read_thumbnails(manifest: Manifest, progress: Progress) -> dict[str, SplitThumbnails]:
    """Return the thumbnails of each split, in one pass through the files."""
    found = {split: SplitThumbnails() for split in SPLITS}
    said = read_values(manifest.table, "split", "sample_id")
    drawn = manifest.survey(range(len(manifest)), draw_thumbnail, progress)
    for (split, sample), (row, result) in zip(said, drawn, strict=True):
        found[split].faces += 1
        if isinstance(result, UnreadableImageError):
            found[split].broken.append((f"{manifest.name}: {sample}", str(result)))
        else:
            found[split].rows.extend(np.array([row]))
            found[split].pictures.extend(result[None])
    return found


def _name_classes(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return the names of the classes of a few rows, (n,) of text, without reading those of all."""
    return manifest.choose(rows).name_classes(np.arange(len(rows)))


def encode_audit(result: Audit) -> bytes:
    """Return the pairs as Parquet, by target sample, the most similar first, with the digests of the manifests."""
    pairs = result.pairs
    order = np.lexsort((pairs.first, -pairs.similarity, pairs.second))
    source, target = result.source.table.take(pairs.first[order]), result.target.table.take(pairs.second[order])
    table = pa.table({
        "source_sample_id": source["sample_id"],
        "source_split": source["split"],
        "target_sample_id": target["sample_id"],
        "target_split": target["split"],
        "similarity": pa.array(pairs.similarity[order], pa.float32()),  # of the two pictures once registered, 0–1
    })  # fmt: skip
    about = {
        "source": result.source.name,
        "source_digest": result.source.digest,
        "target": result.target.name,
        "target_digest": result.target.digest,
        "unreadable": result.broken,
    }
    return encode_table(table.replace_schema_metadata({"cafe.audit": json.dumps(about)}))
