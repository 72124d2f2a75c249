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
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from upath import UPath

from cafe.addresses import Permission, permission
from cafe.arithmetic import set_arithmetic
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
RESTARTS = 3  # of what a cluster's nodes, which come and go, were at work on

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
        self.targets: dict[str, Faces] = {}

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
            self.source, self.targets = plan.source, {}
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
        if prepared:  # it may have taken hours
            _save_checkpoint(run, 0, training, selection)
        last, metrics = epochs or spec.recipe["epochs"], dict[str, float]()
        for epoch in range(done + 1, last + 1):
            metrics = training.run_epoch(epoch, _Notes(run, epoch, check))
            if rank() == 0:
                metrics |= selection.evaluate(training, epoch)
                write_sealed(run / "epochs" / f"{epoch:04d}.json", metrics)
                if epoch % settings.checkpoint_every == 0 and epoch < last:
                    _save_checkpoint(run, epoch, training, selection)
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
        name = f"{[(part.place, part.stores) for part in target.parts]} {target.column} {target.classes}"
        evaluate_target(run, self.targets.setdefault(name, target), self.device)


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
        return self.pool.submit(self.worker.train, plan, epochs, check=self._check)

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""
        return self.pool.submit(self.worker.evaluate, run, target)

    def end(self) -> None:
        """Let a training that still runs end after its step, and nothing else begin."""
        self.ended.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _check(self) -> None:
        if self.ended.is_set():
            raise InterruptedError("The command that this training belongs to has ended.")


class RayWorker:
    """A worker in a process of Ray's, with its share of the machine where `parallel` of them work at a time."""

    def __init__(self, settings: ClusterSettings, use_gpu: bool | None, parallel: int = 1) -> None:
        import ray

        minutes = settings.scale_minutes
        gpus = cluster.count("GPU") if cluster.wants_gpu(use_gpu, minutes=minutes) else 0
        cluster.check_cores(1, minutes)
        shares = {"num_cpus": cluster.share(parallel, cluster.count("CPU")), "num_gpus": cluster.share(parallel, gpus)}
        retries = RESTARTS if settings.address else 0
        self.actor = (
            ray.remote(Worker)
            .options(**shares, max_restarts=retries, max_task_retries=retries)
            .remote(plugins=list_plugins(), allowed=permission())
        )

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""
        future: Future[None] = self.actor.train.remote(plan, epochs, versions()).future()
        return future

    def evaluate(self, run: UPath, target: Faces) -> Future[None]:
        """Predict the faces of one target by a run that is trained."""
        future: Future[None] = self.actor.evaluate.remote(run, target).future()
        return future

    def end(self) -> None:
        """End its process, whose core Ray would keep as long as anything refers to it, such as an error's traceback."""
        import ray

        ray.kill(self.actor)


class RayTeam:
    """Several workers of Ray Train that share every batch; targets are evaluated side by side, wherever there is room."""

    def __init__(self, settings: ClusterSettings, use_gpu: bool | None, workers: int) -> None:
        self.settings, self.use_gpu, self.workers = settings, use_gpu, workers
        self.pool = ThreadPoolExecutor(1)

    def train(self, plan: TrainPlan, epochs: int | None = None) -> Future[None]:
        """Train a run to its end, or up to so many epochs."""
        future = self.pool.submit(self._fit, plan, epochs)
        self.pool.shutdown(wait=False)  # when interrupted, leaving Ray ends the training
        self.pool = ThreadPoolExecutor(1)
        return future

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
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _fit(self, plan: TrainPlan, epochs: int | None) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpu = cluster.wants_gpu(self.use_gpu, self.workers, self.settings.scale_minutes)
        cluster.check_cores(self.workers, self.settings.scale_minutes)
        TorchTrainer(
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
                failure_config=FailureConfig(max_failures=RESTARTS if self.settings.address else 0),
            ),
        ).fit()


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


def _restore(checkpoint: UPath, training: Training, selection: Selection) -> int:
    """Bring a training to a checkpoint and return the epochs that are behind it."""
    record, weights = load_checkpoint(checkpoint, training.method, training.optimizer)
    selection.restore(record, weights)
    return int(record["epoch"])


def _save_checkpoint(run: UPath, epoch: int, training: Training, selection: Selection) -> None:
    folder = run / "checkpoints" / f"{epoch:04d}"
    save_checkpoint(folder, training.method, training.optimizer, selection.record(epoch), selection.weights)
    _remove_checkpoints(run, keep=folder)


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
    """Writes now and then how many faces were trained, for the progress bar of the driver."""

    def __init__(self, run: UPath, epoch: int, check: CheckLease) -> None:
        self.path, self.epoch, self.check, self.last = run / "progress.json", epoch, check, 0.0

    def __call__(self, done: int, total: int) -> None:
        self.check()
        now = time.monotonic()
        if rank() == 0 and (done == total or now - self.last > PROGRESS_SECONDS):
            self.last = now
            write_json(self.path, {"done": (self.epoch - 1) * total + done, "per_epoch": total})
