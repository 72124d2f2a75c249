"""V-REx: the risks of the sources should be equal.

"Out-of-Distribution Generalization via Risk Extrapolation (REx)", Krueger et al., ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cafe.methods.generalisation import annealing
from cafe.methods.generalisation.annealing import Annealed
from cafe.methods.method import Batch


@dataclass(frozen=True)
class Recipe(annealing.Recipe):
    """The settings of ERM, and the weight of the penalty."""

    penalty: float = 10.0  # DomainBed's vrex_lambda


class Vrex(Annealed):
    """Penalises the variance of the sources' risks."""

    recipe_type = Recipe

    def penalise(self, output: dict[str, Tensor], batch: Batch, risks: Tensor) -> Tensor:
        """Return the variance of the risks (D,), not corrected for their number."""
        return (risks - risks.mean()).square().mean()
