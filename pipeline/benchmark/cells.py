"""A benchmark at work: the stores it lacks are filled, then its cells run, several at a time.

A cell is one training with its evaluation, the same run as `cafe train` makes. What is finished is left alone, so the same
file goes on where it was interrupted; a cell that fails is reported at the end and stops no other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from threading import Event, Lock
from typing import Any

from upath import UPath

from cafe.errors import UserError, first_line
from cafe.files import encode_json, exists, list_files, read_file, write_changed, write_file
from cafe.pipeline import cluster
from cafe.pipeline.benchmark.grid import Cell, StoreName, StorePlan
from cafe.pipeline.benchmark.plan import BenchmarkPlan, plan_benchmark
from cafe.pipeline.features.extract import extract
from cafe.pipeline.need import Store
from cafe.pipeline.plan import TrainPlan
from cafe.pipeline.process.lease import hold
from cafe.pipeline.process.progress import Bar, Progress
from cafe.pipeline.runs import note_end, note_start, note_status, read_status
from cafe.pipeline.settings import ClusterSettings, Execution, take
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.train import show_finished, train_and_evaluate
from cafe.pipeline.worker import AnyWorker, RayTeam, RayWorker
from cafe.pipeline.workspace import Workspace
from cafe.records import digest
from cafe.report import ReportSettings
from cafe.report.formats import to_markdown
from cafe.report.report import make_report
from cafe.results.protocols import ProtocolName
from cafe.results.runs import Run, read_runs
from cafe.results.scores import meet
from cafe.towers.names import joint_name

CELL_BYTES = 2 * 2**30  # memory of a cell: its worker with torch and features, and the controller of its training
GPU_CELL_BYTES = 8 * 2**30  # memory of a GPU for a cell: CUDA's own, a branch at 224 pixels and the source's pictures
GPU_CELL_CORES = 2  # cores that a cell on a GPU keeps busy

Failures = dict[Cell, str]  # of the cells that failed, why
Say = Callable[[str], None]


def run_benchmark(plan: BenchmarkPlan, mirror: Mirror, bar: Bar, say: Say) -> Failures:
    """Fill the missing stores, run every cell that is not done, and return why which of them failed.

    The file as it was read and the end of every cell are written to the benchmark's folder. Interrupt it at any time.
    """
    with hold(plan.folder, plan.settings.wait):
        return run_plan(plan, mirror, bar, say)


def run_plan(plan: BenchmarkPlan, mirror: Mirror, bar: Bar, say: Say) -> Failures:
    """Run a plan whose lease is held."""
    write_changed(plan.folder / "benchmark.json", encode_json(asdict(plan.benchmark)))
    note_start(plan.folder)
    try:
        with nullcontext() if all(cell.done for cell in plan.runnable) else cluster.connect(plan.settings):
            if plan.missing_stores:
                filled = _fill_stores(plan, bar, say)
                plan = plan_benchmark(plan.workspace, plan.benchmark, plan.settings, filled)
            failures = _run_cells(plan, mirror, bar, say)
    except BaseException:
        mirror.update_benchmark(plan.folder, plan.experiment, "KILLED")
        raise
    if not all(cell.done for cell in plan.cells):
        note_end(plan.folder)
    _write_outcomes(plan, failures)
    _compare(plan)
    mirror.update_benchmark(plan.folder, plan.experiment, "FAILED" if failures else "FINISHED")
    return failures


def share_machine(plan: BenchmarkPlan) -> tuple[int, int]:
    """Return how many cells run at a time on the connected cluster, and the threads of each of their workers.

    Cells are independent of each other: all that other numbers of threads change is the order in which floats are added.
    """
    cluster.check_cores(1, plan.settings.scale_minutes)  # all may be gone since the features were extracted
    training = [cell.plan.settings for cell in plan.cells if cell.plan]
    workers = max(settings.num_workers for settings in training)
    cores = cluster.count("CPU")
    gpus = 0 if all(settings.use_gpu is False for settings in training) else cluster.count("GPU")
    slots = count_slots(gpus, cores, cluster.gpu_memory() if gpus and workers == 1 else 0)
    memory = cluster.count("memory") // CELL_BYTES
    parallel = plan.settings.parallel or max(1, min(slots // workers, memory))
    return parallel, max(1, cores // (parallel * workers))


def count_slots(gpus: int, cores: int, gpu_memory: int) -> int:
    """Return how many workers have room: one per core, or several on each GPU, which small branches leave idle."""
    return gpus * max(1, min(gpu_memory // GPU_CELL_BYTES, cores // gpus // GPU_CELL_CORES)) if gpus else cores


def _here(plan: BenchmarkPlan) -> dict[str, Any]:
    """Return where and how this command runs, for everything it starts."""
    return take(plan.settings, ClusterSettings)


def _fill_stores(plan: BenchmarkPlan, bar: Bar, say: Say) -> dict[StoreName, Store | str]:
    """Fill the stores that are missing; those of several layers of one tower share its passes."""
    filled: dict[StoreName, Store | str] = {}
    for stores in _group_layers(plan.missing_stores):
        manifest = stores[0].manifest
        tower = joint_name([store.settings.backbone for store in stores])
        settings = replace(stores[0].settings, backbone=tower, **_here(plan))
        try:
            with bar(f"Features of {manifest.name}", "faces") as progress:
                results = extract(plan.workspace, [manifest], settings, progress)
            for store, result in zip(stores, results, strict=True):
                filled[store.name] = result.store, result.info
                say(result.sentence())
        except Exception as error:  # the cells of other stores can still run; these say why they cannot
            filled |= {store.name: _explain(error, f"the features of {manifest.name}") for store in stores}
    return filled


def _group_layers(stores: Sequence[StorePlan]) -> list[list[StorePlan]]:
    """Return stores together that differ in nothing but the layer of one tower."""
    groups: dict[StoreName, list[StorePlan]] = {}
    for store in stores:
        tower = store.settings.backbone.partition("#")[0]
        groups.setdefault((store.manifest.name, replace(store.settings, backbone=tower)), []).append(store)
    return list(groups.values())


def _run_cells(plan: BenchmarkPlan, mirror: Mirror, bar: Bar, say: Say) -> Failures:
    """Run cells in threads, each of which follows what a worker of Ray's does, so that it costs next to nothing.

    A worker trains one cell after another and keeps what they share; cells that ask for several workers share Ray Train.
    """
    failures = {cell: cell.obstacle for cell in plan.cells if cell.obstacle}
    for cell in plan.runnable:
        if cell.done and (failure := _attempt(cell, lambda plan: show_finished(plan, mirror))):
            failures[cell] = failure
    waiting = [cell for cell in plan.runnable if not cell.done]
    parallel, threads = share_machine(plan) if waiting else (1, 1)
    here = {"threads": threads, "system_metrics": plan.settings.system_metrics, **_here(plan)}
    stopping, workers = Event(), Workers([cell.settings for cell in waiting], parallel)

    def run(cell: Cell, part: Bar) -> str:
        return "interrupted" if stopping.is_set() else _run_cell(cell, here, mirror, part, workers)

    with _follow_cells(plan, bar) as bars:
        pool = ThreadPoolExecutor(parallel)
        futures = {pool.submit(run, cell, bars(cell)): cell for cell in waiting}
        try:
            for number, future in enumerate(as_completed(futures), start=len(plan.cells) - len(waiting) + 1):
                cell, failure = futures[future], future.result()
                if failure:
                    failures[cell] = failure
                say(
                    f"{number}/{len(plan.cells)} {cell.name}: {f'failed. {first_line(failure)}' if failure else 'done'}"
                )
        except BaseException:
            stopping.set()  # first: a cell that began now would be noted as one that runs
            _note_killed(waiting, mirror)
            raise
        finally:  # when interrupted, nobody waits for the cells that run: leaving Ray ends them
            pool.shutdown(wait=False, cancel_futures=True)
            workers.end()
    return {cell: failures[cell] for cell in plan.cells if cell in failures}


def _note_killed(cells: list[Cell], mirror: Mirror) -> None:
    plans = [plan for cell in cells if cell.plan for plan in (*cell.plan.folds, cell.plan)]
    runs = [plan.run for plan in plans if read_status(plan.run) == "RUNNING"]
    for run in runs:
        note_status(run, "KILLED", "interrupted")
    for run in runs:
        mirror.update(run)


class Workers:
    """The workers of the cells of a benchmark, each of one cell at a time.

    Where all cells ask for the same, a worker of its own for each, one that is done goes on to a cell that is not begun. It
    ends where there is none: on a cluster that has lost nodes another cell may wait for its core.
    """

    def __init__(self, cells: Sequence[Execution], parallel: int) -> None:
        self.parallel, self.left, self.idle = parallel, len(cells), list[AnyWorker]()
        self.alike = {cell.num_workers for cell in cells} == {1} and len({cell.use_gpu for cell in cells}) == 1
        self.begun, self.ended, self.turn = list[AnyWorker](), False, Lock()

    @contextmanager
    def borrow(self, settings: Execution) -> Iterator[AnyWorker]:
        """Yield a worker for one cell; it ends where that fails."""
        with self.turn:
            self.left -= 1
            idle = self.idle.pop() if self.idle else None
        worker = idle or self._begin(settings)
        goes_on = False
        try:
            yield worker
            goes_on = self.alike
        finally:
            with self.turn:
                goes_on = goes_on and len(self.idle) < self.left
                if goes_on:
                    self.idle.append(worker)
            if not goes_on:
                worker.end()

    def _begin(self, settings: Execution) -> AnyWorker:
        worker: AnyWorker
        if settings.num_workers == 1:
            worker = RayWorker(settings, settings.use_gpu, self.parallel)
        else:
            worker = RayTeam(settings, settings.use_gpu, settings.num_workers)
        with self.turn:
            self.begun.append(worker)
            if not self.ended:
                return worker
        worker.end()
        raise InterruptedError("The benchmark that this cell belongs to has ended.")

    def end(self) -> None:
        """End all: those that wait, and those at work, which must not take the end of Ray for a death to go on after."""
        with self.turn:
            self.ended = True
        for worker in self.begun:
            worker.end()


def _run_cell(cell: Cell, here: Mapping[str, Any], mirror: Mirror, bar: Bar, workers: Workers) -> str:
    """Run a cell with the settings of this machine and return why it failed, or nothing."""

    def work(plan: TrainPlan) -> None:
        settings = replace(plan.settings, **here)
        with workers.borrow(settings) as worker:
            train_and_evaluate(replace(plan, settings=settings), mirror, bar, worker)

    return _attempt(cell, work)


def _attempt(cell: Cell, function: Callable[[TrainPlan], None]) -> str:
    """Do something with the training of a cell and return why it failed, or nothing."""
    assert cell.plan is not None
    try:
        function(cell.plan)
    except InterruptedError:
        return "interrupted"
    except Exception as error:  # one cell must never cost the others; its reason is kept and shown
        return _explain(error, cell.name)
    return ""


def _explain(error: Exception, what: str) -> str:
    """Return a user's mistake as its sentence; anything else is a bug, whose traceback is logged."""
    if isinstance(error, UserError):
        return str(error)
    logging.getLogger(__name__).error("A bug stopped %s", what, exc_info=error)
    return f"{type(error).__name__}: {first_line(str(error))}"


