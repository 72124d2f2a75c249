"""What a worker of Ray Train does: restore, train epoch by epoch, checkpoint; the first one writes the records.

It stands apart from the driver's part, so that workers import nothing they have no use for.
"""

from __future__ import annotations

import os
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from cafe.files import write_json
from cafe.learning.checkpoints import load_checkpoint, save_checkpoint, write_tensors
from cafe.learning.parallel import rank, share_batch_norm, world_size
from cafe.learning.training import Selection, Training, fit, prepare
from pipeline.faces import choose_rows
from pipeline.models import build_method, make_dataset, make_live_dataset
from pipeline.runs import RunSpec
from pipeline.workspace import locate

PROGRESS_SECONDS = 2.0  # between two notes of how far an epoch is


def train_worker(config: dict[str, Any]) -> None:
    """Train the run at `config["run"]` to its end, from its last checkpoint where there is one."""
    import ray.train
    import ray.train.torch

    run = locate(config["run"])
    spec = RunSpec.load(run)
    device = ray.train.torch.get_device()
    torch.backends.cudnn.deterministic = True
    cores = max(1, len(os.sched_getaffinity(0)) // ray.train.get_context().get_local_world_size())
    torch.set_num_threads(min(cores, config["threads"] or cores))

    source = config["source"]
    rows, held_out = choose_rows(source, spec.selection)
    method = build_method(spec).to(device).to(memory_format=torch.channels_last)
    if not method.trained:
        if rank() == 0:
            fit(method, make_dataset(spec, source), rows, device)
            _save_result(run, method.state_dict(), {"epochs": 0})
        return
    dataset = make_live_dataset(spec, source, str(device)) if spec.live else make_dataset(spec, source)
    loaders = config["loader_workers"]
    if rank() == 0 and ray.train.get_checkpoint() is None:
        prepare(method, dataset, rows, spec.seed, device, loaders)
    if world_size() > 1:
        share_batch_norm(method)
    module = ray.train.torch.prepare_model(method)  # hands the first worker's state to the others
    optimizer = method.optimizer()
    training = Training(method, module, optimizer, dataset, rows, spec.seed, device, spec.precision, loaders)
    _train(training, Selection(held_out), run, spec.recipe["epochs"], config["checkpoint_every"])


def _train(training: Training, selection: Selection, run: UPath, epochs: int, checkpoint_every: int) -> None:
    import ray.train
    from ray.train import Checkpoint

    method, optimizer = training.method, training.optimizer
    done = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            record, selection.weights = load_checkpoint(UPath(folder), method, optimizer)
            done, selection.epoch, selection.accuracy = record["epoch"], record["selected"], record["accuracy"]
    metrics: dict[str, float] = {}
    for epoch in range(done + 1, epochs + 1):
        metrics = training.run_epoch(epoch, _Notes(run, epoch))
        if rank() == 0:
            metrics |= selection.judge(training, epoch)
            write_json(run / "epochs" / f"{epoch:04d}.json", metrics)
        if epoch % checkpoint_every == 0 and epoch < epochs:
            with TemporaryDirectory() as folder:
                if rank() == 0:
                    record = {"epoch": epoch, "selected": selection.epoch, "accuracy": selection.accuracy}
                    save_checkpoint(UPath(folder), method, optimizer, record, selection.weights)
                ray.train.report({"epoch": epoch}, checkpoint=Checkpoint(folder) if rank() == 0 else None)
    if rank() == 0:
        _save_result(run, selection.result(training), {"epochs": epochs, "selected": selection.epoch, **metrics})


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
