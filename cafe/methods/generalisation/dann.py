"""DANN: the learned features should not say which source a face is from.

"Domain-Adversarial Training of Neural Networks", Ganin et al., JMLR 2016, with the gradient of the discriminator reversed on
its way to the features, so that one step trains both. DomainBed takes turns instead, one or more steps of the discriminator
for each of the rest; its two losses are these, gradient penalty included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods.draws import Choice, Distribution, Power
from cafe.methods.generalisation import erm
from cafe.methods.generalisation.erm import Erm
from cafe.methods.method import Batch, Inputs, find_targets


@dataclass(frozen=True)
class Recipe(erm.Recipe):
    """The settings of ERM, and the discriminator's; DomainBed's defaults for small images."""

    penalty: float = 1.0  # what the features' adversary weighs, DomainBed's lambda
    gradient_penalty: float = 0.0  # what the discriminator's gradient by the features weighs
    discriminator_learning_rate: float = 1e-3
    discriminator_hidden: int = 256  # channels of its layers
    discriminator_layers: int = 3
    beta1: float = 0.5  # of Adam

    shares: ClassVar[tuple[str, ...]] = (*erm.Recipe.shares, "beta1")

    def __post_init__(self) -> None:
        """Raise `UserError` also for a discriminator that cannot be built."""
        super().__post_init__()
        if self.discriminator_layers < 2 or self.discriminator_hidden < 1:
            raise UserError(
                f"A discriminator of {self.discriminator_layers} layers with {self.discriminator_hidden} channels cannot be "
                "built: give at least 2 layers and 1 channel."
            )


class Dann(Erm):
    """Cross-entropy of the classes and of the sources, whose gradient reaches the features reversed."""

    needs = frozenset({"features", "domain"})
    recipe_type = Recipe
    recipe: Recipe
    moves = "makes learned features alike for a discriminator"

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        between = recipe.discriminator_hidden
        layers: list[nn.Module] = [nn.Linear(self.learned_width, between), nn.ReLU()]
        for _ in range(recipe.discriminator_layers - 2):
            layers += [nn.Linear(between, between), nn.ReLU()]
        self.discriminator = nn.Sequential(*layers, nn.Linear(between, inputs.sources))

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {
            **super().distributions(),
            "penalty": Power(10, -2, 2),
            "gradient_penalty": Power(10, -2, 1),
            "discriminator_learning_rate": Power(10, -4.5, -2.5),
            "discriminator_hidden": Power(2, 6, 10, whole=True),
            "discriminator_layers": Choice((3, 4, 5)),
            "beta1": Choice((0.0, 0.5)),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return logits (N, K) and, of a training step, the sources' (N, D) and each one's squared gradient (N,)."""
        learned = self.represent(batch)
        output = {"logits": self.classifier(learned)}
        if self.training and "domain" in batch:  # not of faces of another set, to which SHOT adapts
            reversed_ = _Reversal.apply(learned, self.recipe.penalty)
            output["source_logits"] = source_logits = self.discriminator(reversed_)
            if self.recipe.gradient_penalty:
                risk = functional.cross_entropy(source_logits.float(), batch["domain"], reduction="sum")
                (gradient,) = torch.autograd.grad(risk, [reversed_], create_graph=True)
                output["gradient"] = gradient.square().sum(dim=1)
        return output

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the risk, the discriminator's loss, and their sum, whose gradient is that of both players."""
        risk = functional.cross_entropy(output["logits"], find_targets(batch))
        discriminator = functional.cross_entropy(output["source_logits"], batch["domain"])
        if "gradient" in output:
            discriminator = discriminator + self.recipe.gradient_penalty * output["gradient"].mean()
        return {"total": risk + discriminator, "risk": risk, "discriminator": discriminator}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains: the network, then the discriminator with a rate of its own."""
        own = list(self.discriminator.parameters())
        others = [value for name, value in self.named_parameters() if not name.startswith("discriminator.")]
        rates = (self.recipe.learning_rate, self.recipe.discriminator_learning_rate)
        return [{"params": group, "lr": rate} for group, rate in zip((others, own), rates, strict=True)]

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam with DomainBed's averages."""
        recipe = self.recipe
        betas = (recipe.beta1, 0.9)
        return torch.optim.Adam(self.parameter_groups(), betas=betas, weight_decay=recipe.weight_decay, fused=True)


class _Reversal(torch.autograd.Function):
    """Values as they are; their gradient comes back negated, times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None
