"""Is a method as accurate on every group of faces? A permutation test of all groups, and the gap between two of them.

The worst and the best of several groups are known only once the data are seen, so that both the test and the interval of the
gap take all groups into account. Faces of one person are no independent draws: persons are exchanged as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy

from cafe.results.significance.statistics import quantile_of_range, wilson

RESAMPLES = 10_000
AT_ONCE = 1000  # resamples that are in memory


@dataclass(frozen=True)
class Share:
    """How many faces of a group are recognised (0–1), with the ends of its 95 % interval over faces or persons.

    `effective` is how many independent faces say as much about it.
    """

    faces: int
    mean: float
    low: float
    high: float
    effective: float


@dataclass(frozen=True)
class Gap:
    """How much more accurate the group of number `best` is than that of number `worst`, and whether all groups may be alike.

    The 95 % interval holds for all pairs of groups at once, so also for the two that are furthest apart; `p` is that of the
    permutation test of all groups.
    """

    worst: int
    best: int
    mean: float
    low: float
    high: float
    p: float


def share_group(values: np.ndarray, persons: np.ndarray | None) -> Share:
    """Return how many faces of a group are recognised: of each face the share of seeds that were right, (n,) in 0–1.

    `persons` (n,) numbers whose face each is. The interval is Wilson's over faces, or over as many as are effective.
    """
    mean, effective = float(values.mean()), _count_effective(values, persons)
    return Share(len(values), mean, *wilson(mean, effective), effective)


def _count_effective(values: np.ndarray, persons: np.ndarray | None) -> float:
    """Return how many independent faces say as much of their mean as these do, 0 where one person says nothing of others.

    The effective size of a survey's sample by persons: the faces divided by the design effect of their mean and by what few
    persons add to the quantile (Korn and Graubard, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data", Survey Methodology 24, 1998). Where all or no faces are recognised, which
    shows no variance, it is the number of persons.
    """
    if persons is None:
        return float(len(values))
    numbers = np.unique(persons, return_inverse=True)[1]
    sizes, sums = np.bincount(numbers), np.bincount(numbers, values)
    count, faces, mean = len(sizes), len(values), float(values.mean())
    if count == faces:
        return float(faces)
    if count == 1:
        return 0.0
    if mean in (0.0, 1.0):
        return float(count)
    variance = count / (count - 1) * ((sums - mean * sizes) ** 2).sum() / faces**2  # of a ratio, between persons
    effect = max(1.0, variance / (mean * (1 - mean) / faces))
    quantile = float(scipy.special.stdtrit(count - 1, 0.975)) / float(scipy.special.ndtri(0.975))
    return float(faces / effect / quantile**2)


def compare_groups(
    values: np.ndarray, groups: np.ndarray, persons: np.ndarray | None = None, resamples: int = RESAMPLES
) -> Gap:
    """Return the gap between the best and the worst of two or more groups and whether all may be alike.

    `values` (N,) is of each face the share of seeds that were right, `groups` (N,) numbers its group from 0 on, `persons`
    (N,) whose face it is. The interval is that of Agresti, Bini, Bertaccini and Ryu, "Simultaneous confidence intervals for
    comparing binomial parameters" (Biometrics 64, 2008): of score intervals by the quantile of the range of as many groups,
    with the effective number of faces where persons have several; two shares are combined as by Newcombe (1998). A person
    in several groups makes it wider than it need be.
    """
    several = [groups == number for number in range(int(groups.max()) + 1)]
    shares = [share_group(values[own], None if persons is None else persons[own]) for own in several]
    means = [share.mean for share in shares]
    worst, best = (
        int(np.argmin(means)),
        len(means) - 1 - int(np.argmax(means[::-1])),
    )  # two groups also where all are alike
    confidence = 1 - 2 * float(scipy.special.ndtr(-quantile_of_range(len(shares), 0.05)))
    (bottom, upper), (lower, top) = (wilson(means[one], shares[one].effective, confidence) for one in (worst, best))
    gap = means[best] - means[worst]
    below = math.hypot(means[best] - lower, upper - means[worst])
    above = math.hypot(top - means[best], means[worst] - bottom)
    return Gap(worst, best, gap, gap - below, gap + above, permute_groups(values, groups, persons, resamples))


@dataclass(frozen=True)
class _Exchange:
    """Units that may exchange their groups: how many of each kind are in each group (groups, kinds).

    `weights` (kinds, 2) hold the sum of the values and the number of the faces of a unit of each kind.
    """

    observed: np.ndarray
    weights: np.ndarray

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Return what they may be after so many exchanges, (count, groups, kinds)."""
        from scipy.stats import random_table  # which takes a while

        drawn = np.broadcast_to(self.observed, (count, *self.observed.shape)).copy()
        there = self.observed.any(axis=1)
        if min(there.sum(), self.observed.shape[1]) > 1:  # else there is no other table of these margins
            margins = random_table(self.observed[there].sum(axis=1), self.observed.sum(axis=0))
            drawn[:, there] = margins.rvs(count, random_state=random)
        return drawn


def permute_groups(
    values: np.ndarray, groups: np.ndarray, persons: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Return p of the permutation test that values (N,) have nothing to do with the groups (N,) of their faces.

    Its statistic is Pearson's for homogeneity, up to constants: the squared sum of a group's values divided by its faces, in
    the sum over groups. Persons who are in one group exchange their groups as a whole; of a person who is in several, the
    faces do, which is what dependent faces allow (Winkler, Webster, Vidaurre, Nichols and Smith, "Multi-level block
    permutation", NeuroImage 123, 2015). Without `persons` every face is somebody else's. Permutations are drawn as tables
    of the same margins (Patefield, Algorithm AS 159, 1981); the data count as one of them (Phipson and Smyth, 2010).
    """
    blocks, random, beyond = _list_exchanges(values, groups, persons), np.random.default_rng(seed), 0
    observed = _spread(sum((block.observed @ block.weights for block in blocks), np.zeros(2)))
    for start in range(0, resamples, AT_ONCE):
        count = min(AT_ONCE, resamples - start)
        drawn = sum((block.draw(count, random) @ block.weights for block in blocks), np.zeros(2))  # (count, groups, 2)
        beyond += int((_spread(drawn) >= observed * (1 - 1e-12)).sum())
    return (beyond + 1) / (resamples + 1)


def _spread(totals: np.ndarray) -> np.ndarray:
    """Return the statistic (…) of the sum of values and the number of faces of every group (…, groups, 2)."""
    return np.asarray((totals[..., 0] ** 2 / totals[..., 1]).sum(axis=-1))


def _list_exchanges(values: np.ndarray, groups: np.ndarray, persons: np.ndarray | None) -> list[_Exchange]:
    """Return all faces in blocks: those of persons who are in one group, and those of every other person."""
    count = int(groups.max()) + 1
    if persons is None:
        return [_make_exchange(values, np.ones(len(values)), groups, count)]
    numbers = np.unique(persons, return_inverse=True)[1]
    sums, sizes = np.bincount(numbers, values), np.bincount(numbers)
    first, last = np.full(len(sizes), count), np.full(len(sizes), -1)
    np.minimum.at(first, numbers, groups)
    np.maximum.at(last, numbers, groups)
    whole = first == last
    blocks = [_make_exchange(sums[whole], sizes[whole], first[whole], count)] if whole.any() else []
    for person in np.flatnonzero(~whole):
        own = numbers == person
        blocks.append(_make_exchange(values[own], np.ones(own.sum()), groups[own], count))
    return blocks


def _make_exchange(sums: np.ndarray, sizes: np.ndarray, groups: np.ndarray, count: int) -> _Exchange:
    """Return a block of units with these sums of values, faces and groups, (n,) each."""
    weights, kinds = np.unique(np.stack([sums.round(9), sizes], axis=1), axis=0, return_inverse=True)
    observed = np.zeros((count, len(weights)), np.int64)
    np.add.at(observed, (groups, kinds.ravel()), 1)
    return _Exchange(observed, weights)
