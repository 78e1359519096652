"""Integer programming through PuLP, made safe: exact at any scale, no budget exceeded, "optimal" only when proved."""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpq.arrays import IntArray
from mpq.problem import Allocation, AllocationProblem

from .features import EVERYTHING
from .infeasibility import explain
from .narrowing import Outcome, Search, minimise, unproved
from .reduction import Core, merge


@dataclass(frozen=True, kw_only=True)
class ILPSolver:
    """The exact solver for every kind of problem, with any integer-programming code that PuLP finds.

    HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) states bit allocation as an integer program: one binary a layer and
    option, exactly one of them 1, sums under budgets. Codes solve it to absolute tolerances of about 1e-6, so that
    small scores drown (the optimum of a table in 1e-6 comes out wrong and is called optimal). Hence:

    1. options that no plan better than the best known can contain are dropped, dominated ones too (`Core.tightened`);
    2. the linear relaxation gives prices, the prices a bound that is computed here (`LinearProgram.bound`), the bound
       drops more options;
    3. what is left is scaled to the distance between the best plan and the floor, and solved;
    4. again, while that distance still falls tenfold; only then the answer is called optimal.

    Choices are evaluated from the problem, never read off the code's sums; a plan that exceeds a budget within the
    code's tolerance is cut off and the program solved again. The max norm is solved by bisection over the worst score;
    among plans with the least one, that with the least sum is returned.

    One thread and no random numbers: the same problem gives the same answer. Cost: for 200 layers of 8 options and
    three budgets a second or two; one relaxation and mostly one integer program.

    Args:
        time_limit: seconds. When they are over, the best plan comes back as "feasible", with its bound. An error about
            budgets that cannot be met may take as long again for each number it reports.
        gap: accept a plan within this fraction of the optimum; it is then called "feasible", with its bound. Not for
            the max norm, which is solved to the end.
        backend: "auto" (CBC, then HiGHS, then any), or the name of a solver that PuLP lists as available.

    Example:
        Giving up 8 bits costs 4 for the first layer and 2.5 for the second, and one of them has to.

        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = ILPSolver().solve(problem)
        >>> allocation.options, allocation.usage, allocation.proof.status
        (('int8', 'int4'), {'size': 8.0}, 'optimal')
    """

    time_limit: float = 60.0
    gap: float = 0.0
    backend: str = "auto"

    exact: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = EVERYTHING

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, got {self.time_limit}")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be from 0 up to 1, got {self.gap}")

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The best plan under all budgets.

        Raises:
            InfeasibleError: if there is none, with the smallest reachable value of every budget.
            TimeoutError: if the time was over before any plan was found.
            ValueError: for a backend that PuLP does not find.
        """
        search = Search(self.backend, self.gap, self.time_limit, time.monotonic() + self.time_limit)
        core = merge(problem)
        outcome = _least_maximum(core, search) if problem.norm == math.inf else minimise(core, search)
        if outcome.status == "infeasible":
            outcome = minimise(core, search, _plan_after_all(core, search))
        best = outcome.choice
        if best is None:
            raise TimeoutError(f"no plan found within time_limit={self.time_limit:g} s: raise it")
        while (nearer := core.refocused(best)) is not None:
            core, outcome = nearer, minimise(nearer, search, best)
            best = best if outcome.choice is None else outcome.choice
        choice = core.expand(best)
        if problem.norm == math.inf:
            choice = _least_sum(problem, choice, search)
        is_optimal = outcome.status == "optimal"
        bound = core.objective(outcome.bound)
        return problem.allocation(choice, status="optimal" if is_optimal else "feasible", bound=bound)


def _plan_after_all(core: Core, search: Search) -> IntArray:
    """Explain the missing plan by an error; a plan only if the explanation comes upon one."""

    def solved(aimed: Core) -> tuple[IntArray | None, bool]:
        outcome = minimise(aimed, search.renewed())
        return outcome.choice, outcome.is_proved

    return explain(core, solved)


def _least_maximum(core: Core, search: Search) -> Outcome:
    """The least worst rank, by bisection: is there any plan without the options above it? Quicker than one program."""
    goal = core.steps.goal[core.steps.row]
    ranks = np.zeros(core.allowed.shape)
    ranks[core.steps.group[goal]] = core.steps.value[goal]
    free = replace(core, steps=replace(core.steps, goal=np.zeros_like(core.steps.goal)))
    low, high = math.ceil(core.floor()), int(ranks[core.allowed].max())
    best: IntArray | None = None
    while best is None or low < high:
        middle = high if best is None else (low + high) // 2
        outcome = minimise(free.without(ranks > middle), search)
        if outcome.choice is not None:
            best = outcome.choice
            high = int(core.value(best))
        elif outcome.status != "infeasible":
            return unproved(core, best, float(low))
        elif best is None:
            return outcome
        else:
            low = middle + 1
    return Outcome("optimal", best, float(high))


def _least_sum(problem: AllocationProblem, choice: IntArray, search: Search) -> IntArray:
    """Among the plans whose worst layer is as good, the one with the least sum; what the maximum leaves open."""
    worst = problem.evaluate(choice)[0]
    scores = np.where(problem.objective <= worst, problem.objective, np.inf)
    core = merge(replace(problem, objective=scores, norm=1))
    first = np.unique(problem.groups, return_index=True)[1]
    outcome = minimise(core, search, choice[first])
    return choice if outcome.choice is None else core.expand(outcome.choice)
