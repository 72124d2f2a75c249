"""Is a method better than another? Paired tests over faces or groups, Holm's correction, and mean ranks over targets.

An interval over seeds measures how much training varies; these measure how much depends on which faces, or which targets,
were evaluated. Both are needed before a difference is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import scipy

RESAMPLES = 10_000
SIGNIFICANCE = 0.05  # of every test, and what its interval leaves out
ROUNDING = 12  # decimals behind which a sum of shares, such as thirds of three seeds, is not exact


@dataclass(frozen=True)
class Difference:
    """How much one method is ahead of another (0–1), with its 95 % interval, two-sided p and sample size.

    `groups` counts the groups of faces, a face without one being a group of its own; it is 0 where no face has a group.
    """

    mean: float
    low: float
    high: float
    p: float
    faces: int
    groups: int = 0


def paired_test(differences: Sequence[np.ndarray], groups: Sequence[np.ndarray | None]) -> Difference:
    """Test whether the mean over targets of the mean difference over faces is zero.

    `differences` holds one value per face (N,) for each target: the share of one method's seeds that were right on it
    minus the other's, so that what makes a face hard for everybody cancels. `groups` holds for each target the number (N,)
    of every face's group, or None: faces of one person or film are not independent, and each group counts as one.
    """
    if all(numbers is None for numbers in groups):
        return paired_bootstrap(differences)
    return grouped_test(differences, groups)


def grouped_test(differences: Sequence[np.ndarray], groups: Sequence[np.ndarray | None]) -> Difference:
    """Test as `paired_test` says, with Student's t and the jackknife over groups.

    Resampling a handful of groups gives intervals that are too narrow. The delete-one-group jackknife (CV3) with as many
    degrees of freedom as groups less one is recommended by MacKinnon, Nielsen and Webb, "Cluster-robust inference: a guide
    to empirical practice", Journal of Econometrics 232 (2023); as groups of unequal size are less informative, they are
    counted by Kish's effective number. Targets are combined as by Welch and Satterthwaite. Where all groups of a target
    differ alike, there is no error to measure t by: p is that of the sign test then.
    """
    means, variances, freedoms, counts = [], [], [], []
    for values, numbers in zip(differences, groups, strict=True):
        known = np.arange(len(values)) if numbers is None else np.unique(numbers, return_inverse=True)[1]
        sums, sizes = np.bincount(known, values), np.bincount(known)
        means.append(values.mean())
        without = (values.sum() - sums) / np.maximum(len(values) - sizes, 1)
        variances.append((1 - 1 / len(sizes)) * ((without - means[-1]) ** 2).sum())
        freedoms.append(len(values) ** 2 / (sizes**2).sum() - 1)
        counts.append(len(sizes))
    mean, error = float(np.mean(means)), math.sqrt(sum(variances)) / len(means)
    faces, count = sum(map(len, differences)), sum(counts)
    if min(freedoms) == 0:  # a single group says nothing of any other
        return Difference(mean, -1.0, 1.0, 1.0, faces, count)
    if round(error, ROUNDING) == 0:
        differing = sum(own for own, lead in zip(counts, means, strict=True) if round(lead, ROUNDING))
        least = _least_p(differing if round(mean, ROUNDING) else 0)
        return Difference(mean, *_hold_zero(mean, mean, least), least, faces, count)
    freedom = sum(variances) ** 2 / sum(variance**2 / own for variance, own in zip(variances, freedoms, strict=True))
    half_width = min(2.0, float(scipy.special.stdtrit(freedom, 1 - SIGNIFICANCE / 2)) * error)
    p = 2 * float(scipy.special.stdtr(freedom, -abs(mean) / error))
    return Difference(mean, mean - half_width, mean + half_width, p, faces, count)


def paired_bootstrap(differences: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Test as `paired_test` says, where faces have no groups, by drawing faces with replacement.

    Faces are drawn within each target, each with all seeds of both methods. The interval is the percentile interval, and
    p is its inversion: p < 0.05 where the 95 % interval excludes zero. A few faces would be drawn so alike that they seem
    certain: p is never below what the sign test can give of those on which the methods differ.
    """
    random = np.random.default_rng(seed)
    drawn = [_resample_mean(values, resamples, random) for values in differences]
    draws = np.mean(drawn, axis=0).round(ROUNDING)  # (B,)
    low, high = np.quantile(draws, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    least = _least_p(sum(int(np.count_nonzero(values)) for values in differences))
    return Difference(
        float(np.mean([values.mean() for values in differences])),
        *_hold_zero(float(low), float(high), least),
        min(1.0, max(least, 2 * (beyond + 1) / (resamples + 1))),  # never zero: the observed data count as one draw
        sum(map(len, differences)),
    )


def _least_p(differing: int) -> float:
    """Return the least two-sided p of a number of differing faces or groups: that of the sign test where all agree."""
    return min(1.0, 2.0 ** (1 - differing))


def _hold_zero(low: float, high: float, least: float) -> tuple[float, float]:
    """Return the ends of an interval, which holds zero where no p is below the least one."""
    return (low, high) if least < SIGNIFICANCE else (min(low, 0.0), max(high, 0.0))


def _resample_mean(values: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means (B,) of resamples of values (N,): few values are distinct, so counts are drawn instead of N samples."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = random.multinomial(len(values), counts / len(values), size=resamples)  # (B, distinct)
    return np.asarray(drawn @ distinct / len(values))


def wilson(share: float, faces: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share of independent faces, within 0 and 1.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), Eq. 4.
    """
    if not faces > 0:
        return 0.0, 1.0
    z = float(scipy.special.ndtri((1 + confidence) / 2))
    middle, whole = share + z**2 / (2 * faces), 1 + z**2 / faces
    reach = z * math.sqrt(share * (1 - share) / faces + z**2 / (4 * faces**2))
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


def combine_intervals(means: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the interval of the mean of independent estimates from theirs, within what those reach.

    The "method of variance estimates recovery" of Zou and Donner (Statistics in Medicine 27, 2008).
    """
    mean, count = sum(means) / len(means), len(means)
    lowest, highest = (sum(ends) / count for ends in zip(*intervals, strict=True))  # which rounding must not pass
    below = math.sqrt(sum((own - low) ** 2 for own, (low, _) in zip(means, intervals, strict=True))) / count
    above = math.sqrt(sum((high - own) ** 2 for own, (_, high) in zip(means, intervals, strict=True))) / count
    return max(mean - below, lowest), min(mean + above, highest)


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

    Two methods whose mean ranks differ by less than the critical difference do not differ significantly. Both are NaN for
    too few methods, and the difference also where ranks cannot differ by as much.
    """

    ranks: tuple[float, ...]
    targets: int
    p: float
    critical_difference: float


def rank_methods(scores: np.ndarray) -> Ranking:
    """Rank methods by their scores (methods, targets), ties sharing their ranks (Demšar, JMLR 2006)."""
    methods, targets = scores.shape
    ranks = pd.DataFrame(scores).rank(ascending=False).to_numpy()
    means = tuple(float(rank) for rank in ranks.mean(axis=1))
    if methods < 3 or targets < 2:
        return Ranking(means, targets, math.nan, math.nan)
    middle = (methods + 1) / 2
    spread = ((ranks - middle) ** 2).sum() / (methods - 1)  # zero where all are alike: then there is nothing to test
    statistic = ((ranks.sum(axis=1) - targets * middle) ** 2).sum() / spread if spread else 0.0
    p = float(scipy.special.chdtrc(methods - 1, statistic))
    critical = quantile_of_range(methods) * math.sqrt(methods * (methods + 1) / (6 * targets))
    return Ranking(means, targets, p, critical if critical < methods - 1 else math.nan)


@cache
def quantile_of_range(count: int) -> float:
    """Return the 95 % quantile of the range of `count` standard normal variables, divided by √2: 1.96 for two."""
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        within = count * density * (scipy.special.ndtr(z + middle) - scipy.special.ndtr(z)) ** (count - 1)
        low, high = (middle, high) if np.trapezoid(within, z) < 1 - SIGNIFICANCE else (low, middle)
    return low / math.sqrt(2)
