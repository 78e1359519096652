"""Level switches: a plan changed in a few layers, some finer and some coarser, with every budget still kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.problem import BUDGET_TOLERANCE, AllocationProblem

_FAR = 0.25  # chance that a change goes to any level in its direction, not to the next
_NOISE = 0.5  # standard deviation of the factor e^z on harm and gain: repairs differ from child to child
_TRIES = 32  # raises that are looked at exactly in one step of filling


@dataclass(frozen=True, eq=False)
class LevelSwitches:
    """Draws children of a plan that keep the problem's budgets, ties, allowed options and limits on formats.

    Method (EvoPress, Sieberling et al. 2024, as its code has it): min(u, u'), u and u' from 1 to 3, switches; each
    lowers one group of tied layers by a level and raises another. EvoPress swaps layers of equal size, so that the sum
    stays exactly what it was; here any two are taken, and then

        repair:  while a budget is exceeded, the group with the least harm / relief goes down,
        fill:    while something fits, the raise with the largest gain is made,

    with harm and gain from `scores` (a table drawn from what is known about it) times a random factor each. Levels are
    ordered by cost: the mean over the budgets of cost / budget. Every child is checked by `problem.is_feasible`, with
    peaks, transitions and offsets, before it is handed out.

    Args:
        problem: with the budgets to keep.

    Cost: O(groups × options) a step of repair or filling.

    Example:
        >>> problem = AllocationProblem([[9, 3, 1]] * 4, resources={"size": [[2, 3, 4]] * 4}, budgets={"size": 12})
        >>> child = LevelSwitches(problem).child(np.ones(4, dtype=int), np.random.default_rng(0), switches=1)
        >>> sorted(child.tolist())
        [0, 1, 1, 2]
    """

    problem: AllocationProblem

    def __post_init__(self) -> None:
        problem, groups = self.problem, self.problem.groups
        count, options = int(groups.max()) + 1, len(problem.options)
        allowed = np.ones((count, options), dtype=bool)
        np.logical_and.at(allowed, groups, problem.allowed)
        budgets = dict(problem.budgets)
        costs = np.zeros((len(budgets), count, options))
        for position, name in enumerate(budgets):
            np.add.at(costs[position], groups, np.where(problem.allowed, problem.resources[name], 0.0))
        weight = np.zeros((count, options))
        for position, limit in enumerate(budgets.values()):
            weight += costs[position] / max(abs(limit), 1e-300)
        for name, limit in problem.peak_budgets.items():
            peak = problem.peak(name)
            np.add.at(weight, (groups[peak.layer], peak.option), peak.value / max(abs(limit), 1e-300))
        first = np.unique(groups, return_index=True)[1]
        values = {"allowed": allowed, "costs": costs, "weight": np.where(allowed, weight, np.inf), "first": first}
        for name, value in values.items():
            object.__setattr__(self, f"_{name}", value)
        slack = [limit - problem.offsets.get(name, 0.0) for name, limit in budgets.items()]
        object.__setattr__(self, "_limits", np.array(slack))
        is_plain = problem.features <= {"several budgets", "max norm", "p-norm", "pairs", "format_costs"}
        object.__setattr__(self, "_is_plain", is_plain)

    # Set once above; frozen, as all that is shared between searches.
    _allowed: BoolArray = None  # type: ignore[assignment]
    _costs: FloatArray = None  # type: ignore[assignment]
    _weight: FloatArray = None  # type: ignore[assignment]
    _first: IntArray = None  # type: ignore[assignment]
    _limits: FloatArray = None  # type: ignore[assignment]
    _is_plain: bool = False  # sums alone decide whether budgets are kept

    def child(
        self,
        parent: NDArray[np.int64],
        rng: np.random.Generator,
        scores: FloatArray | None = None,
        *,
        switches: int | None = None,
    ) -> IntArray | None:
        """A child of a plan, (units,); None where a draw leads to no other plan within the budgets.

        Args:
            parent: (units,) option indices that keep the budgets.
            rng: where the randomness comes from.
            scores: (units, options) that harm and gain are taken from; the problem's objective by default.
            switches: how many; drawn by default.
        """
        benefit = self.by_group(self.problem.objective if scores is None else scores)
        choice = np.asarray(parent, dtype=np.int64)[self._first].copy()
        count = min(rng.integers(1, 4), rng.integers(1, 4)) if switches is None else switches
        kept = np.zeros(len(choice), dtype=bool)  # what was switched is not taken back by the repair
        for _ in range(int(count)):
            for direction in rng.permutation([-1, 1]):
                group = self._moved(choice, int(direction), kept, rng)
                if group is not None:
                    kept[group] = True
        if not self._repaired(choice, benefit, kept, rng):
            return None
        self._filled(choice, benefit, kept, rng)
        child = choice[self.problem.groups]
        if np.array_equal(child, parent) or not self.problem.is_feasible(child):
            return None
        return child

    def filled(
        self, plan: NDArray[np.int64], rng: np.random.Generator, scores: FloatArray | None = None
    ) -> NDArray[np.int64]:
        """A plan that keeps the budgets with what still fits raised."""
        benefit = self.by_group(self.problem.objective if scores is None else scores)
        choice = np.asarray(plan, dtype=np.int64)[self._first].copy()
        self._filled(choice, benefit, np.zeros(len(choice), dtype=bool), rng)
        return choice[self.problem.groups]

    def by_group(self, table: FloatArray) -> FloatArray:
        """(groups, options): a table of units summed within ties."""
        sums = np.zeros(self._weight.shape)
        np.add.at(sums, self.problem.groups, np.where(self.problem.allowed, table, 0.0))
        return sums

    # -- moves, on one option a group --------------------------------------------------------------------------------

    def _moved(self, choice: IntArray, direction: int, kept: BoolArray, rng: np.random.Generator) -> int | None:
        """Move one random group that is not kept by a level, or more, up or down; None where none can."""
        here = self._weight[np.arange(len(choice)), choice][:, None]
        beyond = self._open(choice) & ((self._weight < here) if direction < 0 else (self._weight > here))
        able = np.flatnonzero(beyond.any(1) & ~kept)
        if not len(able):
            return None
        group = int(rng.choice(able))
        levels = np.flatnonzero(beyond[group])
        levels = levels[np.argsort(direction * self._weight[group, levels], kind="stable")]
        choice[group] = levels[rng.integers(len(levels))] if rng.random() < _FAR else levels[0]
        return group

    def _open(self, choice: IntArray) -> BoolArray:
        """(groups, options): what may be taken; where no more formats may be used, those in use."""
        used = np.unique(choice)
        if self.problem.max_formats is None or len(used) < self.problem.max_formats:
            return self._allowed
        return self._allowed & np.isin(np.arange(self._allowed.shape[1]), used)

    def _repaired(self, choice: IntArray, benefit: FloatArray, kept: BoolArray, rng: np.random.Generator) -> bool:
        """Lower groups until every budget is kept; whether that was possible."""
        rows = np.arange(len(choice))
        for _ in range(self._weight.size):
            if not (exceeded := self._exceeded(choice)):
                return True
            relief = self._relief(choice, exceeded)
            harm = np.maximum(benefit - benefit[rows, choice][:, None], 0.0)
            noise = np.exp(_NOISE * rng.standard_normal(harm.shape))
            price = noise * (harm + 1e-30) / np.where(relief > 0, relief, 1.0)
            able = self._open(choice) & (relief > 0)
            free = able & ~kept[:, None]
            price = np.where(free if free.any() else able, price, np.inf)
            group, option = np.unravel_index(int(price.argmin()), price.shape)
            if not np.isfinite(price[group, option]):
                return False
            choice[group] = option
        return False

    def _exceeded(self, choice: IntArray) -> dict[str, float]:
        """By how much each budget is exceeded."""
        if not self._is_plain:
            return self.problem.violations(choice[self.problem.groups])
        over = self._costs[:, np.arange(len(choice)), choice].sum(1) - self._limits
        names = zip(self.problem.budgets, over.tolist(), self._limits.tolist(), strict=True)
        return {name: excess for name, excess, limit in names if excess > BUDGET_TOLERANCE * abs(limit)}

    def _relief(self, choice: IntArray, exceeded: dict[str, float]) -> FloatArray:
        """(groups, options): by how much the exceeded budgets are relieved, relative to them."""
        rows = np.arange(len(choice))
        if not all(name in self.problem.budgets for name in exceeded):
            return self._weight[rows, choice][:, None] - np.where(self._allowed, self._weight, np.inf)
        relief = np.zeros(self._weight.shape)
        for position, name in enumerate(self.problem.budgets):
            if name in exceeded:
                change = self._costs[position][rows, choice][:, None] - self._costs[position]
                relief += np.minimum(change, exceeded[name]) / exceeded[name]  # more than is asked is worth nothing
        return relief

    def _filled(self, choice: IntArray, benefit: FloatArray, kept: BoolArray, rng: np.random.Generator) -> None:
        """Raise what gains most and fits, until nothing does."""
        rows = np.arange(len(choice))
        while True:
            gain = benefit[rows, choice][:, None] - benefit
            fits = self._open(choice) & (gain > 0) & ~kept[:, None]
            for position, limit in enumerate(self._limits):
                now = self._costs[position][rows, choice]
                fits &= self._costs[position] - now[:, None] <= limit - now.sum() + 1e-9 * abs(limit)
            if not fits.any():
                return
            noisy = np.where(fits, gain * np.exp(_NOISE * rng.standard_normal(gain.shape)), -np.inf)
            if not self._raised(choice, noisy):
                return

    def _raised(self, choice: IntArray, gain: FloatArray) -> bool:
        """Make the best raise that keeps the budgets exactly; whether there was one."""
        for move in np.argsort(-gain, axis=None, kind="stable")[:_TRIES]:
            group, option = np.unravel_index(int(move), gain.shape)
            if not np.isfinite(gain[group, option]):
                return False
            before, choice[group] = choice[group], option
            if self._is_plain or self.problem.is_feasible(choice[self.problem.groups]):
                return True
            choice[group] = before
        return False
