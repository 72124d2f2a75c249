"""`cafe data check`: what the pictures of a data set are like, as numbers and as one page to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from upath import UPath

from cafe.data.expressions import EXPRESSIONS
from cafe.data.images import UnreadableImageError
from cafe.data.manifest import SPLITS, Manifest
from cafe.data.survey import Condition, Look, check_pictures, survey
from cafe.report.pages import embed, render
from pipeline.workspace import Workspace

SIDES = (0, 32, 48, 64, 96, 128, 224, 384, 640)  # edges of the size histogram in pixels
BRIGHTNESS = tuple(range(0, 256, 32))
PICTURES = 24  # per expression
LISTED = 60  # broken files and groups of identical pictures on the page


@dataclass(frozen=True)
class Check:
    """What `check` found and where its page is."""

    condition: Condition
    header: list[str]
    lines: list[list[str]]
    sizes: list[tuple[str, int]]
    brightness: list[tuple[str, int]]
    page: UPath


def check(workspace: Workspace, manifest: Manifest, progress: Callable[[int, int], None]) -> Check:
    """Decode every picture of a manifest and write reports/check-NAME.html; `progress(done, total)` counts pictures."""
    condition = check_pictures(manifest, progress)
    header, lines = summarise(condition)
    sizes = _label(SIDES, condition.histogram(lambda look: min(look.width, look.height), SIDES), "")
    brightness = _label(BRIGHTNESS, condition.histogram(lambda look: look.brightness, BRIGHTNESS), "255")
    page = workspace.root / "reports" / f"check-{manifest.name}.html"
    result = Check(condition, header, lines, sizes, brightness, page)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_bytes(_draw_page(result))
    return result


def summarise(condition: Condition) -> tuple[list[str], list[list[str]]]:
    """Return a header and a line per expression and for all: faces per split, grey share, brightness, size, broken."""
    manifest = condition.manifest
    table = manifest.table["split"].to_pylist()
    splits = [split for split in SPLITS if split in table]
    lines = []
    for label, name in [*enumerate(EXPRESSIONS), (None, "all")]:
        rows = [row for row, own in enumerate(manifest.labels) if label is None or own == label]
        looks = [condition.looks[row] for row in rows if row in condition.looks]
        lines.append([
            name,
            *(f"{sum(table[row] == split for row in rows):,}" for split in splits),
            f"{len(rows):,}",
            *_describe(looks),
            f"{len(rows) - len(looks):,}",
        ])  # fmt: skip
    return ["expression", *splits, "faces", "grey", "brightness", "median size", "unreadable"], lines


def _describe(looks: list[Look]) -> tuple[str, str, str]:
    if not looks:
        return "–", "–", "–"
    grey = sum(look.grey for look in looks) / len(looks)
    size = f"{median(look.width for look in looks):.0f}×{median(look.height for look in looks):.0f}"
    return f"{100 * grey:.0f} %", f"{median(look.brightness for look in looks):.0f}", size


def _label(edges: tuple[int, ...], counts: list[int], end: str) -> list[tuple[str, int]]:
    ends = [str(edge - 1) for edge in edges[1:]] + [end]
    return [
        (f"{low}–{high}" if high else f"{low} or more", count)
        for low, high, count in zip(edges, ends, counts, strict=True)
    ]


def _draw_page(check: Check) -> bytes:
    condition, manifest = check.condition, check.condition.manifest
    rows = manifest.table.select(["sample_id", "label", "split"]).to_pylist()
    groups = condition.duplicates
    shown = groups[:LISTED]
    chosen = {
        name: _spread([row for row in condition.looks if manifest.labels[row] == label])
        for label, name in enumerate(EXPRESSIONS)
    }
    wanted = sorted({row for part in chosen.values() for row in part} | {group[0] for group in shown})
    pictures = {
        row: picture
        for row, picture in survey(manifest, wanted, embed)
        if not isinstance(picture, UnreadableImageError)
    }

    def differ(column: str) -> int:
        return sum(len({rows[row][column] for row in group}) > 1 for group in groups)

    members = [
        [(rows[row]["sample_id"], EXPRESSIONS[rows[row]["label"]], rows[row]["split"]) for row in g] for g in shown
    ]
    grey = sum(look.grey for look in condition.looks.values()) / max(1, len(condition.looks))
    return render(
        "check.html",
        title=f"{manifest.name}: {len(manifest):,} faces",
        root=manifest.root,
        tiles=[
            (f"{len(condition.looks):,}", "readable pictures"),
            (f"{len(condition.broken):,}", "unreadable"),
            (f"{100 * grey:.0f} %", "grey"),
            (f"{len(groups):,}", "repeated pictures"),
        ],
        header=check.header,
        lines=check.lines,
        sizes=check.sizes,
        brightness=check.brightness,
        sheets=[
            (name, [(pictures[row], rows[row]["sample_id"]) for row in part if row in pictures])
            for name, part in chosen.items()
            if part
        ],
        duplicates=[
            (pictures[group[0]], names) for group, names in zip(shown, members, strict=True) if group[0] in pictures
        ],
        duplicate_count=len(groups),
        conflicts=differ("label"),
        straddling=differ("split"),
        broken=[(rows[row]["sample_id"], reason) for row, reason in list(condition.broken.items())[:LISTED]],
        broken_count=len(condition.broken),
    )


def _spread(rows: list[int]) -> list[int]:
    """Return up to 24 rows, evenly spaced."""
    step = max(1, len(rows) / PICTURES)
    return [rows[int(position * step)] for position in range(min(PICTURES, len(rows)))]
