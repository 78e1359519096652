"""Is one plan better than another? A one-sided test on the differences of the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Test = Literal["t", "sign"]

_FEW = 8  # samples
_DRAWS = 20_000  # of the lowest of several t values
_TERMS = 500  # of the continued fraction, which needs some ten
_SMALLEST = 1e-300


@dataclass(frozen=True)
class PairedTest:
    """Mean difference a sample and how likely it, or a lower one, would be if the true mean were 0 or more.

    Attributes:
        difference: mean over samples; negative where the first plan is better.
        standard_error: of that mean.
        p_value: one-sided; small says that the first plan is better.
        samples: how many.
    """

    difference: float
    standard_error: float
    p_value: float
    samples: int

    def upper(self, level: float = 0.05) -> float:
        """The one-sided upper confidence bound of the difference (Student's t)."""
        if self.samples < 2:
            return math.inf
        return self.difference + self.standard_error * student_quantile(1 - level, self.samples - 1)


def paired_test(first: ArrayLike, second: ArrayLike | float = 0.0, *, test: Test = "t") -> PairedTest:
    """Test whether the first values are lower than the second on the same samples.

    Formula, with differences d over n samples:

        t = mean(d) / (std(d) / √n),   p = P(T ≤ t),   T of Student's distribution with n - 1 degrees of freedom
        sign: p = P(K ≥ k),   k of the m differences that are not 0 are negative, K binomial(m, 1/2)

    Source: Student (1908); the t test trusts that the mean of the differences is nearly normal, as it is for some
    hundred samples; the sign test trusts nothing, but tests the median and finds less.

    Args:
        first: (samples,) values of one plan, lower is better.
        second: (samples,) of the other, or one number.
        test: "t" or "sign".

    Raises:
        ValueError: if the shapes differ or the test is unknown.

    Example:
        >>> found = paired_test([1.0, 2.0, 3.0, 4.0], [1.5, 2.4, 3.6, 4.5])
        >>> round(found.difference, 3), found.p_value < 0.01
        (-0.5, True)
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or not len(a) or b.shape not in ((), a.shape):
        raise ValueError(f"paired values must be two equal vectors, got shapes {a.shape} and {b.shape}")
    differences, count = a - b, len(a)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    if test == "t":
        p_value = _t_p_value(float(differences.mean()), error, count)
    elif test == "sign":
        p_value = _sign_p_value(int((differences < 0).sum()), int((differences != 0).sum()))
    else:
        raise ValueError(f"test must be t or sign, got {test!r}")
    return PairedTest(float(differences.mean()), error, p_value, count)


def best_of_several(plans: ArrayLike, rival: ArrayLike, *, test: Test = "t") -> NDArray[np.float64]:
    """Test which of several plans are lower than one rival on the same samples: (plans,) adjusted p values.

    The more plans are tried, the more look better by chance; plans that are alike look so together. So each has

        p_i = P(min_k T_k ≤ t_i),   T = Z / √(χ²_(n-1) / (n - 1)),   Z ~ N(0, R)

    with t_i as in `paired_test` and R the correlations of the differences (Dunnett 1955, with R from the data). The
    probability that any of them is found better where none is, is the level. Where all are one plan p is that of
    `paired_test`; where they have nothing in common nearly that times their number. Drawn 20,000 times, always alike.
    With the sign test, and below 8 samples, where R is too rough, p values are multiplied by the number of plans
    (Bonferroni).

    Args:
        plans: (plans, samples) values, lower is better.
        rival: (samples,) of the other.
        test: "t" or "sign".

    Example:
        >>> rival = np.arange(8.0)
        >>> better, same = rival - [1, 2, 1, 2, 1, 2, 1, 2], rival + [1, -1, 1, -1, 1, -1, 1, -1]
        >>> (best_of_several([better, same], rival) < 0.05).tolist()
        [True, False]
    """
    differences = np.asarray(plans, dtype=np.float64) - np.asarray(rival, dtype=np.float64)
    single: NDArray[np.float64] = np.array([paired_test(each, test=test).p_value for each in differences])
    several, count = differences.shape
    if test == "sign" or several == 1 or count < _FEW:
        return np.asarray(np.minimum(1.0, several * single))
    errors = differences.std(axis=1, ddof=1) / math.sqrt(count)
    varies = errors > 0
    if not varies.any():
        return single
    rng = np.random.default_rng(0)
    standard = (differences[varies] - differences[varies].mean(1, keepdims=True)) / errors[varies, None]
    common = rng.standard_normal((_DRAWS, count)) @ standard.T / math.sqrt(count * (count - 1))
    lowest = (common / np.sqrt(rng.chisquare(count - 1, (_DRAWS, 1)) / (count - 1))).min(1)
    found = single.copy()
    found[varies] = [(lowest <= t).mean() for t in differences[varies].mean(1) / errors[varies]]
    return np.asarray(np.maximum(found, single))


def student_tail(t: float, freedom: int) -> float:
    """P(T ≥ t) of Student's distribution.

    Example:
        >>> round(student_tail(2.0, 10), 5), round(student_tail(-1.0, 1), 5)
        (0.03669, 0.75)
    """
    half = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return half if t >= 0 else 1 - half


def student_quantile(share: float, freedom: int) -> float:
    """The value that a share of Student's distribution is below, by bisection.

    Example:
        >>> round(student_quantile(0.95, 10), 4)
        1.8125
    """
    low, high = -1e4, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if student_tail(middle, freedom) < 1 - share else (middle, high)
    return (low + high) / 2


def _t_p_value(mean: float, error: float, count: int) -> float:
    if count < 2:
        return 1.0
    if error == 0:
        return 0.0 if mean < 0 else 1.0
    return student_tail(-mean / error, count - 1)


def _sign_p_value(lower: int, total: int) -> float:
    """P(K ≥ lower) for K binomial(total, 1/2)."""
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(lower, total + 1)]
    return min(1.0, math.fsum(math.exp(log - total * math.log(2)) for log in logs))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised, by its continued fraction on the side where that converges quickly."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x > (a + 1) / (a + b + 2):
        return 1 - math.exp(log) * _fraction(b, a, 1 - x) / b
    return math.exp(log) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction of the incomplete beta function."""
    above, below = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    value = below
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            below = 1 / _away(1 + term * below)
            above = _away(1 + term / above)
            value *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    return value


def _away(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST
