"""Twenty steps of CAFE, SCN, RUL and EAC beside the papers' equations, written down once more in plain torch.

Weights, order, views and drawn numbers (dropped channels, dropout, partners) are equal; everything else is computed here
anew, in float64, by nothing of this project: the image branch, batch norm, losses, relabelling and Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_faces
from torch import Tensor
from torch.nn import functional
from upath import UPath

from cafe.data.indexing import index_files
from cafe.data.manifest import Manifest
from cafe.data.readers import DATASETS
from cafe.learning.loading import FaceDataset
from cafe.learning.training import Training
from cafe.methods import METHODS
from cafe.methods.method import Inputs
from cafe.networks.parallel import GlobalDropout
from cafe.randomness import random_generator
from cafe.views.drawing import ViewPlan

CPU = torch.device("cpu")
EPOCHS, BATCH, FACES = 4, 8, 40  # 5 steps an epoch
CHANNELS = 512  # of the frozen features and of the image branch's map, as published
SETTINGS = {
    "scn": {"relabel_after": 2, "relabel_margin": 0.01, "head": "uniform"}
}  # so that labels are replaced within 4 epochs


@dataclass(frozen=True)
class Faces(FaceDataset):
    """Batches in any number format, and a record of them."""

    dtype: torch.dtype = torch.float64
    record: list[dict[str, Tensor]] = field(default_factory=list)

    def load(self, *arguments: Any, **named: Any) -> Iterator[dict[str, Tensor]]:
        for batch in super().load(*arguments, **named):
            typed = {
                name: value.to(self.dtype) if value.is_floating_point() else value for name, value in batch.items()
            }
            self.record.append(typed)
            yield typed


@dataclass(frozen=True)
class Drawn:
    """Frozen features of CLIP's scale."""

    def read(self, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        features = [np.random.default_rng((int(row), view)).normal(0, 0.4, CHANNELS) for row in rows]
        return {"pooled": np.stack(features).astype(np.float32)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = draw_faces(tmp_path_factory.mktemp("faces"), per_class=20)
    return index_files("tiny", DATASETS["folder"](UPath(folder))).manifest


@dataclass
class Ours:
    """A method of this project under training, and the numbers it drew."""

    training: Training
    dropped: list[Tensor] = field(default_factory=list)  # which values every dropout kept, in order

    @classmethod
    def build(cls, name: str, manifest: Manifest, dtype: torch.dtype) -> Ours:
        torch.manual_seed(0)
        recipe = replace(METHODS[name].recipe_type(), batch_size=BATCH, **SETTINGS.get(name, {}))
        method = METHODS[name](recipe, Inputs(CHANNELS, "small", image_size=12)).to(dtype)
        plan = ViewPlan(method.policy, 0, EPOCHS + 1, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        faces = Faces(manifest, plan, method.needs, 12, Drawn(), dtype=dtype)
        ours = cls(Training(method, method, method.optimizer(), faces, manifest.rows("train")[:FACES], 0, CPU))
        for module in method.modules():
            if isinstance(module, GlobalDropout):
                module.register_forward_hook(lambda _, inputs, output: ours.dropped.append(output != 0))
        return ours

    @property
    def state(self) -> dict[str, Tensor]:
        state = self.training.method.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point()}


# --- the papers' equations -------------------------------------------------------------------------------------------


class Published:
    """A method as published: `loss` is its equation, and all tensors are plain ones in float64."""

    def __init__(self, ours: Ours) -> None:
        self.state = {name: value.detach().double().clone() for name, value in ours.state.items()}
        trained = [name for name, _ in ours.training.method.named_parameters()]
        self.weights = {name: self.state[name].requires_grad_() for name in trained}
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.labels = {int(row): int(label) for row, label in enumerate(ours.training.dataset.manifest.labels)}
        self.kept = iter(ours.dropped)
        self.steps = 0

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def rate(self, name: str) -> float:
        return 2e-4

    def after(self, batch: dict[str, Tensor]) -> None:
        """What the method does after a step."""

    def step(self, batch: dict[str, Tensor], epoch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Adam with weight decay 1e-4 and a rate that falls by a tenth after every epoch; returns the gradients."""
        self.epoch, self.steps = epoch, self.steps + 1
        gradients = torch.autograd.grad(self.loss(batch, generator), list(self.weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
                slope = gradient + 1e-4 * weight
                self.first[name] = 0.9 * self.first[name] + 0.1 * slope
                self.second[name] = 0.999 * self.second[name] + 0.001 * slope * slope
                mean = self.first[name] / (1 - 0.9**self.steps)
                deviation = (self.second[name] / (1 - 0.999**self.steps)).sqrt()
                weight -= self.rate(name) * 0.9 ** (epoch - 1) * mean / (deviation + 1e-8)
            self.after(batch)
        return dict(zip(self.weights, gradients, strict=True))

    def map(self, images: Tensor) -> Tensor:
        """The small image branch."""
        for number in (1, 2):
            images = functional.conv2d(images, self.state[f"branch.trunk.conv{number}.weight"], None, 2, 1)
            images = self.normalise(images, f"branch.trunk.bn{number}", 1e-5).clamp(min=0)
        return images

    def normalise(self, values: Tensor, name: str, epsilon: float) -> Tensor:
        """Batch norm, with its running statistics."""
        axes = [0, 2, 3][: values.dim() - 1]
        shape = (1, -1, *[1] * (values.dim() - 2))
        count = values.numel() // values.shape[1]
        mean, variance = values.mean(axes), values.var(axes, correction=0)
        for kind, new in (("mean", mean), ("var", variance * count / (count - 1))):
            self.state[f"{name}.running_{kind}"] = 0.9 * self.state[f"{name}.running_{kind}"] + 0.1 * new.detach()
        normalised = (values - mean.reshape(shape)) / (variance.reshape(shape) + epsilon).sqrt()
        if f"{name}.weight" in self.state:
            normalised = normalised * self.state[f"{name}.weight"].reshape(shape)
            normalised = normalised + self.state[f"{name}.bias"].reshape(shape)
        return normalised

    def linear(self, values: Tensor, name: str) -> Tensor:
        return values @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]).mean()


class PublishedCafe(Published):
    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        masked = batch["features"] * torch.sigmoid(self.map(batch["image"]).mean((2, 3)))  # Eq. 2
        kept = torch.ones(CHANNELS, dtype=torch.float64)
        for group in range(7):  # 10 of 73 are dropped, of the last 74 too (released script)
            size = 74 if group == 6 else 73
            kept[73 * group + torch.randperm(size, generator=generator)[:10]] = 0
        groups = [slice(73 * group, 73 * group + 73) for group in range(7)]
        largest = torch.stack([(masked * kept)[:, group].max(1).values for group in groups], 1)
        peaks = torch.stack([masked[:, group].max(1).values for group in groups], 1)
        classification = cross_entropy(self.linear(masked, "classifier"), batch["label"])
        return classification + 1.5 * cross_entropy(largest, batch["label"]) + 5 * (1 - peaks.mean() / 73)  # Eq. 9


class PublishedScn(Published):
    def rate(self, name: str) -> float:
        return 1e-3

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        features = self.map(batch["image"]).mean((2, 3))
        weight = torch.sigmoid(self.linear(features, "head.attention"))
        self.logits = weight * self.linear(features, "head.classifier")
        ordered = weight.flatten().sort(descending=True).values
        high = int(0.7 * len(ordered))
        rank = (0.15 - (ordered[:high].mean() - ordered[high:].mean())).clamp(min=0)
        labels = torch.tensor([self.labels[row] for row in batch["row"].tolist()])
        return cross_entropy(self.logits, labels) + rank

    def after(self, batch: dict[str, Tensor]) -> None:
        if self.epoch <= 2:
            return
        for row, probabilities in zip(batch["row"].tolist(), self.logits.softmax(1), strict=True):
            if probabilities.max() - probabilities[self.labels[row]] > 0.01:
                self.labels[row] = int(probabilities.argmax())


class PublishedRul(Published):
    def rate(self, name: str) -> float:
        return 2e-3 if name.startswith("classifier.") else 2e-4

    def head(self, values: Tensor, name: str) -> Tensor:
        dropped = self.normalise(values, f"{name}.0", 2e-5) * next(self.kept) / 0.6
        return self.normalise(self.linear(dropped.flatten(1), f"{name}.3"), f"{name}.4", 2e-5)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        values, labels = self.map(batch["image"]), batch["label"]
        mean, variance = self.head(values, "mean"), self.head(values, "log_variance").exp().mean(1, keepdim=True)
        other = torch.randperm(len(labels), generator=generator)
        mixed = (variance * mean + variance[other] * mean[other]) / (variance + variance[other])
        logits = self.linear(mixed, "classifier")  # the paper mixes features, not logits
        return 0.5 * cross_entropy(logits, labels) + 0.5 * cross_entropy(logits, labels[other])


class PublishedEac(Published):
    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        values, mirrored = self.map(batch["image"]), self.map(batch["image"].flip(3))
        weight = self.state["classifier.weight"].detach()
        attention, other = (torch.einsum("lc,nchw->nlhw", weight, each) for each in (values, mirrored))
        consistency = (attention - other.flip(3)).square().mean()
        return cross_entropy(self.linear(values.mean((2, 3)), "classifier"), batch["label"]) + 5 * consistency


PUBLISHED = {"cafe": PublishedCafe, "scn": PublishedScn, "rul": PublishedRul, "eac": PublishedEac}


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest, small_network: str) -> str:
    return request.param


def follow(published: Published, ours: Ours) -> Iterator[dict[str, Tensor]]:
    """Take the steps that ours took; yield the gradients of each."""
    for number, batch in enumerate(ours.training.dataset.record):
        epoch, step = number // (FACES // BATCH) + 1, number % (FACES // BATCH)
        seed = int(random_generator(0, "step", epoch, step).integers(2**62))
        typed = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        yield published.step(typed, epoch, torch.Generator().manual_seed(seed))


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any value."""
    assert ours.keys() == theirs.keys()
    return max(float((value.detach().double() - theirs[name].detach()).abs().max()) for name, value in ours.items())


def test_twenty_steps_in_float64_are_the_published_ones(name: str, manifest: Manifest) -> None:
    ours = Ours.build(name, manifest, torch.float64)
    published, start = PUBLISHED[name](ours), {key: value.clone() for key, value in ours.state.items()}
    for epoch in range(1, EPOCHS + 1):
        ours.training.run_epoch(epoch)
    published.kept = iter(ours.dropped)
    assert len(list(follow(published, ours))) == 20
    assert furthest(ours.state, published.state) < 1e-8
    assert furthest(ours.state, start) > 1e-3
    if name == "scn":
        changed = {row for row, label in published.labels.items() if label != manifest.labels[row]}
        assert changed
        assert {row: published.labels[row] for row in changed} == {
            row: label for row, label in ours.training.method.labels.replaced.items() if label != manifest.labels[row]
        }


def test_the_first_step_in_float32_is_the_published_one(name: str, manifest: Manifest) -> None:
    ours = Ours.build(name, manifest, torch.float32)
    published = PUBLISHED[name](ours)
    ours.training.rows = ours.training.rows[:BATCH]
    ours.training.run_epoch(1)
    published.kept = iter(ours.dropped)
    (gradients,) = follow(published, ours)
    found = {key: value.grad for key, value in ours.training.method.named_parameters()}
    assert furthest(found, gradients) < 1e-6
    assert furthest(found, {key: torch.zeros_like(value) for key, value in gradients.items()}) > 1e-2
