"""How alike two rankings are: Spearman's and Kendall's coefficients, and Spearman's among the best."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's ρ: the correlation of the ranks, ties at their average rank; NaN where one side is constant.

    Example:
        >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
        0.8
    """
    x, y = ranks(first), ranks(second)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return round(float(x @ y) / size, 15) if size else float("nan")


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's τ-b: concordant less discordant pairs, over the geometric mean of the pairs not tied on either side.

    Example:
        >>> round(kendall([1, 2, 3, 4], [10, 20, 40, 30]), 4)
        0.6667
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    a, b = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    size = float(np.sqrt(np.abs(a).sum() * np.abs(b).sum()))
    return float((a * b).sum()) / size if size else float("nan")


def spearman_at_top(predicted: ArrayLike, measured: ArrayLike, share: float = 0.5) -> float:
    """Spearman's ρ among the share of plans that are predicted to be best (lowest), as EMQ reports it.

    Example:
        >>> spearman_at_top([1, 2, 3, 4, 5, 6], [2, 1, 3, 9, 8, 7], share=0.5)
        0.5
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    best = np.argsort(x, kind="stable")[: max(2, int(len(x) * share))]
    return spearman(x[best], y[best])


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing their average rank.

    Example:
        >>> ranks([3.0, 1.0, 3.0])
        array([1.5, 0. , 1.5])
    """
    array = np.asarray(values, dtype=np.float64)
    _, index, counts = np.unique(array, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[index]
