"""Is a method better than another? Paired bootstrap over samples, Holm's correction, and mean ranks over targets.

An interval over seeds says how much training varies; these say how much the choice of the judged faces, or of the targets,
does. Both are needed before a difference is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much one method is ahead of another (0–1), the percentile interval, the two-sided p, and the samples used."""

    mean: float
    low: float
    high: float
    p: float
    samples: int


def paired_bootstrap(
    differences: Sequence[np.ndarray], resamples: int = RESAMPLES, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Test whether the mean over targets of the mean difference over samples is zero.

    `differences` holds for each target what every sample (N,) contributes: the share of seeds of one method that were
    right on it less that share of the other's. A sample is drawn with all its seeds and both methods, so that what makes
    it hard for everybody cancels; targets are drawn from apart. The p is that of the interval turned round: p < 0.05
    where the 95 % interval leaves zero out.
    """
    random = np.random.default_rng(seed)
    draws = np.mean([_resample_mean(values, resamples, random) for values in differences], axis=0)  # (B,)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Difference(
        float(np.mean([values.mean() for values in differences])),
        float(low),
        float(high),
        min(1.0, 2 * (beyond + 1) / (resamples + 1)),  # never zero: the data themselves count as a draw
        sum(map(len, differences)),
    )


def _resample_mean(values: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means (B,) of resamples of values (N,): few values are distinct, so counting each is as good as drawing N samples."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = random.multinomial(len(values), counts / len(values), size=resamples)  # (B, distinct)
    return np.asarray(drawn @ distinct / len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values of a family of tests (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, float)[order]))
    result = np.empty(len(p_values))
    result[order] = adjusted
    return [float(value) for value in result]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of methods over targets, 1 the best, with the p of Friedman's test and Nemenyi's critical difference.

    Two methods whose mean ranks differ by less than the critical difference cannot be told apart. Both are NaN where
    there are too few methods, and the difference where even the best against the worst on every target would not reach it.
    """

    ranks: tuple[float, ...]
    targets: int
    p: float
    critical_difference: float


def rank_methods(scores: np.ndarray, significance: float = 0.05) -> Ranking:
    """Rank methods by their scores (methods, targets), ties sharing their ranks (Demšar, JMLR 2006)."""
    methods, targets = scores.shape
    ranks = tuple(float(rank) for rank in stats.rankdata(-scores, axis=0).mean(axis=1))
    if methods < 3 or targets < 2:
        return Ranking(ranks, targets, math.nan, math.nan)
    constant = bool((scores == scores[0]).all())  # everybody alike: no test, and Friedman's statistic is 0 / 0
    p = 1.0 if constant else float(stats.friedmanchisquare(*scores).pvalue)
    quantile = float(stats.studentized_range.ppf(1 - significance, methods, np.inf)) / math.sqrt(2)
    critical = quantile * math.sqrt(methods * (methods + 1) / (6 * targets))
    return Ranking(ranks, targets, p, critical if critical < methods - 1 else math.nan)
