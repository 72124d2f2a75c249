"""Tables for the terminal, drawn with rich."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Column, Table

from cafe.data.counts import Difference
from cafe.data.expressions import EXPRESSIONS
from cafe.data.indexing import Index
from cafe.data.manifest import SPLITS
from cafe.results.protocols import find_protocol
from pipeline.benchmark import Outcome, first_line
from pipeline.plan import BenchmarkPlan, expect_parallel
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


def scores_table(metrics: dict[str, float], protocol: str = "clean") -> Table:
    """One run's numbers by one protocol, in percent: a line per target and the mean over the unseen ones.

    Leak-free ones stand beside them when there are.
    """
    prefix = find_protocol(protocol).prefix
    metrics = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    names = ("accuracy", "mean_class_accuracy", "macro_f1")
    titles = ["accuracy", "mean-class accuracy", "macro-F1"]
    leak_free = any(name.startswith("leakfree/") for name in metrics)
    titles += ["leak-free accuracy", "left out"] if leak_free else []
    table = Table("target", *(Column(name, justify="right") for name in titles))

    def percent(name: str) -> str:
        return f"{100 * metrics[name]:.1f}" if name in metrics else "–"

    targets = sorted({name.split("/")[1] for name in metrics if name.startswith("target/")})
    for target in targets:
        further = [percent(f"leakfree/{target}/accuracy"), f"{metrics.get(f'leakfree/{target}/left_out', 0):,.0f}"]
        table.add_row(target, *(percent(f"target/{target}/{name}") for name in names), *further[: len(titles) - 3])
    if "unseen/accuracy" in metrics:
        table.add_section()
        further = [percent("leakfree_unseen/accuracy"), ""]
        table.add_row("mean of unseen", *(percent(f"unseen/{name}") for name in names), *further[: len(titles) - 3])
    return table


def plan_tables(plan: BenchmarkPlan) -> list[Table | str]:
    """What a benchmark will do and what that costs: methods × sources with the cells that are done, then the sums."""
    grid, cells = plan.grid, plan.cells
    titles = list(dict.fromkeys(line.title for line in plan.lines))
    sources = list(dict.fromkeys(line.source for line in plan.lines))
    table = Table("method", *(Column(source, justify="right") for source in sources), title=grid.about or grid.name)
    for title in titles:
        row = [[cell for cell in cells if (cell.line.title, cell.line.source) == (title, source)] for source in sources]
        table.add_row(title, *(f"{sum(cell.done for cell in own)} of {len(own)}" for own in row))
    done, begun = sum(cell.done for cell in cells), sum(bool(cell.records) and not cell.done for cell in cells)
    seeds = len({cell.seed for cell in cells})
    return [
        table,
        f"{len(cells):,} cells ({_count(len(sources), 'source')} × {_count(len(titles), 'method')} × {_count(seeds, 'seed')}"
        f"{', as far as --only goes' if plan.settings.only else ''}): {done:,} done, {begun:,} begun, "
        f"{len(cells) - done - begun:,} to begin. Judged on {', '.join(grid.targets)} by the protocol {grid.protocol}.",
        _training_cost(plan),
        _tower_cost(plan),
        *_obstacles(plan),
    ]


def _training_cost(plan: BenchmarkPlan) -> str:
    left, parallel = plan.work - plan.worked, expect_parallel(plan.settings)
    seconds = plan.seconds_left(parallel)
    speed = "at a speed not known yet"
    if seconds is not None:
        speed = f"about {_duration(seconds)} with {_count(parallel, 'cell')} at a time"
    return (
        f"Training: {plan.work:,} faces × epochs, {f'{left:,} of them left, {speed}' if left else 'none of them left'}."
    )


def _tower_cost(plan: BenchmarkPlan) -> str:
    needed, left = plan.store_passes, sum(store.passes_left for store in plan.stores)
    published = plan.published_passes
    if not published:
        return "Towers: no method of this grid reads frozen features."
    saved = published - needed
    share = f"{abs(saved):,} passes ({abs(saved) / published:.1%})"
    return (
        f"Towers: {needed:,} passes fill {len(plan.stores)} feature stores (faces × views), {left:,} of them left. Without "
        f"stores the cells that read features would take {published:,} (epochs × training faces + judged faces, each cell "
        f"for itself): the cache {'saves' if saved >= 0 else 'costs'} {share}."
    )


def _obstacles(plan: BenchmarkPlan) -> list[Table | str]:
    reasons = Counter(cell.line.obstacle for cell in plan.cells if cell.line.obstacle)
    return [f"{count} cells cannot run: {first_line(reason)}" for reason, count in reasons.items()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def failures_table(outcomes: list[Outcome]) -> Table:
    """The cells that failed, each with its reason."""
    table = Table("cell", "why it failed", title="Failed cells")
    for outcome in outcomes:
        if outcome.failure:
            table.add_row(outcome.cell.name, first_line(outcome.failure))
    return table
