"""Convex-hull greedy: give way where it costs least per unit of budget, then improve by exchange."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.problem import Allocation, AllocationProblem

from .exchange import improve
from .features import refuse
from .reduction import Core, merge

ROUNDS = 32  # weightings of several budgets that are tried


@dataclass(frozen=True, kw_only=True)
class GreedySolver:
    """Best ratio first, along the lower convex hull of every layer: near-optimal on many layers, in milliseconds.

    Every layer starts at its best score. The step with the least loss per unit of resource saved is taken, among all
    layers, until the budget holds; a step goes along the convex hull of the layer's (resource, score) points, so that
    it looks ahead past options that are no bargain themselves. Several budgets are weighted into one resource, and the
    weights moved towards those exceeded. Single and double exchanges then use up what is left.

    The prices found on the way give a lower bound by Lagrangian relaxation; for one budget it is that of the linear
    relaxation. "optimal" is only said where bound and objective are equal. Where several budgets admit no plan that
    this rule finds, `ILPSolver` decides.

    Use it for a first answer; on few layers it can be some percent off, `ILPSolver` is not. Cost: a sort of
    layers × options steps for each weighting, then the exchanges.

    Example:
        Giving up 8 bits costs 4 for the stem and saves 2 bytes, 2.5 for the head and saves 4: the head gives way.

        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = GreedySolver().solve(problem)
        >>> allocation.options, allocation.objective
        (('int8', 'int4'), 4.0)
    """

    exact: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = frozenset({"several budgets", "p-norm"})

    def solve(self, problem: AllocationProblem) -> Allocation:
        """A plan under all budgets.

        Raises:
            InfeasibleError: if there is none.
            ValueError: for a problem with couplings, peak budgets, format limits or the max norm.
        """
        refuse("greedy", self.features, problem)
        core: Core | None = merge(problem)
        allocation = None
        while core is not None:
            tight = core.tightened()
            found = None if tight is None else descend(tight)
            if tight is None or found is None:
                break
            choice = improve(tight, found.choice)
            bound = core.objective(found.bound)
            is_optimal = found.bound >= core.value(choice)
            status = "optimal" if is_optimal else "heuristic"
            allocation = problem.allocation(core.expand(choice), status=status, bound=bound)
            core = core.refocused(choice)
        if allocation is not None:
            return allocation
        from .ilp import ILPSolver

        return ILPSolver().solve(problem)


class Descent(NamedTuple):
    """A feasible plan of groups, and a value that no plan is below."""

    choice: IntArray
    bound: float


class _Path(NamedTuple):
    """Steps from the best scores down the convex hulls, cheapest first."""

    start: IntArray  # (groups,)
    group: IntArray  # (steps,)
    before: IntArray  # (steps,)
    after: IntArray  # (steps,)
    slope: FloatArray  # (steps,), score lost per resource saved


def descend(core: Core) -> Descent | None:
    """The best plan of a few weightings of the budgets, or None where none of them meets all budgets.

    Peak budgets, couplings and formats are not looked at. What is returned keeps the budgets by recomputation.
    """
    score, rows = core.table[0], core.table[1:]
    floors = core.floors()
    slack = core.limits - floors.base[1:]
    binding = (slack > 0) & (np.where(core.allowed, floors.excess[1:], 0).max(2).sum(1) > slack)
    weights = binding / max(1, int(binding.sum()))
    best, best_value, bound = None, math.inf, -math.inf
    for _ in range(ROUNDS if binding.sum() > 1 else 1):
        unit = np.divide(weights, slack, out=np.zeros_like(weights), where=binding)
        path = _hull_path(score, np.tensordot(unit, rows, 1), core.allowed)
        count, usage = _first_fitting(core, path)
        price = unit * (path.slope[min(count, len(path.slope)) - 1] if count and len(path.slope) else 0.0)
        bound = max(bound, _bound(core, price))
        if count <= len(path.slope):
            choice = path.start.copy()
            choice[path.group[:count]] = path.after[:count]
            value = core.value(choice)
            if value < best_value and core.is_feasible(choice):
                best, best_value = choice, value
        if count == 0 or not binding.any():
            break
        pressure = np.where(binding, (usage - core.limits) / np.where(binding, slack, 1.0), 0.0)
        weights = weights * np.exp(np.clip(4.0 * pressure, -1.0, 1.0))
        weights /= weights.sum()
    return None if best is None else Descent(best, min(bound, best_value))


def _hull_path(score: FloatArray, cost: FloatArray, allowed: BoolArray) -> _Path:
    """Steps of all groups by slope; a group's own steps stay in order. Jarvis march, all groups at once."""
    every = np.arange(len(score))
    least = np.where(allowed, score, np.inf).min(1, keepdims=True)
    at = np.where(allowed & (score == least), cost, np.inf).argmin(1)
    start, last = at, np.zeros(len(score))
    parts: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
    while True:
        saved = cost[every, at][:, None] - cost
        lost = score - score[every, at][:, None]
        usable = allowed & (saved > 0)
        slope = np.divide(lost, saved, out=np.full(score.shape, np.inf), where=usable)
        lowest = slope.min(1, keepdims=True)
        moving = np.flatnonzero(np.isfinite(lowest[:, 0]))
        if not len(moving):
            break
        following = np.where(usable & (slope == lowest), saved, -np.inf).argmax(1)
        last = np.where(np.isfinite(lowest[:, 0]), np.maximum(last, lowest[:, 0]), last)
        parts.append((moving, at[moving], following[moving], last[moving]))
        at = at.copy()
        at[moving] = following[moving]
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return _Path(start, nothing, nothing, nothing, np.zeros(0))
    group, before, after, slopes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(slopes, kind="stable")
    return _Path(start, group[order], before[order], after[order], slopes[order])


def _first_fitting(core: Core, path: _Path) -> tuple[int, FloatArray]:
    """Least number of steps after which every budget holds (steps + 1 if never), and the usage there or at the end."""
    rows = core.table[1:]
    begin = rows[:, np.arange(len(path.start)), path.start].sum(1, keepdims=True)
    change = rows[:, path.group, path.after] - rows[:, path.group, path.before]
    usage = np.concatenate([begin, begin + np.cumsum(change, axis=1)], axis=1)
    fits = (usage <= core.limits[:, None]).all(0)
    count = int(fits.argmax()) if fits.any() else len(fits)
    return count, usage[:, min(count, len(fits) - 1)]


def _bound(core: Core, price: FloatArray) -> float:
    """Lagrangian bound Σ_g min_k (score + Σ_b price_b · row_b) − Σ_b price_b · limit_b, less its rounding."""
    priced = core.table[0] + np.tensordot(price, core.table[1:], 1)
    terms = [*np.where(core.allowed, priced, np.inf).min(1).tolist(), *(-price * core.limits).tolist()]
    rounding = 1e-14 * math.fsum(abs(term) for term in terms) if price.any() else 0.0
    return math.fsum(terms) - rounding
