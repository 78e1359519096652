"""What every solver works on: ties merged, forbidden options out, and what cannot be part of a better plan dropped."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.problem import BUDGET_TOLERANCE, AllocationProblem

ROUNDING = 1e-12  # relative; room for the rounding of vectorised sums, never enough to lose a plan


@dataclass(frozen=True, eq=False)
class Coupling:
    """Terms of two groups together: ``table`` is (1 + budgets, options, options), like `Core.table`."""

    first: int
    second: int
    table: FloatArray


@dataclass(frozen=True, eq=False)
class StepRows:
    """Sparse rows: Σ of ``value[e, choice of group[e]]`` over the blocks e with ``row[e] = s`` is at most ``limit[s]``.

    Shapes: row and group (blocks,), value (blocks, options); limit, goal and owner (rows,). The largest sum among the
    rows marked ``goal`` is the objective; those have no limit of their own. ``names[owner[s]]`` is the budget of row s.
    """

    row: IntArray
    group: IntArray
    value: FloatArray
    limit: FloatArray
    goal: BoolArray
    owner: IntArray
    names: tuple[str, ...]

    def sums(self, choice: IntArray) -> FloatArray:
        """Sum of every row, (rows,)."""
        taken = self.value[np.arange(len(self.group)), choice[self.group]]
        return row_sums(self.row, taken, len(self.limit))


def row_sums(row: IntArray, value: FloatArray, rows: int) -> FloatArray:
    """Sum of the values of every row, (rows,)."""
    return np.bincount(row, weights=value, minlength=rows).astype(np.float64)


class Floors(NamedTuple):
    """The least every row can be, and how much every option adds to that at least; entry 0 is the objective."""

    base: FloatArray  # (1 + budgets,)
    excess: FloatArray  # (1 + budgets, groups, options)
    step_base: FloatArray  # (rows,)
    step_excess: FloatArray  # (blocks, options)
    magnitude: FloatArray  # (1 + budgets,), what rounding is relative to
    step_magnitude: FloatArray  # (rows,)


@dataclass(frozen=True, eq=False)
class Core:
    """A problem over groups of tied layers: minimise row 0 under the limits of the others.

    Attributes:
        problem: where it comes from.
        allowed: ``(groups, options)``, options still in play.
        table: ``(1 + budgets, groups, options)``: the objective, then the budgeted sums; 0 where forbidden.
        limits: ``(budgets,)``, budgets less offsets, with the promised room for rounding.
        names: the budgets of these rows.
        couplings: pairs and transitions between groups; those of one group are in the table.
        steps: rows of the peak budgets and, for the max norm, of the objective.
        max_formats: as in the problem.
        format_costs: as in the problem.
        reference: p-norms: the objective here is Σ (score / reference)^p.
    """

    problem: AllocationProblem
    allowed: BoolArray
    table: FloatArray
    limits: FloatArray
    names: tuple[str, ...]
    couplings: tuple[Coupling, ...]
    steps: StepRows
    max_formats: int | None
    format_costs: FloatArray | None
    reference: float

    @property
    def has_goal(self) -> bool:
        """Whether the objective is the largest of some rows."""
        return bool(self.steps.goal.any())

    @property
    def counts_formats(self) -> bool:
        """Whether it matters which options are in use anywhere."""
        return self.max_formats is not None or self.format_costs is not None

    def expand(self, choice: IntArray) -> IntArray:
        """Choices of layers from choices of groups."""
        return choice[self.problem.groups]

    def is_feasible(self, choice: IntArray) -> bool:
        """Whether a plan keeps the limits of this core, recomputed from the problem with exact sums."""
        if self.max_formats is not None and len(np.unique(choice)) > self.max_formats:
            return False
        over = self.problem.violations(self.expand(choice))
        return not over.keys() & {*self.names, *self._limited_steps()}

    def _limited_steps(self) -> set[str]:
        owners = self.steps.owner[~self.steps.goal & (self.steps.limit < np.inf)]
        return {self.steps.names[owner] for owner in np.unique(owners)}

    def value(self, choice: IntArray) -> float:
        """Objective of a plan in this core."""
        if self.has_goal:
            return float(self.steps.sums(choice)[self.steps.goal].max())
        terms = [pair.table[0, choice[pair.first], choice[pair.second]] for pair in self.couplings]
        fixed = [] if self.format_costs is None else self.format_costs[np.unique(choice)].tolist()
        return math.fsum([*self.table[0, np.arange(len(choice)), choice].tolist(), *terms, *fixed])

    def floors(self) -> Floors:
        """Least sums over the options in play, couplings included at their least."""
        masked = np.where(self.allowed, self.table, np.inf)
        least = masked.min(2)
        base, excess = least.sum(1), self.table - least[:, :, None]
        magnitude = np.abs(np.where(self.allowed, self.table, 0)).max(2).sum(1)
        for pair in self.couplings:
            both = np.outer(self.allowed[pair.first], self.allowed[pair.second])
            terms = np.where(both, pair.table, np.inf)
            low = terms.min((1, 2))
            base = base + low
            excess[:, pair.first] += np.where(self.allowed[pair.first], terms.min(2) - low[:, None], 0)
            excess[:, pair.second] += np.where(self.allowed[pair.second], terms.min(1) - low[:, None], 0)
            magnitude = magnitude + np.abs(np.where(both, pair.table, 0)).max((1, 2))
        steps, allowed = self.steps, self.allowed[self.steps.group]
        low = np.where(allowed, steps.value, np.inf).min(1, initial=np.inf)
        size = np.abs(np.where(allowed, steps.value, 0)).max(1, initial=0)
        rows = len(steps.limit)
        step_base, step_magnitude = row_sums(steps.row, low, rows), row_sums(steps.row, size, rows)
        return Floors(base, excess, step_base, steps.value - low[:, None], magnitude, step_magnitude)

    def slack(self, floors: Floors, best: IntArray | None) -> tuple[FloatArray, FloatArray]:
        """How much above its least every row may be, (1 + budgets,) and (rows,), in a plan no worse than ``best``."""
        slack = np.concatenate([[np.inf], self.limits]) - floors.base + ROUNDING * floors.magnitude
        limit = self.steps.limit
        if best is not None and self.has_goal:
            limit = np.where(self.steps.goal, self.value(best), limit)
        elif best is not None:
            slack[0] = self.distance(floors, best) * (1 + ROUNDING)
        return slack, limit - floors.step_base + ROUNDING * floors.step_magnitude

    def distance(self, floors: Floors, choice: IntArray) -> float:
        """Objective of a plan above the floor, free of the cancellation that a difference of sums would have."""
        if self.has_goal:
            return self.value(choice) - float(floors.step_base[self.steps.goal].max())
        least = np.where(self.allowed, self.table[0], np.inf).min(1)
        terms = (self.table[0, np.arange(len(choice)), choice] - least).tolist()
        for pair in self.couplings:
            both = np.outer(self.allowed[pair.first], self.allowed[pair.second])
            low = pair.table[0][both].min()
            terms.append(pair.table[0, choice[pair.first], choice[pair.second]] - low)
        fixed = [] if self.format_costs is None else self.format_costs[np.unique(choice)].tolist()
        return math.fsum([*terms, *fixed])

    def floor(self) -> float:
        """A value no plan of this core is below."""
        floors = self.floors()
        return float(floors.step_base[self.steps.goal].max() if self.has_goal else floors.base[0])

    def objective(self, value: float) -> float:
        """Objective of the problem for a value (or a bound on values) of this core."""
        norm = float(self.problem.norm)
        if norm == 1:
            return value
        if norm < math.inf:
            return self.reference * float(max(value, 0.0) ** (1 / norm))
        levels = np.unique(self.problem.objective)
        return float(levels[min(max(math.ceil(value - 1e-6), 0), len(levels) - 1)])

    def refocused(self, choice: IntArray) -> "Core | None":
        """For a p-norm far below its reference, where powers lose their small terms: a core with a nearer one."""
        if not 1 < self.problem.norm < math.inf:
            return None
        objective = self.problem.evaluate(self.expand(choice))[0]
        return merge(self.problem, objective) if 0 < objective < 0.1 * self.reference else None

    def without(self, dropped: BoolArray) -> "Core":
        """The same core with fewer options; couplings of decided groups move into the table."""
        allowed = self.allowed & ~dropped
        decided, only = allowed.sum(1) == 1, allowed.argmax(1)
        if not any(decided[pair.first] or decided[pair.second] for pair in self.couplings):
            return replace(self, allowed=allowed)
        table, kept = self.table.copy(), []
        for pair in self.couplings:
            if decided[pair.first]:
                table[:, pair.second] += pair.table[:, only[pair.first], :]
            elif decided[pair.second]:
                table[:, pair.first] += pair.table[:, :, only[pair.second]]
            else:
                kept.append(pair)
        return replace(self, allowed=allowed, table=table, couplings=tuple(kept))

    def tightened(self, best: IntArray | None = None) -> "Core | None":
        """Without the options that break a budget or are worse than ``best`` whatever the other groups take.

        An option goes if, with every other group at its least, a row exceeds its limit (the objective's limit is that
        of ``best``), or if another option of the group is nowhere worse and nothing couples them. Of equal options the
        first stays. Cost: a few passes over the table and one of (rows, groups, options²).

        Returns:
            The smaller core, or None where no plan is left.
        """
        core = self.without(np.zeros_like(self.allowed))
        while True:
            floors = core.floors()
            slack, step_slack = core.slack(floors, best)
            if (slack < 0).any() or (step_slack < 0).any():
                return None
            drop: BoolArray = np.logical_or.reduce(floors.excess > slack[:, None, None], axis=0)
            np.logical_or.at(drop, core.steps.group, floors.step_excess > step_slack[core.steps.row][:, None])
            drop &= core.allowed
            if not drop.any():
                break
            if not (core.allowed & ~drop).any(1).all():
                return None
            core = core.without(drop)
        return core if core.counts_formats else core.without(_dominated(core))


def _dominated(core: Core) -> BoolArray:
    """``(groups, options)``: another option in play is nowhere worse, and better somewhere or earlier."""
    worse = np.zeros_like(core.allowed)
    options = core.allowed.shape[1]
    free = np.ones(len(core.allowed), dtype=bool)
    for pair in core.couplings:
        free[[pair.first, pair.second]] = False
    for better in range(options):
        beats: BoolArray = np.logical_and.reduce(core.table[:, :, [better]] <= core.table, axis=0)
        np.logical_and.at(beats, core.steps.group, core.steps.value[:, [better]] <= core.steps.value)
        equal: BoolArray = np.logical_and.reduce(core.table[:, :, [better]] == core.table, axis=0)
        np.logical_and.at(equal, core.steps.group, core.steps.value[:, [better]] == core.steps.value)
        beats &= ~equal | (np.arange(options) > better)
        worse |= beats & core.allowed[:, [better]]
    return worse & free[:, None] & core.allowed


def merge(problem: AllocationProblem, reference: float | None = None) -> Core:
    """The core of a problem: one group a tie, options that all its layers allow.

    Scores of tied layers add up (for the max norm the worst counts). For a p-norm the objective becomes
    Σ (score / reference)^p; options above the reference are left out, so pass the objective of a known plan.
    """
    groups = problem.groups
    allowed = problem.allowed.copy()
    if problem.ties:
        allowed = np.ones((int(groups.max()) + 1, len(problem.options)), dtype=bool)
        np.logical_and.at(allowed, groups, problem.allowed)
    scores = np.where(problem.allowed, problem.objective, 0.0)
    is_power = 1 < problem.norm < math.inf
    if is_power:
        reference = reference or float(scores.max()) or 1.0
        np.logical_and.at(allowed, groups, scores <= reference * (1 + BUDGET_TOLERANCE))
        scores = np.minimum(scores / reference, 1 + BUDGET_TOLERANCE) ** problem.norm
    tables = [scores * (problem.norm != math.inf), *(problem.resources[name] for name in problem.budgets)]
    table = np.zeros((len(tables), *allowed.shape))
    for row, layers in zip(table, tables, strict=True):
        if problem.ties:
            np.add.at(row, groups, np.where(problem.allowed, layers, 0.0))
        else:
            np.copyto(row, layers, where=problem.allowed)
    couplings = tuple(_couplings(problem, table))
    table[:, ~allowed] = 0.0
    offsets = np.array([problem.offsets.get(name, 0.0) for name in problem.budgets])
    budgets = np.array(list(problem.budgets.values()))
    return Core(
        problem=problem,
        allowed=allowed,
        couplings=couplings,
        table=table,
        limits=budgets + BUDGET_TOLERANCE * np.abs(budgets) - offsets,
        names=tuple(problem.budgets),
        steps=_step_rows(problem, allowed),
        max_formats=problem.max_formats,
        format_costs=problem.format_costs,
        reference=reference or 1.0,
    )


def _couplings(problem: AllocationProblem, table: FloatArray) -> Iterable[Coupling]:
    """Pairs and transitions of budgeted resources, merged by group; those within one group are added to the table."""
    groups, options = problem.groups, np.arange(table.shape[2])
    found: dict[tuple[int, int], FloatArray] = {}
    sources = [problem.pairs, *(problem.transitions.get(name, {}) for name in problem.budgets)]
    for row, blocks in enumerate(sources):
        for (i, j), block in blocks.items():
            terms = np.where(np.outer(problem.allowed[i], problem.allowed[j]), block, 0.0)
            first, second = int(groups[i]), int(groups[j])
            if first == second:
                table[row, first] += terms[options, options]
                continue
            if first > second:
                first, second, terms = second, first, terms.T
            found.setdefault((first, second), np.zeros((len(sources), *terms.shape)))[row] += terms
    return (Coupling(first, second, terms) for (first, second), terms in found.items())


def _step_rows(problem: AllocationProblem, allowed: BoolArray) -> StepRows:
    """Rows of the peak budgets; the max norm adds a row a group, its scores replaced by their ranks.

    Only the order of the scores matters to a maximum, so ranks are exact at any scale.
    """
    parts = [_peak_rows(problem, allowed, name) for name in problem.peak_budgets]
    names = tuple(problem.peak_budgets)
    if problem.norm == math.inf:
        parts.append(_rank_rows(problem, allowed))
        names = (*names, "objective")
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return StepRows(none, none, np.zeros((0, allowed.shape[1])), np.zeros(0), none.astype(bool), none, names)
    sizes = [len(part.limit) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    return StepRows(
        row=np.concatenate([part.row + start for part, start in zip(parts, starts, strict=True)]),
        group=np.concatenate([part.group for part in parts]),
        value=np.concatenate([part.value for part in parts]),
        limit=np.concatenate([part.limit for part in parts]),
        goal=np.concatenate([part.goal for part in parts]),
        owner=np.repeat(np.arange(len(parts)), sizes),
        names=names,
    )


def _peak_rows(problem: AllocationProblem, allowed: BoolArray, name: str) -> StepRows:
    peak, count = problem.peak(name), len(allowed)
    place, index = np.unique(peak.step * count + problem.groups[peak.layer], return_inverse=True)
    value = np.zeros((len(place), allowed.shape[1]))
    np.add.at(value, (index, peak.option), peak.value)
    row, group = np.divmod(place, count)
    budget = problem.peak_budgets[name]
    limit = np.full(peak.steps, budget + BUDGET_TOLERANCE * abs(budget) - problem.offsets.get(name, 0.0))
    none = np.zeros(peak.steps, dtype=np.int64)
    return StepRows(row, group, np.where(allowed[group], value, 0.0), limit, none.astype(bool), none, (name,))


def _rank_rows(problem: AllocationProblem, allowed: BoolArray) -> StepRows:
    ranks = np.unique(np.where(problem.allowed, problem.objective, np.inf), return_inverse=True)[1]
    worst = np.zeros(allowed.shape)
    np.maximum.at(worst, problem.groups, ranks.reshape(problem.objective.shape).astype(np.float64))
    every, count = np.arange(len(allowed)), len(allowed)
    limit, goal = np.full(count, np.inf), np.ones(count, dtype=bool)
    return StepRows(every, every, np.where(allowed, worst, 0.0), limit, goal, np.zeros(count, np.int64), ("objective",))
