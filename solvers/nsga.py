"""NSGA-II over whole populations: ranks, crowding, survivors, parents and children, in numpy."""

from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .ordinal_genes import GeneArray

CROSSED = 0.9  # share of children with two parents
SWITCHED = 0.5  # share of children with one gene raised and one lowered


def ranks(points: FloatArray, enough: int | None = None) -> IntArray:
    """Number of the front that every point ``(points, objectives)`` is on, 0 for the non-dominated; equal points share.

    One objective: the order. Two: fronts are peeled off along the order of the first, a pass each. More: all pairs are
    compared (Deb et al. 2002, IEEE Trans. Evol. Comput. 6(2), section III.A). Fronts that begin after ``enough`` points
    are not told apart.

    Example:
        >>> ranks(np.array([[1.0, 4.0], [2.0, 2.0], [2.0, 4.0], [3.0, 3.0], [1.0, 4.0]]))
        array([0, 0, 1, 1, 0])
    """
    enough = len(points) if enough is None else enough
    if points.shape[1] == 1:
        return np.unique(points[:, 0], return_inverse=True)[1].astype(np.int64)
    return _ranks_of_two(points, enough) if points.shape[1] == 2 else _ranks_of_many(points, enough)


def _ranks_of_two(points: FloatArray, enough: int) -> IntArray:
    order = np.lexsort((points[:, 1], points[:, 0]))
    ranked = points[order]
    is_new = np.append(True, (ranked[1:] != ranked[:-1]).any(1))
    place, second = np.flatnonzero(is_new), ranked[is_new, 1]
    sizes = np.diff(np.append(place, len(points)))
    left, distinct = np.arange(len(place)), np.zeros(len(place), dtype=np.int64)
    rank = placed = 0
    while len(left) and placed < enough:
        value = second[left]
        on_front = np.append(True, value[1:] < np.minimum.accumulate(value)[:-1])
        distinct[left[on_front]] = rank
        placed += int(sizes[left[on_front]].sum())
        left, rank = left[~on_front], rank + 1
    distinct[left] = rank
    found = np.empty(len(points), dtype=np.int64)
    found[order] = np.repeat(distinct, sizes)
    return found


def _ranks_of_many(points: FloatArray, enough: int) -> IntArray:
    no_worse = np.ones((len(points), len(points)), dtype=bool)
    equal = no_worse.copy()
    for column in points.T:
        value = np.ascontiguousarray(column)
        no_worse &= value[:, None] <= value
        equal &= value[:, None] == value
    beats: BoolArray = no_worse & ~equal
    dominators = np.count_nonzero(beats, axis=0)
    found, rank = np.full(len(points), -1), 0
    while True:
        front = (found < 0) & (dominators == 0)
        found[front] = rank
        rank += 1
        is_left = found < 0
        if not is_left.any() or len(points) - np.count_nonzero(is_left) >= enough:
            found[is_left] = rank
            return found
        dominators = dominators - np.count_nonzero(beats[front], axis=0)


def crowding(points: FloatArray, rank: IntArray) -> FloatArray:
    """Crowding distance of every point within its front (Deb et al. 2002, IEEE Trans. Evol. Comput. 6(2)), (points,).

        d_i = Σ_m (f_m(next of i) − f_m(previous of i)) / (f_m^max − f_m^min)

    over the points of the front in the order of f_m; ∞ at both ends.

    Example:
        >>> crowding(np.array([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]]), np.zeros(3, dtype=int))
        array([inf,  2., inf])
    """
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.lexsort((column, rank))
        value, front = column[order], rank[order]
        begin = np.flatnonzero(front[1:] != front[:-1]) + 1
        first, last = np.concatenate([[0], begin]), np.concatenate([begin, [len(front)]]) - 1
        span = (value[last] - value[first]).repeat(last - first + 1)
        part = np.zeros(len(value))
        part[1:-1] = value[2:] - value[:-2]
        part /= np.where(span > 0, span, np.inf)
        part[first] = part[last] = np.inf
        distance[order] += part
    return distance


def standing(points: FloatArray, excess: FloatArray, signature: IntArray, enough: int | None = None) -> IntArray:
    """The plans by quality, best first, ``(plans,)``: by front, and the lonely before the crowded on each.

    Constrained domination (Deb et al. 2002): infeasible plans follow all others, by excess; copies come last.

    Args:
        points: ``(plans, objectives)``; those of infeasible plans are not looked at.
        excess: ``(plans,)``, 0 where feasible.
        signature: ``(plans,)``, equal for copies of a plan.
        enough: how many plans are wanted; those behind are in no order.
    """
    is_first = np.zeros(len(points), dtype=bool)
    is_first[np.unique(signature, return_index=True)[1]] = True
    fits = np.flatnonzero((excess <= 0) & is_first)
    rank = np.zeros(len(points), dtype=np.int64)
    lonely = np.zeros(len(points))
    if len(fits):
        rank[fits] = ranks(points[fits], enough)
        lonely[fits] = crowding(points[fits], rank[fits]) if points.shape[1] > 1 else 0.0
    last = len(points) + 1
    rank[excess > 0] = last
    rank[~is_first] = last + 1
    order: IntArray = np.lexsort((-lonely, excess, rank))
    return order


class Variation(NamedTuple):
    """How children come from a population that stands in the order of quality.

    Attributes:
        counts: ``(groups,)`` values of each gene.
        mutations: genes changed a child, on average, besides the switches.
    """

    counts: IntArray
    mutations: float = 1.0

    def children(self, genes: GeneArray, count: int, rng: np.random.Generator) -> GeneArray:
        """``(count, groups)``: binary tournaments, uniform crossover, ordinal mutation and level switches."""
        first, second = self._parents(len(genes), count, rng), self._parents(len(genes), count, rng)
        second = np.where(rng.random(count) < CROSSED, second, first)
        found, other = genes.take(first, axis=0), genes.take(second, axis=0)
        other ^= found
        other &= -_coin_flips(count, genes.shape[1], rng).astype(np.int16)  # all ones or all zeros
        found ^= other
        self._mutate(found, rng)
        self._switch(found, rng)
        return found

    def _parents(self, size: int, count: int, rng: np.random.Generator) -> IntArray:
        drawn: IntArray = rng.integers(0, size, (2, count)).min(0)
        return drawn

    def _mutate(self, genes: GeneArray, rng: np.random.Generator) -> None:
        """A step up or down mostly, any value sometimes."""
        count = int(rng.poisson(self.mutations * len(genes)))
        plan, group = rng.integers(0, len(genes), count), rng.integers(0, genes.shape[1], count)
        step = rng.integers(0, 2, count) * 2 - 1
        near = genes[plan, group] + step
        anywhere = (rng.random(count) * self.counts[group]).astype(np.int64)
        value = np.where(rng.random(count) < 0.25, anywhere, near)
        genes[plan, group] = np.clip(value, 0, self.counts[group] - 1)

    def _switch(self, genes: GeneArray, rng: np.random.Generator) -> None:
        """One gene a step up and another down (the level switch of EvoPress, ICML 2025): costs stay about the same."""
        plan = np.flatnonzero(rng.random(len(genes)) < SWITCHED)
        for step in (1, -1):
            group = rng.integers(0, genes.shape[1], len(plan))
            genes[plan, group] = np.clip(genes[plan, group] + step, 0, self.counts[group] - 1)


def _coin_flips(rows: int, columns: int, rng: np.random.Generator) -> BoolArray:
    """(rows, columns) fair booleans, eight from a byte."""
    width = -(-columns // 8)
    drawn = np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
    return np.unpackbits(drawn, axis=1, count=columns).view(np.bool_)
