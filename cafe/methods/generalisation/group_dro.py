"""GroupDRO: the source with the highest risk weighs most.

"Distributionally Robust Neural Networks for Group Shifts", Sagawa et al., ICLR 2020, Alg. 1, with the sources as groups, as
in DomainBed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cafe.methods.draws import Distribution, Power
from cafe.methods.generalisation import erm
from cafe.methods.generalisation.erm import Erm, measure_risks
from cafe.methods.method import Batch, Inputs


@dataclass(frozen=True)
class Recipe(erm.Recipe):
    """The settings of ERM, and how fast the weights of the sources change."""

    step_size: float = 1e-2  # η of Alg. 1, DomainBed's groupdro_eta


class GroupDro(Erm):
    """Sum of the sources' risks, each by a weight that grows with it from step to step; the weights add up to 1."""

    needs = frozenset({"features", "domain"})
    recipe_type = Recipe
    recipe: Recipe
    weights: Tensor  # (D,)

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.register_buffer("weights", torch.full((inputs.sources,), 1 / inputs.sources))

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "step_size": Power(10, -3, -1)}

    def reweigh(self, risks: Tensor) -> Tensor:
        """Return the weights (D,) after a step with these risks (D,)."""
        grown = self.weights * (self.recipe.step_size * risks.detach()).exp()
        return grown / grown.sum()

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the weighted sum of the risks, and the largest of them."""
        risks = measure_risks(output, batch)
        return {"total": risks @ self.reweigh(risks), "worst": risks.max()}

    def after_step(self, output: dict[str, Tensor], batch: Batch) -> None:
        """Keep the weights that the step was taken with."""
        self.weights.copy_(self.reweigh(measure_risks(output, batch)))
