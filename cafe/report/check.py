"""The page of a check: what the pictures of a data set are like, with contact sheets and what is wrong with some."""

from __future__ import annotations

from itertools import chain

import pandas as pd

from cafe.data.checking import Check
from cafe.report.pages import embed, render

PICTURES = 24  # per expression
LISTED = 60  # groups of identical pictures on the page


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
