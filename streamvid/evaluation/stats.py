"""Intervals and tests whose unit is the prompt (or script): samples and segments of one prompt stay together.

Percentile and BCa bootstrap (Efron 1987), sign-flip permutation, Wilcoxon, McNemar, Holm; scipy where it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES, SEED, CONFIDENCE = 10_000, 2024, 0.95
MOST_EXACT = 16  # pairs for which all sign flips are counted
DRAWS = 100_000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def by_group(values: Sequence[float], groups: Sequence[str]) -> np.ndarray:
    """Mean of every group, in the order of their names."""
    found: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    return np.array([np.mean(found[name]) for name in sorted(found)])


def interval(sample: np.ndarray, method: str = "BCa", resamples: int = RESAMPLES) -> Interval:
    """95% bootstrap interval of the mean of independent values; [x, x] where nothing varies."""
    sample = np.asarray(sample, float)
    if len(sample) < 2 or np.ptp(sample) == 0:
        value = float(sample.mean()) if len(sample) else float("nan")
        return Interval(value, value)
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method=method,
        rng=np.random.default_rng(SEED),
        vectorized=True,
        batch=1000,
    ).confidence_interval
    if not np.isfinite([found.low, found.high]).all():  # BCa without variation of the jackknife
        return interval(sample, "percentile", resamples)
    return Interval(float(found.low), float(found.high))


def bootstrap_of(
    samples: Mapping[str, np.ndarray],
    statistic: Callable[[Mapping[str, float]], float],
    resamples: int = 2000,
) -> Interval:
    """Percentile interval of a function of several means; the samples are of independent groups of prompts."""
    rng = np.random.default_rng(SEED)
    draws = {
        name: sample[rng.integers(len(sample), size=(resamples, len(sample)))].mean(1)
        for name, sample in sorted(samples.items())
    }
    values = [statistic({name: float(draws[name][i]) for name in draws}) for i in range(resamples)]
    low, high = np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Paired:
    """How one method differs from another on the same prompts.

    Attributes:
        difference: mean over prompts; low, high: its 95% interval; p: sign-flip permutation (McNemar for yes / no);
        wilcoxon: p of the signed-rank test; wins, ties, losses: prompts; effect: Cohen's d_z; prompts: their number;
        detectable: smallest difference found with 80% power.
    """

    difference: float
    low: float
    high: float
    p: float
    wilcoxon: float
    wins: int
    ties: int
    losses: int
    effect: float
    prompts: int
    detectable: float


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p of a mean of 0 when every difference may have either sign: exact for up to 16, else drawn."""
    count, seen = len(differences), abs(differences.mean()) - 1e-12
    if count <= MOST_EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ differences) / count >= seen).mean())
    rng = np.random.default_rng(SEED)
    hits = 0
    for _ in range(10):
        signs = rng.integers(0, 2, (DRAWS // 10, count), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ differences) / count >= seen).sum())
    return (hits + 1) / (DRAWS + 1)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p for paired yes / no."""
    gained, lost = int(((first == 0) & (second == 1)).sum()), int(((first == 1) & (second == 0)).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired(first: np.ndarray, second: np.ndarray, better: str = "up") -> Paired:
    """`second` minus `first`, prompt by prompt."""
    differences = np.asarray(second, float) - np.asarray(first, float)
    binary = set(np.unique(np.concatenate([first, second]))) <= {0.0, 1.0}
    bounds = interval(differences)
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    constant = np.ptp(differences) == 0
    if binary:
        p = mcnemar(np.asarray(first), np.asarray(second))
    else:
        p = 1.0 if not differences.any() else sign_flip(differences)
    wilcoxon = 1.0 if constant and not differences.any() else float(stats.wilcoxon(differences).pvalue)
    sign = -1 if better == "down" else 1
    power = stats.norm.ppf(1 - (1 - CONFIDENCE) / 2) + stats.norm.ppf(0.8)
    return Paired(
        float(differences.mean()),
        bounds.low,
        bounds.high,
        p,
        wilcoxon,
        int((sign * differences > 0).sum()),
        int((differences == 0).sum()),
        int((sign * differences < 0).sum()),
        float(differences.mean() / spread) if spread else 0.0,
        len(differences),
        float(power * spread / len(differences) ** 0.5),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being several (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def equivalent(differences: np.ndarray, margin: float) -> float:
    """P of two one-sided t tests: small means that the mean difference lies within +-margin."""
    if np.ptp(differences) == 0:
        return 0.0 if abs(differences[0]) < margin else 1.0
    lower = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(lower, upper))


def variance_parts(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float] | None:
    """Standard deviations between prompts and within them (over seeds); None where no prompt has two samples."""
    found: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(value)
    several = [np.var(v, ddof=1) for v in found.values() if len(v) > 1]
    if not several:
        return None
    within = float(np.mean(several))
    size = float(np.mean([len(v) for v in found.values()]))
    between = float(np.var([np.mean(v) for v in found.values()], ddof=1)) if len(found) > 1 else 0.0
    return max(0.0, between - within / size) ** 0.5, within**0.5
