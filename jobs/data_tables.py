"""Tables of `cafe data` for the terminal, drawn with rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Column, Table

from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import CountDifference, Index
from cafe.data.manifest import SPLITS
from cafe.jobs.terminal import make_table
from cafe.pipeline.features.integrity import find_stores
from cafe.pipeline.workspace import Workspace

if TYPE_CHECKING:  # they load a search library, which most commands do not need
    from cafe.data.auditing import Audit
    from cafe.data.checking import Check
    from cafe.pipeline.datasets import Alignment

LISTED = 10  # files named before "and N more"


def index_tables(index: Index) -> list[Table | str]:
    """Faces per expression and split, sizes, and what was broken, listed twice or identical in a fresh manifest."""
    manifest, listing, counts = index.manifest, index.listing, index.counts()
    splits = [split for split in SPLITS if len(manifest.rows(split))]
    numbers = {name: [counts[split, label] for split in splits] for label, name in enumerate(EXPRESSIONS)}
    lines = [(name, *own, sum(own)) for name, own in numbers.items()]
    table = make_table(["expression", *splits, "all"], lines)
    table.add_section()
    table.add_row("all", *(f"{len(manifest.rows(split)):,}" for split in (*splits, "all")))

    widths, heights = (sorted(manifest.table[side].to_pylist()) for side in ("width", "height"))
    smallest, middle, largest = (f"{widths[n]}×{heights[n]}" for n in (0, (len(widths) - 1) // 2, -1))
    ignored = f"; {listing.ignored:,} other files ignored" if listing.ignored else ""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(listing.dropped.items()))
    left_out = f"{listing.dropped.total():,} with none of the seven labels, left out: {dropped}"
    repeated, duplicates = listing.repeated, [" = ".join(group) for group in index.duplicates]
    broken = [f"{path}: {reason}" for path, reason in index.broken]
    return [
        f"{manifest.name}: {len(manifest):,} faces, read as {listing.layout}",
        table,
        f"sizes {smallest} to {largest} pixels, median {middle}{ignored}",
        *([left_out] if dropped else []),
        _list_some(f"{len(broken)} broken files, left out", broken),
        *([_list_some(f"{len(repeated)} listed more than once, counted once", repeated)] if repeated else []),
        _list_some(f"{len(duplicates)} groups of identical files", duplicates),
        *_warn_of_twins(index),
    ]


def _warn_of_twins(index: Index) -> list[str]:
    manifest, twins = index.manifest, index.training_twins
    if not twins:
        return []
    shares = " and ".join(f"{twins[split]:,} of {len(manifest.rows(split)):,} {split} faces" for split in sorted(twins))
    return [
        f"{shares} are also in the training split, byte for byte: find them and other copies with "
        f"`cafe data audit {manifest.name}`, then leave them out of the results with --exclude-leaks."
    ]


def counts_tables(differences: list[CountDifference]) -> list[Table | str]:
    """Where a copy differs from what is expected: a table of the numbers that are known, a line for each doubtful one."""
    certain = [(row.expression, row.split, row.expected, row.found) for row in differences if row.certain]
    known: list[Table | str] = [make_table(["expression", "split", "expected", "found"], certain, 2)] if certain else []
    known += [f"Expected: {source}." for source in dict.fromkeys(row.source for row in differences if row.certain)]
    doubtful = [
        f"Warning: {row.split}, {row.expression}: {row.found:,} faces where {row.expected:,} are expected ({row.source})."
        for row in differences
        if not row.certain
    ]
    return [*known, *doubtful]


def _list_some(title: str, lines: list[str]) -> str:
    more = [f"  … and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([title + (":" if lines else ""), *(f"  {line}" for line in lines[:LISTED]), *more])


def unreadable(broken: list[tuple[str, str]]) -> str:
    """Name the files that could not be read, with the reason."""
    return _list_some(f"{len(broken)} unreadable files", [f"{sample}: {reason}" for sample, reason in broken])


def check_tables(check: Check) -> list[Table | str]:
    """What the pictures of a data set are like: a line per expression, sizes and brightness, broken and repeated files."""
    header, lines = check.summary()
    table = make_table(header, lines[:-1])
    table.add_section()
    table.add_row(*lines[-1])
    duplicates = [" = ".join(group["sample_id"]) for group in check.duplicates]
    return [
        f"{check.manifest.name}: {len(check.manifest):,} faces",
        table,
        *(_histogram(title, counts) for title, counts in check.histograms.items()),
        unreadable(check.broken),
        _list_some(f"{len(duplicates)} groups of identical pictures", duplicates),
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
    words = ["source", "target", "source split", "target split"]
    table = make_table([*words, "target faces", "with a copy", "share", "pairs", "under another label"], [], len(words))
    for audit in audits:
        for pair in audit.splits:
            names = (audit.source.name, audit.target.name, pair.source_split, pair.target_split)
            share = f"{100 * pair.copied / pair.faces:.1f} %"
            numbers = (f"{pair.faces:,}", f"{pair.copied:,}", share, f"{pair.pairs:,}", f"{pair.relabelled:,}")
            table.add_row(*names, *numbers)
        table.add_section()
    return table


def alignment_tables(alignment: Alignment) -> list[Table | str]:
    """What became of the photos, by outcome, and the first ones that were left out."""
    outcomes = alignment.outcomes()
    table = make_table(["outcome", "photos"], outcomes.items())
    table.add_section()
    table.add_row("all", f"{outcomes.total():,}")
    left_out = [f"{sample}: {reason}" for sample, reason in alignment.left_out]
    return [
        table,
        f"{alignment.crops:,} crops in {alignment.folder}",
        _list_some(f"{len(left_out)} photos left out", left_out),
    ]


def list_manifests(workspace: Workspace) -> Iterator[dict[str, object]]:
    """Yield the manifests of a workspace with their faces and what features there are of each."""
    for name in workspace.manifest_names():
        manifest = workspace.load_manifest(name)
        sizes = {split: len(manifest.rows(split)) for split in SPLITS}
        stores = [about.describe() for _, about in find_stores(workspace.features, name)]
        yield {"manifest": name, "kind": manifest.kind, "features": stores, "faces": len(manifest), **sizes}
