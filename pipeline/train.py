"""Stage two: a plan at work. One method is trained on one source, then evaluated on every target.

The specification of a run names it, so the same command goes on where an interrupted one stopped and does nothing when it
is finished. Everything is written to the run's folder, which MLflow mirrors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
from upath import UPath

from cafe.files import read_json, write_json
from cafe.pipeline import cluster
from cafe.pipeline.evaluate import evaluate_targets
from cafe.pipeline.plan import TrainPlan, find_deviations
from cafe.pipeline.process.lease import hold
from cafe.pipeline.process.progress import Bar, Progress, no_bar
from cafe.pipeline.release.start import keep_start
from cafe.pipeline.runs import add_experiment, is_finished, note_end, note_start, note_status, read_status
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.worker import AnyWorker, find_worker
from cafe.results.runs import list_epochs, read_epoch

FOLLOW_SECONDS = 1.0  # between two looks at what the workers have written
MIRROR_SECONDS = 10.0  # between two times that MLflow is shown the epochs of a run, which takes a tenth of a second


def train_and_evaluate(plan: TrainPlan, mirror: Mirror, bar: Bar = no_bar, worker: AnyWorker | None = None) -> None:
    """Train, then evaluate on every target that remains, with a worker that runs already or one of its own.

    Folds are trained first, each a run of its own; then the run itself up to the epoch they choose. A plan that is done
    costs nothing. Interrupt it at any time: the same plan goes on from its last checkpoint.
    """
    if plan.done:
        show_finished(plan, mirror)
        return
    settings = plan.settings
    _write_description(plan, plan)
    with (
        hold(plan.run, settings.wait) as check,
        keep_status(plan.run, mirror),
        mirror.monitoring(plan.run) if settings.system_metrics else nullcontext(),
        nullcontext(worker) if worker else find_worker(settings, settings.use_gpu, settings.num_workers) as at_work,
    ):
        if not is_finished(plan.run):
            with bar(f"Training {plan.spec.name}", "steps") as progress:
                share = len(plan.folds) + 1
                for number, fold in enumerate(plan.folds):
                    if not is_finished(fold.run):
                        _train_fold(plan, fold, mirror, at_work, _part(progress, number, share), check)
                epochs = choose_epoch(plan) if plan.folds else None
                training = at_work.train(plan, epochs)
                follow(plan, training, mirror, _part(progress, share - 1, share), check, epochs)
        if remaining := plan.remaining:
            with bar("Evaluating", "targets") as progress:
                evaluate_targets(plan.run, remaining, progress, at_work.evaluate)


def _train_fold(
    plan: TrainPlan, fold: TrainPlan, mirror: Mirror, worker: AnyWorker, progress: Progress, check: Callable[[], None]
) -> None:
    """Train a fold, which the runs of other commands may choose their epoch by too: it has a lease of its own."""
    with hold(fold.run, plan.settings.wait) as check_fold:

        def check_both() -> None:
            check()
            check_fold()

        if is_finished(fold.run):  # by whom this command waited for
            return
        _write_description(fold, plan)
        with keep_status(fold.run, mirror):
            training = worker.train(replace(fold, settings=plan.settings))
            follow(fold, training, mirror, progress, check_both)


def show_finished(plan: TrainPlan, mirror: Mirror) -> None:
    """Note that a run that is done belongs to this experiment too, and mirror it."""
    _write_description(plan, plan)
    note_status(plan.run, "FINISHED")
    mirror.update(plan.run)


def _write_description(plan: TrainPlan, owner: TrainPlan) -> None:
    """Write down what a run is, and to which experiment it belongs: a fold to that of the run whose epoch it chooses."""
    plan.spec.save(plan.run, find_deviations(plan.spec))
    if not is_finished(plan.run):
        keep_start(plan.start, plan.run)
    add_experiment(plan.run, owner.settings.experiment, owner.benchmark)


@contextmanager
def keep_status(run: UPath, mirror: Mirror) -> Iterator[None]:
    """Write into a run's folder that it is RUNNING and then how it ended, and mirror it.

    One that is FINISHED stays so, whatever becomes of another evaluation of it: its weights and predictions are there.
    """
    finished = read_status(run) == "FINISHED" and is_finished(run)
    if not finished:
        note_start(run)
        note_status(run, "RUNNING")
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | InterruptedError) or read_status(run) == "KILLED"
        if not finished:
            note_status(run, "KILLED" if killed else "FAILED", "interrupted" if killed else str(error))
        raise
    else:
        note_status(run, "FINISHED")
        if not finished:
            note_end(run)
    finally:
        mirror.update(run)


def _part(progress: Progress, number: int, count: int) -> Progress:
    def update(done: int, total: int, /, **facts: float) -> None:
        progress(number * total + done, count * total, **facts)

    return update


def choose_epoch(plan: TrainPlan) -> int:
    """Return the epoch with the best mean accuracy on the sources left out, the first of equals, and write it down."""
    records = [[read_epoch(path) for path in list_epochs(fold.run).values()] for fold in plan.folds]
    means = np.mean([[record["selection/accuracy"] for record in own] for own in records], axis=0).tolist()
    epoch = int(means.index(max(means))) + 1
    runs = {fold.spec.fold: fold.spec.name for fold in plan.folds}
    write_json(plan.run / "selection.json", {"epoch": epoch, "accuracy": means, "folds": runs})
    return epoch


def follow(
    plan: TrainPlan,
    training: Future[None],
    mirror: Mirror,
    progress: Progress,
    check: Callable[[], None],
    epochs: int | None = None,
) -> None:
    """Show the run's own records in MLflow and in the progress bar until the training ends."""
    mirrored, since, last = 0, time.monotonic(), epochs or plan.spec.recipe["epochs"]
    facts: dict[str, float] = {"epochs_done": 0, "epochs": last}
    over = False
    while not over:
        over = training.done()  # then what it wrote last is shown once more
        if not over:
            check()
        records = list_epochs(plan.run)
        trained = len(records)
        if trained > facts["epochs_done"]:
            record = read_epoch(records[max(records)])
            facts = {"epochs_done": trained, "epochs": last}
            for name, key in (("loss", "train/total"), ("accuracy", "train/accuracy")):
                facts |= {name: record[key]} if key in record else {}
        if trained > mirrored and time.monotonic() - since > MIRROR_SECONDS:
            mirror.update(plan.run)
            mirrored, since = trained, time.monotonic()
        if note := read_json(plan.run / "progress.json"):
            progress(note["done"], note["per_epoch"] * last, **facts)
        if not over:
            wait([training], FOLLOW_SECONDS)
    if error := training.exception():
        raise cluster.user_error(error) or error
