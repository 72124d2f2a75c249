"""Data sets made or looked at in a workspace: drawn faces, aligned crops, pages about pictures and lists of copies.

No photo is left out of an alignment in silence: alignment.parquet has a row for each crop, and one with the reason for each
photo without a crop.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from cafe.data.alignment import Aligned, align_faces, find_detector
from cafe.data.images import UnreadableImageError, list_suffixes, suffix_of
from cafe.data.indexing import index_files
from cafe.data.layouts import is_image, list_files
from cafe.data.manifest import NAME, Face, Manifest
from cafe.data.packed.archives import is_archive
from cafe.data.readers import DATASETS
from cafe.errors import UserError
from cafe.files import check_different, check_outputs, exists, list_folder, locate, place_below, remove_file, write_file
from cafe.pipeline.process.progress import Progress
from cafe.pipeline.settings import AlignSettings, ExtractSettings
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.results.leaks import audit_path
from cafe.synthetic.domains import write

if TYPE_CHECKING:
    from cafe.data.auditing import Audit
    from cafe.data.checking import Check

SCHEMA = pa.schema([
    ("sample_id", pa.string()),  # of the photo
    ("aligned_id", pa.string()),  # of the crop: that of its photo, with @2, @3 … for further faces; null without one
    ("path", pa.string()),  # of the crop, below its folder
    ("reason", pa.string()),  # why there is no crop
    ("faces", pa.int32()),  # found in the photo
    ("tiny_faces", pa.int32()),  # of these, too small to use
    ("confidence", pa.float32()),
    ("box", pa.list_(pa.float32())),  # left, top, right, bottom in pixels of the photo
    ("eyes", pa.list_(pa.float32())),  # x, y of the left and the right one
])  # fmt: skip
LISTING = "alignment.parquet"  # in a folder of crops: what became of each photo
BEGUN = ".align"  # there too: that it is being filled
CHUNK = 64  # photos decoded before the detector runs on them,
HELD_BYTES = 2**28  # or as many as take so much
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
        return Counter(_name_outcome(row) for row in {row["sample_id"]: row for row in self.rows}.values())


def _name_outcome(row: dict[str, Any]) -> str:
    if row["path"] is None:
        return "unreadable" if row["faces"] is None else "no face" if row["faces"] == 0 else "only tiny faces"
    return "one face" if row["faces"] == 1 else "several faces"


def draw_domains(workspace: Workspace, domains: list[str], faces: int, seed: int, progress: Progress) -> list[Manifest]:
    """Draw about `faces` faces of each synthetic domain below `faces/` and write a manifest named after it.

    `progress(done, total)` counts domains. The same seed gives the same bytes.
    """
    manifests = []
    root = workspace.root / "faces"
    progress(0, len(domains))
    for number, domain in enumerate(domains, start=1):
        write(root, domain, faces, seed)
        manifests.append(index_files(domain, DATASETS["synthetic"](root / domain)).manifest)
        with workspace.writing_manifest(domain) as save:
            save(manifests[-1])
        progress(number, len(domains))
    return manifests


def report_check(
    workspace: Workspace, manifest: Manifest, progress: Progress, max_megapixels: int = ExtractSettings.max_megapixels
) -> tuple[Check, UPath]:
    """Look at every picture of a manifest; return what they are like and where the page about them was written.

    A picture is readable here where an extraction with the same `max_megapixels` reads it.
    """
    from cafe.data.checking import check_pictures
    from cafe.report.inspection import draw_check

    page = place_below(workspace.root / "reports", f"check-{manifest.name}.html")
    result = check_pictures(manifest, progress, max_megapixels * 1_000_000)
    write_file(page, draw_check(result))
    return result, page


def report_audits(
    workspace: Workspace, source: Manifest, targets: list[Manifest], reading: Progress, comparing: Progress
) -> Iterator[Audit]:
    """Yield the audit of a source against itself and each target once its list of pairs and its page are written.

    `reading` counts pictures and `comparing` faces of one manifest.
    """
    from cafe.data.auditing import audit, encode_audit  # brings a search library along
    from cafe.report.inspection import draw_audit

    for result in audit(source, targets, reading, comparing):
        path = audit_path(workspace.root, source.name, result.target.name)
        write_file(path.with_suffix(".html"), draw_audit(result))
        write_file(path, encode_audit(result))
        yield result


def find_photos(workspace: Workspace, source: str) -> Manifest:
    """Return the manifest of that name, or one without labels of the photos in that folder or archive; raise `UserError`."""
    root = locate(source)
    if source in workspace.manifest_names() or not (root.is_dir() or is_archive(root)):
        if not re.fullmatch(NAME, source):
            raise UserError(f"There is no folder or archive {root}: give one of photos, or the name of a manifest.")
        return workspace.load_manifest(source)
    files = list_files(root)
    paths = [path for path in files if is_image(path)]
    if not paths:
        there = f"its files are {list_suffixes(Counter(map(suffix_of, files)))}" if files else "it holds no file"
        raise UserError(f"There is no photo below {root}, by their names: {there}.")
    faces = (Face(path, path, UNLABELLED, "", None, 0, 0, "") for path in paths)
    return Manifest.from_faces(root.name, str(root), faces)


def align_photos(workspace: Workspace, photos: Manifest, settings: AlignSettings, progress: Progress) -> Alignment:
    """Crop the faces of photos below aligned/NAME, list what became of each, and write the manifest of labelled ones.

    The manifest keeps labels, splits, groups and the kind of the data set, on which its protocols and recipes depend.
    Raises `UserError` before anything is written when originals would be overwritten or there is no detector, and when no
    photo has a face.
    """
    settings.check()
    folder = locate(settings.out) if settings.out else place_below(workspace.root / "aligned", settings.name)
    if settings.name == photos.name and workspace.manifest_path(photos.name).exists():
        raise UserError(f"The manifest {photos.name!r} would overwrite itself: give another --name.")
    if str(folder).rstrip("/") == photos.root.rstrip("/"):
        raise UserError(f"The crops would overwrite the photos in {folder}: give another --out.")
    _check_crops(folder, photos, settings)
    find_detector()  # or say that there is none
    result, faces = Alignment(folder), []
    write_file(folder / BEGUN, b"")  # what a kill leaves is taken up again
    for row, aligned in _align(photos, settings, progress):
        faces += _save_crops(result, photos, row, aligned, settings.size)
    listing = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(result.rows, schema=SCHEMA), listing)
    write_file(folder / LISTING, listing.getvalue().to_pybytes())
    remove_file(folder / BEGUN)
    if not faces:
        sample, reason = result.left_out[0]
        raise UserError(
            f"None of the {len(photos)} photos has a usable face (first: {sample}: {reason}): lower --smallest or "
            f"--confidence; {folder / LISTING} lists them all."
        )
    if photos.labels[0] != UNLABELLED:
        made = Manifest.from_faces(settings.name, str(folder), faces, photos.kind, photos.classes, photos.parted)
        with workspace.writing_manifest(settings.name) as save:
            result.manifest = save(made)
    return result


def _check_crops(folder: UPath, photos: Manifest, settings: AlignSettings) -> None:
    """Raise `UserError` before the work when a crop has no place below a folder, or that of another photo's."""
    crops = {sample: _name_crop(sample, 1) for sample in photos.sample_ids}
    for crop in crops.values():
        place_below(folder, crop)
    check_different(crops, "The crops")
    if settings.faces == "all":
        taken = set(crops.values())
        for crop in crops.values():
            first = re.sub(r"@\d+(\.[^.]*)$", r"\1", crop)
            if first != crop and first in taken:
                raise UserError(f"A further face of {first} and the crop {crop} could have one name: rename a photo.")
    if not any(exists(folder / name) for name in (LISTING, BEGUN)) and (others := list_folder(folder)):
        raise UserError(
            f"{folder} holds {others[0].name!r} and no crops of an earlier `cafe data align`: give --out another folder."
        )
    longest = max(crops.values(), key=lambda crop: max(len(part.encode()) for part in crop.split("/")))
    check_outputs((str(place_below(folder, file)) for file in (LISTING, longest)), "The output")


