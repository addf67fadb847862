"""Confidence intervals of what a benchmark reports."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a success rate (Wilson 1927); honest for few trials and for rates near 0 and 1.

    Args:
        successes: trials that succeeded.
        trials: at least 1.
        z: normal quantile of the confidence asked for.

    Raises:
        ValueError: if there are no trials, or not between 0 and ``trials`` successes.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials: both must be counts, with at least one trial")
    rate = successes / trials
    scale = 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # The ends are exactly 0 and 1 there; rounding would leave 1e-17 and 0.99...
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)


def newcombe(successes: int, trials: int, other: int, other_trials: int, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two success rates, the first minus the other (Newcombe 1998, method 10).

    Made of the two score intervals, so it stays in [-1, 1] and is honest for rates near 0 and 1.

    Args:
        successes: of the first.
        trials: of the first, at least 1.
        other: successes of the other.
        other_trials: trials of the other, at least 1.
        z: normal quantile of the confidence asked for.

    Raises:
        ValueError: as ``wilson``.
    """
    low, high = wilson(successes, trials, z)
    other_low, other_high = wilson(other, other_trials, z)
    rate, other_rate = successes / trials, other / other_trials
    below = math.hypot(rate - low, other_high - other_rate)
    above = math.hypot(high - rate, other_rate - other_low)
    return rate - other_rate - below, rate - other_rate + above


def bootstrap_mean(
    values: np.ndarray, rng: np.random.Generator, *, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` [n].

    Args:
        values: at least one number; for paired comparisons, the differences.
        rng: seeded generator.
        level: confidence, in (0, 1).
        resamples: bootstrap samples.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a bootstrap needs a list of at least one number, got shape {list(values.shape)}")
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
