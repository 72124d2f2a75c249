"""The part of a training and an evaluation that runs on a worker: restore, train epoch by epoch, checkpoint; then predict.

One worker can train and evaluate many runs, one after another: in a thread of the command where it works on this machine
alone, which needs no Ray, or in a process of Ray's. Several share one training through Ray Train. What they do is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Event, Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from upath import UPath

from cafe.addresses import Permission, permission
from cafe.arithmetic import set_arithmetic
from cafe.errors import quote
from cafe.files import exists, list_folder, remove_file, remove_tree, write_json
from cafe.learning.calibration import calibrate
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.learning.loading import FaceDataset
from cafe.learning.training import Averaging, Selection, Training, fit, prepare
from cafe.methods.method import Method
from cafe.networks.parallel import rank, share_batch_norm, world_size
from cafe.pipeline import cluster
from cafe.pipeline.evaluate import evaluate_target
from cafe.pipeline.faces import Faces
from cafe.pipeline.models import build_method, make_dataset, make_live_dataset
from cafe.pipeline.plan import AVERAGED, NEEDED, TrainPlan
from cafe.pipeline.process import machine
from cafe.pipeline.process.versions import check_versions, versions
from cafe.pipeline.release.start import continue_from
from cafe.pipeline.runs import START, RunSpec
from cafe.pipeline.settings import ClusterSettings
from cafe.plugins import Plugin, list_plugins
from cafe.seals import write_sealed
from cafe.towers.weights import write_tensors

MOST_LOADERS = 8  # processes that make views for a GPU which cannot
PROGRESS_SECONDS = 2.0  # between two notes of how far an epoch is
PREPARE_SECONDS = 24 * 3600  # that other workers wait for the first one, while it lives and prepares a method
RESTARTS = 3  # of what a cluster's nodes, which come and go, were at work on, without a new checkpoint

CheckLease = Callable[[], None]


class Worker:
    """Trains and evaluates runs one after another in one process, which keeps the faces of a source and of its targets.

    `wrap` makes the module trained of a method, where several workers share it; `cores` are those this one may use,
    `plugins` those of the command, and `allowed` what it may ask, where this is another process than the command's.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda method: method,
        cores: int | None = None,
        plugins: Sequence[Plugin] = (),
        allowed: Permission | None = None,
    ) -> None:
        if allowed:
            allowed.install()
        for plugin in plugins:
            plugin.install()
        self.device, self.wrap, self.cores = torch.device(device or cluster.device()), wrap, cores
        self.source: Faces | None = None
        self.targets: list[Faces] = []

    def train(
        self,
        plan: TrainPlan,
        epochs: int | None = None,
        drivers: Mapping[str, str] | None = None,
        check: CheckLease = lambda: None,
    ) -> None:
        """Train a run from its last checkpoint to its end, or up to so many epochs.

        `drivers` are the versions the command computes with; `check` may raise between two steps.
        """
        check_versions(drivers or {})
        if plan.source != self.source:
            self.source, self.targets = plan.source, []
        run, spec, source, settings = plan.run, plan.spec, self.source, plan.settings
        set_arithmetic(spec.precision)
        cores = self.cores or machine.cores()
        torch.set_num_threads(min(cores, settings.threads or cores))

        rows, held_out = source.split_rows(spec.selection, spec.recipe.get("calibration", "none"))
        method = _build(spec, run).to(self.device).to(memory_format=torch.channels_last)
        if not method.trained:
            if rank() == 0:
                fit(method, make_dataset(spec, source), rows, self.device)
                _save_result(run, method.state_dict(), {"epochs": 0})
            return
        dataset = _make_dataset(plan, source, self.device)
        loaders = _count_loaders(settings.loader_workers, self.device, dataset, cores)
        checkpoint, prepared = find_checkpoint(run), False
        if rank() == 0 and checkpoint is None and not spec.start:  # which has learned that already
            prepared = prepare(method, dataset, rows, spec.seed, self.device, loaders)
        if world_size() > 1:
            share_batch_norm(method)
        selection = _select(plan, held_out)
        module, optimizer = self.wrap(method), method.optimizer()
        domains = source.domains if spec.sources and spec.sampler == "balanced" else None
        training = Training(
            method, module, optimizer, dataset, rows, spec.seed, self.device, spec.precision, loaders, domains
        )
        done = _restore(checkpoint, training, selection) if checkpoint else 0
        keeper = _Keeper(run, training, selection, 60 * settings.checkpoint_minutes)
        if prepared:  # it may have taken hours
            keeper.save(0)
        last, metrics = epochs or spec.recipe["epochs"], dict[str, float]()
        for epoch in range(done + 1, last + 1):
            metrics = training.run_epoch(epoch, _Notes(keeper, epoch, check))
            if rank() == 0:
                metrics |= selection.evaluate(training, epoch)
                write_sealed(run / "epochs" / f"{epoch:04d}.json", metrics)
                if epoch < last and (epoch % settings.checkpoint_every == 0 or keeper.due):
                    keeper.save(epoch)
        if rank() == 0:
            metrics |= selection.conclude(training)
            if method.recipe.calibration == "temperature":
                method.load_state_dict(selection.result(training))
                metrics |= calibrate(method, dataset, held_out, self.device)
                selection.weights = method.state_dict()
            _save_result(run, selection.result(training), {"epochs": last, "selected": selection.epoch, **metrics})
            _remove_checkpoints(run)

    def evaluate(self, run: UPath, target: Faces) -> None:
        """Predict the faces of one target by a run that is trained."""
        if target not in self.targets:
            self.targets.append(target)
        kept = self.targets[self.targets.index(target)]  # with what was read of it for an earlier run
        evaluate_target(run, kept, self.device)


