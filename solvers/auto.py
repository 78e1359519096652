"""The default: prices, a core of the few groups they leave open, and the integer program for what is left."""

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import Allocation, AllocationProblem

from .core_search import Effort, Found, distance, dive, penalties, search
from .dynamic import DynamicSolver
from .features import EVERYTHING
from .forest import NotAForestError
from .ilp import ILPSolver
from .lagrangian import near
from .lagrangian_dual import Dual, maximise
from .narrowing import Outcome, Search, minimise
from .pruning import TooManyLabelsError
from .reduction import Core, merge

SUMS = frozenset({"several budgets", "p-norm"})
EFFORTS = (Effort(1000, 1e6), Effort(6000, 6e6), Effort(20_000, 3e7))
FIRST, GROWTH = 20, 1.7  # open groups of the first core, and of every next one
DEEP = 96  # open groups decided in one run
LABELS, LABELS_A_SECOND = 2e5, 1e4  # partial plans a list, and so many at most a second of the time limit
SMALL = 2e7  # plans; so few are always searched to the end


@dataclass(frozen=True, kw_only=True)
class AutoSolver:
    """Takes every problem and solves it in the quickest way that proves its answer.

    Sums under budgets: Lagrangian prices give a bound, and a plan near it (`LagrangianSolver`). Only options within the
    gap between the two can be in a better plan. Cores of the likeliest groups are searched to the end, for a small gap
    first and then wider ones, until the optimum is among the plans excluded or found (`core_search`). Where that is too
    much work and the certified gap is above ``gap``, the integer program goes on with what is left.

    Chains and trees of couplings, and the max norm, under one budget are solved by `DynamicSolver` as long as its lists
    are short, everything else (other couplings, peak budgets, limits on formats) by `ILPSolver`.

    No random numbers, and limits of work instead of time but for ``time_limit``: the same problem gives the same
    answer. Cost: some ten milliseconds for 200 layers of 8 options and one budget, a tenth of a second for 500 and
    three.

    Args:
        time_limit: seconds for the integer program. When they are over, the best plan comes back as "feasible".
        gap: a plan that is certified to be within this fraction of the optimum may come back as "feasible" with its
            bound, where more proof would take long. 0: prove the optimum, or run to the time limit.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = AutoSolver().solve(problem)
        >>> allocation.options, allocation.proof.status
        (('int8', 'int4'), 'optimal')
    """

    time_limit: float = 60.0
    gap: float = 1e-4

    exact: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = EVERYTHING

    def __post_init__(self) -> None:
        ILPSolver(time_limit=self.time_limit, gap=self.gap)  # checks both

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The best plan under all budgets.

        Raises:
            InfeasibleError: if there is none, with the smallest reachable value of every budget.
            TimeoutError: if the time was over before any plan was found.
        """
        core = merge(problem)
        whole = ILPSolver(time_limit=self.time_limit, gap=0.0 if _plans(core) <= SMALL else self.gap)
        if not problem.features <= SUMS:
            return self._coupled(problem) or whole.solve(problem)
        limits = Search("auto", whole.gap, self.time_limit, time.monotonic() + self.time_limit)
        outcome = _minimised(core, limits)
        while outcome is not None and outcome.choice is not None:
            nearer = core.refocused(outcome.choice)
            if nearer is None:
                bound = core.objective(outcome.bound)
                choice = core.expand(outcome.choice)
                is_optimal = outcome.status == "optimal"
                return problem.allocation(choice, status="optimal" if is_optimal else "feasible", bound=bound)
            core, outcome = nearer, _minimised(nearer, limits)
        return whole.solve(problem)

    def _coupled(self, problem: AllocationProblem) -> Allocation | None:
        """By lists, where that is quick: one budget, couplings that form chains and trees."""
        if not problem.features <= DynamicSolver.features:
            return None
        try:
            return DynamicSolver(labels=int(min(LABELS, 1 + LABELS_A_SECOND * self.time_limit))).solve(problem)
        except (NotAForestError, TooManyLabelsError):
            return None


def _plans(core: Core) -> float:
    """How many plans there are, as a float."""
    with np.errstate(over="ignore"):
        return float(np.prod(core.allowed.sum(1), dtype=np.float64))


def _minimised(core: Core, limits: Search) -> Outcome | None:
    """The best plan of a core; None where prices and hulls lead to none."""
    tight = core.tightened()
    dual = None if tight is None else maximise(tight)
    if tight is None or dual is None:
        return None
    found = near(tight, dual)
    if found.choice is None:
        return None
    return _Closing(tight, dual, limits).run(found)


class _Closing:
    """Raises the bound and improves the plan until they meet, or are near enough."""

    def __init__(self, core: Core, dual: Dual, limits: Search) -> None:
        self.core, self.dual, self.limits = core, dual, limits
        self.proved = 0.0  # no plan is less than this above the bound
        self.groups = FIRST

    def run(self, found: Found) -> Outcome:
        """The outcome, starting from a plan."""
        best = found.choice
        if best is None:
            return Outcome("unknown", None, self.dual.bound)
        penalty = penalties(self.core, self.dual)
        second = np.sort(np.partition(penalty, 1, axis=1)[:, 1]) if penalty.shape[1] > 1 else np.zeros(0)
        is_complete = found.is_complete
        for effort in EFFORTS if len(self.core.names) == 1 else EFFORTS[:1]:
            if not is_complete:
                best, is_complete = self._searched(best, second, effort)
            if is_complete:
                return Outcome("optimal", best, self.core.value(best))
            if self._is_near(best):
                return Outcome("feasible", best, self._bound())
        keep = distance(self.core, self.dual, best) * (1 + 1e-6)
        left = self.core.without(penalty > keep)
        outcome = minimise(left, self.limits._replace(gap=self.limits.gap / 10), best)
        return outcome._replace(bound=max(outcome.bound, self._bound()))

    def _searched(self, best: IntArray, second: FloatArray, effort: Effort) -> tuple[IntArray, bool]:
        """Wider and wider cores until one is too much work; the best plan, and whether it is proved to be."""
        is_last = False  # beyond the first core that is too much work one more is tried, for a better plan
        while self.limits.remaining() > 0:
            above = distance(self.core, self.dual, best)
            width = float(second[self.groups]) if self.groups < len(second) else math.inf
            found = search(self.core, self.dual, best, width, effort)
            is_better = found.choice is not best
            if found.choice is not None:
                best = found.choice
            if is_better or width >= above:
                return best, found.is_complete
            if found.is_complete:
                self.proved = max(self.proved, width)
            elif is_last:
                return self._dived(best, effort)
            is_last = is_last or not found.is_complete
            self.groups = int(self.groups * GROWTH)
        return best, False

    def _dived(self, best: IntArray, effort: Effort) -> tuple[IntArray, bool]:
        """A better plan where halves are too much work: fewer labels, over more groups."""
        found = dive(self.core, self.dual, best, Effort(effort.labels // 4, groups=DEEP))
        return best if found.choice is None else found.choice, found.is_complete

    def _bound(self) -> float:
        """A value that no plan is below; a little less than what was searched."""
        return self.dual.bound + self.proved * (1 - 1e-9)

    def _is_near(self, best: IntArray) -> bool:
        if not self.limits.gap:
            return False
        objective, bound = self.core.objective(self.core.value(best)), self.core.objective(self._bound())
        return objective - bound <= self.limits.gap * abs(objective)
