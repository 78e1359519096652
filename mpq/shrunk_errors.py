"""Standard errors of means of few samples, drawn to what is usual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TRUST = 8.0  # degrees of freedom that the usual variance counts for


def errors_of(differences: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Standard errors of the means of vectors of differences, some of two or three samples.

    A variance from so few is itself mostly noise, and often far too small. It is drawn to what is usual for its mean:

        s² = ((n - 1) var + ν w) / (n - 1 + ν),   w = A + B mean²,   error = s / √n

    with A the median variance of the half with the smaller means, B the median of var / mean² of the other half, and
    ν = 8 (the form of Smyth 2004, from memory; ν and w are ours). Vectors of zeros, of a plan and itself, have none.

    Example:
        >>> errors_of([np.array([1.0, 1.1]), np.array([1.0, 5.0]), np.array([1.0, 3.0]), np.zeros(3)]).round(1).tolist()
        [0.9, 1.9, 1.3, 0.0]
    """
    means, counts = np.array([[found.mean(), len(found)] for found in differences]).T
    own = np.array([found.var(ddof=1) if len(found) > 1 else 0.0 for found in differences])
    known = np.flatnonzero((counts > 1) & (own > 0))
    known = known[np.argsort(np.abs(means[known]), kind="stable")]
    small, large = known[: -(-len(known) // 2)], known[len(known) // 2 :]
    usual = np.zeros_like(own)
    if len(known):
        usual += np.median(own[small]) + np.median(own[large] / np.maximum(means[large] ** 2, 1e-300)) * means**2
    shrunk = ((counts - 1) * own + _TRUST * usual) / (counts - 1 + _TRUST)
    is_itself = np.array([not found.any() for found in differences])
    return np.where(is_itself, 0.0, np.sqrt(shrunk / counts))
