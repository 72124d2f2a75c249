"""What all methods have in common: what a batch must hold, the way to logits, what is minimised, and the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from cafe.data.expressions import EXPRESSIONS
from cafe.errors import UserError, unknown
from cafe.methods.draws import Distribution, Power

Batch = dict[str, Any]
LARGEST = 2**31 - 1  # that a setting of a recipe can be
ARRAYS = {"features": "pooled", "map": "map"}  # what a method may need of a store → its array


@dataclass(frozen=True)
class Recipe:
    """The training recipe all methods share; the defaults are CAFE's published ones (supplement, released script)."""

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 2e-4  # Adam
    weight_decay: float = 1e-4
    gamma: float = 0.9  # the learning rate is multiplied by it after every epoch
    # Which shares of the expressions training assumes. "source": the source's own; "balanced": faces are drawn by
    # 1 / class count, with replacement; "adjusted": the logarithm of each share is added to the logits, in the losses only
    # ("Long-tail learning via logit adjustment", Menon et al., ICLR 2021, Eq. 10).
    prior: Literal["source", "balanced", "adjusted"] = "source"
    prior_strength: float = 1.0  # τ of Eq. 10: what the logarithm is multiplied by, where `prior` is "adjusted"

    # "votes": the target of a face is how many people chose each class, as shares; where a set has no votes, its label.
    labels: Literal["majority", "votes"] = "majority"
    # "temperature": logits are divided by a number that is fitted on faces held out of the source (Guo et al., "On
    # Calibration of Modern Neural Networks", ICML 2017, Sec. 4.2).
    calibration: Literal["none", "temperature"] = "none"
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic where a record of a run is read

    # Settings that keep their ratio to another one when that one alone is changed: a point of the schedule to the epochs,
    # the rate of a part to the learning rate.
    follows: ClassVar[Mapping[str, str]] = {}
    shares: ClassVar[tuple[str, ...]] = ()  # settings that are shares, with 1 of which nothing could be learned

    def __post_init__(self) -> None:
        """Raise `UserError` for a share of everything, or more."""
        for name in self.shares:
            if (share := getattr(self, name)) >= 1:
                usual = getattr(type(self), name) or 0.1
                raise UserError(f"The setting {name} is a share below 1, not {share}: give {usual}, for example.")


@dataclass(frozen=True)
class Inputs:
    """What a method is built for: the width of the frozen features (or maps), the image branch to use, and the classes."""

    width: int | None  # channels of the frozen features
    network: str = "resnet18"
    init: str = "scratch"
    image_size: int = 224  # pixels, side of the image branch's input
    backbone: str | None = None  # name of the tower the frozen features are of
    grid: tuple[int, int] | None = None  # (H, W) of the maps, where the method needs them
    classes: tuple[str, ...] = EXPRESSIONS  # what its logits stand for, in order; their number is K
    sources: int = 1  # data sets it is trained on


