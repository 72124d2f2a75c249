"""MMD: no kernel should tell the learned features of one source from those of another.

"Domain Generalization with Adversarial Feature Learning", Li et al., CVPR 2018, without its autoencoder and adversary, as in
DomainBed: the squared maximum mean discrepancy of every two sources by a sum of Gaussian kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from cafe.methods.draws import Distribution, Power
from cafe.methods.generalisation import erm
from cafe.methods.generalisation.erm import Erm, measure_risks, split_sources
from cafe.methods.method import Batch

WIDTHS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)  # γ of the kernels exp(−γ · squared distance), DomainBed


@dataclass(frozen=True)
class Recipe(erm.Recipe):
    """The settings of ERM, and what the distance between sources weighs."""

    penalty: float = 1.0  # DomainBed's mmd_gamma


class Mmd(Erm):
    """Mean risk of the sources + penalty · mean distance of every two of them."""

    needs = frozenset({"features", "domain"})
    recipe_type = Recipe
    recipe: Recipe
    moves = "brings the learned features of the sources together"

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "penalty": Power(10, -1, 1)}

    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        """Return how far two sources' features (n, C) and (m, C) are from each other."""
        return _kernel(one, one).mean() + _kernel(other, other).mean() - 2 * _kernel(one, other).mean()

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the mean risk, the distance, and their sum."""
        pairs = combinations(split_sources(output["learned"], batch), 2)
        distance = torch.stack([self.compare(one, other) for one, other in pairs]).mean()
        risk = measure_risks(output, batch).mean()
        return {"total": risk + self.recipe.penalty * distance, "risk": risk, "distance": distance}


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of Gaussian kernels (n, m) of features (n, C) and (m, C)."""
    squares = one.square().sum(1)[:, None] + other.square().sum(1) - 2 * one @ other.T
    squares = squares.clamp(min=1e-30)  # rounding makes the distance of a face to itself negative
    return torch.stack([torch.exp(-width * squares) for width in WIDTHS]).sum(dim=0)
