"""A penalty that weighs 1 for the first steps and only then what the recipe says: of IRM and V-REx."""

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
    """The settings of ERM, and the weight of the penalty."""

    penalty: float = 1.0
    anneal_steps: int = 500  # steps in which the penalty weighs 1 instead; DomainBed, of 5,000


class Annealed(Erm):
    """Mean risk of the sources + weight · penalty. A subclass says what is penalised."""

    needs = frozenset({"features", "domain"})
    recipe_type = Recipe
    recipe: Recipe
    steps: Tensor  # how many were taken

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        super().__init__(recipe, inputs)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "penalty": Power(10, -1, 5), "anneal_steps": Power(10, 0, 4, whole=True)}

    def penalise(self, output: dict[str, Tensor], batch: Batch, risks: Tensor) -> Tensor:
        """Return the penalty of a whole batch, given the risk of each source (D,)."""
        raise NotImplementedError

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the mean risk, the penalty before it is weighed, and the sum."""
        risks = measure_risks(output, batch)
        risk, penalty = risks.mean(), self.penalise(output, batch, risks)
        weight = self.recipe.penalty if self.steps >= self.recipe.anneal_steps else 1.0
        return {"total": risk + weight * penalty, "risk": risk, "penalty": penalty}

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the recipe, which forgets its averages when the penalty begins to weigh."""
        self.adam = super().optimizer()
        return self.adam

    def after_step(self, output: dict[str, Tensor], batch: Batch) -> None:
        """Count the step; before the first with the whole penalty Adam begins anew, as the released codes do."""
        self.steps += 1
        if self.steps == self.recipe.anneal_steps:
            self.adam.state.clear()
