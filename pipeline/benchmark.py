"""The grid at work: the stores a benchmark lacks are filled, then its cells run, several at a time.

A cell is one training with its judging, the same run as `cafe train` makes. What is finished is left alone, so the same file
goes on where it was interrupted; a cell that fails is reported at the end and stops no other.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any

from cafe.errors import UserError
from cafe.results.protocols import find_protocol
from pipeline import cluster
from pipeline.extract import extract
from pipeline.grid import Grid
from pipeline.plan import BenchmarkPlan, Cell, Store, StoreKey, plan_benchmark
from pipeline.progress import Bar, Progress
from pipeline.runs import Target
from pipeline.tracking import PARENT, TrackedRun, Tracker
from pipeline.train import TrainPlan, train_and_judge

CELL_BYTES = 2 * 2**30  # memory of a cell: its worker with torch and features, and the controller of its training


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with its mean accuracy over the unseen targets, where there are any, or with a reason."""

    cell: Cell
    unseen: float | None = None
    failure: str = ""


def run_benchmark(plan: BenchmarkPlan, bar: Bar, say: Callable[[str], None]) -> list[Outcome]:
    """Fill the missing stores, run every cell that is not done, and return how each of them ended.

    One MLflow run stands for the benchmark, and the cells' runs lie below it. Interrupt it at any time.
    """
    grid, settings = plan.grid, plan.settings
    tracker = Tracker(plan.workspace, settings.mlflow_uri, settings.experiment or grid.name)
    parent = tracker.start(f"{grid.name}-{grid.digest[:8]}", _parameters(grid), {"cafe.benchmark": grid.name})
    tracker.log_text(parent, json.dumps(asdict(grid), indent=1), "benchmark.json")
    try:
        with (
            nullcontext() if all(cell.done or cell.line.obstacle for cell in plan.cells) else cluster.connect(settings)
        ):
            if plan.missing_stores:
                made = _fill_stores(plan, bar, say)
                plan = plan_benchmark(plan.workspace, grid, settings, made)
            outcomes = _run_cells(plan, tracker.below(parent), bar, say)
    except BaseException:
        tracker.finish(parent, "KILLED")
        raise
    _log_outcomes(tracker, parent, plan, outcomes)
    return outcomes