def _align(
    photos: Manifest, settings: AlignSettings, progress: Progress
) -> Iterator[tuple[int, Aligned | UnreadableImageError]]:
    """Yield (row, what became of it) of every photo."""
    decoded, done = photos.survey(photos.rows("all"), lambda pixels: pixels), 0
    every = settings.faces == "all"
    while chunk := _take(decoded):
        pictures = {row: pixels for row, pixels in chunk if isinstance(pixels, np.ndarray)}
        found = align_faces(list(pictures.values()), settings.size, settings.smallest, every, settings.confidence)
        outcomes = dict(zip(pictures, found, strict=True))
        for row, pixels in chunk:
            yield row, pixels if isinstance(pixels, UnreadableImageError) else outcomes[row]
        done += len(chunk)
        progress(done, len(photos))


def _take(
    decoded: Iterator[tuple[int, np.ndarray | UnreadableImageError]],
) -> list[tuple[int, np.ndarray | UnreadableImageError]]:
    """Return the next photos that the detector runs on together, those of a telephone seven at a time."""
    chunk, held = [], 0
    for row, pixels in islice(decoded, CHUNK):
        chunk.append((row, pixels))
        held += 0 if isinstance(pixels, UnreadableImageError) else pixels.nbytes
        if held >= HELD_BYTES:
            break
    return chunk


def _save_crops(
    result: Alignment, photos: Manifest, row: int, aligned: Aligned | UnreadableImageError, size: int
) -> list[Face]:
    """Write the crops of a photo, add its rows to the list, and return its faces as the new manifest has them."""
    photo = photos.read(range(row, row + 1)).to_pylist()[0]
    entry = {**dict.fromkeys(SCHEMA.names), "sample_id": photo["sample_id"]}
    if isinstance(aligned, UnreadableImageError):
        result.rows.append({**entry, "reason": str(aligned)})
        return []
    entry |= {"faces": aligned.found, "tiny_faces": aligned.tiny}
    if aligned.reason:
        result.rows.append({**entry, "reason": aligned.reason})
    faces = []
    for number, (crop, found) in enumerate(zip(aligned.crops, aligned.detections, strict=True), start=1):
        sample = photo["sample_id"] if number == 1 else f"{photo['sample_id']}@{number}"
        path = _name_crop(photo["sample_id"], number)
        data = io.BytesIO()
        Image.fromarray(crop).save(data, "JPEG", quality=95, subsampling=0)
        write_file(place_below(result.folder, path), data.getvalue())
        content = digest(data.getvalue())
        place = {"confidence": found.confidence, "box": list(found.box), "eyes": found.eyes.ravel().tolist()}
        result.rows.append({**entry, "aligned_id": sample, "path": path, **place})
        kept = {name: photo[name] for name in photos.kept if photo[name] is not None}
        face = Face(sample, path, photo["label"], photo["split"], photo["group"], size, size, content, kept=kept)
        faces.append(face)
    return faces


def _name_crop(sample: str, number: int) -> str:
    """Return a path of its own for every crop: the photo's, as JPEG."""
    path = PurePosixPath(sample if sample.lower().endswith((".jpg", ".jpeg")) else f"{sample}.jpg")
    return str(path if number == 1 else path.with_name(f"{path.stem}@{number}{path.suffix}"))
