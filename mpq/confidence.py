"""Confidence intervals of means, shares and quantiles over independent samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its confidence interval; infinite where the data does not bound it."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom; beyond, the normal quantile with four terms of the Cornish-Fisher expansion
    in 1/degrees (Abramowitz and Stegun, 26.7.5), within 1 % of the truth at the 2.5 % tails.

    Args:
        probability: between 0 and 1, neither of them.
        degrees: of freedom, at least 1.

    Example:
        >>> [round(student_t(0.975, degrees), 3) for degrees in (1, 2, 10, 1000)]
        [12.706, 4.303, 2.228, 1.962]
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        centred = 2 * probability - 1
        return centred * math.sqrt(2 / (1 - centred**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))


def mean_estimate(values: ArrayLike, weights: ArrayLike | None = None, *, level: float = LEVEL) -> Estimate:
    """Mean over samples with a Student-t interval; with weights the mean over what the samples hold.

        m = Σ w_i x_i / Σ w_i,    se² = 1/(n (n-1)) Σ (w_i (x_i - m) / w̄)²,    m ± t_{n-1} se

    which is the linearised ratio estimator for samples that are drawn whole (sequences of tokens). One sample bounds
    nothing: the ends are infinite.

    Args:
        values: (samples,).
        weights: (samples,), not all 0.
        level: of confidence.

    Example:
        >>> estimate = mean_estimate([1.0, 2.0, 3.0])
        >>> estimate.value, round(estimate.low, 3), round(estimate.high, 3)
        (2.0, -0.484, 4.484)
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    mean, count = float((w * x).sum() / w.sum()), x.size
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    error = math.sqrt(float(np.square(w * (x - mean) / w.mean()).sum()) / (count * (count - 1)))
    margin = student_t((1 + level) / 2, count - 1) * error
    return Estimate(mean, mean - margin, mean + margin)


def share_estimate(hits: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Share of samples that are true, with Wilson's score interval (1927), which holds at 0 and 1 as well.

    Args:
        hits: (samples,) of true and false.
        level: of confidence.

    Example:
        >>> nothing_seen = share_estimate([False] * 100)
        >>> nothing_seen.value, round(nothing_seen.high, 3)
        (0.0, 0.037)
    """
    found = np.asarray(hits, dtype=np.float64)
    count, share, z = found.size, float(found.mean()), NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    margin = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = max(0.0, min(centre - margin, share)), min(1.0, max(centre + margin, share))
    return Estimate(share, low, high)


def quantile_estimate(
    values: ArrayLike, owner: ArrayLike | None = None, *, quantile: float = 0.99, level: float = LEVEL
) -> Estimate:
    """A quantile of values that come in samples, with Woodruff's interval (1952, from memory).

    The share of values at or below the quantile has a standard error over samples; the ends are the quantiles at that
    share, plus and minus its margin. Where that goes beyond 1 the upper end is infinite: too few samples to say.

    Args:
        values: (values,).
        owner: (values,) number of the sample each value belongs to; by default each is one of its own.
        quantile: between 0 and 1.
        level: of confidence.

    Example:
        >>> estimate = quantile_estimate(range(1, 10001), quantile=0.5)
        >>> estimate.value, estimate.low, estimate.high
        (5000.0, 4902.0, 5099.0)
        >>> quantile_estimate(range(100)).high
        inf
    """
    x = np.asarray(values, dtype=np.float64)
    samples = np.arange(x.size) if owner is None else np.unique(np.asarray(owner), return_inverse=True)[1]
    ordered = np.sort(x)
    value = _ranked(ordered, quantile)
    held = np.bincount(samples)
    share = mean_estimate(np.bincount(samples, weights=x <= value) / held, held, level=level)
    low = _ranked(ordered, max(0.0, quantile - share.margin))
    high = math.inf if quantile + share.margin > 1 else _ranked(ordered, quantile + share.margin)
    return Estimate(value, low, high)


def _ranked(ordered: NDArray[np.float64], share: float) -> float:
    """The least value that `share` of them are not above."""
    return float(ordered[max(0, math.ceil(share * ordered.size - 1e-9) - 1)])
