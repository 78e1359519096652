"""The default solver in a hurry, for plans that are only proposals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import AllocationProblem, InfeasibleError


@dataclass(frozen=True)
class QuickSolver:
    """The default solver, content with a plan that is proved to be within a thousandth."""

    def solve(self, problem: AllocationProblem) -> Any:
        """An allocation."""
        return import_module("mpq.solvers").solve(problem, "auto", gap=1e-3, time_limit=5.0)


def optimum_of(problem: AllocationProblem, scores: FloatArray) -> IntArray | None:
    """The plan that is best by other scores under the budgets of a problem; None if none was found in time.

    Example:
        >>> problem = AllocationProblem([[9, 3]] * 2, resources={"size": [[2, 4]] * 2}, budgets={"size": 6})
        >>> optimum_of(problem, np.array([[5.0, 4.0], [5.0, 1.0]])).tolist()
        [0, 1]
    """
    scores = scores if problem.norm == 1 else np.maximum(scores, 0.0)
    asked = replace(problem, objective=np.where(problem.allowed, scores, np.inf), objective_se=None)
    try:
        found: IntArray = QuickSolver().solve(asked).choices
    except (InfeasibleError, TimeoutError):
        return None
    return found
