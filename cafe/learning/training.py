"""The plain-torch loops: one training epoch, and prediction. No cluster in sight; a worker of one calls the same code."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cafe.errors import UserError
from cafe.learning.loading import FaceDataset, epoch_order, own_part, smallest_batch
from cafe.learning.valley import find_valley
from cafe.methods.features import FeatureMethod, Standardisation
from cafe.methods.method import Batch, Method, widen
from cafe.networks.parallel import gather, rank, world_size
from cafe.randomness import random_generator

PREDICTION_BATCH = 64
PREPARATION_BATCH = 32  # smaller, since what is prepared takes a step with each


@dataclass
class Training:
    """A method under training: `module` is the method, wrapped in DDP when there are several workers."""

    method: Method
    module: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: FaceDataset
    rows: np.ndarray  # the source's training rows
    seed: int
    device: torch.device
    precision: str = "fp32"
    loader_workers: int = 0
    domains: np.ndarray | None = None  # (N,) the source of every row of the manifest, where these take turns
    step: int = 0  # how many steps of the epoch under way are behind it, and the sums over their faces by name
    sums: dict[str, Tensor | float] = field(default_factory=dict)

    @cached_property
    def log_prior(self) -> Tensor:
        """What the losses add to the logits (K,): τ times the logarithm of each class's share, where the recipe says so."""
        classes, recipe = len(self.method.inputs.classes), self.method.recipe
        if recipe.prior != "adjusted":
            return torch.zeros(classes, device=self.device)
        counts = np.bincount(self.dataset.manifest.labels[self.rows], minlength=classes)
        shares = counts.clip(min=1) / len(self.rows)
        return torch.from_numpy(recipe.prior_strength * np.log(shares)).float().to(self.device)

    def run_epoch(
        self, epoch: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, float]:
        """Train epoch 1, 2, … and return mean losses by name, accuracy, learning rate and faces per second.

        The epoch depends on (seed, epoch) and the state at its start alone, and so does what follows any of its steps: a
        resumed training, which begins after `step`, is the uninterrupted one. `progress(done, total)` is called after each
        step, when the training can be saved. Raises `UserError` when the training has diverged.
        """
        started = time.perf_counter()
        self.module.train()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.method.learning_rate_factor(epoch)
        # Batch norm needs two faces to estimate a variance.
        smallest = 2 if any(isinstance(module, _BatchNorm) for module in self.method.modules()) else 1
        if self.method.needs_domains():  # a covariance needs two of each source
            smallest = smallest_batch(self.method.inputs.sources)
        labels, recipe = self.dataset.manifest.labels, self.method.recipe
        order = epoch_order(self.rows, labels, recipe, self.seed, epoch, smallest, self.domains)
        view, frozen_view = self.dataset.plan.view_of(epoch), None
        if self.method.clean_features:  # a new picture in every epoch, however few views are stored
            view, frozen_view = epoch, 0
        first, parts = self.step, [own_part(batch) for batch in order[self.step :]]
        batches = self.dataset.share(order[self.step :]).load(
            parts, view, self.device, self.loader_workers, frozen_view
        )
        for batch in batches:
            for name, value in self._step(batch, len(order[self.step]), epoch, self.step).items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.step += 1
            progress(self.step, len(order))
        faces = sum(map(len, order))
        metrics = {f"train/{name}": float(value) / faces for name, value in self.sums.items()}  # no step waits for it
        self.step, self.sums = 0, {}
        if not math.isfinite(metrics["train/total"]):
            raise UserError(f"The loss is NaN or infinite in epoch {epoch}: take a smaller learning rate.")
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        metrics["faces_per_second"] = sum(map(len, order[first:])) / (time.perf_counter() - started)
        return metrics

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says of the epoch under way."""
        return {"step": self.step, "sums": {name: float(value) for name, value in self.sums.items()}}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says; older ones could only lie between two epochs."""
        self.step, self.sums = record.get("step", 0), dict(record.get("sums", {}))

    def _step(self, batch: Batch, total: int, epoch: int, step: int) -> dict[str, Tensor]:
        step_seed = int(random_generator(self.seed, "step", epoch, step).integers(2**62))
        # For dropout. `torch.manual_seed` seeds CUDA too and, where there is none, formats a traceback instead.
        seed = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
        seed(step_seed + rank())
        batch = self.method.augment(batch)
        with autocast(self.device, self.precision):
            output = self.module(batch)
        whole = {name: gather(widen(value), total) for name, value in output.items()}
        targets: Batch = {"label": gather(batch["label"], total), "row": gather(batch["row"], total)}
        targets |= {name: gather(batch[name], total) for name in ("target", "domain") if name in batch}
        targets |= {"epoch": epoch, "generator": torch.Generator().manual_seed(step_seed), "log_prior": self.log_prior}
        correct = (whole["logits"].argmax(1) == targets["label"]).float().mean()
        whole["logits"] = whole["logits"] + self.log_prior
        losses = self.method.losses(whole, targets)
        self.optimizer.zero_grad()
        (losses["total"] * world_size()).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.method.after_step(whole, targets)
        return {name: value.detach().double() * total for name, value in {**losses, "accuracy": correct}.items()}


