"""Stability of a plan: tables drawn within the errors of the scores, each solved again."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpq.arrays import FloatArray, IntArray
from mpq.problem import Allocation, AllocationProblem

from .auto import AutoSolver

if TYPE_CHECKING:
    from . import Solver


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """What other tables, as likely as the one given, would have chosen.

    Attributes:
        nominal: the plan of the table as it is.
        choices: ``(plans, layers)``, the different plans of the draws, the most frequent first.
        counts: ``(plans,)``, how many draws chose each.
        objectives: ``(plans,)``, what each costs in the table as it is.
        frequency: ``(layers, options)``, the share of draws in which a layer takes an option.
        regret: ``(draws,)``, how much better than the nominal plan the best plan of each draw is, in that draw; from 0
            wherever the solver is exact.
    """

    nominal: Allocation
    choices: IntArray
    counts: IntArray
    objectives: FloatArray
    frequency: FloatArray
    regret: FloatArray

    @property
    def stability(self) -> FloatArray:
        """``(layers,)``: the share of draws in which a layer keeps its option of the nominal plan."""
        return self.frequency[np.arange(len(self.frequency)), self.nominal.choices]

    def __repr__(self) -> str:
        shaky = int((self.stability < 0.5).sum())
        return (
            f"Bootstrap({int(self.counts.sum())} draws, {len(self.counts)} different plans, {shaky} of "
            f"{len(self.stability)} layers change option in most, mean regret {self.regret.mean():.3g})"
        )


def near_optimal_plans(
    problem: AllocationProblem,
    *,
    draws: int = 50,
    seed: int = 0,
    solver: "Solver | None" = None,
    replicates: npt.ArrayLike | None = None,
) -> Bootstrap:
    """Solve tables drawn around the scores: which plans are nearly as good, and which layers' options can be trusted.

    Formula (parametric bootstrap, Efron and Tibshirani 1993, from memory): every draw replaces the objective by

        s[i, c] + e[i, c] z[i, c],   z independent standard normal

    with scores s and standard errors e; for a p-norm, negative values become 0. Replicate tables, such as scores of
    resampled calibration data, can be given instead: they keep correlations that standard errors do not know.

    Args:
        problem: with `objective_se`, unless there are replicates.
        draws: how many tables are drawn.
        seed: of the draws.
        solver: solves each; `AutoSolver()` by default. `GreedySolver()` is quicker for many layers.
        replicates: (draws, layers, options) tables to use in place of drawn ones.

    Cost: draws + 1 solves.

    Raises:
        InfeasibleError: if no plan meets all budgets.
        ValueError: without `objective_se` and replicates, for less than one draw, or replicates of another shape or not
            finite where the option is allowed.

    Example:
        The stem is sure to want 8 bits, the head is not:

        >>> problem = AllocationProblem(objective=[[5.0, 1.0], [3.0, 1.6]], objective_se=[[0.1, 0.1], [1.0, 1.0]])
        >>> found = near_optimal_plans(problem, draws=200)
        >>> found.choices.tolist(), found.stability.round(1).tolist()
        ([[1, 1], [1, 0]], [1.0, 0.8])
    """
    inner = AutoSolver() if solver is None else solver
    tables = _drawn(problem, draws, seed) if replicates is None else _given(problem, replicates)
    nominal = inner.solve(problem)
    rows = np.arange(len(problem.objective))
    frequency = np.zeros(problem.objective.shape)
    found: dict[bytes, int] = {}
    regret = []
    for table in tables:
        drawn = replace(problem, objective=np.where(problem.allowed, table, np.inf), objective_se=None)
        allocation = inner.solve(drawn)
        plan = allocation.choices.tobytes()
        found[plan] = found.get(plan, 0) + 1
        frequency[rows, allocation.choices] += 1
        regret.append(drawn.evaluate(nominal.choices)[0] - allocation.objective)
    plans = {plan: np.frombuffer(plan, dtype=np.int64) for plan in found}
    objectives = {plan: problem.evaluate(choices)[0] for plan, choices in plans.items()}
    order = sorted(found, key=lambda plan: (-found[plan], objectives[plan]))  # stable: then the first drawn
    return Bootstrap(
        nominal=nominal,
        choices=np.array([plans[plan] for plan in order]),
        counts=np.array([found[plan] for plan in order], dtype=np.int64),
        objectives=np.array([objectives[plan] for plan in order]),
        frequency=frequency / len(regret),
        regret=np.array(regret),
    )


def _drawn(problem: AllocationProblem, draws: int, seed: int) -> Iterable[FloatArray]:
    if problem.objective_se is None:
        raise ValueError(
            "drawing tables needs standard errors: give the problem objective_se (with_residuals makes one), or "
            "replicates=(draws, layers, options)"
        )
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rng = np.random.default_rng(seed)
    errors = np.where(problem.allowed, problem.objective_se, 0.0)
    lowest = 0.0 if 1 < problem.norm < math.inf else -math.inf
    for _ in range(draws):
        yield np.maximum(problem.objective + errors * rng.standard_normal(errors.shape), lowest)


def _given(problem: AllocationProblem, replicates: npt.ArrayLike) -> FloatArray:
    tables = np.asarray(replicates, dtype=np.float64)
    if tables.ndim != 3 or not len(tables) or tables.shape[1:] != problem.objective.shape:
        raise ValueError(
            f"replicates must have shape (draws, layers, options) = (draws, {len(problem.objective)}, "
            f"{len(problem.options)}), got {tables.shape}"
        )
    for draw, layer, option in np.argwhere(~np.isfinite(tables) & problem.allowed)[:1]:
        raise ValueError(
            f"replicates must be finite wherever the option is allowed, replicate {draw} has "
            f"{tables[draw, layer, option]} for {problem.label(int(layer))!r}, {problem.options[option]!r}"
        )
    return tables
