"""The part of a training that runs on a worker: restore, train epoch by epoch, checkpoint; the first one writes the records.

One process can train and judge many runs, one after another; several processes share one training through Ray Train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from upath import UPath

from cafe.arithmetic import set_arithmetic
from cafe.files import exists, list_folder, locate, remove_file, remove_tree, write_json
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint, write_tensors
from cafe.learning.parallel import rank, share_batch_norm, world_size
from cafe.learning.training import Selection, Training, fit, prepare
from pipeline import cluster
from pipeline.evaluate import predict_target
from pipeline.faces import Faces
from pipeline.models import build_method, make_dataset, make_live_dataset
from pipeline.runs import RunSpec
from pipeline.sources import UnitedFaces, choose_rows

PROGRESS_SECONDS = 2.0  # between two notes of how far an epoch is


@dataclass(frozen=True)
class Task:
    """What a worker is to train, and with what: all that decides the result follows from the run's specification."""

    run: str
    source: Faces | UnitedFaces
    threads: int | None  # None: the worker's share of the cores
    loader_workers: int
    checkpoint_every: int
    versions: dict[str, str] = field(default_factory=dict)  # of the driver
    validation: Faces | None = None  # the domain by whose training faces the epoch is chosen, instead of the source's
    epochs: int | None = None  # after which to end; None: those of the recipe


class Worker:
    """Trains and judges runs one after another in one process, which keeps the faces of a source and of its targets."""

    def __init__(self) -> None:
        self.source: Faces | UnitedFaces | None = None
        self.targets: dict[str, Faces] = {}

    def train(self, task: Task) -> None:
        """Train a run to its end."""
        if task.source != self.source:
            self.source, self.targets = task.source, {}
        train_run(task, self.source, torch.device(cluster.device()))

    def judge(self, run: str, target: Faces) -> None:
        """Predict one target of a run that is trained."""
        predict_target(run, self.targets.setdefault(f"{target.place} {target.store} {target.title}", target))


def train_together(config: dict[str, Task]) -> None:
    """Train the run of `config["task"]` as one of several workers of Ray Train."""
    import ray.train
    import ray.train.torch

    task = config["task"]
    share = cluster.cores() // ray.train.get_context().get_local_world_size()
    device = ray.train.torch.get_device()
    # Preparing hands the first worker's state to the others.
    train_run(task, task.source, device, ray.train.torch.prepare_model, max(1, share))


def train_run(
    task: Task,
    source: Faces | UnitedFaces,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module] = lambda method: method,
    cores: int | None = None,
) -> None:
    """Train a run to its end, from its last checkpoint where there is one; `wrap` makes the module that is trained."""
    cluster.check_versions(task.versions)
    run = locate(task.run)
    spec = RunSpec.load(run)
    set_arithmetic(spec.precision)
    cores = cores or cluster.cores()
    torch.set_num_threads(min(cores, task.threads or cores))

    rows, held_out = choose_rows(source, spec.selection)
    method = build_method(spec).to(device).to(memory_format=torch.channels_last)
    if not method.trained:
        if rank() == 0:
            fit(method, make_dataset(spec, source), rows, device)
            _save_result(run, method.state_dict(), {"epochs": 0})
        return
    dataset = make_live_dataset(spec, source, str(device)) if spec.live else make_dataset(spec, source)
    checkpoint, prepared = find_checkpoint(run), False
    if rank() == 0 and checkpoint is None:
        prepared = prepare(method, dataset, rows, spec.seed, device, task.loader_workers)
    if world_size() > 1:
        share_batch_norm(method)
    module, selection = wrap(method), Selection(held_out)
    if task.validation:
        selection = Selection(task.validation.rows("train"), make_dataset(spec, task.validation))
    optimizer, loaders = method.optimizer(), task.loader_workers
    domains = source.manifest.domains if isinstance(source, UnitedFaces) and spec.sampler == "balanced" else None
    training = Training(method, module, optimizer, dataset, rows, spec.seed, device, spec.precision, loaders, domains)
    done = _restore(checkpoint, training, selection) if checkpoint else 0
    if prepared:  # it may have taken hours
        save_checkpoint(run / "checkpoints" / "0000", method, optimizer, selection.record(0), selection.weights)
    last = task.epochs or spec.recipe["epochs"]
    _train(training, selection, run, range(done + 1, last + 1), task.checkpoint_every)


def find_checkpoint(run: UPath) -> UPath | None:
    """Return the folder of a run's last whole checkpoint, whose JSON is written last."""
    folders = list_folder(run / "checkpoints")
    return next((folder for folder in reversed(folders) if exists(folder / "state.json")), None)


def _restore(checkpoint: UPath, training: Training, selection: Selection) -> int:
    """Bring a training to a checkpoint and return the epochs that are behind it."""
    record, selection.weights = load_checkpoint(checkpoint, training.method, training.optimizer)
    selection.epoch, selection.accuracy = record["selected"], record["accuracy"]
    return int(record["epoch"])


def _train(training: Training, selection: Selection, run: UPath, epochs: range, checkpoint_every: int) -> None:
    metrics: dict[str, float] = {}
    for epoch in epochs:
        metrics = training.run_epoch(epoch, _Notes(run, epoch))
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

    def __init__(self, run: UPath, epoch: int) -> None:
        self.path, self.epoch, self.last = run / "progress.json", epoch, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if rank() == 0 and (done == total or now - self.last > PROGRESS_SECONDS):
            self.last = now
            write_json(self.path, {"done": (self.epoch - 1) * total + done, "per_epoch": total})
