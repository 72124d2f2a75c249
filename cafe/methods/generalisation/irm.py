"""IRM: one classifier should be the best for every source at the same time.

"Invariant Risk Minimization", Arjovsky et al., arXiv:1907.02893, the practical version IRMv1 with DomainBed's unbiased
estimate: each source's faces are halved, and the gradients of both halves multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cafe.methods.generalisation import annealing
from cafe.methods.generalisation.annealing import Annealed
from cafe.methods.generalisation.erm import split_sources
from cafe.methods.method import Batch, find_targets


@dataclass(frozen=True)
class Recipe(annealing.Recipe):
    """The settings of ERM, and the weight of the penalty."""

    penalty: float = 100.0  # DomainBed's irm_lambda


class Irm(Annealed):
    """Penalises the gradient of each source's risk by a number that all logits are multiplied by, at 1."""

    recipe_type = Recipe

    def penalise(self, output: dict[str, Tensor], batch: Batch, risks: Tensor) -> Tensor:
        """Return the mean over the sources of the product of both halves' gradients."""
        logits, targets = output["logits"], find_targets(batch)
        shares = targets if targets.dim() > 1 else functional.one_hot(targets, logits.shape[1])
        gradients = ((logits.softmax(dim=1) - shares) * logits).sum(dim=1)  # of each face's cross-entropy, (N,)
        halves = ((own[::2].mean(), own[1::2].mean()) for own in split_sources(gradients, batch))
        return torch.stack([one * other for one, other in halves]).mean()
