"""Plans pushed inside their budgets by the moves that do the least harm, and room used up, a population at once."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .ordinal_genes import GeneArray, OrdinalGenes

BLOCK = 32  # moves looked at together: children are seldom further from a budget
ROUNDS = 4  # a budget and a gene value; fewer do unless budgets pull in different directions


class _Moves(NamedTuple):
    """The best way from every gene value, each (groups · options,)."""

    key: IntArray  # place among all moves by what they cost, times the number of groups, + the group
    saved: FloatArray  # of the budget, or of the objective; 0 where there is no such way
    target: GeneArray


@dataclass(frozen=True, eq=False)
class BudgetRepair:
    """Lower what exceeds a budget, repeatedly the one exceeded most.

    From every option the move is the one with the least objective lost per unit saved, which is the next step along the
    convex hull (as in `GreedySolver`); moves that raise another budget come only where there is no other. A plan takes
    as many of its cheapest moves as bring the budget down to its limit. The objective of the table says what is cheap;
    couplings, steps and formats are not looked at, so a plan may come back outside all the same: `costs` tells.

    Cost: a sort of the genes of every plan over a budget, one round a budget as a rule.
    """

    genes: OrdinalGenes

    @cached_property
    def _moves(self) -> tuple[_Moves, ...]:
        return tuple(self._best_moves(row) for row in range(1, len(self.genes.table)))

    def _best_moves(self, row: int) -> _Moves:
        """From value a of a group to value b: lost[b] − lost[a] over saved[a] − saved[b]."""
        table, count = self.genes.table, self.genes.order.shape[1]
        is_value = np.arange(count) < self.genes.counts[:, None]
        saved = table[row][:, :, None] - table[row][:, None, :]
        lost = table[0][:, None, :] - table[0][:, :, None]
        usable = (saved > 0) & is_value[:, None, :]
        others = [other for other in range(1, len(table)) if other != row]
        gentle = usable.copy()
        for other in others:
            gentle &= table[other][:, None, :] <= table[other][:, :, None]
        usable = np.where(gentle.any(2, keepdims=True), gentle, usable)
        harm = np.divide(lost, saved, out=np.full(saved.shape, np.inf), where=usable)
        least = harm.min(2, keepdims=True)
        target = np.where(usable & (harm == least), saved, -np.inf).argmax(2)
        gain = np.take_along_axis(saved, target[:, :, None], 2)[:, :, 0]
        can = usable.any(2)
        return _Moves(_keys(least[:, :, 0]), np.where(can, gain, 0.0).ravel(), target.ravel().astype(np.int16))

    def __call__(self, genes: GeneArray) -> GeneArray:
        """Genes within the sum budgets, as far as that is possible, ``(plans, groups)``; others come back unchanged."""
        limits = self.genes.core.limits
        if not len(limits):
            return genes
        found, open_plans = genes.copy(), np.arange(len(genes))
        for _ in range(ROUNDS * len(limits) * self.genes.order.shape[1]):
            now = found if len(open_plans) == len(found) else found[open_plans]
            places = now + self.genes.start
            over = self.genes.sums(now, places) - limits[:, None]
            relative = over / self.genes.scale[:, None]
            worst = relative.argmax(0)
            is_over = relative.max(0) > 0
            if not is_over.any():
                break
            for budget in np.unique(worst[is_over]):
                mine = np.flatnonzero(is_over & (worst == budget))
                need = over[budget, mine]
                found[open_plans[mine]] = self._lowered(now[mine], places[mine], self._moves[budget], need)
            open_plans = open_plans[is_over]
        return found

    def _lowered(self, genes: GeneArray, places: IntArray, moves: _Moves, need: FloatArray) -> GeneArray:
        """Plans after as many of their cheapest moves as save what is needed; all moves where that is not enough."""
        keys, found = np.sort(moves.key.take(places), axis=1), genes.copy()  # faster than an argsort
        plan = np.arange(len(genes))
        for first in range(0, genes.shape[1], BLOCK):
            group = keys[plan, first : first + BLOCK] % genes.shape[1]
            now = places[plan[:, None], group]
            saved = moves.saved.take(now)
            total = np.cumsum(saved, axis=1)
            taken: BoolArray = (total - saved < need[:, None]) & (saved > 0)
            row, place = np.nonzero(taken)
            found[plan[row], group[row, place]] = moves.target.take(now[row, place])
            need = need - total[:, -1]
            wants = need > 0
            if not wants.any():
                break
            plan, need = plan[wants], need[wants]
        return found

    @cached_property
    def _gains(self) -> _Moves:
        """From every value the one that saves most objective per unit of all budgets, each relative to its range."""
        table, count = self.genes.table, self.genes.order.shape[1]
        is_value = np.arange(count) < self.genes.counts[:, None]
        cost = np.tensordot(1 / self.genes.scale, table[1:], 1)
        saved = table[0][:, :, None] - table[0][:, None, :]
        spent = np.maximum(cost[:, None, :] - cost[:, :, None], 0.0)
        usable = (saved > 0) & is_value[:, None, :]
        price = np.divide(spent, saved, out=np.full(saved.shape, np.inf), where=usable)
        least = price.min(2, keepdims=True)
        target = np.where(usable & (price == least), saved, -np.inf).argmax(2)
        gain = np.take_along_axis(np.where(usable, saved, 0.0), target[:, :, None], 2)[:, :, 0]
        return _Moves(_keys(least[:, :, 0]), gain.ravel(), target.ravel().astype(np.int16))

    def filled(self, genes: GeneArray) -> GeneArray:
        """Plans within the budgets after their best gains, in order, up to the first that does not fit any more."""
        moves, places = self._gains, genes + self.genes.start
        keys, found = np.sort(moves.key.take(places), axis=1), genes.copy()
        plan, room = np.arange(len(genes)), self.genes.core.limits[:, None] - self.genes.sums(genes, places)
        for first in range(0, genes.shape[1], BLOCK):
            group = keys[plan, first : first + BLOCK] % genes.shape[1]
            now = places[plan[:, None], group]
            target = moves.target.take(now)
            then = target + self.genes.start[group]
            fits: BoolArray = moves.saved.take(now) > 0
            more = [np.cumsum(row.take(then) - row.take(now), axis=1) for row in self.genes.flat[1:]]
            for spent, left in zip(more, room, strict=True):
                fits &= spent <= left[:, None]
            taken = np.logical_and.accumulate(fits, axis=1)
            row, place = np.nonzero(taken)
            found[plan[row], group[row, place]] = target[row, place]
            goes_on = taken[:, -1]
            if not goes_on.any():
                break
            room = (room - np.array([spent[:, -1] for spent in more]))[:, goes_on]
            plan = plan[goes_on]
        return found


def _keys(price: FloatArray) -> IntArray:
    """Place of every move by its price, times the number of groups, plus its group: sorting keys sorts moves.

    In 32 bits where they fit: those are sorted twice as fast.
    """
    groups, options = price.shape
    place = np.empty(price.size, dtype=np.int64)
    place[np.argsort(price.ravel(), kind="stable")] = np.arange(price.size)
    keys = place * groups + np.repeat(np.arange(groups), options)
    small: IntArray = keys.astype(np.int32)
    return small if price.size * groups < 2**31 else keys
