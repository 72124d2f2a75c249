"""Tests between methods, against SciPy, statsmodels' numbers, a published worked example, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cafe.results.significance.statistics import (
    combine_intervals,
    grouped_test,
    holm,
    paired_bootstrap,
    paired_test,
    rank_methods,
    wilson,
)


def evaluate_faces(
    random: np.random.Generator, faces: int, seeds: int, skills: tuple[float, float]
) -> list[np.ndarray]:
    """The share of seeds of two methods that are right on each face (N,), some faces being hard for everybody."""
    ease = random.normal(0.4, 1.2, faces)
    return [(ease + skill + random.normal(size=(seeds, faces)) > 0).mean(axis=0) for skill in skills]


def test_the_interval_is_scipys_paired_percentile_bootstrap() -> None:
    one, other = evaluate_faces(np.random.default_rng(2), 300, 3, (0.3, 0.0))
    result = paired_bootstrap([one - other])
    assert result.mean == pytest.approx(one.mean() - other.mean())
    assert result.faces == 300

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(np.mean(a, axis=axis) - np.mean(b, axis=axis))

    expected = stats.bootstrap(
        (one, other), statistic, paired=True, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    error = 0.05 * (expected.high - expected.low)  # what 10,000 draws leave uncertain
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=error)


def test_counting_distinct_values_is_drawing_samples() -> None:
    values = np.array([-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1 / 3, 2 / 3])
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (200_000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    result = paired_bootstrap([values], resamples=200_000)
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.01)
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    assert result.p == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("seeds", [1, 3])
def test_methods_that_are_alike_differ_five_times_in_a_hundred(seeds: int) -> None:
    random = np.random.default_rng(5)
    results = []
    for number in range(1500):
        one, other = evaluate_faces(random, 400, seeds, (0.0, 0.0))
        results.append(paired_bootstrap([one - other], resamples=1000, seed=number))
    assert 0.035 < np.mean([result.p < 0.05 for result in results]) < 0.065
    assert 0.93 < np.mean([result.low <= 0 <= result.high for result in results]) < 0.97


def test_the_interval_covers_a_true_difference_95_times_in_100() -> None:
    random = np.random.default_rng(6)
    truth = np.subtract(*(share.mean() for share in evaluate_faces(random, 4_000_000, 1, (0.25, 0.0))))
    covered = []
    for number in range(1500):
        one, other = evaluate_faces(random, 500, 2, (0.25, 0.0))
        result = paired_bootstrap([one - other], resamples=1000, seed=number)
        covered.append(result.low <= truth <= result.high)
    assert 0.93 < np.mean(covered) < 0.97


def evaluate_people(random: np.random.Generator, sizes: list[int], lead: float) -> tuple[np.ndarray, np.ndarray]:
    """The difference of two methods on each face (N,), and its person (N,): methods differ more on some people."""
    people = np.repeat(np.arange(len(sizes)), sizes)
    leads = random.normal(lead, 0.15, len(sizes))[people]
    shares = [random.binomial(3, np.clip(0.55 + sign * leads / 2, 0, 1)) / 3 for sign in (1, -1)]
    return shares[0] - shares[1], people


@pytest.mark.parametrize("sizes", [[14] * 5, [4, 10, 14, 20, 22], [2, 3, 5, 8, 12, 20, 30, 60]])
def test_faces_of_few_people_are_tested_and_covered_at_their_level(sizes: list[int]) -> None:
    random = np.random.default_rng(7)
    for truth in (0.0, 0.1):
        results = [
            grouped_test([values], [people])
            for values, people in (evaluate_people(random, sizes, truth) for _ in range(1500))
        ]
        assert 0.93 <= np.mean([result.low <= truth <= result.high for result in results]) <= 0.97
        if truth == 0:
            assert 0.03 <= np.mean([result.p < 0.05 for result in results]) <= 0.07


def test_equal_groups_are_students_t_over_their_means() -> None:
    values, people = evaluate_people(np.random.default_rng(8), [14] * 5, 0.1)
    means = values.reshape(5, 14).mean(axis=1)
    result = paired_test([values], [people])
    low, high = stats.t.interval(0.95, 4, loc=means.mean(), scale=stats.sem(means))
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert (result.faces, result.groups) == (70, 5)


def test_faces_without_groups_are_drawn_as_before() -> None:
    values = np.tile([1.0, 0.0, -1.0, 1.0], 25)
    assert paired_test([values], [None]) == paired_bootstrap([values])
    alone = grouped_test([values], [np.arange(100)])
    assert alone.groups == 100
    drawn = paired_bootstrap([values])
    assert (alone.low, alone.high) == pytest.approx((drawn.low, drawn.high), abs=0.01)


def test_one_group_says_nothing_of_others() -> None:
    result = grouped_test([np.ones(50)], [np.zeros(50, int)])
    assert (result.mean, result.low, result.high, result.p, result.groups) == (1, -1, 1, 1, 1)


def test_pairing_finds_what_two_separate_intervals_hide() -> None:
    """Both methods fail on the same hard faces; one of them on few more."""
    one = np.repeat([1.0, 0.0], [620, 380])
    other = np.where(np.arange(1000) < 20, 0, one)
    result = paired_bootstrap([one - other])
    assert result.p < 0.001
    noise = 1.96 * math.sqrt(0.62 * 0.38 / 1000)
    assert result.mean < noise  # less than the half-width of either accuracy


def test_targets_count_alike_whatever_their_size() -> None:
    small, large = np.ones(10), np.zeros(1000)
    assert paired_bootstrap([small, large]).mean == pytest.approx(0.5)
    assert paired_bootstrap([small, large]).faces == 1010
    noisy = np.tile([1.0, -1.0], 50)
    alone, beside = paired_bootstrap([noisy]), paired_bootstrap([noisy, np.zeros(1000)])
    assert beside.high - beside.low == pytest.approx((alone.high - alone.low) / 2, rel=0.05)


def test_equal_methods_and_sure_ones() -> None:
    equal = paired_bootstrap([np.zeros(50)])
    assert (equal.mean, equal.low, equal.high, equal.p) == (0, 0, 0, 1)
    sure = paired_bootstrap([np.ones(50)], resamples=999)
    assert sure.p == pytest.approx(2 / 1000)  # never zero


@pytest.mark.parametrize("differing", [1, 2, 5, 6])
def test_few_faces_are_no_more_certain_than_by_the_sign_test(differing: int) -> None:
    least = stats.binomtest(differing, differing).pvalue
    faces = paired_bootstrap([np.repeat([1.0, 0.0], [differing, 3])])
    groups = grouped_test([np.ones(10 * differing)], [np.arange(10 * differing) // 10])
    assert faces.p == pytest.approx(least)
    assert (faces.low > 0) == (least < 0.05)
    if differing > 1:  # of one group nothing is known of any other
        assert groups.p == pytest.approx(least)
        assert (groups.low > 0) == (least < 0.05)


def test_groups_that_differ_alike_are_counted_on_the_targets_where_they_differ() -> None:
    zeros, ones = (np.zeros(40), np.arange(40) // 4), (np.ones(20), np.arange(20) // 10)
    result = grouped_test(*zip(zeros, ones, strict=True))
    assert (result.mean, result.low, result.groups) == (0.5, 0, 12)
    assert result.p == pytest.approx(stats.binomtest(2, 2).pvalue)


@pytest.mark.parametrize("third", [1 / 3, 1 - 2 / 3])  # which are two numbers
def test_shares_of_three_seeds_are_tested_as_exactly_as_whole_faces(third: float) -> None:
    alike = grouped_test([np.full(9, third)], [np.arange(9) // 3])
    assert alike.p == pytest.approx(stats.binomtest(3, 3).pvalue)
    balanced = np.array([third, third, third - 1])
    assert grouped_test([np.tile(balanced, 5)], [np.arange(15) // 3]).p == 1
    thirds, whole = (np.repeat([high, low, 0], [4, 3, 4]) for high, low in ((third, -1 / 3), (1.0, -1.0)))
    assert paired_bootstrap([thirds]).p == paired_bootstrap([whole]).p


def test_holm_is_that_of_statsmodels() -> None:
    """Numbers of statsmodels.stats.multitest.multipletests(…, method="holm"), version 0.15."""
    assert holm([0.01, 0.04, 0.03, 0.005, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    assert holm([0.0004, 0.5, 0.5, 0.012, 0.9, 0.03]) == pytest.approx([0.0024, 1, 1, 0.06, 1, 0.12])
    assert holm([]) == []


# Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7 (2006), Table 6. Its ranks are those of
# the unrounded numbers, so that a fourth digit here separates the two that are 0.975 in print.
DEMSAR = [
    (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967), (0.628, 0.661, 0.654, 0.657),
    (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931), (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625),
    (0.775, 0.838, 0.866, 0.875), (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
    (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
]  # fmt: skip


def test_ranks_of_the_published_example() -> None:
    ranking = rank_methods(np.array(DEMSAR).T)
    assert ranking.ranks == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=5e-4)
    assert ranking.critical_difference == pytest.approx(1.25, abs=0.005)
    assert ranking.targets == 14
    assert ranking.p == pytest.approx(stats.friedmanchisquare(*np.array(DEMSAR).T).pvalue)


def test_the_critical_difference_uses_the_published_quantiles() -> None:
    for methods, quantile in ((3, 2.343), (5, 2.728), (10, 3.164)):  # Demšar, Table 5
        scores = np.random.default_rng(0).normal(size=(methods, 40))
        expected = quantile * math.sqrt(methods * (methods + 1) / (6 * 40))
        assert rank_methods(scores).critical_difference == pytest.approx(expected, rel=5e-4)


def test_too_little_is_not_tested() -> None:
    two = rank_methods(np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]]))
    assert two.ranks == (1, 2)
    assert math.isnan(two.p)
    assert math.isnan(two.critical_difference)
    few = rank_methods(np.array([[0.9, 0.8], [0.5, 0.6], [0.1, 0.2]]))
    assert few.p < 0.2
    assert math.isnan(few.critical_difference)  # 2.34 is more than the best and the worst can be apart
    alike = rank_methods(np.full((3, 8), 0.5))
    assert (alike.ranks, alike.p) == ((2, 2, 2), 1)


def test_an_interval_over_faces_is_wilsons_and_that_of_a_mean_is_combined_of_them() -> None:
    expected = stats.binomtest(15, 20).proportion_ci(0.95, "wilson")
    assert wilson(0.75, 20) == pytest.approx((expected.low, expected.high))
    assert wilson(0.0, 10)[0] == 0
    assert wilson(1.0, 10)[1] == pytest.approx(1)
    assert combine_intervals([0.0], [wilson(0.0, 100)])[0] >= 0  # and is printed without a minus
    low, high = combine_intervals([0.5, 0.5], [wilson(0.5, 100)] * 2)
    assert (low, high) == pytest.approx(wilson(0.5, 200), abs=0.001)
    assert combine_intervals([0.0, 1.0], [(0.0, 0.3), (0.7, 1.0)]) == pytest.approx((0.35, 0.65))