@contextmanager
def _follow_cells(plan: BenchmarkPlan, bar: Bar) -> Iterator[Callable[[Cell], Bar]]:
    """Show one bar of faces × epochs for all cells; yields what gives each cell its part of it."""
    worked = {cell: cell.worked for cell in plan.runnable}
    with bar(f"Training {len(worked)} cells", "faces") as progress:

        def bars(cell: Cell) -> Bar:
            @contextmanager
            def part(title: str, unit: str) -> Iterator[Progress]:
                def update(done: int, total: int, /, **facts: float) -> None:
                    if unit == "steps" and total:
                        worked[cell] = max(worked[cell], cell.work * done // total)
                        progress(sum(worked.values()), plan.work)

                yield update

            return part

        progress(plan.worked, plan.work)
        yield bars


def _write_outcomes(plan: BenchmarkPlan, failures: Failures) -> None:
    records = [
        {"cell": cell.name, "run": cell.plan.spec.name if cell.plan else None, "failure": failures.get(cell)}
        for cell in plan.cells
    ]
    write_changed(plan.folder / "cells.json", json.dumps(records, indent=1, ensure_ascii=False).encode())


def _compare(plan: BenchmarkPlan) -> None:
    """Write the comparison of the cells, unless it was made before of the same predictions and manifests."""
    folders = {cell.plan.run: None for cell in plan.runnable if cell.plan}
    evaluated = {
        str(path.relative_to(folder.parent)): digest(read_file(path))
        for folder in folders
        for path in list_files(folder / "predictions")
    }
    note = plan.folder / "comparison.sha256"
    manifests = plan.workspace.manifest_digests()  # by which predictions are left out
    made_of = digest(
        encode_json({"protocol": plan.benchmark.protocol, "evaluated": evaluated, "manifests": manifests})
    ).encode()
    if not (exists(note) and exists(plan.folder / "report.html") and read_file(note) == made_of):
        write_comparison(plan.workspace, plan.folder, read_runs(folders), plan.experiment, plan.benchmark.protocol)
        write_file(note, made_of)


def write_comparison(
    workspace: Workspace, folder: UPath, runs: Sequence[Run], experiment: str, protocol: ProtocolName
) -> None:
    """Write the comparison of runs, where any was evaluated, to a benchmark's folder: tables and the page of a report."""
    from cafe.report.experiment import draw_experiment

    manifests = workspace.manifest_digests()
    if any(run.load_predictions(protocol, named=False) for run in meet(runs, manifests).runs):
        report = make_report(runs, manifests, ReportSettings(protocol=protocol))
        write_file(folder / "comparison.md", to_markdown(report).encode())
        page = draw_experiment(experiment, report, workspace.root, workspace.keeping_manifests().find_manifest)
        write_file(folder / "report.html", page)
