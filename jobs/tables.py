"""Tables for the terminal, drawn with rich."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.table import Column, Table

from cafe.data.counts import Difference
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import Index
from cafe.data.manifest import SPLITS
from pipeline.store import find_stores
from pipeline.workspace import Workspace

if TYPE_CHECKING:  # they bring a search library along, which most commands need not load
    from pipeline.align import Alignment
    from pipeline.audit import Audit
    from pipeline.check import Check

LISTED = 10  # broken or duplicate files named before "and N more"


def index_tables(index: Index) -> list[Table | str]:
    """Class counts per split, sizes, broken and duplicate files of a fresh manifest."""
    manifest, counts = index.manifest, index.counts()
    splits = [split for split in SPLITS if any(counts[split, label] for label in range(len(EXPRESSIONS)))]
    table = Table()
    table.add_column("expression")
    for split in splits:
        table.add_column(split, justify="right")
    table.add_column("all", justify="right")
    for label, name in enumerate(EXPRESSIONS):
        numbers = [counts[split, label] for split in splits]
        table.add_row(name, *(f"{n:,}" for n in (*numbers, sum(numbers))))
    table.add_section()
    totals = [sum(counts[split, label] for label in range(len(EXPRESSIONS))) for split in splits]
    table.add_row("all", *(f"{n:,}" for n in (*totals, sum(totals))))

    widths, heights = (manifest.table[side].to_pylist() for side in ("width", "height"))
    middle = f"{statistics.median_low(widths)}×{statistics.median_low(heights)}"
    size = f"sizes {min(widths)}×{min(heights)} to {max(widths)}×{max(heights)} pixels, median {middle}"
    ignored = f"; {index.ignored:,} other files ignored" if index.ignored else ""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(index.dropped.items()))
    left_out = [f"{index.dropped.total():,} with none of the seven labels, left out: {dropped}"] if dropped else []
    title = f"{manifest.name}: {len(manifest):,} faces, read as {index.layout}"
    broken = [f"  {path}: {reason}" for path, reason in index.broken]
    duplicates = [f"  {' = '.join(group)}" for group in index.duplicates]
    return [
        title,
        table,
        f"{size}{ignored}",
        *left_out,
        _listed(f"{len(broken)} broken files, left out", broken),
        _listed(f"{len(duplicates)} groups of identical files", duplicates),
    ]


def counts_tables(differences: list[Difference]) -> list[Table | str]:
    """Where a copy differs from what is expected: a table of the numbers that are known, a line for each doubtful one."""
    table = Table("expression", "split", *(Column(name, justify="right") for name in ("expected", "found")))
    certain = [difference for difference in differences if difference.certain]
    for row in certain:
        table.add_row(row.expression, row.split, f"{row.expected:,}", f"{row.found:,}")
    known: list[Table | str] = [table] if certain else []
    known += [f"Expected: {source}." for source in dict.fromkeys(row.source for row in certain)]
    doubtful = [
        f"Warning: {row.split}, {row.expression}: {row.found:,} faces where {row.expected:,} are expected ({row.source})."
        for row in differences
        if not row.certain
    ]
    return [*known, *doubtful]


def _listed(title: str, lines: list[str]) -> str:
    more = [f"  … and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([title + (":" if lines else ""), *lines[:LISTED], *more])


def unreadable(broken: list[tuple[str, str]]) -> str:
    """Name the files that could not be read, with the reason."""
    return _listed(f"{len(broken)} unreadable files", [f"  {sample}: {reason}" for sample, reason in broken])


def check_tables(check: Check) -> list[Table | str]:
    """What the pictures of a data set are like: a line per expression, sizes and brightness, broken and repeated files."""
    manifest, condition = check.condition.manifest, check.condition
    table = Table(
        *(Column(name, justify="left" if not position else "right") for position, name in enumerate(check.header))
    )
    for line in check.lines:
        table.add_row(*line, end_section=line is check.lines[-2])
    ids = manifest.sample_ids
    broken = [(ids[row], reason) for row, reason in condition.broken.items()]
    duplicates = [f"  {' = '.join(ids[row] for row in group)}" for group in condition.duplicates]
    return [
        f"{manifest.name}: {len(manifest):,} faces",
        table,
        _histogram("shorter side", check.sizes),
        _histogram("brightness", check.brightness),
        unreadable(broken),
        _listed(f"{len(duplicates)} groups of identical pictures", duplicates),
    ]


def _histogram(title: str, counts: list[tuple[str, int]]) -> Table:
    most = max(1, *(count for _, count in counts))
    table = Table(title, Column("faces", justify="right"), "")
    for name, count in counts:
        if count:
            table.add_row(name, f"{count:,}", "█" * max(1, round(30 * count / most)))
    return table


def audit_table(audits: list[Audit]) -> Table:
    """Copies of a source's faces: a line per pair of splits."""
    titles = ("source split", "target split", "target faces", "with a copy", "share", "pairs", "under another label")
    table = Table(
        "source", "target", *(Column(name, justify="left" if "split" in name else "right") for name in titles)
    )
    for audit in audits:
        for pair in audit.splits:
            numbers = (f"{number:,}" for number in (pair.faces, pair.copied, pair.pairs, pair.relabelled))
            faces, copied, pairs, relabelled = numbers
            share = f"{100 * pair.copied / pair.faces:.1f} %"
            names = (audit.source.name, audit.target.name, pair.source_split, pair.target_split)
            table.add_row(*names, faces, copied, share, pairs, relabelled)
        table.add_section()
    return table


def alignment_tables(alignment: Alignment) -> list[Table | str]:
    """What became of the photos, by outcome, and the first ones that were left out."""
    table = Table("outcome", Column("photos", justify="right"))
    outcomes = alignment.outcomes()
    for name, count in outcomes.items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{outcomes.total():,}")
    left_out = [f"  {sample}: {reason}" for sample, reason in alignment.left_out]
    return [
        table,
        f"{alignment.crops:,} crops in {alignment.folder}",
        _listed(f"{len(left_out)} photos left out", left_out),
    ]


def manifests_table(workspace: Workspace) -> Table | str:
    """The manifests of a workspace and what features there are of each."""
    names = workspace.manifest_names()
    if not names:
        return f"No manifest in {workspace.root} yet: make one with `cafe data index folder ROOT --name NAME`."
    table = Table("manifest", "kind", "faces", *SPLITS, "features", title=str(workspace.root))
    for name in names:
        manifest = workspace.load_manifest(name)
        stores = "\n".join(about.describe() for _, about in find_stores(workspace.features, name)) or "none"
        sizes = (f"{len(manifest.rows(split)):,}" for split in SPLITS)
        table.add_row(name, manifest.kind, f"{len(manifest):,}", *sizes, stores)
    return table