def share_machine(plan: BenchmarkPlan) -> tuple[int, int]:
    """Return how many cells run at a time on the connected cluster, and the threads of each of their workers.

    Cells know nothing of each other; that other numbers of threads add floats in another order is all that can differ.
    """
    training = [cell.line.plan.settings for cell in plan.cells if cell.line.plan]
    workers = max(settings.num_workers for settings in training)
    cores = cluster.count("CPU")
    gpus = 0 if all(settings.use_gpu is False for settings in training) else cluster.count("GPU")
    slots = gpus or cores
    memory = cluster.count("memory") // CELL_BYTES
    parallel = plan.settings.parallel or max(1, min(slots // workers, memory))
    return parallel, max(1, cores // (parallel * workers))


def _fill_stores(plan: BenchmarkPlan, bar: Bar, say: Callable[[str], None]) -> dict[StoreKey, Store | str]:
    made: dict[StoreKey, Store | str] = {}
    for store in plan.missing_stores:
        settings = replace(store.settings, address=plan.settings.address, num_cpus=plan.settings.num_cpus)
        try:
            with bar(f"Features of {store.manifest.name}", "faces") as progress:
                (result,) = extract(plan.workspace, [store.manifest], settings, progress)
            made[store.key] = result.store, result.about
            say(result.sentence())
        except Exception as error:  # the cells of other stores can still run; these say why they cannot
            made[store.key] = _explain(error, f"the features of {store.manifest.name}")
    return made


def _run_cells(plan: BenchmarkPlan, tracker: Tracker, bar: Bar, say: Callable[[str], None]) -> list[Outcome]:
    """Run cells in threads: each follows a training of Ray's, so a thread costs next to nothing."""
    tracked = {run.name: run for run in tracker.runs()}
    outcomes = {cell: _recall(cell, tracked, tracker) for cell in plan.cells}
    waiting = [cell for cell, outcome in outcomes.items() if outcome is None]
    idle = all(cell.done for cell in waiting)
    parallel, threads = (1, 1) if idle else share_machine(plan)
    here = {"threads": threads, "address": plan.settings.address, "num_cpus": plan.settings.num_cpus}
    stopping = Event()
    with _follow_cells(plan, bar) as bars:
        pool = ThreadPoolExecutor(parallel)
        futures: dict[Future[Outcome], Cell] = {
            pool.submit(_run_cell, cell, here, tracker, bars(cell), stopping): cell for cell in waiting
        }
        try:
            for number, future in enumerate(as_completed(futures), start=len(outcomes) - len(waiting) + 1):
                outcome = outcomes[futures[future]] = future.result()
                say(f"{number}/{len(outcomes)} {describe(outcome)}")
        finally:  # when interrupted, no other cell begins, and nobody waits for those that run: leaving Ray ends them
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return [outcome for outcome in outcomes.values() if outcome]


def _recall(cell: Cell, tracked: Mapping[str, TrackedRun], tracker: Tracker) -> Outcome | None:
    """Return the outcome of a cell that needs no work: it cannot run, or it is done and logged."""
    if cell.plan is None:
        assert cell.line.obstacle
        return Outcome(cell, failure=cell.line.obstacle)
    run = tracked.get(cell.plan.spec.name)
    if not cell.done or run is None or not all(_is_logged(run, target) for target in cell.plan.targets):
        return None
    if run.tags.get(PARENT) != tracker.parent:
        tracker.tag(run.run_id, PARENT, str(tracker.parent))
    return Outcome(cell, _unseen(cell.plan, run.metrics))


def _is_logged(run: TrackedRun, target: Target) -> bool:
    return f"{find_protocol(target.protocol).prefix}target/{target.title}/accuracy" in run.metrics


def _run_cell(cell: Cell, here: Mapping[str, Any], tracker: Tracker, bar: Bar, stopping: Event) -> Outcome:
    plan = cell.plan
    assert plan is not None
    if stopping.is_set():
        return Outcome(cell, failure="interrupted")
    try:
        own = replace(plan, settings=replace(plan.settings, **here))
        return Outcome(cell, _unseen(plan, train_and_judge(own, bar, tracker)))
    except Exception as error:  # one cell must never cost the others; its reason is kept and shown
        return Outcome(cell, failure="interrupted" if stopping.is_set() else _explain(error, cell.name))


def _explain(error: Exception, what: str) -> str:
    """Return a user's mistake as its sentence; anything else is a bug, whose traceback is logged."""
    if isinstance(error, UserError):
        return str(error)
    logging.getLogger(__name__).error("A bug stopped %s", what, exc_info=error)
    return f"{type(error).__name__}: {first_line(str(error).strip())}"


def first_line(reason: str) -> str:
    """Return a reason without the list that may follow it."""
    return reason.partition("\n")[0]


def _unseen(plan: TrainPlan, metrics: Mapping[str, float]) -> float | None:
    return metrics.get(f"{find_protocol(plan.settings.protocol).prefix}unseen/accuracy")


def describe(outcome: Outcome) -> str:
    """Say how a cell ended."""
    if outcome.failure:
        return f"{outcome.cell.name}: failed. {first_line(outcome.failure)}"
    score = f", {100 * outcome.unseen:.1f} % on the unseen targets" if outcome.unseen is not None else ""
    return f"{outcome.cell.name}: done{score}"


@contextmanager
def _follow_cells(plan: BenchmarkPlan, bar: Bar) -> Iterator[Callable[[Cell], Bar]]:
    """Show one bar of faces × epochs for all cells; yields what gives each cell its part of it."""
    worked = {cell: cell.worked for cell in plan.cells if not cell.line.obstacle}
    with bar(f"Training {len(worked)} cells", "faces") as progress:

        def bars(cell: Cell) -> Bar:
            @contextmanager
            def part(title: str, unit: str) -> Iterator[Progress]:
                def update(done: int, total: int) -> None:
                    if unit == "steps" and total:
                        worked[cell] = max(worked[cell], cell.work * done // total)
                        progress(sum(worked.values()), plan.work)

                yield update

            return part

        progress(plan.worked, plan.work)
        yield bars


def _parameters(grid: Grid) -> dict[str, Any]:
    return {
        "sources": ", ".join(grid.sources),
        "methods": "; ".join(entry.label for entry in grid.entries),
        "seeds": ", ".join(map(str, grid.seeds)),
        "towers": ", ".join(grid.towers),
        "targets": ", ".join(grid.targets),
        "protocol": grid.protocol,
    }


def _log_outcomes(tracker: Tracker, parent: str, plan: BenchmarkPlan, outcomes: Sequence[Outcome]) -> None:
    """Log what came of the benchmark with its own run: how many cells, each cell's end, the mean of every method."""
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    scores: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.unseen is not None:
            name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in outcome.cell.line.title)
            scores.setdefault(f"unseen_accuracy/{outcome.cell.line.source}/{name}", []).append(outcome.unseen)
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    tracker.log(parent, {"cells": len(outcomes), "cells_failed": failed, **means})
    records = [
        {
            "cell": outcome.cell.name,
            "run": outcome.cell.plan.spec.name if outcome.cell.plan else None,
            "unseen_accuracy": outcome.unseen,
            "failure": outcome.failure or None,
        }
        for outcome in outcomes
    ]
    tracker.log_text(parent, json.dumps(records, indent=1), "cells.json")
    tracker.finish(parent, "FAILED" if failed else "FINISHED")
