"""Enumeration: every plan there is, the reference for all other solvers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.problem import Allocation, AllocationProblem

from .features import EVERYTHING
from .infeasibility import explain
from .reduction import ROUNDING, Core, merge

MOST = 20_000_000  # plans; about half a minute
CHUNK = 4e6  # numbers held at once


@dataclass(frozen=True, kw_only=True)
class ExhaustiveSolver:
    """Every plan is looked at: exact for every kind of problem, up to `MOST` plans.

    Cost: options to the power of the untied layers, times the layers; a million plans of ten layers take a second.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> ExhaustiveSolver().solve(problem).options
        ('int8', 'int4')
    """

    exact: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = EVERYTHING

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The best plan under all budgets; of equal ones the first in the order of the options.

        Raises:
            InfeasibleError: if there is none, with the smallest reachable value of every budget.
            ValueError: for more than `MOST` plans.
        """
        core = merge(problem)
        count = math.prod(core.allowed.sum(1).tolist())
        if count > MOST:
            raise ValueError(f"solver 'exhaustive' looks at {MOST:,} plans at most, got {count:.3g}: use solver='ilp'")
        choice = _best(core)
        if choice is None:
            choice = explain(core, lambda aimed: (_best(aimed), True))
        while (nearer := core.refocused(choice)) is not None:
            core, found = nearer, _best(nearer)
            choice = choice if found is None else found
        return problem.allocation(core.expand(choice), status="optimal")


class _Plans(NamedTuple):
    """Some plans, one a column."""

    choices: IntArray  # (groups, plans)
    value: FloatArray  # (plans,)
    fits: BoolArray  # (plans,), rows hold, or might by rounding
    is_sure: BoolArray  # (plans,), rows hold


def _best(core: Core) -> IntArray | None:
    best, best_value = None, math.inf
    for plans in _plans(core):
        value = np.where(plans.fits, plans.value, np.inf)
        while (least := int(value.argmin())) >= 0 and value[least] < best_value:
            choice = plans.choices[:, least]
            if plans.is_sure[least] or core.is_feasible(choice):
                best, best_value = choice.copy(), float(value[least])
            value[least] = np.inf
    return best


def _plans(core: Core) -> Iterator[_Plans]:
    """All plans of a core in chunks, in the order of their options."""
    groups, options = core.allowed.shape
    counts = core.allowed.sum(1)
    allowed = np.argsort(~core.allowed, axis=1, kind="stable")  # options in play first
    floors, total = core.floors(), math.prod(counts.tolist())
    size = max(256, int(CHUNK / (groups + options + len(core.table) + len(core.steps.limit))))
    room = ROUNDING * floors.magnitude[1:, None]
    step_room = ROUNDING * floors.step_magnitude[:, None]
    limits, step_limits = core.limits[:, None], core.steps.limit[:, None]
    for start in range(0, total, size):
        digits = np.array(np.unravel_index(np.arange(start, min(start + size, total)), counts))
        choices = np.take_along_axis(allowed, digits, 1)
        sums, steps = _sums(core, choices)
        value = steps[core.steps.goal].max(0) if core.has_goal else sums[0]
        few, fixed = _formats(core, choices)
        fits = few & (sums[1:] <= limits + room).all(0) & (steps <= step_limits + step_room).all(0)
        is_sure = few & (sums[1:] <= limits - room).all(0) & (steps <= step_limits - step_room).all(0)
        yield _Plans(choices, value + fixed, fits, is_sure)


def _sums(core: Core, choices: IntArray) -> tuple[FloatArray, FloatArray]:
    """Objective and budgeted sums, (1 + budgets, plans), and step rows, (rows, plans)."""
    sums = np.zeros((len(core.table), choices.shape[1]))
    for group, options in enumerate(choices):
        sums += core.table[:, group][:, options]
    for pair in core.couplings:
        sums += pair.table[:, choices[pair.first], choices[pair.second]]
    steps = np.zeros((len(core.steps.limit), choices.shape[1]))
    for row, group, value in zip(core.steps.row, core.steps.group, core.steps.value, strict=True):
        steps[row] += value[choices[group]]
    return sums, steps


def _formats(core: Core, choices: IntArray) -> tuple[BoolArray, FloatArray | float]:
    """Whether few enough options are in use, and what those in use cost."""
    if not core.counts_formats:
        return np.ones(choices.shape[1], dtype=bool), 0.0
    used = np.zeros((core.allowed.shape[1], choices.shape[1]), dtype=bool)
    np.put_along_axis(used, choices, True, 0)
    most = core.max_formats if core.max_formats is not None else len(used)
    return used.sum(0) <= most, 0.0 if core.format_costs is None else core.format_costs @ used
