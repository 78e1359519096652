"""Which of many points are worth keeping: those that no other point equals or beats in every coordinate."""

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

PAIRS = 1 << 16  # comparisons made at once, where halving the sets costs more than it saves
NOISE = 2e-15  # relative; costs nearer than that are sums of the same numbers in another order


def staircase(cost: FloatArray, value: FloatArray) -> IntArray:
    """Indices of the non-dominated points of a plane, cheapest first; of equal points the first.

    Costs are not negative. Points whose costs differ by rounding alone count as equally dear (`NOISE`), so that the
    number of points does not grow with the number of ways to add the same numbers up. Cost: a sort.

    Example:
        >>> staircase(np.array([1.0, 2.0, 2.0, 3.0]), np.array([5.0, 6.0, 4.0, 1.0]))
        array([0, 2, 3])
    """
    order = np.argsort(cost, kind="stable")
    ranked = value[order]
    below = np.ones(len(order), dtype=bool)
    np.less(ranked[1:], np.minimum.accumulate(ranked)[:-1], out=below[1:])
    order = order[below]
    dear = cost[order]
    close = dear[1:] <= dear[:-1] * (1 + NOISE)
    return order[~_superseded(dear, close)] if close.any() else order


def _superseded(cost: FloatArray, close: BoolArray) -> BoolArray:
    """Points followed by a better one at the same cost; runs wider than rounding are left alone."""
    run = np.concatenate([[0], np.cumsum(~close)])
    ends = np.append(np.flatnonzero(np.diff(run)), len(run) - 1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    narrow = cost[ends] <= cost[starts] * (1 + 4 * NOISE)
    dropped: BoolArray = narrow[run]
    dropped[ends] = False
    return dropped


def nondominated(points: FloatArray) -> IntArray:
    """Indices of the points ``(points, coordinates)`` that no other is as small as everywhere, in lexical order.

    Of equal points the first. Divide and conquer (Kung, Luccio & Preparata 1975, J. ACM 22(4)): the lexically first
    half is filtered, and filters the second. Cost: n log^(coordinates − 1) n.

    Example:
        >>> nondominated(np.array([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))
        array([1, 0])
    """
    order = np.lexsort(points.T[::-1])
    ranked = np.ascontiguousarray(points[order])
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ranked[1:] != ranked[:-1]).any(1)
    order, ranked = order[fresh], ranked[fresh]
    return order[_front(ranked)]


def _front(ranked: FloatArray) -> IntArray:
    """Indices of the non-dominated among different points in lexical order."""
    count, coordinates = ranked.shape
    if coordinates == 1:
        return np.arange(min(1, count))
    if coordinates == 2:
        last = ranked[:, 1]
        return np.flatnonzero(np.append(True, last[1:] < np.minimum.accumulate(last)[:-1])[:count])
    if count * count <= PAIRS:
        return np.flatnonzero(~_by_pairs(ranked, ranked, strict=True))
    half = count // 2
    first = _front(ranked[:half])
    second = half + _front(ranked[half:])
    # The first coordinate of all points of the first half is no larger than that of any of the second.
    beaten = dominated(ranked[second, 1:], ranked[first, 1:])
    return np.concatenate([first, second[~beaten]])


def dominated(points: FloatArray, others: FloatArray) -> BoolArray:
    """``(points,)``: whether one of the others is as small in every coordinate; equal ones count."""
    if not len(points) or not len(others):
        return np.zeros(len(points), dtype=bool)
    coordinates = points.shape[1]
    if coordinates == 1:
        return np.asarray(points[:, 0] >= others[:, 0].min())
    if len(points) * len(others) <= PAIRS:
        return _by_pairs(points, others)
    if coordinates == 2:
        order = np.argsort(others[:, 0], kind="stable")
        least = np.append(np.inf, np.minimum.accumulate(others[order, 1]))
        return np.asarray(least[np.searchsorted(others[order, 0], points[:, 0], "right")] <= points[:, 1])
    return _by_halves(points, others)


def _by_halves(points: FloatArray, others: FloatArray) -> BoolArray:
    """Split both sets at a value of the first coordinate; across it that coordinate need not be compared."""
    middle = float(np.median(np.concatenate([points[:, 0], others[:, 0]])))
    far, near = points[:, 0] > middle, others[:, 0] <= middle
    if near.all() and far.all():
        return dominated(points[:, 1:], others[:, 1:])
    if near.all() and not far.any():  # the median is the largest value: split below it
        far, near = points[:, 0] >= middle, others[:, 0] < middle
        if not near.any():
            return dominated(points[:, 1:], others[:, 1:]) if far.all() else _at_the_top(points, others, far)
    result = np.zeros(len(points), dtype=bool)
    result[~far] = dominated(points[~far], others[near])
    upper = dominated(points[far, 1:], others[near, 1:])
    left = np.flatnonzero(far)[~upper]
    result[far] = upper
    result[left] = dominated(points[left], others[~near])
    return result


def _at_the_top(points: FloatArray, others: FloatArray, far: BoolArray) -> BoolArray:
    """All of the others have the largest first coordinate: they reach only the points that have it too."""
    result = np.zeros(len(points), dtype=bool)
    result[far] = dominated(points[far, 1:], others[:, 1:])
    return result


def _by_pairs(points: FloatArray, others: FloatArray, *, strict: bool = False) -> BoolArray:
    """Every pair compared; ``strict``: both are the same set of different points, and none beats itself."""
    beats = np.ones((len(points), len(others)), dtype=bool)
    for coordinate in range(points.shape[1]):
        beats &= others[:, coordinate] <= points[:, [coordinate]]
    if strict:
        np.fill_diagonal(beats, False)
    return np.asarray(beats.any(1))
