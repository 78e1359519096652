"""Lagrangian relaxation: prices of the budgets, the bound they prove, and a plan near it, for millions of units."""

from dataclasses import dataclass
from typing import ClassVar

from mpq.problem import Allocation, AllocationProblem

from .core_search import Effort, Found, dive
from .descent import descend
from .features import refuse
from .ilp import ILPSolver
from .lagrangian_dual import Dual, maximise
from .reduction import Core, merge

EFFORT = Effort(labels=300, groups=64)


@dataclass(frozen=True, kw_only=True)
class LagrangianSolver:
    """A price for every budget: near-optimal with a bound, in time that grows with the number of units.

    Everett (1963, Oper. Res. 11): minimise Σ score + λ · (Σ usage − limits) without the budgets, each unit on its own,

        L(λ) = Σ_g min_k (score_gk + λ · usage_gk) − λ · limits  ≤  optimum   for every λ ≥ 0.

    `maximise` finds the largest L. The plan at these prices is off by a handful of units, as many as there are budgets
    or a few more: those with the next best option nearest in priced score are decided together (`dive`), so that the
    budgets hold and are nearly used up. The gap is about one unit's share of the objective: on millions of units
    1e-7 and less. "optimal" is only said where the bound is reached, or no other plan is left.

    Use it for very many units (rows, channels); `AutoSolver` begins with it and goes on to the optimum. Where the
    prices lead to no plan, `ILPSolver` decides. Cost: a few dozen passes over parts of the table.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = LagrangianSolver().solve(problem)
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
        refuse("lagrangian", self.features, problem)
        core: Core | None = merge(problem)
        allocation = None
        while core is not None:
            dual = maximise(core)
            found = None if dual is None else near(core, dual)
            if dual is None or found is None or found.choice is None:
                break
            is_optimal = found.is_complete or dual.bound >= core.value(found.choice)
            allocation = problem.allocation(
                core.expand(found.choice),
                status="optimal" if is_optimal else "heuristic",
                bound=core.objective(dual.bound),
            )
            core = core.refocused(found.choice)
        return ILPSolver().solve(problem) if allocation is None else allocation


def near(core: Core, dual: Dual) -> Found:
    """A plan near the bound; where the likeliest groups are not enough to meet the budgets, from the convex hulls."""
    found = dive(core, dual, None, EFFORT)
    if found.choice is not None:
        return found
    descent = descend(core, dual.price) or descend(core)
    return Found(None, False) if descent is None else dive(core, dual, descent.choice, EFFORT)
