"""The part of a training that runs on a worker: restore, train epoch by epoch, checkpoint; the first one writes the records.

One worker can train and judge many runs, one after another: in this process where it works on this machine alone, which
needs no Ray, or in one of Ray's. Several share one training through Ray Train. What they do is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from upath import UPath

from cafe.arithmetic import set_arithmetic
from cafe.files import exists, list_folder, locate, remove_file, remove_tree, write_json
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint
from cafe.learning.loading import FaceDataset
from cafe.learning.training import Selection, Training, fit, prepare
from cafe.networks.parallel import rank, share_batch_norm, world_size
from cafe.pipeline import cluster, machine
from cafe.pipeline.evaluate import predict_target
from cafe.pipeline.faces import Faces
from cafe.pipeline.models import build_method, make_dataset, make_live_dataset
from cafe.pipeline.runs import RunSpec
from cafe.pipeline.settings import EvaluateSettings, TrainSettings
from cafe.pipeline.sources import UnitedFaces, choose_rows
from cafe.pipeline.versions import check_versions
from cafe.towers.weights import write_tensors

MOST_LOADERS = 8  # processes that make views for a GPU which cannot
PROGRESS_SECONDS = 2.0  # between two notes of how far an epoch is


@dataclass(frozen=True)
class Task:
    """What a worker is to train, and with what: all that decides the result follows from the run's specification."""

    run: str
    source: Faces | UnitedFaces
    threads: int | None  # None: the worker's share of the cores
    loader_workers: (
        int | None
    )  # None: the training's own process decodes, unless it trains on a GPU with views that no GPU makes
    checkpoint_every: int
    versions: dict[str, str] = field(default_factory=dict)  # of the driver
    validation: Faces | None = None  # the domain by whose training faces the epoch is chosen, instead of the source's
    epochs: int | None = None  # after which to end; None: those of the recipe


class Worker:
    """Trains and judges runs one after another in one process, which keeps the faces of a source and of its targets."""

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device or cluster.device())
        self.source: Faces | UnitedFaces | None = None
        self.targets: dict[str, Faces] = {}

    def train(self, task: Task, check: Callable[[], None] = lambda: None) -> None:
        """Train a run to its end, or until `check` raises between two steps."""
        if task.source != self.source:
            self.source, self.targets = task.source, {}
        train_run(task, self.source, self.device, check=check)

    def judge(self, run: str, target: Faces) -> None:
        """Predict one target of a run that is trained."""
        name = f"{target.place} {target.store} {target.title}"
        predict_target(run, self.targets.setdefault(name, target), self.device)


class AnyWorker(Protocol):
    """A worker that is told what to do next, wherever it is; it does one thing after another."""

    def train(self, task: Task) -> Future[None]:
        """Train a run to its end."""

    def judge(self, run: str, target: Faces) -> Future[None]:
        """Predict one target of a run that is trained."""


class LocalWorker:
    """A worker in a thread of this process; only one at a time, since torch's random numbers belong to the process."""

    def __init__(self, device: str) -> None:
        self.worker, self.pool, self.ended = Worker(device), ThreadPoolExecutor(1), Event()

    def train(self, task: Task) -> Future[None]:
        """Train a run to its end."""
        return self.pool.submit(self.worker.train, task, self._check)

    def judge(self, run: str, target: Faces) -> Future[None]:
        """Predict one target of a run that is trained."""
        return self.pool.submit(self.worker.judge, run, target)

    def end(self) -> None:
        """Let a training that still runs end after its step, and nothing else begin."""
        self.ended.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _check(self) -> None:
        if self.ended.is_set():
            raise InterruptedError("The command that this training belongs to has ended.")


class RayWorker:
    """A worker in a process of Ray's, with its share of the machine where `parallel` of them work at a time."""

    def __init__(self, settings: TrainSettings, parallel: int = 1) -> None:
        import ray

        minutes = settings.scale_minutes
        gpus = cluster.count("GPU") if cluster.wants_gpu(settings.use_gpu, minutes=minutes) else 0
        cluster.check_cores(1, minutes)
        shares = {"num_cpus": cluster.share(parallel, cluster.count("CPU")), "num_gpus": cluster.share(parallel, gpus)}
        retries = 3 if settings.address else 0  # a cluster's nodes come and go
        self.actor = ray.remote(Worker).options(**shares, max_restarts=retries, max_task_retries=retries).remote()

    def train(self, task: Task) -> Future[None]:
        """Train a run to its end."""
        future: Future[None] = self.actor.train.remote(task).future()
        return future

    def judge(self, run: str, target: Faces) -> Future[None]:
        """Predict one target of a run that is trained."""
        future: Future[None] = self.actor.judge.remote(run, target).future()
        return future


@contextmanager
def find_worker(settings: TrainSettings | EvaluateSettings) -> Iterator[AnyWorker | None]:
    """Yield a worker in this process or, on a cluster, one of Ray's; None where several are to work side by side."""
    single = not isinstance(settings, TrainSettings) or settings.num_workers == 1
    if settings.address is None and single:
        local = LocalWorker(machine.own_device(settings.use_gpu))
        try:
            yield local
        finally:
            local.end()
        return
    with cluster.connect(settings):
        yield RayWorker(settings) if single and isinstance(settings, TrainSettings) else None


def train_together(config: dict[str, Task]) -> None:
    """Train the run of `config["task"]` as one of several workers of Ray Train."""
    import ray.train
    import ray.train.torch

    task = config["task"]
    share = machine.cores() // ray.train.get_context().get_local_world_size()
    device = ray.train.torch.get_device()
    # Preparing hands the first worker's state to the others.
    train_run(task, task.source, device, ray.train.torch.prepare_model, max(1, share))


