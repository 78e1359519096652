"""Plans that need no search, at the same budgets: what a search has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.limits import Limit
from mpq.options import Option
from mpq.problem import BUDGET_TOLERANCE, AllocationProblem, SparsePeak
from mpq.table_problem import build_problem

if TYPE_CHECKING:
    from mpq.tables import CostTable

Choices = NDArray[np.int64]

# How many plans each baseline draws; of more than one the median counts.
DRAWS: Mapping[str, int] = {"protected": 1, "smallest": 1, "sorted": 1, "shuffled": 5, "random": 20}


@dataclass(frozen=True, eq=False, kw_only=True)
class BaselinePlans:
    """Baselines from a cost table alone, every one of them within the budgets and filled to them.

    All but `shuffled` start from the cheapest plan and raise one layer's precision at a time, in the order below, until
    no layer can be raised to any higher precision within the budgets. Precision is the width of the weight's values,
    then of the input's, then bytes. Layers of a tie go together, and so do all units of a layer; layers with a fixed
    option keep it.

        protected   the first and the last layer to the highest precision that fits, then as `smallest`, in order
        smallest    every layer to the next precision before any goes beyond; small layers first
        sorted      the same; layers with the largest score per weight first, scores of the lowest precision
        random      single raises drawn at random
        shuffled    the exact plan for the table whose rows of scores are exchanged at random between layers with the
                    same options: as good as the plan where the table carries no information

    Source: the list of baselines is the usual one of papers on layer-wise allocation; "size-proportional" is read as
    fewer bits for larger layers, `sorted` as HAWQ's order of layers with the score in place of the eigenvalue.

    Attributes:
        table: scores and costs.
        limits: the budgets in base units, on anything but the sensitivity.
        fixed: (units,) option index a unit where it is fixed, else -1; None fixes nothing.
        seed: of what is drawn.

    Raises:
        InfeasibleError: if no plan with one option a layer keeps the budgets.
        ValueError: if a budget is on the sensitivity, or units of a layer or tie have no option in common.

    Example:
        >>> from mpq.limits import apply_budgets
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["stem", "body", "head"], options=["int4", "int8"], parameters=[10, 80, 20],
        ...     quantities={"sensitivity": [[3, 0.1], [4, 0.2], [1, 0.1]], "size": [[5, 10], [40, 80], [10, 20]]})
        >>> plans = BaselinePlans(table=table, limits=apply_budgets(table, {"size": 71}))
        >>> plans.choices("protected").tolist(), plans.choices("random").shape
        ([[1, 0, 1]], (20, 3))
    """

    table: CostTable
    limits: tuple[Limit, ...]
    fixed: Choices | None = None
    seed: int = 0

    def choices(self, name: str) -> Choices:
        """(plans, units) option indices of one baseline.

        Cost: `shuffled` solves 5 problems; the others test every raise a step, layers x options numbers.

        Raises:
            ValueError: if there is no baseline of that name.
        """
        if name not in DRAWS:
            raise ValueError(f"baseline must be one of {', '.join(DRAWS)}, got {name!r}")
        rng = np.random.default_rng([self.seed, sorted(DRAWS).index(name)])
        if name == "shuffled":
            found = [self._shuffled(rng) for _ in range(DRAWS[name])]
        elif name == "random":
            found = [self._filled(self.cheapest, rng.random(self.levels.shape)) for _ in range(DRAWS[name])]
        else:
            found = [getattr(self, f"_{name}")()]
        return np.stack(found)[:, self.groups]

    @cached_property
    def groups(self) -> Choices:
        """(units,): number of the layer, or of the tie of layers, that a unit belongs to, in order of first units."""
        leader = np.array(self.table.layer_index)
        for tie in self.table.ties:
            members = np.isin(leader, leader[list(tie)])
            leader[members] = leader[members].min()
        _, first, codes = np.unique(leader, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[codes].astype(np.int64)

    @cached_property
    def problem(self) -> AllocationProblem:
        """The problem with one row a group."""
        return _grouped(build_problem(_fixed(self.table, self.fixed), self.limits, "sensitivity", {}, {}), self.groups)

    @cached_property
    def levels(self) -> Choices:
        """(groups, options): rank of an option's precision, lowest 0, alike for all groups; -1 where not allowed."""
        allowed = self.problem.allowed
        sizes = np.where(allowed, self.problem.resources.get("size", np.zeros(allowed.shape)), 0).sum(0)
        keys = [(*_widths(label), size) for label, size in zip(self.table.options, sizes, strict=True)]
        rank = np.argsort(np.array(sorted(range(len(keys)), key=lambda column: keys[column])))
        return np.where(allowed, rank, -1)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(groups,): how many weights a group has."""
        table = self.table
        if table.parameters is None and not table.layers:
            return np.ones(len(self.levels))
        each = table.parameters if table.parameters is not None else [layer.parameters for layer in table.layers]
        total: NDArray[np.float64] = np.bincount(self.groups, weights=np.asarray(each)).astype(np.float64)
        return np.maximum(total, 1.0)  # operators of attention have none

    @cached_property
    def cheapest(self) -> Choices:
        """(groups,): the plan with the least use of the budgets, each relative to its limit."""
        problem, use = self.problem, np.zeros(self.levels.shape)
        for name, limit in problem.budgets.items():
            use += problem.resources[name] / abs(limit or 1.0)
        for name, limit in problem.peak_budgets.items():
            peak = problem.peak(name)
            np.add.at(use, (peak.layer, peak.option), peak.value / (abs(limit or 1.0) * peak.steps))
        return self._solved(np.where(problem.allowed, use, np.inf))

    def _protected(self) -> Choices:
        ends = [self.groups[0], self.groups[-1]]
        movable = np.isin(np.arange(len(self.levels)), ends)[:, None]
        protected = self._filled(self.cheapest, -self.levels.astype(np.float64), movable)
        return self._filled(protected, self._level_by_level(np.arange(len(self.levels))))

    def _smallest(self) -> Choices:
        return self._filled(self.cheapest, self._level_by_level(np.argsort(self.weights, kind="stable")))

    def _sorted(self) -> Choices:
        lowest = np.where(self.levels >= 0, self.levels, self.levels.max() + 1).argmin(1)
        score = self.problem.objective[np.arange(len(lowest)), lowest] / self.weights
        return self._filled(self.cheapest, self._level_by_level(np.argsort(-score, kind="stable")))

    def _shuffled(self, rng: np.random.Generator) -> Choices:
        source = np.arange(len(self.levels))
        for alike in np.unique(self.problem.allowed, axis=0):
            members = np.flatnonzero((self.problem.allowed == alike).all(1))
            source[members] = rng.permutation(members)
        return self._solved(self.problem.objective[source])

    def _solved(self, objective: NDArray[np.float64]) -> Choices:
        asked = replace(self.problem, objective=objective, objective_se=None, pairs={})
        found: Choices = import_module("mpq.solvers").solve(asked).choices
        return found

    def _level_by_level(self, order: Sequence[int] | Choices) -> NDArray[np.float64]:
        """(groups, options): when a raise is due if all groups go to a level before any goes beyond."""
        place = np.empty(len(order))
        place[np.asarray(order)] = np.arange(len(order))
        due: NDArray[np.float64] = self.levels * len(order) + place[:, None]
        return due

    def _filled(self, start: Choices, due: NDArray[np.float64], movable: NDArray[np.bool_] | bool = True) -> Choices:
        """A plan raised, the least `due` first, until no raise of a movable group keeps the budgets."""
        choice, rows = start.copy(), np.arange(len(start))
        coupled = bool(self.problem.peak_budgets) or any(self.problem.transitions.get(n) for n in self.problem.budgets)
        refused, moved = np.zeros(due.shape, dtype=bool), False
        while True:
            raises = self.levels > self.levels[rows, choice][:, None]
            possible = raises & movable & ~refused & self._within_sums(choice)
            if not possible.any():
                if not (refused.any() and moved):
                    return choice
                refused, moved = np.zeros(due.shape, dtype=bool), False  # what was refused may fit by now
                continue
            group, option = np.unravel_index(np.argmin(np.where(possible, due, np.inf)), due.shape)
            tried = choice.copy()
            tried[group] = option
            if coupled and self.problem.violations(tried):
                refused[group, option] = True
            else:
                choice, moved = tried, True

    def _within_sums(self, choice: Choices) -> NDArray[np.bool_]:
        """(groups, options): which single changes keep every budget on a sum; those with transitions are left open."""
        kept, rows = np.ones(self.levels.shape, dtype=bool), np.arange(len(choice))
        for name, limit in self.problem.budgets.items():
            if not self.problem.transitions.get(name):
                cost = np.where(self.problem.allowed, self.problem.resources[name], 0.0)
                mine = cost[rows, choice]
                used = self.problem.offsets.get(name, 0.0) + mine.sum()
                kept &= used + cost - mine[:, None] <= limit + BUDGET_TOLERANCE * abs(limit)
        return kept


def _fixed(table: CostTable, fixed: Choices | None) -> CostTable:
    if fixed is None:
        return table
    free = (fixed < 0)[:, None] | (np.arange(len(table.options)) == fixed[:, None])
    return replace(table, quantities={n: np.where(free, values, np.nan) for n, values in table.quantities.items()})


def _widths(label: str) -> tuple[float, float]:
    """Bits of an option's weight and of its input; what is not quantised counts as 64."""
    option = Option.parse(label)
    weight, activation = (64.0 if fmt is None else float(fmt.bits) for fmt in (option.weight, option.activation))
    return weight, activation


