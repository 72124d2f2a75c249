"""Spectral decoupling: logits should be small, so that no easy feature starves the others of gradient.

"Gradient Starvation: A Learning Proclivity in Neural Networks", Pezeshki et al., NeurIPS 2021, Eq. 25.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from cafe.methods.draws import Distribution, Power
from cafe.methods.generalisation import erm
from cafe.methods.generalisation.erm import Erm
from cafe.methods.method import Batch, find_targets


@dataclass(frozen=True)
class Recipe(erm.Recipe):
    """The settings of ERM, and what the logits' squares weigh."""

    penalty: float = 0.1  # DomainBed's sd_reg


class SpectralDecoupling(Erm):
    """Cross-entropy + penalty · mean square of the logits."""

    recipe_type = Recipe
    recipe: Recipe

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "penalty": Power(10, -5, -1)}

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy, the mean square, and their sum."""
        risk = functional.cross_entropy(output["logits"], find_targets(batch))
        squares = output["logits"].square().mean()
        return {"total": risk + self.recipe.penalty * squares, "risk": risk, "squares": squares}
