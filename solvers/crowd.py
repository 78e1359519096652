"""Partial plans extended group by group, all at once, as far as their bounds allow."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .certificates import Certificates, ordered
from .reduction import Core

LARGE = 4096  # partial plans from which on it is worth looking for those that others make useless
EQUAL = 1e-14  # relative to the largest sum: partial plans nearer than that count as equal


class Crowd(NamedTuple):
    """Partial plans of the first groups in order.

    Attributes:
        stage: how many groups.
        choices: ``(plans, stages)``.
        level: ``(rows, plans)``, rows of the certificates.
        used: ``(plans, options)`` options in use; nothing where that does not matter.
    """

    stage: int
    choices: IntArray
    level: FloatArray
    used: BoolArray

    def pick(self, index: IntArray) -> "Crowd":
        """Some of the plans."""
        return Crowd(self.stage, self.choices[index], self.level[:, index], self.used[index])


class Growth:
    """How the crowds of a core grow below a threshold; `order` are its undecided groups."""

    def __init__(self, core: Core, rows: Certificates, k: int) -> None:
        self.core, self.rows, self.k = core, rows, k
        self.order, self._start, self._unary, self._links = ordered(rows)
        self._is_plain = not any(self._links) and not core.counts_formats

    def empty(self) -> Crowd:
        """No undecided group has an option yet."""
        rows, level = self.rows, self._start
        used = np.zeros((1, self.core.counts_formats * len(rows.rises)), dtype=bool)
        if self.core.counts_formats:
            used[0, rows.allowed.argmax(1)[rows.allowed.sum(1) == 1]] = True
            level = level + rows.priced * rows.rises[used[0]].sum()
        most = self.core.max_formats or used.shape[1]
        return Crowd(0, np.zeros((1, len(self.order)), dtype=np.int64), level[:, None], used).pick(
            np.flatnonzero(used.sum(1) <= most)
        )

    def within(self, crowd: Crowd, most: float) -> Crowd:
        """What a lower threshold leaves."""
        return crowd.pick(np.flatnonzero((crowd.level <= self.rows.limits(most)[:, None]).all(0)))

    def bound(self, crowd: Crowd) -> FloatArray:
        """Least objective above zero of every partial plan, (plans,)."""
        largest: FloatArray = crowd.level[self.rows.priced].max(0)
        return largest

    def extended(self, crowd: Crowd, most: float) -> Crowd:
        """Every partial plan with every option of the next group, as far as limits and threshold allow."""
        rows, core, group = self.rows, self.core, self.order[crowd.stage]
        options = np.flatnonzero(rows.allowed[group])
        limits = rows.limits(most)
        row = int(rows.priced.sum() > 1)  # the one with the best prices leaves least
        plan, option = np.nonzero(crowd.level[row][:, None] + self._unary[row, group, options] <= limits[row])
        option = options[option]
        level = crowd.level[:, plan] + self._unary[:, group, option]
        for stage, excess in self._links[crowd.stage]:
            level += excess[:, crowd.choices[plan, stage], option]
        used = crowd.used[plan]
        if core.counts_formats:
            is_new = ~used[np.arange(len(plan)), option]
            level += rows.priced[:, None] * np.where(is_new, rows.rises[option], 0.0)
            used[np.arange(len(plan)), option] = True
        fits: BoolArray = np.logical_and.reduce(level <= limits[:, None], axis=0)
        if core.max_formats is not None:
            fits &= used.sum(1) <= core.max_formats
        choices = crowd.choices[plan]
        choices[:, crowd.stage] = option
        grown = Crowd(crowd.stage + 1, choices, level, used)
        return self._thinned(grown if fits.all() else grown.pick(np.flatnonzero(fits)))

    def _thinned(self, crowd: Crowd) -> Crowd:
        """Without partial plans that k others are nowhere worse than; only large crowds are looked through."""
        if not self._is_plain or len(crowd.choices) <= max(LARGE, 2 * self.k):
            return crowd
        values = np.concatenate([crowd.level[:1], crowd.level[~self.rows.priced]])
        index = _undominated(values, self.k) if len(values) <= 2 else _few_equal(values, self.k)
        return crowd.pick(np.sort(index))

    def finished(self, crowd: Crowd) -> Iterator[tuple[float, IntArray]]:
        """Objectives above zero and plans of groups, best first; those at a limit only after an exact check."""
        rows = self.rows
        is_sure = np.logical_and.reduce(crowd.level[~rows.priced] <= -rows.room[~rows.priced, None], axis=0)
        plan = rows.allowed.argmax(1)
        for index in np.argsort(crowd.level[0], kind="stable").tolist():
            plan[self.order] = crowd.choices[index]
            if is_sure[index] or self.core.is_feasible(plan):
                yield float(crowd.level[0, index]), plan.copy()


def _undominated(values: FloatArray, k: int) -> IntArray:
    """Columns but for some that k others are nowhere above; rows: the objective and one limited sum, or none.

    In the order of the limited sum, a column whose objective is no less than the k-th least before it is useless.
    """
    order = np.lexsort((values[0], values[-1]))
    least, equal = np.full(k, np.inf), EQUAL * float(np.abs(values[0]).max())
    kept, size = [], max(k, 256)
    for start in range(0, len(order), size):
        block = order[start : start + size]
        block = block[values[0, block] < least.max() - equal]
        kept.append(block)
        least = np.partition(np.concatenate([least, values[0, block]]), k - 1)[:k]
    return np.concatenate(kept)


def _few_equal(values: FloatArray, k: int) -> IntArray:
    """Columns without those before which k equal ones stand."""
    unit = EQUAL * np.abs(values).max(1, keepdims=True)
    keys = np.round(np.divide(values, unit, out=np.zeros_like(values), where=unit > 0))
    order = np.lexsort(keys)
    is_first = np.append(True, (np.diff(keys[:, order]) != 0).any(0))
    place = np.arange(len(order))
    return order[place - np.maximum.accumulate(np.where(is_first, place, 0)) < k]
