"""SCN: a learned weight for each face, ranked within the batch, and doubtful labels replaced by the network's own.

"Suppressing Uncertainties for Large-Scale Facial Expression Recognition", CVPR 2020 (Self-Cure Network), as in the released
script where the paper differs. Deviations: docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods import method
from cafe.methods.method import Batch, Inputs, Method
from cafe.networks.branches import build_network


@dataclass(frozen=True)
class Recipe(method.Recipe):
    """SCN's published settings (released script)."""

    epochs: int = 70
    batch_size: int = 64
    learning_rate: float = 1e-3
    high_share: float = 0.7  # of a batch: the faces of the largest weights, the high group
    margin: float = 0.15  # that the mean weights of the two groups should keep
    rank: float = 1.0  # weight of the rank regularisation; 0 switches it off
    relabel: Literal["all", "low", "none"] = "all"  # "low": faces of the low group alone, as the abstract says
    relabel_margin: float = 0.2  # by which another class must be more probable than the label
    relabel_after: int = 9  # epochs: the tenth is the first that relabels (released script)
    # How the two linear layers are drawn where training starts from scratch. "pytorch": by PyTorch's default for a linear
    # layer, as in every run of the released script; "uniform": within 1 / √outputs, without a bias, as it would draw them
    # were its `imagenet_pretrained` not always true.
    head: Literal["pytorch", "uniform"] = "pytorch"

    follows: ClassVar = {"relabel_after": "epochs"}


class Scn(Method):
    """Self-attention importance weighting, rank regularisation and relabelling."""

    needs = frozenset({"image"})
    policy = "scn"
    recipe_type = Recipe
    recipe_changes: ClassVar = {"affectnet": {"epochs": 20, "gamma": 0.8, "prior": "balanced"}}
    revision = "head=pytorch"  # runs before it drew the head uniformly
    recipe: Recipe

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.branch = build_network(inputs.network, inputs.init)
        self.head = WeightedHead(self.branch.width, len(inputs.classes))
        if recipe.head == "uniform" and inputs.init == "scratch":
            self.head.draw()
        self.labels = Relabelling()

    @classmethod
    def check_recipe(cls, recipe: method.Recipe, name: str) -> None:
        """Raise `UserError` for a high group of everybody."""
        super().check_recipe(recipe, name)
        if (share := cast("Recipe", recipe).high_share) >= 1:
            raise UserError(f"high_share is the share of a batch in the high group, below 1, not {share}: give 0.7.")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted logits (N, K) and the weight of every face (N, 1)."""
        weight, logits = self.head(self.branch.pool(self.branch(batch["image"])))
        return {"logits": logits, "weight": weight}

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Classification with the labels as they are now + rank regularisation; and the share of replaced labels."""
        labels = self.labels(batch["row"], batch["label"])
        losses = scn_losses(output["logits"], output["weight"], labels, self.recipe)
        return {**losses, "relabelled": (labels != batch["label"]).float().mean()}

    def after_step(self, output: dict[str, Tensor], batch: Batch) -> None:
        """Relabel faces of the batch by the probabilities it was just trained with."""
        if self.recipe.relabel == "none" or batch["epoch"] <= self.recipe.relabel_after:
            return
        labels = self.labels(batch["row"], batch["label"])
        changed = relabel(output["logits"], labels, self.recipe.relabel_margin)
        if self.recipe.relabel == "low":
            changed = torch.where(find_low_group(output["weight"], self.recipe.high_share), changed, labels)
        self.labels.replace(batch["row"][changed != labels], changed[changed != labels])


class WeightedHead(nn.Module):
    """A weight between 0 and 1 per face, learned from its features, scales its logits."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)
        self.attention = nn.Linear(width, 1)

    def draw(self) -> None:
        """Draw the weights uniformly within 1 / √outputs, without a bias."""
        for layer in (self.classifier, self.attention):
            nn.init.uniform_(layer.weight, -(layer.out_features**-0.5), layer.out_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (N, 1) and weighted logits (N, K) of features (N, C)."""
        weight = self.attention(features).sigmoid()
        return weight, weight * self.classifier(features)  # the bias is scaled too (released script)


class Relabelling(nn.Module):
    """The labels that replaced the data set's, by manifest row.

    They are part of the state dict as rows and labels (R, 2), so that a checkpoint holds them and a method that is built
    to predict need not know how many faces it was trained on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: dict[int, int] = {}

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the labels (N,) of some rows as they are now, given those of the data set."""
        pairs = zip(rows.tolist(), labels.tolist(), strict=True)
        return labels.new_tensor([self.replaced.get(row, label) for row, label in pairs])

    def replace(self, rows: Tensor, labels: Tensor) -> None:
        """Replace the labels (n,) of some rows; of a row that comes twice the last one counts."""
        self.replaced.update(zip(rows.tolist(), labels.tolist(), strict=True))

    def get_extra_state(self) -> Tensor:
        """Return the state as torch's state dict takes it, (R, 2)."""
        return torch.tensor(sorted(self.replaced.items()), dtype=torch.int64).reshape(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state."""
        self.replaced = dict(state.tolist())


def find_low_group(weight: Tensor, high_share: float) -> Tensor:
    """Return which faces (N,) are not among the `high_share` of a batch with the largest weights (N, 1)."""
    high = min(max(int(high_share * len(weight)), 1), len(weight) - 1)  # rounded down (released script); none is empty
    low = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    low[weight[:, 0].topk(high).indices] = False
    return low


def scn_losses(logits: Tensor, weight: Tensor, labels: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Return classification, rank regularisation and total for weighted logits (N, K), weights (N, 1), labels (N,)."""
    low = find_low_group(weight, recipe.high_share)
    classification = functional.cross_entropy(logits, labels)
    rank = (recipe.margin - (weight[~low].mean() - weight[low].mean())).clamp(min=0)
    return {"total": classification + recipe.rank * rank, "classification": classification, "rank": rank}


def relabel(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the labels (N,), replaced by the most probable class where it is more probable by over `margin`."""
    probabilities = logits.softmax(dim=1)
    largest, predicted = probabilities.max(dim=1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    return torch.where(largest - own > margin, predicted, labels)
