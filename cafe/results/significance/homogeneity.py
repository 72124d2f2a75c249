"""Is a method as accurate on every group of faces? A permutation test of all groups, and the gap between two of them.

The worst and the best of several groups are known only once the data are seen, so that both the test and the interval of the
gap take all groups into account. Faces of one person are no independent draws: persons are exchanged as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy

from cafe.results.significance.statistics import quantile_of_range, wilson

RESAMPLES = 10_000
AT_ONCE = 2**22  # faces of resamples that are in memory
FEW_FACES = 2000  # of persons in several groups, more than which are not exchanged one by one


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


def share_groups(values: np.ndarray, groups: np.ndarray, persons: np.ndarray | None) -> list[Share]:
    """Return the shares of all groups; `groups` (n,) numbers each face's from 0 on, and none is without a face."""
    several = (groups == number for number in range(int(groups.max()) + 1))
    return [share_group(values[own], None if persons is None else persons[own]) for own in several]


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
    sums, sizes = np.bincount(numbers, values), np.bincount(numbers)
    count, faces = len(sizes), len(values)
    if count == 1 < faces:
        return 0.0
    effective = float(_count_independent(_measure(sums, sizes).sum(axis=0)))
    if count == faces or values.mean() in (0.0, 1.0):
        return effective
    quantile = float(scipy.special.stdtrit(count - 1, 0.975)) / float(scipy.special.ndtri(0.975))
    return effective / quantile**2