class AnyWorker(Protocol):
    """What trains and evaluates runs, wherever it is and however many share the work; it does one thing after another."""

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""

    def end(self) -> None:
        """Begin nothing else, and give back what it holds of the machine or the cluster, whoever still refers to it."""


class LocalWorker:
    """A worker in a thread of this process; only one at a time, since torch's random numbers belong to the process."""

    def __init__(self, device: str) -> None:
        self.worker, self.pool, self.ended = Worker(device), ThreadPoolExecutor(1), Event()

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""
        return self.pool.submit(self.worker.train, plan, epochs, check=lambda: _check_wanted(self.ended))

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""
        return self.pool.submit(self.worker.evaluate, run, target)

    def end(self) -> None:
        """Let a training that still runs end after its step, and nothing else begin."""
        self.ended.set()
        self.pool.shutdown(wait=False, cancel_futures=True)


class RayWorker:
    """A worker in a process of Ray's, with its share of the machine where `parallel` of them work at a time.

    On a cluster, whose nodes come and go, another process takes over where one died, as long as the work advances.
    """

    def __init__(self, settings: ClusterSettings, use_gpu: bool | None, parallel: int = 1) -> None:
        minutes = settings.scale_minutes
        gpus = cluster.count("GPU") if cluster.wants_gpu(use_gpu, minutes=minutes) else 0
        cluster.check_cores(1, minutes)
        self.shares = {
            "num_cpus": cluster.share(parallel, cluster.count("CPU")),
            "num_gpus": cluster.share(parallel, gpus),
        }
        self.retries = RESTARTS if settings.address else 0
        self.pool, self.ended, self.turn = ThreadPoolExecutor(1), Event(), Lock()
        self.actor = self._start()

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""
        return self.pool.submit(self._persist, plan.run, "train", plan, epochs, versions())

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""
        return self.pool.submit(self._persist, run, "evaluate", run, target)

    def end(self) -> None:
        """End its process, whose core Ray would keep as long as anything refers to it, such as an error's traceback."""
        import ray

        with self.turn:
            self.ended.set()
            if ray.is_initialized():  # else the process is gone, and Ray would start anew to look for it
                ray.kill(self.actor)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> Any:
        import ray

        return ray.remote(Worker).options(**self.shares).remote(plugins=list_plugins(), allowed=permission())

    def _persist(self, run: UPath, task: str, *arguments: Any) -> None:
        cluster.persist(
            lambda: self._ask(task, *arguments), lambda: find_place(run), self.retries, run.name, self._replace
        )

    def _ask(self, task: str, *arguments: Any) -> None:
        """Let the process do something, and end it where it dies or cannot be reached."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            ray.get(getattr(self.actor, task).remote(*arguments))
        except RayTaskError:  # what it came to, not its death
            raise
        except RayError as error:
            with self.turn:
                if self.ended.is_set() or not ray.is_initialized():
                    raise
                ray.kill(self.actor)  # one that only cannot be reached must not go on beside the next
            raise cluster.WorkerDiedError(quote(error)) from error

    def _replace(self) -> None:
        """Start another process, as soon as there is a node for it."""
        cluster.await_return("GPU" if self.shares["num_gpus"] else "CPU")
        with self.turn:
            _check_wanted(self.ended)
            self.actor = self._start()


class RayTeam:
    """Several workers of Ray Train that share every batch; targets are evaluated side by side, wherever there is room."""

    def __init__(self, settings: ClusterSettings, use_gpu: bool | None, workers: int) -> None:
        self.settings, self.use_gpu, self.workers = settings, use_gpu, workers
        self.pool, self.ended = ThreadPoolExecutor(1), Event()

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""
        return self.pool.submit(self._persist, plan, epochs)

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""
        import ray

        options = {"num_cpus": 1, "num_gpus": int(cluster.wants_gpu(self.use_gpu))}
        future: Future[None] = (
            ray.remote(_evaluate_alone).options(**options).remote(run, target, list_plugins(), permission()).future()
        )
        return future

    def end(self) -> None:
        """Let no other training begin: each ends its own workers, and one that is interrupted with the connection."""
        self.ended.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _persist(self, plan: TrainPlan, epochs: int | None) -> None:
        """Train, and on a cluster go on with other workers where some died, as long as the training advances."""
        gpu = cluster.wants_gpu(self.use_gpu, self.workers, self.settings.scale_minutes)
        cluster.check_cores(self.workers, self.settings.scale_minutes)
        cluster.persist(
            lambda: self._fit(plan, epochs, gpu),
            lambda: find_place(plan.run),
            RESTARTS if self.settings.address else 0,
            plan.run.name,
            lambda: cluster.await_return("GPU" if gpu else "CPU", self.workers),
        )

    def _fit(self, plan: TrainPlan, epochs: int | None, gpu: bool) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        _check_wanted(self.ended)
        trainer = TorchTrainer(
            train_together,
            train_loop_config={
                "plan": plan,
                "epochs": epochs,
                "drivers": versions(),
                "plugins": list_plugins(),
                "allowed": permission(),
            },
            torch_config=TorchConfig(timeout_s=PREPARE_SECONDS),
            scaling_config=ScalingConfig(num_workers=self.workers, use_gpu=gpu),
            run_config=RunConfig(
                name="train",
                storage_path=str(plan.run),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # they are counted above
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            first = next(iter(getattr(error, "worker_failures", {}).values()), error)
            sentence, _, _ = quote(getattr(first, "_base_exc", first)).partition(". ")
            raise cluster.WorkerDiedError(sentence) from error


def _check_wanted(ended: Event) -> None:
    """Raise `InterruptedError` where the command has ended for which a worker trains."""
    if ended.is_set():
        raise InterruptedError("The command that this training belongs to has ended.")


@contextmanager
def find_worker(settings: ClusterSettings, use_gpu: bool | None, workers: int = 1) -> Iterator[AnyWorker]:
    """Yield what trains and evaluates: a worker in this process, or on a cluster, or several that share the work there."""
    alone = settings.address is None and workers == 1
    with nullcontext() if alone else cluster.connect(settings):
        worker: LocalWorker | RayWorker | RayTeam
        if alone:
            worker = LocalWorker(machine.own_device(use_gpu))
        else:
            worker = RayWorker(settings, use_gpu) if workers == 1 else RayTeam(settings, use_gpu, workers)
        try:
            yield worker
        finally:
            worker.end()


def train_together(config: dict[str, Any]) -> None:
    """Train the run of `config["plan"]` as one of several workers of Ray Train."""
    import ray.train
    import ray.train.torch

    share = machine.cores() // ray.train.get_context().get_local_world_size()
    # Preparing hands the first worker's state to the others.
    prepare_model, plugins = ray.train.torch.prepare_model, config["plugins"]
    worker = Worker(ray.train.torch.get_device(), prepare_model, max(1, share), plugins, config["allowed"])
    worker.train(config["plan"], config["epochs"], config["drivers"])


def _evaluate_alone(run: UPath, target: Faces, plugins: Sequence[Plugin], allowed: Permission) -> None:
    """Predict the faces of one target, in a process that does nothing else."""
    Worker(plugins=plugins, allowed=allowed).evaluate(run, target)


def _select(plan: TrainPlan, held_out: np.ndarray) -> Selection:
    """Return by which faces the epoch is chosen: those of the domain left out, or rows held out of the source."""
    if plan.validation:
        return Selection(plan.validation.rows("train"), make_dataset(plan.spec, plan.validation))
    if plan.spec.selection == AVERAGED:
        return Averaging(held_out)
    return Selection(held_out if plan.spec.selection in NEEDED else held_out[:0])


def _build(spec: RunSpec, run: UPath) -> Method:
    """Return a method with its first weights: drawn, or those it goes on from."""
    method = build_method(spec)
    if spec.start:
        continue_from(method, run / START, spec.name, spec.start)
    return method


def _make_dataset(plan: TrainPlan, source: Faces, device: torch.device) -> FaceDataset:
    """Return the faces of the source as the training needs them, with features of a store or of the tower at work."""
    live = plan.spec.live
    made = make_live_dataset(plan.spec, source, str(device)) if live else make_dataset(plan.spec, source, keep=True)
    return replace(made, silent_seconds=plan.settings.silent_seconds)


def _count_loaders(asked: int | None, device: torch.device, dataset: FaceDataset, cores: int) -> int:
    """Return how many processes make views: as asked for, else those a GPU needs that cannot make them itself."""
    if asked is not None:
        return asked
    return min(MOST_LOADERS, cores - 1) if device.type == "cuda" and dataset.plan.turns else 0


def find_checkpoint(run: UPath) -> UPath | None:
    """Return the folder of a run's last whole checkpoint, whose JSON is written last."""
    folders = list_folder(run / "checkpoints")
    return next((folder for folder in reversed(folders) if exists(folder / "state.json")), None)


