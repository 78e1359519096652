"""Layers that interact, a quadratic objective: tabu search, a bound for the pairs, and a proof where that is near."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpq.allocation import Status
from mpq.arrays import IntArray
from mpq.problem import Allocation, AllocationProblem

from .descent import descend
from .exchange import improve
from .features import refuse
from .ilp import ILPSolver
from .narrowing import Search, minimise
from .pair_bound import PairBound, pair_bound
from .plan_enumeration import best_plans
from .reduction import Core, merge
from .tabu import Effort, tabu_search

QUICK = 0.1  # of the partial plans, for a proof before the tabu search
ADDITIVE_SHARE = 0.1  # of the time for the best plan without pairs, where the search starts


@dataclass(frozen=True, kw_only=True)
class QuadraticSolver:
    """Pairwise interactions: the increase of the loss of two layers together is not the sum of both.

    minimise Σ_i objective[i, c_i] + Σ_{i<j} pairs[i, j][c_i, c_j] under budgets. CLADO (DAC 2025, as read in its
    scripts) measures the loss L with two layers quantised, pairs[i, j] = L(ij) − L(i) − L(j) + L_fp, and solves
    min ½ xᵀCx over one-hot x with Gurobi. Here:

    1. terms of pairs are moved into those of layers, and budgets priced, until the bound of what is left no longer
       rises (`pair_bound`); where pairs are chains or small blocks that bound is nearly the optimum;
    2. tabu search, from the best plan without pairs (as far as a tenth of the time goes) or a better one that the moved
       terms propose (`tabu_search`);
    3. branch and bound on the moved terms looks for a better plan, until it has proved that there is none or has
       looked at ``proof_plans`` partial plans (`best_plans`).

    Against `ILPSolver`, which linearises every product: 200 layers of 5 options in a chain are proved in seconds, not
    minutes, and 50 or more layers that are all coupled get a plan at all. Weak interactions and chains are proved to
    the end; strong ones among all layers are not, and the gap says how far the bound is off.

    Args:
        time_limit: seconds; the answer then depends on the machine.
        gap: accept a plan proved to be within this fraction of the optimum; it is then called "feasible".
        iterations: changes that the tabu search makes.
        proof_plans: partial plans looked at for the proof, 50 000 to 500 000 a second; 0 for none, `math.inf` to go
            on until the time is over.
        seed: of the tabu search.

    Example:
        Quantising both layers costs 2 less than the sum says: their errors cancel.

        >>> problem = AllocationProblem(objective=[[3.0, 0.0], [3.0, 0.0], [2.0, 0.0]], budgets={"size": 20.0},
        ...                             resources={"size": [[4.0, 8.0]] * 3}, options=("int4", "int8"),
        ...                             pairs={(0, 1): [[-4.5, 0.0], [0.0, 0.0]]})
        >>> allocation = QuadraticSolver().solve(problem)
        >>> allocation.options, allocation.objective, allocation.proof.status
        (('int4', 'int4', 'int8'), 1.5, 'optimal')
    """

    time_limit: float = 60.0
    gap: float = 0.0
    iterations: int = 5000
    proof_plans: float = 2e5
    seed: int = 0

    exact: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = frozenset(
        {"several budgets", "pairs", "transitions", "peak budgets", "max_formats", "format_costs"}
    )

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, got {self.time_limit}")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be from 0 up to 1, got {self.gap}")
        if self.iterations < 0 or self.proof_plans < 0:
            raise ValueError(
                f"iterations and proof_plans must not be negative, got {self.iterations}, {self.proof_plans}"
            )

    def solve(self, problem: AllocationProblem) -> Allocation:
        """A plan under all budgets, never worse than the best plan without pairs, with a bound.

        Raises:
            InfeasibleError: if there is none, with the smallest reachable value of every budget.
            TimeoutError: if the time was over before any plan was found.
            ValueError: for the max norm and p-norms.
        """
        refuse("quadratic", self.features, problem)
        deadline = time.monotonic() + self.time_limit
        core = merge(problem).tightened()
        if core is None:
            return ILPSolver(time_limit=self.time_limit).solve(problem)
        lower = pair_bound(core)
        plan = min(_first_plans(core, lower, deadline), key=core.value, default=None)
        if plan is None:
            plan = minimise(core, Search("auto", 0.0, self.time_limit, deadline)).choice
        if plan is None:
            return ILPSolver(time_limit=self.time_limit).solve(problem)
        plan, bound = self._improved(core, lower, plan, deadline)
        value = problem.evaluate(core.expand(plan))[0]
        status: Status = "optimal" if bound >= value else "feasible" if self._is_near(value, bound) else "heuristic"
        return problem.allocation(core.expand(plan), status=status, bound=bound)

    def _improved(self, core: Core, lower: PairBound, plan: IntArray, deadline: float) -> tuple[IntArray, float]:
        """A quick proof, which does on many problems; else tabu search, and the proof at length."""
        bound, problem = lower.bound, core.problem
        for share in (QUICK, 1.0):
            if share == 1.0 and self._is_open(core, plan, bound):
                plan = tabu_search(core, plan, Effort(self.iterations, deadline, self.seed), lower.price)
            if self.proof_plans and self._is_open(core, plan, bound):
                found = best_plans(lower.core, 1, deadline, known=plan, effort=share * self.proof_plans)
                plan = min([plan, *(_of_groups(problem, other) for other in found.plans)], key=core.value)
                bound = max(bound, found.bound)
        return plan, bound

    def _is_open(self, core: Core, plan: IntArray, bound: float) -> bool:
        """Whether a better plan is wanted and possible."""
        value = core.problem.evaluate(core.expand(plan))[0]
        return bound < value and not self._is_near(value, bound)

    def _is_near(self, value: float, bound: float) -> bool:
        return self.gap > 0 and bound * value > 0 and value - bound <= self.gap * min(abs(value), abs(bound))


def _of_groups(problem: AllocationProblem, plan: IntArray) -> IntArray:
    return plan[np.unique(problem.groups, return_index=True)[1]]


def _first_plans(core: Core, lower: PairBound, deadline: float) -> Iterator[IntArray]:
    """The best plan without pairs, and those along the prices of the scores with and without what was moved."""
    additive = [replace(pair, table=np.concatenate([0 * pair.table[:1], pair.table[1:]])) for pair in core.couplings]
    limited = tuple(pair for pair in additive if pair.table.any())
    seconds = max(ADDITIVE_SHARE * (deadline - time.monotonic()), 0.01)
    search = Search("auto", 0.0, seconds, time.monotonic() + seconds)
    choice = minimise(replace(core, couplings=limited), search).choice
    if choice is not None:
        yield improve(core, choice)
    for other, price in ((core, None), (lower.core, lower.price)):
        found = descend(other, price)
        if found is not None:
            yield improve(core, found.choice)
