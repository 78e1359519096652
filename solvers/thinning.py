"""One point of several that differ by rounding alone."""

import numpy as np

from mpq.arrays import FloatArray, IntArray

from .dominance import nondominated

EQUAL = 1e-9  # relative; amounts nearer than that are one


def distinct_points(points: FloatArray, noise: FloatArray) -> IntArray:
    """Indices of the non-dominated points ``(points, coordinates)``, amounts equal to rounding being equal.

    Of points that agree in all coordinates but for rounding the one with the least last coordinate stays. ``noise``
    is what counts as rounding besides `EQUAL`, one number a coordinate.

    Example:
        >>> distinct_points(np.array([[1.0, 5.0], [1.0 + 1e-15, 4.0], [2.0, 4.0 - 1e-15]]), np.zeros(2))
        array([1])
    """
    order = np.lexsort(points.T)
    levels = [_levels(points[order, k], float(noise[k])) for k in range(points.shape[1])]
    return np.asarray(order[nondominated(np.stack(levels, axis=1))])


def _levels(values: FloatArray, noise: float) -> FloatArray:
    """Number of the level of every value; a level begins with its least value and holds all that equal it."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    begins = np.ones(len(ranked), dtype=bool)
    begins[1:] = np.diff(ranked) > EQUAL * np.abs(ranked[:-1]) + noise
    anchor = 0
    for index in np.flatnonzero(~begins):  # a run of close values may grow wider than rounding: another level begins
        anchor = int(index) - 1 if begins[index - 1] else anchor
        begins[index] = ranked[index] - ranked[anchor] > EQUAL * abs(ranked[anchor]) + noise
    levels = np.empty(len(values))
    levels[order] = np.cumsum(begins)
    return levels