def _measure(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return of units, each with its sum of values and number of faces (n,), what `_count_independent` adds up, (n, 6)."""
    return np.stack([sums, sizes, np.ones(len(sums)), sums**2, sums * sizes, sizes**2], axis=1)


def _count_independent(moments: np.ndarray) -> np.ndarray:
    """Return the faces of some units divided by the design effect of their mean, from the sums (…, 6) of `_measure`.

    The variance of the mean is that of a ratio, between units. Where it cannot be seen, of one unit or where all or no faces
    are recognised, each unit counts as one face.
    """
    right, faces, units, squared, both, sizes = np.moveaxis(moments, -1, 0)
    mean = right / faces
    between = (squared - 2 * mean * both + mean**2 * sizes) * units / np.maximum(units - 1, 1)
    alone = mean * (1 - mean) * faces  # the same, were all faces independent
    seen = (alone > 0) & (units > 1) & (units < faces)
    effect = np.divide(between, alone, out=np.asarray(faces / units), where=seen)
    return np.asarray(faces / np.maximum(effect, 1))


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
    shares = share_groups(values, groups, persons)
    means = [share.mean for share in shares]
    worst, best = int(np.argmin(means)), len(means) - 1 - int(np.argmax(means[::-1]))  # two, also where all are alike
    confidence = 1 - 2 * float(scipy.special.ndtr(-quantile_of_range(len(shares))))
    (bottom, upper), (lower, top) = (wilson(means[one], shares[one].effective, confidence) for one in (worst, best))
    gap = means[best] - means[worst]
    below = math.hypot(means[best] - lower, upper - means[worst])
    above = math.hypot(top - means[best], means[worst] - bottom)
    return Gap(worst, best, gap, gap - below, gap + above, permute_groups(values, groups, persons, resamples))


def permute_groups(
    values: np.ndarray, groups: np.ndarray, persons: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Return p of the permutation test that values (N,) have nothing to do with the groups (N,) of their faces.

    Persons who are in one group exchange their groups as a whole; of a person who is in several, the faces do, which is what
    dependent faces allow (Winkler, Webster, Vidaurre, Nichols and Smith, "Multi-level block permutation", NeuroImage 123,
    2015). Without `persons` every face is somebody else's. The data count as one of the permutations (Phipson and Smyth,
    2010).
    """
    random, count = np.random.default_rng(seed), int(groups.max()) + 1
    numbers = np.arange(len(values)) if persons is None else np.unique(persons, return_inverse=True)[1]
    first, last = np.full(numbers.max() + 1, count), np.full(numbers.max() + 1, -1)
    np.minimum.at(first, numbers, groups)
    np.maximum.at(last, numbers, groups)
    whole = first == last
    sums = np.bincount(numbers, values).round(9)  # thirds in any order sum alike
    units = _measure(sums, np.bincount(numbers))[whole]
    faces = ~whole[numbers]
    exchanges: list[_Persons | _Faces] = []
    if whole.any():
        exchanges.append(_Persons.of(units, first[whole], count))
    if faces.any():
        exchanges.append(_Faces.of(values[faces], groups[faces], numbers[faces], count))
    observed, beyond = _spread(sum((one.observed for one in exchanges), np.zeros(6))), 0
    at_once = max(1, AT_ONCE // len(values))
    for start in range(0, resamples, at_once):
        drawn = sum((one.draw(min(at_once, resamples - start), random) for one in exchanges), np.zeros(6))
        beyond += int((_spread(drawn) >= observed - 1e-9).sum())
    return (beyond + 1) / (resamples + 1)


def _spread(moments: np.ndarray) -> np.ndarray:
    """Return the statistic (…) of the sums of every group (…, groups, 6): how far the groups' means are apart.

    Up to a constant it is Pearson's for homogeneity, of each group's faces divided by their design effect (Rao and Scott, "A
    simple method for the analysis of clustered binary data", Biometrics 48, 1992). Without that, groups of a few persons
    with many faces beside ones of many persons with few would be told apart where they are alike: a permutation test of a
    statistic is right for groups that differ in variance only if the statistic is divided by it (Chung and Romano, Annals
    of Statistics 41, 2013).
    """
    weights, means = _count_independent(moments), moments[..., 0] / moments[..., 1]
    middle = (weights * means).sum(axis=-1, keepdims=True) / weights.sum(axis=-1, keepdims=True)
    return np.asarray((weights * (means - middle) ** 2).sum(axis=-1))


@dataclass(frozen=True)
class _Persons:
    """Persons who may exchange their groups (n,), with the `moments` (n, 6) of each.

    They are of some `kinds` (k, 6), of which `table` (groups, k) says how many are in each group.
    """

    moments: np.ndarray
    groups: np.ndarray
    kinds: np.ndarray
    table: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray, groups: np.ndarray, count: int) -> _Persons:
        kinds, numbers = np.unique(moments, axis=0, return_inverse=True)
        table = np.zeros((count, len(kinds)), np.int64)
        np.add.at(table, (groups, numbers.ravel()), 1)
        return cls(moments, groups, kinds, table)

    @property
    def observed(self) -> np.ndarray:
        """The sums of every group, (groups, 6)."""
        return np.asarray(self.table @ self.kinds)

    def draw(self, resamples: int, random: np.random.Generator) -> np.ndarray:
        """Return the sums of every group after random exchanges, (resamples, groups, 6).

        Of few kinds as tables of the same margins (Patefield, Algorithm AS 159, 1981).
        """
        count, there = len(self.table), self.table.any(axis=1)
        if min(there.sum(), len(self.kinds)) == 1:  # there is no other table
            return np.broadcast_to(self.observed, (resamples, count, 6))
        if self.table.size < len(self.groups):
            from scipy.stats import random_table  # which takes a while

            margins = random_table(self.table[there].sum(axis=1), self.table.sum(axis=0))
            drawn = np.zeros((resamples, *self.table.shape))
            drawn[:, there] = margins.rvs(resamples, random_state=random)
            return np.asarray(drawn @ self.kinds)
        groups = random.permuted(np.tile(self.groups, (resamples, 1)), axis=1)
        places = (groups + count * np.arange(resamples)[:, None]).ravel()
        sums = [np.bincount(places, np.tile(moment, resamples), resamples * count) for moment in self.moments.T]
        return np.stack(sums, axis=1).reshape(resamples, count, 6)


@dataclass(frozen=True)
class _Faces:
    """Faces that may exchange their groups with those of the same person, in the order of persons.

    `values`, `persons` (n,) and `groups` (n, groups), 1 for the group of each, else 0.
    """

    values: np.ndarray
    persons: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, groups: np.ndarray, persons: np.ndarray, count: int) -> _Faces:
        order = np.argsort(persons, kind="stable")
        return cls(values[order], np.unique(persons[order], return_inverse=True)[1], np.eye(count)[groups[order]])

    @property
    def observed(self) -> np.ndarray:
        """The sums of every group, (groups, 6)."""
        return self._measure(self.values @ self.groups)

    def draw(self, resamples: int, random: np.random.Generator) -> np.ndarray:
        """Return the sums of every group after random exchanges, (resamples, groups, 6).

        The sums of more than a few faces are drawn as normal variables with the mean and covariance of all exchanges, as in
        the generalised test of Cochran, Mantel and Haenszel (Landis, Heyman and Koch, International Statistical Review 46,
        1978). To exchange the faces would take minutes.
        """
        if len(self.values) > FEW_FACES:
            return self._measure(random.multivariate_normal(*self._moments, resamples))
        order = np.argsort(self.persons + random.random((resamples, len(self.values))), axis=1)
        return self._measure(self.values[order] @ self.groups)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """How many faces are in each group, (groups,)."""
        return np.asarray(self.groups.sum(axis=0))

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean (groups,) and the covariance (groups, groups) of the sums of values in the groups over all exchanges."""
        table = np.stack([np.bincount(self.persons, own) for own in self.groups.T], axis=1)  # (persons, groups)
        faces = table.sum(axis=1)  # two or more
        means = np.bincount(self.persons, self.values) / faces
        variances = np.bincount(self.persons, (self.values - means[self.persons]) ** 2) / (faces - 1)
        return means @ table, np.diag(variances @ table) - table.T @ (table * (variances / faces)[:, None])

    def _measure(self, sums: np.ndarray) -> np.ndarray:
        """Return the sums (…, groups) as those of faces that are all right or all wrong, each a unit."""
        sizes = np.broadcast_to(self._sizes, sums.shape)
        return np.stack([sums, sizes, sizes, sums, sums, sizes], axis=-1)
