"""Mixup between sources: every face is mixed with one of another source, and so are their labels.

"Heterogeneous Domain Generalization via Domain Mixup", Wang et al., ICASSP 2020, and "Adversarial Domain Adaptation with
Domain Mixup", Xu et al., AAAI 2020, as in DomainBed. Mixing any two faces is a setting of the heads (`linear_probe`, `mlp`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import UserError
from cafe.methods.draws import Distribution, Power
from cafe.methods.generalisation import erm
from cafe.methods.generalisation.erm import Erm, measure_risks
from cafe.methods.method import Batch


@dataclass(frozen=True)
class Recipe(erm.Recipe):
    """The settings of ERM, and how far faces are mixed."""

    alpha: float = 0.2  # of Beta(α, α), from which each pair of sources draws its mixture; DomainBed's mixup_alpha

    def __post_init__(self) -> None:
        """Raise `UserError` also for an α of 0, which mixes nothing."""
        super().__post_init__()
        if not self.alpha:
            raise UserError(
                "The setting alpha of mixup is a number above 0: give 0.2, or train erm, which mixes nothing."
            )


class Mixup(Erm):
    """Cross-entropy of mixed features with mixed labels, averaged over the sources."""

    needs = frozenset({"features", "domain"})
    recipe_type = Recipe
    recipe: Recipe

    @classmethod
    def distributions(cls) -> dict[str, Distribution]:
        """Return what each setting is drawn from in a sweep, DomainBed's."""
        return {**super().distributions(), "alpha": Power(10, -1, 1)}

    def augment(self, batch: Batch) -> Batch:
        """Mix the faces of each source with those of the next one, the sources in a random circle."""
        domains, labels = batch["domain"], batch["label"]
        shares = batch.get("target", functional.one_hot(labels, len(self.inputs.classes)).float())
        rows = [torch.nonzero(domains == number)[:, 0] for number in domains.unique().tolist()]
        circle = torch.randperm(len(rows)).tolist()
        partner, kept = torch.zeros_like(labels), torch.zeros(len(labels), device=labels.device)
        for place, number in enumerate(circle):
            own, others = rows[number], rows[circle[(place + 1) % len(circle)]]
            partner[own] = others[torch.arange(len(own), device=own.device) % len(others)]
            kept[own] = torch.distributions.Beta(self.recipe.alpha, self.recipe.alpha).sample()
        kept = kept[:, None]
        mixed = {"features": batch["features"], "target": shares}
        return {**batch, **{name: kept * values + (1 - kept) * values[partner] for name, values in mixed.items()}}

    def losses(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the mean of the sources' risks."""
        return {"total": measure_risks(output, batch).mean()}
