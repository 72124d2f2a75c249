"""Tables for the terminal, drawn with rich."""

from __future__ import annotations

from collections import Counter

from rich.table import Column, Table
from rich.text import Text

from cafe.results.protocols import find_protocol
from pipeline.benchmark import Outcome, first_line
from pipeline.plan import BenchmarkPlan, expect_parallel
from pipeline.report import Report
from pipeline.sheets import BEST, SECOND

STYLES = {BEST: "bold", SECOND: "underline", "": ""}


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


def report_tables(report: Report) -> list[Table | str]:
    """The sheets of a comparison with how to read them; the best is bold, the second underlined."""
    tables: list[Table | str] = []
    for sheet in report.sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for place, name in enumerate(sheet.header):
            word = place < sheet.words
            table.add_column(name, justify="left" if word else "right", no_wrap=word)
        for number, line in enumerate(sheet.lines):
            last = number + 1 == len(sheet.lines)
            cells = (Text(cell.text, STYLES[cell.mark]) for cell in line)
            table.add_row(*cells, end_section=not last and sheet.starts_block(number + 1))
        tables += [table, *sheet.notes]
    return [*tables, *report.about]


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
