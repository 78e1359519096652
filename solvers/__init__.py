"""Solvers: an `AllocationProblem` in, an `Allocation` with its proof out. One file a method; numpy throughout."""

from collections.abc import Callable
from typing import Protocol

from mpq.plugins import all_names, plugin_named
from mpq.problem import Allocation, AllocationProblem, InfeasibleError, Proof
from mpq.suggestions import did_you_mean

from .auto import AutoSolver
from .bootstrap import Bootstrap, near_optimal_plans
from .dynamic import DynamicSolver
from .evolution import EvolutionSolver, evolve
from .exhaustive import ExhaustiveSolver
from .greedy import GreedySolver
from .ilp import ILPSolver
from .lagrangian import LagrangianSolver
from .multipliers import shadow_prices
from .pareto import pareto_frontier
from .quadratic import QuadraticSolver
from .ranked_plans import k_best
from .robust_plans import RobustAllocation, robust, with_residuals, worst_case

__all__ = [
    "AutoSolver",
    "Bootstrap",
    "DynamicSolver",
    "EvolutionSolver",
    "ExhaustiveSolver",
    "GreedySolver",
    "ILPSolver",
    "InfeasibleError",
    "LagrangianSolver",
    "Proof",
    "QuadraticSolver",
    "RobustAllocation",
    "Solver",
    "available",
    "evolve",
    "k_best",
    "near_optimal_plans",
    "pareto_frontier",
    "robust",
    "shadow_prices",
    "solve",
    "with_residuals",
    "worst_case",
]


class Solver(Protocol):
    """Anything that turns a problem into an allocation."""

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The allocation of a problem."""


SOLVERS: dict[str, Callable[..., Solver]] = {
    "auto": AutoSolver,
    "ilp": ILPSolver,
    "dynamic": DynamicSolver,
    "lagrangian": LagrangianSolver,
    "quadratic": QuadraticSolver,
    "evolution": EvolutionSolver,
    "greedy": GreedySolver,
    "exhaustive": ExhaustiveSolver,
}


def available() -> list[str]:
    """Names of the solvers, for `solver=`; ours first, then those of other packages (`mpq.plugins`)."""
    return all_names("mpq.solvers", SOLVERS)


def solve(problem: AllocationProblem, solver: str | Solver = "auto", **settings: float | str) -> Allocation:
    """Solve a problem.

    Args:
        problem: what to solve.
        solver: a name of `available()`, or a solver object such as ``ILPSolver(time_limit=10)``.
        settings: fields of the named solver.

    Returns:
        The allocation, with what is proved about it.

    Raises:
        InfeasibleError: if no plan meets all budgets.
        ValueError: for a name that is not known or of two packages, or a solver that does not take this problem.
        TypeError: for settings beside a solver object, or settings that the solver does not have.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9})
        >>> solve(problem, solver="ilp", time_limit=10).choices
        array([1, 0])
    """
    if not isinstance(solver, str):
        if settings:
            raise TypeError(f"settings go with a solver's name, got {settings} beside {solver!r}")
        return solver.solve(problem)
    if plugin := plugin_named("mpq.solvers", solver, SOLVERS):
        answer: Allocation = plugin.make(settings).solve(problem)
        return answer
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver!r}{did_you_mean(solver, available())}")
    return SOLVERS[solver](**settings).solve(problem)