def _grouped(problem: AllocationProblem, groups: Choices) -> AllocationProblem:
    """A problem whose rows are groups of its layers, which take one option together."""
    shape = (int(groups.max()) + 1, len(problem.options))
    objective = _added(np.zeros(shape), groups, problem.objective)
    if not np.isfinite(objective).any(1).all():
        first = int(np.flatnonzero(~np.isfinite(objective).any(1))[0])
        names = [problem.label(int(unit)) for unit in np.flatnonzero(groups == first)[:3]]
        raise ValueError(f"baselines need one option a layer or tie: {', '.join(names)} have none in common")
    resources = {name: _added(np.zeros(shape), groups, values) for name, values in problem.resources.items()}
    transitions: dict[str, dict[tuple[int, int], Any]] = {}
    for name, blocks in problem.transitions.items():
        merged = transitions.setdefault(name, {})
        for (i, j), block in blocks.items():
            key = (int(groups[i]), int(groups[j]))
            if key[0] == key[1]:
                resources[name][key[0]] += np.diagonal(block)
            else:
                merged[key] = merged.get(key, 0.0) + block
    peaks = {name: problem.peak(name) for name in problem.peak_resources}
    return AllocationProblem(
        objective=objective,
        resources=resources,
        budgets=problem.budgets,
        peak_resources={n: SparsePeak(p.step, groups[p.layer], p.option, p.value, p.steps) for n, p in peaks.items()},
        peak_budgets=problem.peak_budgets,
        transitions=transitions,
        offsets=problem.offsets,
        options=problem.options,
    )


def _added(into: NDArray[np.float64], groups: Choices, values: NDArray[np.float64]) -> NDArray[np.float64]:
    np.add.at(into, groups, values)
    return into
