"""The pages of data sets that were looked at: a check of the pictures, and an audit with pairs of copies side by side."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pandas as pd

from cafe.data.auditing import Audit
from cafe.data.checking import Check
from cafe.data.manifest import Manifest
from cafe.report.pages import embed, render

PICTURES = 24  # per expression
LISTED = 60  # groups of identical pictures on the page
SHOWN = 60  # pairs on the page from the least similar ones, and as many from all others


def draw_check(check: Check) -> bytes:
    """Return the page of a check: its numbers, a contact sheet for each expression, repeated and broken pictures."""
    manifest, seen, groups = check.manifest, check.seen, check.duplicates
    header, lines = check.summary()
    sheets = {name: _spread(seen.index[seen["expression"] == name]) for name in manifest.classes}
    wanted = sorted({*chain(*sheets.values()), *(group.index[0] for group in groups[:LISTED])})
    pictures = {row: picture for row, picture in manifest.survey(wanted, embed) if isinstance(picture, str)}
    return render(
        "check.html",
        title=f"{manifest.name}: {len(manifest):,} faces",
        root=manifest.root,
        tiles=[
            (f"{len(seen):,}", "readable pictures"),
            (f"{len(check.broken):,}", "unreadable"),
            (f"{100 * seen['grey'].sum() / max(1, len(seen)):.0f} %", "grey"),
            (f"{len(groups):,}", "repeated pictures"),
        ],
        header=header,
        lines=lines,
        histograms=check.histograms,
        sheets=[
            (name, [(pictures[row], manifest.sample_ids[row]) for row in rows if row in pictures])
            for name, rows in sheets.items()
            if rows
        ],
        duplicates=[
            (pictures[group.index[0]], group[["sample_id", "expression", "split"]].itertuples(index=False))
            for group in groups[:LISTED]
            if group.index[0] in pictures
        ],
        duplicate_count=len(groups),
        conflicts=sum(group["expression"].nunique() > 1 for group in groups),
        straddling=sum(group["split"].nunique() > 1 for group in groups),
        broken=check.broken,
    )


def _spread(rows: pd.Index[int]) -> list[int]:
    """Return up to 24 rows, evenly spaced."""
    step = max(1, len(rows) / PICTURES)
    return [int(rows[int(position * step)]) for position in range(min(PICTURES, len(rows)))]


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
    entry = manifest.read(range(int(row), int(row) + 1)).to_pylist()[0]
    label, picture = manifest.classes[entry["label"]], embed(manifest.read_face(int(row)))
    return {"picture": picture, "id": entry["sample_id"], "split": entry["split"], "label": label}
