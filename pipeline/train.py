"""Stage two: one method on one source, with Ray Train; judged afterwards on every target.

The specification of a run names it, so the same command goes on where an interrupted one stopped and does nothing when it
is finished. Everything is written to the run's folder, which MLflow mirrors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from upath import UPath

from cafe.data.union import unite
from cafe.errors import UserError
from cafe.files import list_folder, read_json, write_json
from cafe.learning.loading import SMALLEST_BATCH
from cafe.methods import find_method
from cafe.methods.method import Recipe
from cafe.networks.branches import check_network
from cafe.pipeline import cluster
from cafe.pipeline.evaluate import is_judged, judge_anywhere, predict_targets
from cafe.pipeline.faces import Faces, choose_target, choose_targets
from cafe.pipeline.lease import hold
from cafe.pipeline.models import find_deviations, find_inputs, find_recipe, specify
from cafe.pipeline.progress import Bar, Progress, no_bar
from cafe.pipeline.runs import RunSpec, add_experiment, is_finished, note_status, read_status
from cafe.pipeline.settings import TrainSettings
from cafe.pipeline.sources import (
    UnitedFaces,
    check_domains,
    check_faces,
    choose_stores,
    describe_stores,
    find_faces,
    split_names,
)
from cafe.pipeline.tracking.mirror import Mirror
from cafe.pipeline.versions import versions
from cafe.pipeline.worker import AnyWorker, Task, find_worker, train_together
from cafe.pipeline.workspace import Workspace, check_name
from cafe.results.protocols import find_protocol

PREPARE_SECONDS = 24 * 3600  # that the other workers wait for the first one, while it prepares a method
FOLLOW_SECONDS = 1.0  # between two looks at what the workers have written
MIRROR_SECONDS = 10.0  # between two times that MLflow is shown the epochs of a run, which takes a tenth of a second


@dataclass(frozen=True)
class TrainPlan:
    """A checked training: nothing in it can be wrong any more when Ray starts."""

    workspace: Workspace
    settings: TrainSettings
    spec: RunSpec
    source: Faces | UnitedFaces
    targets: list[Faces]
    benchmark: str | None = None  # whose cell it is
    validation: Faces | None = None  # the domain left out, where its training faces choose the epoch
    folds: tuple[TrainPlan, ...] = ()  # trainings on all sources but one, which choose the epoch together

    @property
    def run(self) -> UPath:
        """The folder of the run."""
        return self.workspace.run_path(self.spec.name)

    @property
    def remaining(self) -> list[Faces]:
        """The targets that are not judged yet."""
        trained = is_finished(self.run)
        return [target for target in self.targets if not (trained and is_judged(self.run, target))]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return is_finished(self.run) and not self.remaining

    def with_seed(self, seed: int) -> TrainPlan:
        """Return the same training with another seed."""
        settings, spec = replace(self.settings, seed=seed), replace(self.spec, seed=seed)
        return replace(self, settings=settings, spec=spec, folds=tuple(fold.with_seed(seed) for fold in self.folds))


def plan_training(workspace: Workspace, settings: TrainSettings) -> TrainPlan:
    """Check every name, file and store and return what will be trained; raise `UserError`."""
    if settings.views_per_seed:
        settings = replace(settings, view_seed=settings.seed)
    method, names = find_method(settings.method), split_names(settings.source)
    manifest = unite([workspace.load_manifest(name) for name in names])
    recipe = find_recipe(settings, manifest.kind)
    _check_names(settings, recipe)
    check_domains(settings, names)
    stores = choose_stores(workspace, manifest, settings)
    spec = specify(settings, manifest, recipe, describe_stores(manifest, stores, settings))
    method.check(find_inputs(spec))
    source = find_faces(workspace, manifest, stores)
    for part in source.parts:
        check_faces(part, settings)
    judged = settings.fold or None if settings.targets is None else settings.targets
    targets = choose_targets(workspace, judged, spec, settings.protocol)
    plan = TrainPlan(workspace, settings, spec, source, targets)
    if settings.selection == "oracle":
        plan = replace(plan, validation=choose_target(workspace, settings.fold, spec, find_protocol("clean"), "train"))
    if settings.selection == "leave_one_out":
        plan = replace(plan, folds=tuple(_plan_fold(plan, part) for part in source.parts))
    return plan


def _plan_fold(plan: TrainPlan, left_out: Faces) -> TrainPlan:
    """Return the training on all sources but one, with the same stores, whose epochs are judged on the one left out."""
    others = [part for part in plan.source.parts if part is not left_out]
    changes: dict[str, Any] = {"source": ",".join(part.name for part in others), "fold": left_out.name}
    if plan.spec.features:
        changes |= {"backbone": None, "store": ",".join(part.about.folder for part in others if part.about)}
    if len(others) == 1:
        changes["sampler"] = "proportional"
    return plan_training(plan.workspace, replace(plan.settings, selection="oracle", targets="none", **changes))


def _check_names(settings: TrainSettings, recipe: Recipe) -> None:
    check_network(settings.network, settings.init)
    check_name(settings.experiment)
    if settings.tag:
        check_name(settings.tag)
    if settings.num_workers > min(SMALLEST_BATCH, recipe.batch_size):
        raise UserError(f"{settings.num_workers} workers are too many for batches of {recipe.batch_size}: use fewer.")


def train_and_judge(plan: TrainPlan, mirror: Mirror, bar: Bar = no_bar, worker: AnyWorker | None = None) -> None:
    """Train, then judge on every target not judged yet, with a worker that runs already or one of its own.

    A plan that is done costs nothing. Interrupt it at any time: the same plan goes on from its last checkpoint.
    """
    if plan.done:
        show_finished(plan, mirror)
        return
    _describe(plan, plan)
    with (
        hold(plan.run, plan.settings.wait) as check,
        keep_status(plan.run, mirror),
        nullcontext(worker) if worker else find_worker(plan.settings) as worker,
    ):
        if not is_finished(plan.run):
            with bar(f"Training {plan.spec.name}", "steps") as progress:
                _train_all(plan, mirror, progress, worker, check)
        if remaining := plan.remaining:
            with bar("Judging", "targets") as progress:
                judge = worker.judge if worker else judge_anywhere(plan.settings.use_gpu)
                predict_targets(plan.run, remaining, progress, judge)


def show_finished(plan: TrainPlan, mirror: Mirror) -> None:
    """Note that a run that is done belongs to this experiment too, and mirror it."""
    _describe(plan, plan)
    note_status(plan.run, "FINISHED")
    mirror.update(plan.run)


def _describe(plan: TrainPlan, owner: TrainPlan) -> None:
    """Write down what a run is, and to which experiment it belongs: a fold to that of the run whose epoch it chooses."""
    plan.spec.save(plan.run, list(find_deviations(plan.spec)))
    add_experiment(plan.run, owner.settings.experiment, owner.benchmark)


@contextmanager
def keep_status(run: UPath, mirror: Mirror) -> Iterator[None]:
    """Write into a run's folder that it is RUNNING and then how it ended, and mirror it."""
    note_status(run, "RUNNING")
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt) or read_status(run) == "KILLED"
        note_status(run, "KILLED" if killed else "FAILED", "interrupted" if killed else str(error))
        raise
    else:
        note_status(run, "FINISHED")
    finally:
        mirror.update(run)