@dataclass
class Selection:
    """Which epoch's weights are the result: the last one's, or the most accurate on faces that are not trained on."""

    rows: np.ndarray  # empty: the last epoch's
    dataset: FaceDataset | None = None  # whose rows these are; None: the source's
    epoch: int = 0
    accuracy: float = -1.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def evaluate(self, training: Training, epoch: int) -> dict[str, float]:
        """Keep the weights of an epoch when they are the best so far, the first among equals; return the accuracy."""
        if not len(self.rows):
            return {}
        dataset = self.dataset or training.dataset
        probabilities = predict(training.method, dataset, self.rows, training.device)
        labels = dataset.manifest.labels[self.rows]
        accuracy = float((probabilities.argmax(axis=1) == labels).mean())
        if accuracy > self.accuracy:
            self.epoch, self.accuracy = epoch, accuracy
            self.weights = {name: value.clone() for name, value in training.method.state_dict().items()}
        return {"selection/accuracy": accuracy}

    def record(self, epoch: int) -> dict[str, Any]:
        """Return what a checkpoint of an epoch says besides weights."""
        return {"epoch": epoch, "selected": self.epoch, "accuracy": self.accuracy}

    def restore(self, record: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint says."""
        self.epoch, self.accuracy, self.weights = record["selected"], record["accuracy"], weights

    def conclude(self, training: Training) -> dict[str, float]:
        """Make up the weights that are the result, after the last epoch; return what is to be said of them."""
        return {}

    def result(self, training: Training) -> dict[str, Tensor]:
        """Return the weights that are the result of the training."""
        return self.weights or training.method.state_dict()


@dataclass
class Averaging(Selection):
    """The weights are averaged over epochs, those in the valley of the loss on held-out faces: `cafe.learning.valley`."""

    losses: list[float] = field(default_factory=list)  # after each epoch

    def evaluate(self, training: Training, epoch: int) -> dict[str, float]:
        """Keep the weights of an epoch, and return accuracy and cross-entropy on the held-out faces."""
        accuracy, loss = self._measure(training)
        self.losses.append(loss)
        self.weights |= {f"{epoch}/{name}": value.clone() for name, value in training.method.state_dict().items()}
        return {"selection/accuracy": accuracy, "selection/loss": loss}

    def record(self, epoch: int) -> dict[str, Any]:
        """Return what a checkpoint of an epoch says besides weights."""
        return {**super().record(epoch), "losses": self.losses}

    def restore(self, record: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint says."""
        super().restore(record, weights)
        self.losses = list(record["losses"])

    def conclude(self, training: Training) -> dict[str, float]:
        """Average the weights, and return their accuracy on the held-out faces and the first epoch of the average."""
        first, self.epoch = find_valley(self.losses)
        average = dict[str, Tensor]()
        for name, last in training.method.state_dict().items():
            several = torch.stack([self.weights[f"{epoch}/{name}"] for epoch in range(first, self.epoch + 1)])
            average[name] = several.mean(dim=0) if several.is_floating_point() else last
        self.weights = average
        training.method.load_state_dict(average)
        self.accuracy, _ = self._measure(training)
        return {"selection/accuracy": self.accuracy, "averaged_from": first}

    def _measure(self, training: Training) -> tuple[float, float]:
        probabilities = predict(training.method, training.dataset, self.rows, training.device)
        labels = training.dataset.manifest.labels[self.rows]
        chosen = probabilities[np.arange(len(labels)), labels].astype(float)
        smallest = np.finfo(np.float32).tiny  # where float32 rounds a probability to 0
        return float((probabilities.argmax(axis=1) == labels).mean()), float(-np.log(chosen.clip(smallest)).mean())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass in `fp32` or, by autocast, `bf16`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def fit(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> None:
    """Fit a method that is not trained in epochs, with the clean views of some rows."""
    method.eval()
    measure_features(method, dataset, rows, device)
    with torch.no_grad():
        method.fit(dataset.load(split_rows(rows), 0, device))


def prepare(
    method: Method, dataset: FaceDataset, rows: np.ndarray, seed: int, device: torch.device, loader_workers: int = 0
) -> bool:
    """Let a method learn what it keeps fixed while it is trained, from the clean views of the training rows.

    Returns whether there was anything to learn.
    """

    def load(number: int) -> Iterator[Batch]:
        order = random_generator(seed, "prepare", number).permutation(rows)
        return dataset.load(split_rows(order, PREPARATION_BATCH), 0, device, loader_workers)

    measured = measure_features(method, dataset, rows, device)
    torch.manual_seed(int(random_generator(seed, "prepare").integers(2**62)))
    method.prepare(load)
    return measured or type(method).prepare is not Method.prepare


def measure_features(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> bool:
    """Take the statistics a method standardises features by from the clean views of some rows; no picture is decoded.

    Returns whether the method standardises.
    """
    if isinstance(method, FeatureMethod) and isinstance(method.standardise, Standardisation):
        name = method.array()
        features_only = replace(dataset, needs=frozenset({name}))
        method.standardise.fit(batch[name] for batch in features_only.load(split_rows(rows), 0, device))
        return True
    return False


def predict(method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return class probabilities (n, K) float32 of the clean views of some rows."""
    return predict_average([method], dataset, rows, device)


def predict_average(
    methods: Sequence[Method], dataset: FaceDataset, rows: np.ndarray, device: torch.device, views: int = 1
) -> np.ndarray:
    """Return the mean of what several methods with the same needs predict of views 0 to `views` - 1 of some rows.

    Each view of a face is decoded and embedded once.
    """
    for method in methods:
        method.eval()
    frozen_view = 0 if methods[0].clean_features else None
    by_view: list[Tensor] = []
    for view in range(views):
        parts: list[Tensor] = []
        with torch.no_grad():
            for batch in dataset.load(split_rows(rows), view, device, frozen_view=frozen_view):
                shares = [method.predict(batch) for method in methods]
                parts.append(torch.stack(shares).mean(dim=0).cpu())
        by_view.append(torch.cat(parts))
    return torch.stack(by_view).mean(dim=0).numpy()


def describe_faces(
    method: Method, dataset: FaceDataset, rows: np.ndarray, device: torch.device
) -> dict[str, np.ndarray]:
    """Return what a method says of the clean view of some rows beside its predictions, (n,) float32 by name."""
    if type(method).describe_faces is Method.describe_faces:
        return {}
    method.eval()
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in dataset.load(split_rows(rows), 0, device):
            for name, values in method.describe_faces(batch).items():
                parts.setdefault(name, []).append(values.float().cpu())
    return {name: torch.cat(several).numpy() for name, several in parts.items()}


def split_rows(rows: np.ndarray, size: int = PREDICTION_BATCH) -> list[np.ndarray]:
    """Return rows in batches of a size, in order; the last may be smaller."""
    return np.split(rows, range(size, len(rows), size))
