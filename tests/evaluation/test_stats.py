"""Intervals and tests: closed forms, and their error rates on simulated data."""

from itertools import product

import numpy as np
import pytest

from streamvid.evaluation import stats


def test_sign_flip_is_exact():
    differences = np.array([0.5, 1.0, -0.2, 2.0, 0.7])
    means = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=5)]
    expected = np.mean([value >= abs(differences.sum()) - 1e-9 for value in means])
    assert stats.sign_flip(differences) == pytest.approx(expected)
    assert stats.sign_flip(np.ones(10)) == pytest.approx(2 / 2**10)


def test_sign_flip_by_draws_agrees_with_the_normal_distribution():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.4, 1, 30)
    z = differences.mean() / (np.sqrt((differences**2).sum()) / 30)
    from scipy.stats import norm

    assert stats.sign_flip(differences) == pytest.approx(2 * norm.sf(z), abs=0.01)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_cover_as_often_as_they_say(method):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        bounds = stats.interval(rng.normal(3.0, 2.0, 60), method, resamples=500)
        covered += bounds.low <= 3.0 <= bounds.high
    assert 0.93 <= covered / 500 <= 0.97


def test_paired_tests_are_wrong_as_rarely_as_they_say():
    rng = np.random.default_rng(2)
    false = sum(stats.sign_flip(rng.normal(0, 1, 14)) < 0.05 for _ in range(500))
    assert 0.03 <= false / 500 <= 0.07


def test_paired_counts_and_direction():
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 5.0, 4.5])
    up, down = stats.paired(first, second, "up"), stats.paired(first, second, "down")
    assert (up.wins, up.ties, up.losses) == (3, 1, 0) and (down.wins, down.losses) == (0, 3)
    assert up.difference == pytest.approx(0.875) and up.low <= 0.875 <= up.high
    assert up.effect == pytest.approx(0.875 / np.std([1, 0, 2, 0.5], ddof=1))
    same = stats.paired(first, first)
    assert same.p == 1.0 and (same.low, same.high) == (0.0, 0.0) and same.wilcoxon == 1.0


def test_yes_and_no_are_compared_by_mcnemar():
    first = np.array([0.0] * 10 + [1.0] * 10)
    second = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 10)
    assert stats.paired(first, second).p == pytest.approx(2 * 0.5**8)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_equivalence_needs_more_than_no_difference():
    rng = np.random.default_rng(3)
    assert stats.equivalent(rng.normal(0, 0.05, 50), 0.2) < 0.001
    assert stats.equivalent(rng.normal(0, 2.0, 5), 0.2) > 0.05
    assert stats.equivalent(np.full(4, 0.3), 0.2) == 1.0 and stats.equivalent(np.zeros(4), 0.2) == 0.0


def test_parts_of_variance():
    rng = np.random.default_rng(4)
    groups = [f"g{i}" for i in range(300) for _ in range(4)]
    prompts = {g: rng.normal(0, 3) for g in set(groups)}
    between, within = stats.variance_parts([prompts[g] + rng.normal(0, 1) for g in groups], groups)
    assert between == pytest.approx(3, rel=0.15) and within == pytest.approx(1, rel=0.1)
    assert stats.variance_parts([1.0, 2.0], ["a", "b"]) is None


def test_nothing_varies():
    assert stats.interval(np.full(9, 2.0)) == stats.Interval(2.0, 2.0)
    assert stats.interval(np.array([5.0])) == stats.Interval(5.0, 5.0)


def test_a_total_is_resampled_as_a_whole():
    rng = np.random.default_rng(5)
    samples = {"a": rng.normal(1, 1, 100), "b": rng.normal(2, 1, 100)}
    bounds = stats.bootstrap_of(samples, lambda means: means["a"] + means["b"])
    half = 1.96 * (2 / 100) ** 0.5
    assert (bounds.high - bounds.low) / 2 == pytest.approx(half, rel=0.15)