def _train_all(
    plan: TrainPlan, mirror: Mirror, progress: Progress, worker: AnyWorker | None, check: Callable[[], None]
) -> None:
    """Train the folds, each a run of its own; then the run itself, where there are any up to the epoch they choose."""
    count = len(plan.folds) + 1
    for number, fold in enumerate(plan.folds):
        if is_finished(fold.run):
            continue
        _describe(fold, plan)
        with keep_status(fold.run, mirror):
            shared = replace(fold, settings=plan.settings)
            _train(shared, mirror, _share(progress, number, count), worker, check)
    epochs = choose_epoch(plan) if plan.folds else None
    _train(plan, mirror, _share(progress, count - 1, count), worker, check, epochs)


def _share(progress: Progress, number: int, count: int) -> Progress:
    return lambda done, total: progress(number * total + done, count * total)


def choose_epoch(plan: TrainPlan) -> int:
    """Return the epoch with the best mean accuracy on the sources left out, the first of equals, and write it down."""
    records = [[read_json(path) or {} for path in list_folder(fold.run / "epochs")] for fold in plan.folds]
    means = np.mean([[record["selection/accuracy"] for record in own] for own in records], axis=0).tolist()
    epoch = int(means.index(max(means))) + 1
    runs = {fold.spec.fold: fold.spec.name for fold in plan.folds}
    write_json(plan.run / "selection.json", {"epoch": epoch, "accuracy": means, "folds": runs})
    return epoch


def _train(
    plan: TrainPlan,
    mirror: Mirror,
    progress: Progress,
    worker: AnyWorker | None,
    check: Callable[[], None],
    epochs: int | None = None,
) -> None:
    settings = plan.settings
    task = Task(
        str(plan.run),
        plan.source,
        settings.threads,
        settings.loader_workers,
        settings.checkpoint_every,
        versions(),
        plan.validation,
        epochs,
    )
    background = ThreadPoolExecutor(1)
    try:
        if worker is None:
            outcome: Future[Any] = background.submit(_train_together, task, settings)
        else:
            outcome = worker.train(task)
        _follow(plan, outcome, mirror, progress, check, epochs or plan.spec.recipe["epochs"])
    finally:
        background.shutdown(wait=False)  # when interrupted, leaving Ray ends the training


def _follow(
    plan: TrainPlan,
    outcome: Future[Any],
    mirror: Mirror,
    progress: Progress,
    check: Callable[[], None],
    epochs: int,
) -> None:
    """Show the run's own records in MLflow and in the progress bar until the training ends."""
    mirrored, since = 0, time.monotonic()
    while not outcome.done():
        check()
        trained = len(list_folder(plan.run / "epochs"))
        if trained > mirrored and time.monotonic() - since > MIRROR_SECONDS:
            mirror.update(plan.run)
            mirrored, since = trained, time.monotonic()
        if note := read_json(plan.run / "progress.json"):
            progress(note["done"], note["per_epoch"] * epochs)
        wait([outcome], FOLLOW_SECONDS)
    if error := outcome.exception():
        raise cluster.user_error(error) or error


def _train_together(task: Task, settings: TrainSettings) -> None:
    """Train with several workers of Ray Train, which share every batch."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = cluster.wants_gpu(settings.use_gpu, settings.num_workers, settings.scale_minutes)
    cluster.check_cores(settings.num_workers, settings.scale_minutes)
    trainer = TorchTrainer(
        train_together,
        train_loop_config={"task": task},
        torch_config=TorchConfig(timeout_s=PREPARE_SECONDS),
        scaling_config=ScalingConfig(num_workers=settings.num_workers, use_gpu=gpu),
        run_config=RunConfig(
            name="train",
            storage_path=task.run,
            failure_config=FailureConfig(max_failures=3 if settings.address else 0),
        ),
    )
    trainer.fit()
