"""Which faces of one data set are copies of another's, counted by split and kept as a list of pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cafe.data.copies import THUMBNAIL, CopyIndex, Pairs, Progress, draw_thumbnail
from cafe.data.images import UnreadableImageError
from cafe.data.manifest import Manifest
from cafe.data.rows import SPLITS
from cafe.seals import encode_table

Thumbnails = dict[str, tuple[np.ndarray, np.ndarray]]  # of each split the manifest rows (N,) and pictures (N, 64, 64)


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
    own, own_broken = _read_thumbnails(source, reading)
    indexes = {split: CopyIndex(pictures) for split, (_, pictures) in own.items()}
    for target in [source, *(target for target in targets if target.name != source.name)]:
        itself = target is source
        faces, broken = (own, []) if itself else _read_thumbnails(target, reading)
        found, splits = [], []
        for source_split, index in indexes.items():
            for target_split, (rows, pictures) in faces.items():
                if itself and SPLITS.index(source_split) >= SPLITS.index(target_split):
                    continue
                pairs = index.find(pictures, comparing)
                pairs = Pairs(own[source_split][0][pairs.first], rows[pairs.second], pairs.similarity)
                differs = source.name_classes(pairs.first) != target.name_classes(pairs.second)
                relabelled = pairs.second[differs]
                copied = (len(np.unique(numbers)) for numbers in (pairs.second, relabelled))
                splits.append(
                    SplitPair(source_split, target_split, len(target.rows(target_split)), len(pairs), *copied)
                )
                found.append(pairs)
        yield Audit(source, target, Pairs.concatenate(found), splits, [*own_broken, *broken])


def _read_thumbnails(manifest: Manifest, progress: Progress) -> tuple[Thumbnails, list[tuple[str, str]]]:
    """Return the thumbnails of each split, and (sample, reason) of every unreadable picture."""
    splits = manifest.table["split"].to_pylist()
    order = np.concatenate([manifest.rows(split) for split in SPLITS])
    pictures = np.empty((len(order), THUMBNAIL, THUMBNAIL), np.uint8)
    rows: list[int] = []
    broken = []
    for row, result in manifest.survey(order, draw_thumbnail, progress):
        if isinstance(result, UnreadableImageError):
            broken.append((f"{manifest.name}: {manifest.sample_ids[row]}", str(result)))
        else:
            pictures[len(rows)] = result
            rows.append(row)
    # The readable ones lie split by split, so that each part is a view: a copy would double the memory of a large set.
    parts, start = {}, 0
    for split in SPLITS:
        own = [row for row in rows if splits[row] == split]
        if own:
            parts[split] = np.array(own), pictures[start : start + len(own)]
        start += len(own)
    return parts, broken


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
