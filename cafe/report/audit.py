"""The page of an audit: pairs of pictures side by side, and how many there are in which splits."""

from __future__ import annotations

import numpy as np

from cafe.data.auditing import Audit
from cafe.data.manifest import Manifest
from cafe.report.pages import embed, render

SHOWN = 60  # pairs on the page from the least similar ones, and as many from all others


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
    entry = manifest.table.slice(int(row), 1).to_pylist()[0]
    label, picture = manifest.classes[entry["label"]], embed(manifest.read_face(int(row)))
    return {"picture": picture, "id": entry["sample_id"], "split": entry["split"], "label": label}
