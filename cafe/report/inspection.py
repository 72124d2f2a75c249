"""The pages of data sets that were looked at: a check of the pictures, and an audit with pairs of copies side by side."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cafe.data.auditing import Audit
from cafe.data.checking import ALL, Check, CheckedFace
from cafe.data.manifest import Manifest
from cafe.report.pages import embed, render

PICTURES = 24  # per expression
LISTED = 60  # groups of identical pictures on the page
SHOWN = 60  # pairs on the page from the least similar ones, and as many from all others


def draw_check(check: Check) -> bytes:
    """Return the page of a check: its numbers, a contact sheet for each expression, repeated and broken pictures."""
    manifest, seen, groups = check.manifest, check.seen, check.duplicates
    header, lines = check.summary
    sheets, shown = _choose_shown(check), groups[:LISTED]
    wanted = sorted({face.row for faces in (*sheets.values(), *(group[:1] for group in shown)) for face in faces})
    pictures = {row: picture for row, picture in manifest.survey(wanted, embed) if isinstance(picture, str)}
    return render(
        "check.html",
        title=f"{manifest.name}: {len(manifest):,} faces",
        root=manifest.root,
        tiles=[
            (f"{len(seen):,}", "readable pictures"),
            (f"{len(check.broken):,}", "unreadable"),
            (f"{100 * check.grey[ALL] / max(1, len(seen)):.0f} %", "grey"),
            (f"{len(groups):,}", "repeated pictures"),
        ],
        header=header,
        lines=lines,
        histograms=check.histograms,
        sheets=[
            (name, [(pictures[face.row], face.sample_id) for face in faces if face.row in pictures])
            for name, faces in sheets.items()
            if faces
        ],
        duplicates=[
            (pictures[group[0].row], [(face.sample_id, face.expression, face.split) for face in group])
            for group in shown
            if group[0].row in pictures
        ],
        duplicate_count=len(groups),
        conflicts=sum(len({face.expression for face in group}) > 1 for group in groups),
        straddling=sum(len({face.split for face in group}) > 1 for group in groups),
        broken=check.broken,
    )


def _choose_shown(check: Check) -> dict[str, list[CheckedFace]]:
    """Return of each expression up to 24 faces, evenly spaced."""
    places, sheets = {}, {name: list[CheckedFace]() for name in check.manifest.classes}
    for name in sheets:
        step = max(1, check.readable[name] / PICTURES)
        places[name] = {int(position * step) for position in range(min(PICTURES, check.readable[name]))}
    passed = Counter[str]()
    for face in check.seen:
        if passed[face.expression] in places[face.expression]:
            sheets[face.expression].append(face)
        passed[face.expression] += 1
    return sheets


def draw_audit(result: Audit) -> bytes:
    """Return the page of an audit: counts per pair of splits, and pairs of pictures, the most doubtful first."""
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
    one = manifest.choose([int(row)])
    (entry,) = one.read(range(1)).to_pylist()
    label, picture = manifest.classes[entry["label"]], embed(one.read_face(0))
    return {"picture": picture, "id": entry["sample_id"], "split": entry["split"], "label": label}
