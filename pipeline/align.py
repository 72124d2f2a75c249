"""`cafe data align`: the photos of a manifest or folder → upright face crops, a manifest of them, and a list of every photo.

A photo is never dropped in silence: alignment.parquet has a row for each crop, and one with the reason for each photo
without a crop.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from cafe.data.alignment import Aligned, align_faces
from cafe.data.folder import list_files
from cafe.data.images import SUFFIXES, UnreadableImageError
from cafe.data.manifest import Face, Manifest
from cafe.data.survey import survey
from cafe.errors import UserError
from pipeline.settings import AlignSettings
from pipeline.workspace import Workspace, locate

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),  # of the photo
        (
            "aligned_id",
            pa.string(),
        ),  # of the crop: that of its photo, with @2, @3 … for further faces; null without one
        ("path", pa.string()),  # of the crop, below its folder
        ("reason", pa.string()),  # why there is no crop
        ("faces", pa.int32()),  # found in the photo
        ("tiny_faces", pa.int32()),  # of these, too small to use
        ("confidence", pa.float32()),
        ("box", pa.list_(pa.float32())),  # left, top, right, bottom in pixels of the photo
        ("eyes", pa.list_(pa.float32())),  # x, y of the one and of the other
    ]
)
CHUNK = 64  # photos decoded before the detector runs on them
UNLABELLED = -1


@dataclass
class Alignment:
    """What was made: the rows of alignment.parquet, the folder of the crops, and the manifest's path if there is one."""

    folder: UPath
    rows: list[dict[str, Any]] = field(default_factory=list)
    manifest: UPath | None = None

    @property
    def crops(self) -> int:
        """How many crops there are."""
        return sum(row["path"] is not None for row in self.rows)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """The photos without a crop, and why."""
        return [(row["sample_id"], row["reason"]) for row in self.rows if row["reason"]]

    def outcomes(self) -> Counter[str]:
        """Count the photos by what became of them."""
        photos = {row["sample_id"]: row for row in self.rows}
        return Counter(_outcome(row) for row in photos.values())


def _outcome(row: dict[str, Any]) -> str:
    if row["path"] is None:
        return "unreadable" if row["faces"] is None else "no face" if row["faces"] == 0 else "only tiny faces"
    return "one face" if row["faces"] == 1 else "several faces"


def find_photos(workspace: Workspace, source: str) -> Manifest:
    """Return the manifest of that name, or an unlabelled one of the photos in the folder of that name; raise `UserError`."""
    if source in workspace.manifest_names() or not locate(source).is_dir():
        return workspace.load_manifest(source)
    root = locate(source)
    paths = [path for path in list_files(root) if PurePosixPath(path).suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(
            f"There is no photo below {root}: give a folder that holds {', '.join(sorted(SUFFIXES))} files."
        )
    return Manifest.from_faces(
        root.name, str(root), [Face(path, path, UNLABELLED, "", None, 0, 0, "") for path in paths]
    )


def align_photos(
    workspace: Workspace, photos: Manifest, settings: AlignSettings, progress: Callable[[int, int], None]
) -> Alignment:
    """Crop the faces of photos below aligned/NAME, list what became of each, and write the manifest of labelled ones.

    Raises `UserError` before anything is written when originals would be overwritten, and when no photo has a face.
    """
    folder = locate(settings.out) if settings.out else workspace.root / "aligned" / settings.name
    if settings.name == photos.name and workspace.manifest_path(photos.name).exists():
        raise UserError(f"The manifest {photos.name!r} would overwrite itself: give another --name.")
    if str(folder).rstrip("/") == photos.root.rstrip("/"):
        raise UserError(f"The crops would overwrite the photos in {folder}: give another --out.")
    result, faces = Alignment(folder), []
    for sample, row, aligned in _align(photos, settings, progress):
        if isinstance(aligned, UnreadableImageError):
            result.rows.append(_entry(sample, reason=str(aligned)))
            continue
        counts = {"faces": aligned.found, "tiny_faces": aligned.tiny}
        if aligned.reason:
            result.rows.append(_entry(sample, reason=aligned.reason, **counts))
        for number, (crop, found) in enumerate(zip(aligned.crops, aligned.detections, strict=True), start=1):
            aligned_id = sample if number == 1 else f"{sample}@{number}"
            path = _crop_path(sample, number)
            digest = _save(crop, folder / path)
            where = {"confidence": found.confidence, "box": list(found.box), "eyes": found.eyes.ravel().tolist()}
            result.rows.append(_entry(sample, aligned_id=aligned_id, path=path, **counts, **where))
            about = photos.table.slice(row, 1).to_pylist()[0]
            faces.append(
                Face(
                    aligned_id,
                    path,
                    about["label"],
                    about["split"],
                    about["group"],
                    settings.size,
                    settings.size,
                    digest,
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    _save_list(result.rows, folder / "alignment.parquet")
    if not faces:
        first = result.left_out[0]
        raise UserError(
            f"None of the {len(photos)} photos has a usable face (first: {first[0]}: {first[1]}): lower --smallest or "
            f"--confidence; {folder / 'alignment.parquet'} lists them all."
        )
    if photos.labels[0] != UNLABELLED:
        result.manifest = workspace.manifest_path(settings.name)
        Manifest.from_faces(settings.name, str(folder), faces).save(result.manifest)
    return result


def _align(
    photos: Manifest, settings: AlignSettings, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, int, Aligned | UnreadableImageError]]:
    """Yield (sample, row, what became of it) of every photo."""
    decoded = survey(photos, photos.rows("all"), lambda pixels: pixels)
    done = 0
    while chunk := list(islice(decoded, CHUNK)):
        good = [(row, pixels) for row, pixels in chunk if isinstance(pixels, np.ndarray)]
        found = align_faces(
            [pixels for _, pixels in good],
            settings.size,
            settings.smallest,
            settings.faces == "all",
            settings.confidence,
        )
        outcomes = dict(zip([row for row, _ in good], found, strict=True))
        for row, pixels in chunk:
            yield photos.sample_ids[row], row, pixels if isinstance(pixels, UnreadableImageError) else outcomes[row]
        done += len(chunk)
        progress(done, len(photos))


def _crop_path(sample: str, number: int) -> str:
    """Return a path of its own for every crop: the photo's, as JPEG."""
    path = PurePosixPath(sample if sample.lower().endswith((".jpg", ".jpeg")) else f"{sample}.jpg")
    return str(path if number == 1 else path.with_name(f"{path.stem}@{number}{path.suffix}"))


def _save(crop: np.ndarray, path: UPath) -> str:
    """Write a crop and return the digest of its file."""
    data = io.BytesIO()
    Image.fromarray(crop).save(data, "JPEG", quality=95, subsampling=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    return hashlib.sha256(data.getvalue()).hexdigest()


def _entry(sample: str, **known: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA.names), "sample_id": sample, **known}


def _save_list(rows: list[dict[str, Any]], path: UPath) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    path.write_bytes(sink.getvalue().to_pybytes())
