"""`cafe data audit`: which faces of the targets are copies of the source's, and of the source's own other splits.

Writes audits/SOURCE/TARGET.parquet, one row per pair, and a page with the pairs side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cafe.data.copies import THUMBNAIL, CopyIndex, Pairs, draw_thumbnail
from cafe.data.expressions import EXPRESSIONS
from cafe.data.images import UnreadableImageError
from cafe.data.manifest import SPLITS, Manifest
from cafe.report.pages import embed, render
from cafe.results.leaks import audit_path
from pipeline.workspace import Workspace

SHOWN = 60  # pairs on the page from the least similar ones, and as many from all others

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Thumbnails:
    """The thumbnails (N, 64, 64) of one split's readable faces, and their manifest rows (N,)."""

    rows: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class SplitPair:
    """Copies between a split of the source and one of the target: `copied` target faces among `faces`, in `pairs`."""

    source_split: str
    target_split: str
    faces: int
    copied: int
    pairs: int
    relabelled: int  # target faces with a copy of another label


@dataclass(frozen=True)
class Audit:
    """The copies between two manifests: `pairs` holds manifest rows; `broken` the (sample, reason) left out."""

    source: Manifest
    target: Manifest
    pairs: Pairs
    splits: list[SplitPair]
    broken: list[tuple[str, str]] = field(default_factory=list)


def audit(
    workspace: Workspace, source: Manifest, targets: list[Manifest], reading: Progress, comparing: Progress
) -> Iterator[Audit]:
    """Compare the source's splits with each other, then with every target; yield each result once it is written.

    `reading` counts pictures and `comparing` faces of one manifest.
    """
    own, own_broken = read_thumbnails(source, reading)
    indexes = {split: CopyIndex(faces.pixels) for split, faces in own.items()}
    for target in [source, *(target for target in targets if target.name != source.name)]:
        itself = target is source
        faces, broken = (own, []) if itself else read_thumbnails(target, reading)
        found, splits = [], []
        for source_split, index in indexes.items():
            for target_split, part in faces.items():
                if itself and SPLITS.index(source_split) >= SPLITS.index(target_split):
                    continue
                pairs = index.find(part.pixels, comparing)
                pairs = Pairs(own[source_split].rows[pairs.first], part.rows[pairs.second], pairs.similarity)
                splits.append(_count(source, target, source_split, target_split, pairs))
                found.append(pairs)
        result = Audit(source, target, Pairs.concatenate(found), splits, [*own_broken, *broken])
        path = audit_path(workspace.root, source.name, target.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".html").write_bytes(draw_page(result))
        save(result, path)
        yield result


def read_thumbnails(manifest: Manifest, progress: Progress) -> tuple[dict[str, Thumbnails], list[tuple[str, str]]]:
    """Return the thumbnails of each split, and (sample, reason) of every unreadable picture."""
    order = np.concatenate([manifest.rows(split) for split in SPLITS])
    pixels = np.empty((len(order), THUMBNAIL, THUMBNAIL), np.uint8)
    readable = np.ones(len(order), bool)
    broken = []
    for place, (row, result) in enumerate(manifest.survey(order, draw_thumbnail, progress)):
        if isinstance(result, UnreadableImageError):
            readable[place] = False
            broken.append((f"{manifest.name}: {manifest.sample_ids[row]}", str(result)))
        else:
            pixels[place] = result
    parts, end = {}, 0
    for split in SPLITS:
        start, end = end, end + len(manifest.rows(split))
        good = np.flatnonzero(readable[start:end]) + start
        if len(good):
            # A split without broken pictures stays a view: a copy would double the memory of a large set.
            parts[split] = Thumbnails(order[good], pixels[start:end] if len(good) == end - start else pixels[good])
    return parts, broken


def _count(source: Manifest, target: Manifest, source_split: str, target_split: str, pairs: Pairs) -> SplitPair:
    relabelled = pairs.second[source.labels[pairs.first] != target.labels[pairs.second]]
    copied, copied_otherwise = len(np.unique(pairs.second)), len(np.unique(relabelled))
    return SplitPair(source_split, target_split, len(target.rows(target_split)), copied, len(pairs), copied_otherwise)


def save(result: Audit, path: UPath) -> None:
    """Write the pairs as Parquet, by target sample and most similar first; the digests say which manifests they hold of."""
    order = np.lexsort((result.pairs.first, -result.pairs.similarity, result.pairs.second))
    source, target = (
        result.source.table.take(result.pairs.first[order]),
        result.target.table.take(result.pairs.second[order]),
    )
    table = pa.table({
        "source_sample_id": source["sample_id"],
        "source_split": source["split"],
        "target_sample_id": target["sample_id"],
        "target_split": target["split"],
        "similarity": pa.array(result.pairs.similarity[order], pa.float32()),  # of the two pictures once registered, 0–1
    })  # fmt: skip
    about = {
        "source": result.source.name,
        "source_digest": result.source.digest,
        "target": result.target.name,
        "target_digest": result.target.digest,
        "unreadable": result.broken,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"cafe.audit": json.dumps(about)}), sink)
    path.write_bytes(sink.getvalue().to_pybytes())


def draw_page(result: Audit) -> bytes:
    """Return the page of one audit: counts per pair of splits and pairs of pictures, the most doubtful first."""
    found = result.pairs
    order = np.argsort(found.similarity, kind="stable")
    rest = order[SHOWN:]
    shown = [*order[:SHOWN], *rest[np.unique(np.linspace(0, len(rest) - 1, SHOWN).astype(int))]] if len(rest) else order
    within = f"Copies within {result.source.name}"
    between = f"Copies of {result.source.name} in {result.target.name}"
    return render(
        "audit.html",
        title=within if result.source is result.target else between,
        splits=result.splits,
        pairs=[
            (_face(result.source, found.first[n]), _face(result.target, found.second[n]), float(found.similarity[n]))
            for n in shown
        ],
        total=len(found),
        copied=len(np.unique(found.second)),
        broken=result.broken,
    )


def _face(manifest: Manifest, row: int) -> dict[str, str]:
    entry = manifest.table.slice(int(row), 1).to_pylist()[0]
    label, picture = EXPRESSIONS[entry["label"]], embed(manifest.read_face(int(row)))
    return {"picture": picture, "id": entry["sample_id"], "split": entry["split"], "label": label}
