"""Convex-hull greedy: give way where it costs least per unit of budget, then improve by exchange."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq.arrays import IntArray
from mpq.problem import Allocation, AllocationProblem

from .descent import Descent, descend
from .exchange import improve
from .features import refuse
from .ilp import ILPSolver
from .reduction import Core, merge

BRANCHES = 48  # options tried in place of the plan's
BRANCH_LOOK = 2e5  # table entries looked at for a double exchange in each
SMALL = 20_000  # groups × options up to which they are tried


@dataclass(frozen=True, kw_only=True)
class GreedySolver:
    """Best ratio first, along the lower convex hull of every layer: near-optimal on many layers, in milliseconds.

    Every layer starts at its best score. The step with the least loss per unit of resource saved is taken, among all
    layers, until the budget holds; a step goes along the convex hull of the layer's (resource, score) points, so that
    it looks ahead past options that are no bargain themselves. Several budgets are weighted into one resource, and the
    weights moved towards those exceeded. Single and double exchanges then use up what is left. Last, the options that a
    better plan could contain by the bound are fixed one at a time, the likeliest first, and the rest decided anew.

    The prices found on the way give the bound, by Lagrangian relaxation; for one budget it is that of the linear
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
            choice = _branch(tight, found)
            allocation = problem.allocation(
                core.expand(choice),
                status="optimal" if found.bound >= core.value(choice) else "heuristic",
                bound=core.objective(found.bound),
            )
            core = core.refocused(choice)
        if allocation is not None:
            return allocation
        return ILPSolver().solve(problem)


def _branch(core: Core, found: Descent) -> IntArray:
    """Improve a plan, then fix options that a better one may contain and decide the rest anew.

    An option whose priced score is above its group's least by more than the gap is in no better plan.
    """
    best = improve(core, found.choice)
    priced = core.table[0] + np.tensordot(found.price, core.table[1:], 1)
    penalty = priced - np.where(core.allowed, priced, np.inf).min(1, keepdims=True)
    order = np.argsort(np.where(core.allowed, penalty, np.inf), axis=None, kind="stable")
    options, tried = core.allowed.shape[1], 0
    for group, option in (divmod(int(index), options) for index in order[: core.allowed.sum()]):
        if penalty[group, option] >= core.value(best) - found.bound or tried == BRANCHES or penalty.size > SMALL:
            break
        if option == best[group]:
            continue
        tried += 1
        others = np.zeros_like(core.allowed)
        others[group] = np.arange(options) != option
        branch = core.without(others).tightened(best)
        plan = None if branch is None else descend(branch, found.price)
        if branch is not None and plan is not None:
            choice = improve(branch, plan.choice, BRANCH_LOOK)
            best = choice if core.value(choice) < core.value(best) else best
    return best