def train_run(
    task: Task,
    source: Faces | UnitedFaces,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module] = lambda method: method,
    cores: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Train a run from its last checkpoint to its end; `wrap` makes the module trained, `check` may raise after any step."""
    check_versions(task.versions)
    run = locate(task.run)
    spec = RunSpec.load(run)
    set_arithmetic(spec.precision)
    cores = cores or machine.cores()
    torch.set_num_threads(min(cores, task.threads or cores))

    rows, held_out = choose_rows(source, spec.selection)
    method = build_method(spec).to(device).to(memory_format=torch.channels_last)
    if not method.trained:
        if rank() == 0:
            fit(method, make_dataset(spec, source), rows, device)
            _save_result(run, method.state_dict(), {"epochs": 0})
        return
    dataset = make_live_dataset(spec, source, str(device)) if spec.live else make_dataset(spec, source, keep=True)
    loaders = _count_loaders(task, device, dataset, cores)
    checkpoint, prepared = find_checkpoint(run), False
    if rank() == 0 and checkpoint is None:
        prepared = prepare(method, dataset, rows, spec.seed, device, loaders)
    if world_size() > 1:
        share_batch_norm(method)
    module, selection, optimizer = wrap(method), _choose_selection(task, spec, held_out), method.optimizer()
    domains = source.manifest.domains if isinstance(source, UnitedFaces) and spec.sampler == "balanced" else None
    training = Training(method, module, optimizer, dataset, rows, spec.seed, device, spec.precision, loaders, domains)
    done = _restore(checkpoint, training, selection) if checkpoint else 0
    if prepared:  # it may have taken hours
        save_checkpoint(run / "checkpoints" / "0000", method, optimizer, selection.record(0), selection.weights)
    last = task.epochs or spec.recipe["epochs"]
    _train(training, selection, run, range(done + 1, last + 1), task.checkpoint_every, check)


def _count_loaders(task: Task, device: torch.device, dataset: FaceDataset, cores: int) -> int:
    """Return how many processes make views: as asked for, else those a GPU needs that cannot make them itself."""
    if task.loader_workers is not None:
        return task.loader_workers
    return min(MOST_LOADERS, cores - 1) if device.type == "cuda" and dataset.plan.turns else 0


def _choose_selection(task: Task, spec: RunSpec, held_out: np.ndarray) -> Selection:
    """Return what chooses the epoch: the domain left out, where there is one, else faces held out of the source."""
    if task.validation:
        return Selection(task.validation.rows("train"), make_dataset(spec, task.validation))
    return Selection(held_out)


def find_checkpoint(run: UPath) -> UPath | None:
    """Return the folder of a run's last whole checkpoint, whose JSON is written last."""
    folders = list_folder(run / "checkpoints")
    return next((folder for folder in reversed(folders) if exists(folder / "state.json")), None)


def _restore(checkpoint: UPath, training: Training, selection: Selection) -> int:
    """Bring a training to a checkpoint and return the epochs that are behind it."""
    record, selection.weights = load_checkpoint(checkpoint, training.method, training.optimizer)
    selection.epoch, selection.accuracy = record["selected"], record["accuracy"]
    return int(record["epoch"])


def _train(
    training: Training,
    selection: Selection,
    run: UPath,
    epochs: range,
    checkpoint_every: int,
    check: Callable[[], None],
) -> None:
    metrics: dict[str, float] = {}
    for epoch in epochs:
        metrics = training.run_epoch(epoch, _Notes(run, epoch, check))
        if rank() > 0:
            continue
        metrics |= selection.judge(training, epoch)
        write_json(run / "epochs" / f"{epoch:04d}.json", metrics)
        if epoch % checkpoint_every == 0 and epoch < epochs.stop - 1:
            folder = run / "checkpoints" / f"{epoch:04d}"
            save_checkpoint(folder, training.method, training.optimizer, selection.record(epoch), selection.weights)
            _remove_checkpoints(run, keep=folder)
    if rank() == 0:
        result = {"epochs": epochs.stop - 1, "selected": selection.epoch, **metrics}
        _save_result(run, selection.result(training), result)
        _remove_checkpoints(run)


def _remove_checkpoints(run: UPath, keep: UPath | None = None) -> None:
    for folder in list_folder(run / "checkpoints"):
        if keep is None or folder.name != keep.name:
            # Its record goes first, so that a kill leaves no checkpoint that looks whole; half-written files go too.
            remove_file(folder / "state.json")
            remove_tree(folder)


def _save_result(run: UPath, weights: dict[str, Tensor], result: dict[str, Any]) -> None:
    """Write a trained method; the record that it is finished comes last."""
    write_tensors(run / "model.safetensors", weights)
    write_json(run / "result.json", result)


class _Notes:
    """Writes now and then how many faces were trained, for the progress bar of the driver."""

    def __init__(self, run: UPath, epoch: int, check: Callable[[], None]) -> None:
        self.path, self.epoch, self.check, self.last = run / "progress.json", epoch, check, 0.0

    def __call__(self, done: int, total: int) -> None:
        self.check()
        now = time.monotonic()
        if rank() == 0 and (done == total or now - self.last > PROGRESS_SECONDS):
            self.last = now
            write_json(self.path, {"done": (self.epoch - 1) * total + done, "per_epoch": total})
