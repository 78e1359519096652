"""Lower bounds that a partial plan carries along: the objective at several prices, and every limited row."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .reduction import ROUNDING, Core, row_sums

FACTORS = (0.0, 0.8, 1.25)  # of one price at a time


@dataclass(frozen=True, eq=False)
class PairExcess:
    """What two groups together add above the least: (certificates, options, options)."""

    first: int
    second: int
    excess: FloatArray


@dataclass(frozen=True, eq=False)
class Certificates:
    """Row p of a plan is ``start[p]`` + Σ_g unary[p, g, choice_g] + Σ pairs, all terms ≥ 0, so it only ever rises.

    Row 0 is the objective above ``zero``. The other rows marked ``priced`` are the objective plus prices times what is
    over the limits: no more than the objective for a plan within them, and of far less spread; row 1 has the best
    prices. The rest are limited sums above their limits: a plan over 0 breaks a budget.

    Attributes:
        zero: objective that rows count from.
        start: ``(rows,)``.
        unary: ``(rows, groups, options)``, 0 where forbidden.
        pairs: couplings.
        priced: ``(rows,)``, which are bounds on the objective.
        room: ``(rows,)``, for rounding.
        allowed: ``(groups, options)`` still in play.
        rises: ``(options,)`` what the objective rises by for the first use of an option.
    """

    zero: float
    start: FloatArray
    unary: FloatArray
    pairs: tuple[PairExcess, ...]
    priced: BoolArray
    room: FloatArray
    allowed: BoolArray
    rises: FloatArray

    def limits(self, most: float) -> FloatArray:
        """What every row may reach in a plan whose objective is at most ``most`` above zero."""
        return np.where(self.priced, most, 0.0) + self.room

    def within(self, most: float) -> "Certificates | None":
        """Without the options that no such plan contains, None where no plan is left."""
        limits, kept = self.limits(most), self
        while True:
            if (kept.start > limits).any():
                return None
            over: BoolArray = np.logical_or.reduce(kept.unary > (limits - kept.start)[:, None, None], axis=0)
            if not (over & kept.allowed).any():
                return kept
            allowed = kept.allowed & ~over
            if not allowed.any(1).all():
                return None
            kept = replace(kept, allowed=allowed)._lifted()

    def _lifted(self) -> "Certificates":
        """The same rows with the least of every group and pair moved into ``start``."""
        start, unary, pairs = self.start.copy(), self.unary, []
        for pair in self.pairs:
            both = np.outer(self.allowed[pair.first], self.allowed[pair.second])
            least = np.where(both, pair.excess, np.inf).min((1, 2))
            start += least
            pairs.append(replace(pair, excess=np.where(both, pair.excess - least[:, None, None], 0.0)))
        least_unary = np.where(self.allowed, unary, np.inf).min(2)
        unary = np.where(self.allowed, unary - least_unary[:, :, None], 0.0)
        return replace(self, start=start + least_unary.sum(1), unary=unary, pairs=tuple(pairs))


def certificates(core: Core, price: FloatArray, zero: float | None = None) -> Certificates:
    """Rows of a core whose budgets have these prices, (budgets,); ``zero`` is the best bound itself by default."""
    weights = np.array([[1.0, *price], *_neighbours(price)])
    budgets = np.eye(1 + len(core.limits))[1:]
    weights = np.concatenate([np.eye(1, 1 + len(core.limits)), weights, budgets])
    priced = np.arange(len(weights)) < len(weights) - len(budgets)
    unary = np.tensordot(weights, np.where(core.allowed, core.table, 0.0), 1)
    rows = Certificates(
        zero=0.0,
        start=-(weights[:, 1:] @ core.limits),
        unary=unary,
        pairs=tuple(PairExcess(c.first, c.second, np.tensordot(weights, c.table, 1)) for c in core.couplings),
        priced=priced,
        room=_magnitude(core, weights) * np.where(priced, 2e-15, ROUNDING),
        allowed=core.allowed,
        rises=np.zeros(core.allowed.shape[1]) if core.format_costs is None else core.format_costs,
    )
    rows = _with_steps(core, rows)._lifted()
    zero = float(rows.start[rows.priced].max()) if zero is None else zero
    return replace(rows, zero=zero, start=np.where(rows.priced, rows.start - zero, rows.start))


def _neighbours(price: FloatArray) -> Iterable[FloatArray]:
    for budget in np.flatnonzero(price > 0):
        for factor in FACTORS:
            other = np.array([1.0, *price])
            other[1 + budget] *= factor
            yield other


def _magnitude(core: Core, weights: FloatArray) -> FloatArray:
    size = np.abs(np.where(core.allowed, core.table, 0.0)).max(2).sum(1)
    for pair in core.couplings:
        size = size + np.abs(pair.table).max((1, 2))
    size[1:] += np.abs(core.limits)
    magnitude: FloatArray = weights @ size
    return magnitude


def _with_steps(core: Core, rows: Certificates) -> Certificates:
    """One more row for every step that can be above its peak budget."""
    steps = core.steps
    most = row_sums(steps.row, np.where(core.allowed[steps.group], steps.value, -np.inf).max(1), len(steps.limit))
    limited = np.flatnonzero(most > steps.limit)
    unary = dense_steps(core, limited)
    room = ROUNDING * (np.abs(unary).max(2).sum(1) + np.abs(steps.limit[limited]))
    pairs = [np.zeros((len(limited), *pair.excess.shape[1:])) for pair in rows.pairs]
    return replace(
        rows,
        start=np.concatenate([rows.start, -steps.limit[limited]]),
        unary=np.concatenate([rows.unary, unary]),
        pairs=tuple(
            replace(pair, excess=np.concatenate([pair.excess, more]))
            for pair, more in zip(rows.pairs, pairs, strict=True)
        ),
        priced=np.concatenate([rows.priced, np.zeros(len(limited), dtype=bool)]),
        room=np.concatenate([rows.room, room]),
    )


def dense_steps(core: Core, picked: IntArray) -> FloatArray:
    """Some step rows of a core as tables, (rows, groups, options)."""
    steps, place = core.steps, np.full(len(core.steps.limit), -1)
    place[picked] = np.arange(len(picked))
    kept = place[steps.row] >= 0
    table = np.zeros((len(picked), *core.allowed.shape))
    table[place[steps.row[kept]], steps.group[kept]] = steps.value[kept]
    return table


class Ordered(NamedTuple):
    """Rows as they rise group after group, in an order of the undecided groups.

    Attributes:
        order: ``(stages,)`` groups.
        start: ``(rows,)`` with all decided groups.
        unary: ``(rows, groups, options)``, with the least that a group's later partners add.
        links: for every stage the partners before it: their stages, and (rows, their options, own options) above that.
    """

    order: IntArray
    start: FloatArray
    unary: FloatArray
    links: tuple[tuple[tuple[int, FloatArray], ...], ...]


def ordered(rows: Certificates) -> Ordered:
    """Groups with the dearest second-best option first: the crowd comes late, and is pruned early."""
    undecided = rows.allowed.sum(1) > 1
    second = np.sort(np.where(rows.allowed, rows.unary[1], np.inf), axis=1)[:, min(1, rows.allowed.shape[1] - 1)]
    order = np.argsort(np.where(undecided, -second, np.inf), kind="stable")[: undecided.sum()]
    stage = np.full(len(undecided), -1)
    stage[order] = np.arange(len(order))
    only, unary = rows.allowed.argmax(1), rows.unary.copy()
    links: list[list[tuple[int, FloatArray]]] = [[] for _ in order]
    for pair in rows.pairs:
        early, late, excess = pair.first, pair.second, pair.excess
        if stage[early] > stage[late]:
            early, late, excess = late, early, excess.transpose(0, 2, 1)
        if stage[early] < 0:
            unary[:, late] += excess[:, only[early]]
            continue
        least = np.where(rows.allowed[late], excess, np.inf).min(2)
        unary[:, early] += least
        links[stage[late]].append((int(stage[early]), excess - least[:, :, None]))
    lowest = np.where(rows.allowed, unary, np.inf).min(2)
    start = rows.start + lowest.sum(1)
    return Ordered(order, start, unary - lowest[:, :, None], tuple(tuple(link) for link in links))
