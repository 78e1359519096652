"""The k best allocations, not only the best: what to measure on the real model when scores are estimates."""

import math
import time
from dataclasses import replace

import numpy as np

from mpq.arrays import IntArray
from mpq.problem import Allocation, AllocationProblem, InfeasibleError

from .ilp import ILPSolver
from .pair_bound import pair_bound
from .plan_enumeration import Found, best_plans
from .reduction import Core, merge


def k_best(problem: AllocationProblem, k: int, *, time_limit: float = 60.0) -> list[Allocation]:
    """The k best different allocations, best first; all of them where there are fewer than k.

    Scores of layers are estimates, and their sum is one more approximation: measuring the best 200 plans on the real
    model and keeping the winner repairs much of both. An option that another of its layer beats in everything may be
    part of the second-best plan, so nothing is dropped for that. Takes every kind of problem; see `best_plans` for the
    method. Lawler (1972, Management Science 18, from memory) solves the same problem one best plan after another;
    here whole crowds of plans go through the bounds together.

    Plans of equal objectives come in the order of their options. Where more of them than asked for equal the last one
    to rounding, it is not said which are taken, but always the same. For the max norm, plans with the same worst score
    come in the order of their sums.

    Cost: 200 layers of 5 options take a third of a second for k = 200 under one budget, mostly half a second under
    two or three, at worst five; 500 layers a second, at worst ten. Pairs and transitions go through `pair_bound`
    first: chains of hundreds of layers take seconds; many layers that are all coupled can take forever.

    Args:
        problem: what to solve.
        k: how many.
        time_limit: seconds.

    Returns:
        Allocations. "optimal" says that the rank is proved: no plan that is left out, or later in the list, is better.
        When the time is over, those for which this is not proved are "feasible", and no plan outside the list is below
        their bound; there may be fewer of them than k.

    Raises:
        InfeasibleError: if there is no plan, with the smallest reachable value of every budget.
        TimeoutError: if the time was over before any plan was found.
        ValueError: if k is not a whole number from 1, or the time limit not positive.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> [(allocation.options, allocation.objective) for allocation in k_best(problem, 5)]
        [(('int8', 'int4'), 4.0), (('int4', 'int4'), 8.0)]
    """
    if isinstance(k, bool) or int(k) != k or k < 1:
        raise ValueError(f"k must be a whole number from 1, got {k!r}")
    if not time_limit > 0:
        raise ValueError(f"time_limit must be positive, got {time_limit}")
    deadline = time.monotonic() + time_limit
    least = _least_maxima if problem.norm == math.inf else _least_sums
    found = least(problem, int(k), deadline)
    if not found.plans:
        if found.bound < math.inf:
            raise TimeoutError(f"no plan found within time_limit={time_limit:g} s: raise it")
        return [ILPSolver(time_limit=time_limit).solve(problem)]
    return [_allocation(problem, plan, found.bound) for plan in found.plans]


def _allocation(problem: AllocationProblem, plan: IntArray, bound: float) -> Allocation:
    is_proved = bound == math.inf or problem.evaluate(plan)[0] <= bound
    return problem.allocation(plan, status="optimal" if is_proved else "feasible", bound=bound)


def _least_sums(problem: AllocationProblem, k: int, deadline: float) -> Found:
    """Norms but the maximum; powers lose small terms, so with a nearer reference where all plans are far below it."""
    core: Core = merge(problem)
    while True:
        found = best_plans(pair_bound(core).core if core.couplings else core, k, deadline)
        last = problem.evaluate(found.plans[-1])[0] if len(found.plans) == k else 0.0
        bound = found.bound if found.bound == math.inf else core.objective(found.bound)
        if problem.norm == 1 or not 0 < last < 0.1 * core.reference or time.monotonic() > deadline:
            return Found(found.plans, bound)
        core = merge(problem, last)


def _least_maxima(problem: AllocationProblem, k: int, deadline: float) -> Found:
    """The max norm, by bisection over the worst score that k plans need; those below it come first.

    Plans below a worst score are those without the options above it, and come in the order of their sums.
    """
    scores = problem.objective[problem.allowed]
    levels = np.unique(scores)
    below: dict[int, Found] = {-1: Found([], math.inf)}

    def plans(level: int) -> Found:
        if level not in below:
            below[level] = _below(problem, float(levels[level]), k, deadline)
        return below[level]

    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(plans(middle).plans) >= k else (middle + 1, high)
    first, rest = plans(low - 1).plans, plans(low).plans
    known = {plan.tobytes() for plan in first}
    ordered = [*first, *(plan for plan in rest if plan.tobytes() not in known)][:k]
    ordered.sort(key=lambda plan: problem.evaluate(plan)[0])
    is_proved = all(found.bound == math.inf for found in below.values())
    return Found(ordered, math.inf if is_proved else float(levels[0]))


def _below(problem: AllocationProblem, worst: float, k: int, deadline: float) -> Found:
    scores = np.where(problem.objective <= worst, problem.objective, np.inf)
    try:
        return _least_sums(replace(problem, objective=scores, norm=1), k, deadline)
    except InfeasibleError:  # a layer, or a tie, is left without an option
        return Found([], math.inf)
