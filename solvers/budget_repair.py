"""Plans pushed inside their budgets by the moves that do the least harm, and room used up, a population at once."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .ordinal_genes import GeneArray, OrdinalGenes

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
            over = self.genes.costs(found[open_plans]).sums - limits[:, None]
            relative = over / self.genes.scale[:, None]
            worst = relative.argmax(0)
            is_over = relative.max(0) > 0
            open_plans, worst = open_plans[is_over], worst[is_over]
            need = over[worst, np.flatnonzero(is_over)]
            if not len(open_plans):
                break
            for budget in np.unique(worst):
                mine = worst == budget
                found[open_plans[mine]] = self._lowered(found[open_plans[mine]], self._moves[budget], need[mine])
        return found

    def _lowered(self, genes: GeneArray, moves: _Moves, need: FloatArray) -> GeneArray:
        """Plans after as many of their cheapest moves as save what is needed; all moves where that is not enough."""
        index = genes + self.genes.start
        group = np.sort(moves.key.take(index), axis=1) % genes.shape[1]  # sorting keys is faster than an argsort
        plan = np.arange(len(genes))[:, None]
        saved = moves.saved.take(index[plan, group])
        before = np.cumsum(saved, axis=1) - saved
        taken: BoolArray = (before < need[:, None]) & (saved > 0)
        row, place = np.nonzero(taken)
        changed = group[row, place]
        found = genes.copy()
        found[row, changed] = moves.target.take(index[row, changed])
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
        table, moves = self.genes.flat, self._gains
        index = genes + self.genes.start
        group = np.sort(moves.key.take(index), axis=1) % genes.shape[1]
        now = index[np.arange(len(genes))[:, None], group]
        target = moves.target.take(now)
        then = target + self.genes.start[group]
        fits: BoolArray = moves.saved.take(now) > 0
        room = self.genes.core.limits[:, None] - self.genes.costs(genes).sums
        for budget, left in enumerate(room, 1):
            fits &= np.cumsum(table[budget].take(then) - table[budget].take(now), axis=1) <= left[:, None]
        taken = np.logical_and.accumulate(fits, axis=1)
        row, place = np.nonzero(taken)
        found = genes.copy()
        found[row, group[row, place]] = target[row, place]
        return found


def _keys(price: FloatArray) -> IntArray:
    """Place of every move by its price, times the number of groups, plus its group: sorting keys sorts moves."""
    groups, options = price.shape
    place = np.empty(price.size, dtype=np.int64)
    place[np.argsort(price.ravel(), kind="stable")] = np.arange(price.size)
    return np.asarray(place * groups + np.repeat(np.arange(groups), options))
