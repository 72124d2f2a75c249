"""CORAL: the learned features of every two sources should agree in mean and covariance.

"Deep CORAL: Correlation Alignment for Deep Domain Adaptation", Sun and Saenko, ECCV 2016 workshops; with the means, as in
DomainBed.
"""

from __future__ import annotations

from torch import Tensor

from cafe.methods.generalisation.mmd import Mmd


class Coral(Mmd):
    """Penalises the squared differences of the sources' means and covariances, each averaged over its entries."""

    def compare(self, one: Tensor, other: Tensor) -> Tensor:
        """Return how far two sources' features (n, C) and (m, C) are from each other, n and m at least 2."""
        means, covariances = zip(*map(_measure_moments, (one, other)), strict=True)
        apart: Tensor = (means[0] - means[1]).square().mean() + (covariances[0] - covariances[1]).square().mean()
        return apart


def _measure_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)
