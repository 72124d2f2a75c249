"""Tables of the commands that compute: the plan of a benchmark, and the cells that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from cafe.errors import first_line
from cafe.jobs.terminal import make_table
from cafe.pipeline import machine
from cafe.pipeline.benchmark.cells import Failures
from cafe.pipeline.benchmark.grid import Cell
from cafe.pipeline.benchmark.plan import BenchmarkPlan
from cafe.results.published import load_published
from cafe.results.sources import ALL_BUT_TARGET


def plan_tables(plan: BenchmarkPlan) -> list[Table | str]:
    """What a benchmark will do and what that costs: methods × sources with the cells that are done, then the sums."""
    benchmark, cells = plan.benchmark, plan.cells
    titles = list(dict.fromkeys(cell.title for cell in cells))
    sources = list(dict.fromkeys(cell.source_name for cell in cells))
    lines = []
    for title in titles:
        row = [[cell for cell in cells if (cell.title, cell.source_name) == (title, source)] for source in sources]
        lines.append((title, *(f"{sum(cell.done for cell in own)} of {len(own)}" for own in row)))
    table = make_table(["method", *sources], lines, title=benchmark.about or benchmark.name)
    done, begun = sum(cell.done for cell in cells), sum(bool(cell.records) and not cell.done for cell in cells)
    seeds = len({cell.settings.seed for cell in cells})
    parts = (_count(len(sources), "source"), _count(len(titles), "method"), _count(seeds, "seed"))
    shape = " × ".join(parts) + (", restricted by --only" if plan.settings.only else "")
    obstacles = Counter(cell.obstacle for cell in cells if cell.obstacle)
    by = ", each by the trainings that leave it out," if benchmark.sources == [ALL_BUT_TARGET] else ""
    judged = f"Judged on {', '.join(benchmark.judged)}{by} by the protocol {benchmark.protocol}."
    return [
        table,
        f"{len(cells):,} cells ({shape}): {done:,} done, {begun:,} begun, {len(cells) - done - begun:,} to begin. {judged}",
        _training_cost(plan),
        _tower_cost(plan),
        *_deviations(cells),
        *(f"{count} cells cannot run: {first_line(reason)}" for reason, count in obstacles.items()),
    ]


def _deviations(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield in which settings methods with published numbers differ from what was published, and which they are."""
    differing: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.deviations and cell.entry.method in load_published()["accuracy"]:
            differing.setdefault(", ".join(cell.deviations), {})[cell.title] = None
    for settings, titles in differing.items():
        yield f"Not as published: {settings} ({'; '.join(titles)})."


def _training_cost(plan: BenchmarkPlan) -> str:
    cores = 1 if plan.settings.address else plan.settings.num_cpus or machine.cores()
    left, parallel = plan.work - plan.worked, plan.settings.parallel or cores
    seconds = plan.seconds_left(parallel)
    speed = "at a speed not known yet"
    if seconds is not None:
        speed = f"about {_duration(seconds)} with {_count(parallel, 'cell')} at a time"
    rest = f"{left:,} of them left, {speed}" if left else "none of them left"
    return f"Training: {plan.work:,} faces × epochs, {rest}.{_fold_cost(plan)}"


def _fold_cost(plan: BenchmarkPlan) -> str:
    folds = sum(cell.folds for cell in plan.runnable)
    share = sum(cell.work - cell.work // cell.folds for cell in plan.runnable if cell.folds)
    if not folds:
        return ""
    return (
        f" Of these, {share:,} are of the {folds:,} trainings on all sources but one by which leave_one_out chooses epochs, "
        "each of which also judges the source left out after every epoch."
    )


def _tower_cost(plan: BenchmarkPlan) -> str:
    needed, left = plan.store_passes, sum(store.passes_left for store in plan.stores)
    published = plan.published_passes
    if not published:
        return "Towers: no method of this benchmark reads frozen features."
    saved, several = published - needed, plan.benchmark.views_per_seed
    share = f"{abs(saved):,} passes ({abs(saved) / published:.1%})"
    each = f"for each of {len(plan.benchmark.seeds)} seeds views of its own, " if several else ""
    return (
        f"Towers: {needed:,} passes fill {len(plan.stores)} feature stores (faces × views), {each}{left:,} of them left. "
        f"Without stores the cells that read features would take {published:,} (epochs × training faces + judged faces, "
        f"each cell for itself): the cache {'saves' if saved >= 0 else 'costs'} {share}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def failures_table(failures: Failures) -> Table:
    """The cells that failed, each with its reason."""
    lines = [(cell.name, first_line(reason)) for cell, reason in failures.items()]
    return make_table(["cell", "why it failed"], lines, words=2, title="Failed cells")