class Method(nn.Module):
    """A method of facial-expression recognition. A subclass cites its paper and states where it deviates from it."""

    # What a batch must hold: "image", with it "flipped_image" and "placement"; "features", "map"; or the "tower" itself; and
    # of a training on several sources, "domain", which of them each face is of.
    needs: ClassVar[frozenset[str]]
    trained: ClassVar[bool] = True  # epoch by epoch; what is not trained is fitted at once
    published_tower: ClassVar[str] = ""  # whose features it was published with; empty where it reads none or any
    policy: ClassVar[str] = "paper"  # the published augmentation, a name of `cafe.views.drawing.POLICIES`
    clean_features: ClassVar[bool] = False  # whether frozen features are of the clean view while images are augmented
    takes_votes: ClassVar[bool] = False  # whether its losses read the targets of `find_targets`
    revision: ClassVar[str] = ""  # what changed of it without a setting of its own: names its runs where there is one
    not_exported: ClassVar[str] = ""  # why it cannot be one graph, as ONNX keeps it: a sentence; empty where it can
    recipe_type: ClassVar[type[Recipe]] = Recipe
    # What the recipe changes for a kind of data set; CAFE's supplement. Rivals keep their own learning rate.
    recipe_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "affectnet": {"learning_rate": 1e-4, "epochs": 20, "gamma": 0.8, "prior": "balanced"}
    }

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting of the recipe is drawn from in a sweep; those of others stay as they are.

        Of what trains on pictures, DomainBed's for whole networks (a batch of all sources together); of what trains on
        frozen features, DomainBed's for small images, with a weight decay and larger batches.
        """
        if not cls.trained:
            return {}
        if cls.needs.isdisjoint({"image", "tower"}):
            return {
                "learning_rate": Power(10, -4.5, -2.5),
                "weight_decay": Power(10, -6, -2),
                "batch_size": Power(2, 5, 9, whole=True),
            }
        return {
            "learning_rate": Power(10, -5, -3.5),
            "weight_decay": Power(10, -6, -2),
            "batch_size": Power(2, 3, 5.5, whole=True),
        }

    @classmethod
    def published_recipe(cls, kind: str) -> Recipe:
        """Return the published recipe for a source of some kind (`rafdb`, `affectnet`, …)."""
        changes = cls.recipe_changes.get(kind, {}) if cls.trained else {}
        return cls.recipe_type(**changes)

    temperature: Tensor  # what logits are divided by where they are calibrated, 1 before it is fitted

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__()
        self.recipe = recipe
        self.inputs = inputs
        if recipe.calibration == "temperature":
            self.register_buffer("temperature", torch.ones(()))

    @classmethod
    def needs_features(cls) -> bool:
        """Whether it reads the features of a frozen tower."""
        return not cls.needs.isdisjoint(ARRAYS)

    @classmethod
    def needs_domains(cls) -> bool:
        """Whether it compares several sources within each batch, so that none can be learned from alone."""
        return "domain" in cls.needs

    @classmethod
    def needs_tower(cls) -> bool:
        """Whether it cannot be built without a tower: it reads its features, or trains the tower itself."""
        return cls.needs_features() or "tower" in cls.needs

    @classmethod
    def check_recipe(cls, recipe: Recipe, name: str) -> None:
        """Raise `UserError` for a setting that the method has no use for."""
        if recipe.labels == "votes" and not cls.takes_votes:
            raise UserError(f"{name} learns one label of each face, as published: leave labels=votes out.")
        if recipe.calibration != "none" and not cls.trained:
            raise UserError(
                f"{name} is not trained, so that no face is held out to calibrate it: leave calibration out."
            )

    @classmethod
    def check(cls, inputs: Inputs) -> None:
        """Raise `UserError` when the method cannot be built for these inputs; asked before anything starts."""

    def fit(self, batches: Iterable[Batch]) -> None:
        """Learn from the clean views of the training faces at once, by a method that is not trained in epochs."""
        raise NotImplementedError

    def prepare(self, load: Callable[[int], Iterable[Batch]]) -> None:
        """Learn, before the first epoch, what stays fixed while the method is trained, and keep it in the state dict.

        `load(n)` gives the clean views of the training faces in the n-th random order. Only the first worker is asked, and
        not again when a training is resumed.
        """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named outputs of which `logits` (N, K) is required; runs inside DDP, on one worker's part of a batch."""
        raise NotImplementedError(f"The method {type(self).__name__} has no forward(self, batch).")

    def predict(self, batch: Batch) -> Tensor:
        """Return class probabilities (N, K) float32, calibrated where the recipe says so."""
        return self.to_probabilities(self(batch)["logits"])

    def to_probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, K) float32 that `predict` makes of logits (N, K)."""
        logits = logits.float()
        if self.recipe.calibration == "temperature":
            logits = logits / self.temperature
        return logits.softmax(dim=1)

    def describe_faces(self, batch: Batch) -> dict[str, Tensor]:
        """Return what else it says of each face, numbers (N,) by name: further columns of its predictions, by default none.

        Asked of the clean view in evaluation, without an option of test time; no metric is computed from them.
        """
        return {}

    @property
    def masking(self) -> bool:
        """Whether it has a mask between 0 and 1, by `make_mask`, of which figures are drawn."""
        return False

    def make_mask(self, batch: Batch) -> Tensor:
        """Return the mask (N, C), or (N, C, H, W) with positions, of a method that is `masking`."""
        raise NotImplementedError

    def augment(self, batch: Batch) -> Batch:
        """Return what a training step learns from instead of one worker's part of a batch."""
        return batch

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses of a whole batch; `total` is minimised. Owns no parameters.

        A whole batch holds `label` (N,), `row` (N,) of the manifest, `domain` (N,) for a method that needs it, `epoch`, a
        seeded `generator` and `log_prior` (K,), which the logits already contain and any other classification of the labels
        must add; 0 unless adjusted. A method that `takes_votes` reads `find_targets`.
        """
        total = nn.functional.cross_entropy(output["logits"], find_targets(batch))
        return {"total": total}

    def after_step(self, output: dict[str, Tensor], batch: Batch) -> None:
        """Do what is due after a training step, given the whole batch; what it keeps belongs into the state dict.

        Every worker calls it with the same values, so that all of them keep the same state.
        """

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the recipe."""
        return torch.optim.Adam(self.parameter_groups(), weight_decay=self.recipe.weight_decay, fused=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains, each group with its learning rate `lr`; the first group's is the one reported.

        The classifier is a group of its own where the recipe has a `classifier_learning_rate`.
        """
        named = [(name, value) for name, value in self.named_parameters() if value.requires_grad]
        rate = getattr(self.recipe, "classifier_learning_rate", None)
        classifier = [value for name, value in named if rate is not None and name.startswith("classifier.")]
        others = [value for name, value in named if rate is None or not name.startswith("classifier.")]
        groups = [{"params": others, "lr": self.recipe.learning_rate}]
        return [*groups, {"params": classifier, "lr": rate}] if classifier else groups

    def learning_rate_factor(self, epoch: int) -> float:
        """What the optimiser's learning rates are multiplied by in epoch 1, 2, …"""
        return float(self.recipe.gamma ** (epoch - 1))


def find_targets(batch: Batch) -> Tensor:
    """Return what the logits of a batch should become: shares of the classes (N, K), or a label each (N,)."""
    targets: Tensor = batch["target"] if "target" in batch else batch["label"]
    return targets


def widen(values: Tensor) -> Tensor:
    """Return values of half precision, as autocast gives them, in float32 and others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def apply_overrides(recipe: Recipe, overrides: Iterable[str], method: str) -> Recipe:
    """Return the recipe with `KEY=VALUE` settings changed; raise `UserError` for an unknown key or an unfit value.

    What follows a changed setting keeps its ratio to it, unless it is changed itself.
    """
    known = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"Cannot read the setting {override!r}: write KEY=VALUE, e.g. epochs=20.")
        if key not in known:
            raise unknown(f"setting of {method}", key, known)
        kind = type(known[key])
        try:
            changes[key] = kind(text)
        except ValueError:
            wanted = "whole number" if kind is int else "number"
            raise UserError(f"The setting {key} of {method} is a {wanted}, not {text!r}.") from None
    for follower, leader in recipe.follows.items():
        if leader in changes and follower not in changes:
            scaled = known[follower] * changes[leader] / known[leader]
            changes[follower] = max(1, round(scaled)) if isinstance(known[follower], int) else float(f"{scaled:.12g}")
    changed = replace(recipe, **changes)
    check_recipe(changed, method)
    return changed


def check_recipe(recipe: Recipe, method: str) -> None:
    """Raise `UserError` for settings outside what they may be, and for those that contradict each other."""
    kinds = get_type_hints(type(recipe))
    for name, value in asdict(recipe).items():
        if get_origin(kinds[name]) is Literal and value not in get_args(kinds[name]):
            raise unknown(f"{name} of {method}", value, get_args(kinds[name]))
        if isinstance(value, int | float) and not 0 <= value <= LARGEST:
            raise UserError(f"The setting {name} of {method} is a number from 0 to {LARGEST}, not {value}.")
    if recipe.prior != "adjusted" and recipe.prior_strength != Recipe.prior_strength:
        raise UserError(
            f"prior_strength says how far the prior is adjusted, and prior is {recipe.prior!r}: set prior=adjusted too, or "
            "leave it out."
        )
    if type(recipe)().epochs == 0:
        if recipe.epochs:
            raise UserError(
                f"{method} is not trained in epochs, so it cannot take {recipe.epochs} of them: leave them out."
            )
        if recipe.prior != "source":
            raise UserError(f"{method} is not trained, so it cannot take prior={recipe.prior}: leave it out.")
    elif recipe.epochs < 1 or recipe.batch_size < 2:
        raise UserError(f"{method} needs at least 1 epoch and batches of at least 2 faces.")