def find_place(run: UPath) -> str:
    """Say what a training would go on from now."""
    checkpoint = find_checkpoint(run)
    return f"checkpoint {checkpoint.name}" if checkpoint else "its beginning"


def _restore(checkpoint: UPath, training: Training, selection: Selection) -> int:
    """Bring a training to a checkpoint and return the epochs that are behind it."""
    record, weights = load_checkpoint(checkpoint, training.method, training.optimizer)
    training.restore(record)
    selection.restore(record, weights)
    return int(record["epoch"])


class _Keeper:
    """Writes the checkpoints of a training, the last one alone, and says when one is due by the clock."""

    def __init__(self, run: UPath, training: Training, selection: Selection, seconds: int) -> None:
        self.run, self.training, self.selection, self.seconds = run, training, selection, seconds
        self.since = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one is old."""
        return time.monotonic() - self.since >= self.seconds

    def save(self, done: int) -> None:
        """Write what a training goes on from that has `done` epochs behind it and `step` steps of the next."""
        training, selection = self.training, self.selection
        name = f"{done:04d}" + (f"-{training.step:08d}" if training.step else "")  # sorted as they come
        record = selection.record(done) | training.record()
        folder = self.run / "checkpoints" / name
        save_checkpoint(folder, training.method, training.optimizer, record, selection.weights)
        _remove_checkpoints(self.run, keep=folder)
        self.since = time.monotonic()


def _remove_checkpoints(run: UPath, keep: UPath | None = None) -> None:
    for folder in list_folder(run / "checkpoints"):
        if keep is None or folder.name != keep.name:
            # Its record goes first, so that a kill leaves no checkpoint that looks whole; half-written files go too.
            remove_file(folder / "state.json")
            remove_tree(folder)


def _save_result(run: UPath, weights: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Write a trained method; the record that it is finished comes last."""
    write_tensors(run / "model.safetensors", weights)
    write_sealed(run / "result.json", result)


class _Notes:
    """What is due after a step: a note, now and then, of how far it is for the driver's progress bar, and a checkpoint."""

    def __init__(self, keeper: _Keeper, epoch: int, check: CheckLease) -> None:
        self.keeper, self.epoch, self.check, self.last = keeper, epoch, check, 0.0

    def __call__(self, done: int, total: int) -> None:
        self.check()
        if rank() != 0:
            return
        now = time.monotonic()
        if done == total or now - self.last > PROGRESS_SECONDS:
            self.last = now
            note = {"done": (self.epoch - 1) * total + done, "per_epoch": total}
            write_json(self.keeper.run / "progress.json", note)
        # Before the last step it would begin with a batch that may be too small for all workers.
        if done < total - 1 and self.keeper.due:
            self.keeper.save(self.epoch - 1)
