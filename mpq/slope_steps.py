"""Steps along the slopes of a plan's divergence: plans that a gradient at the plan holds to be better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import AllocationProblem
from mpq.quick_solver import optimum_of

TRUSTS = tuple(2 ** (step / 3) for step in range(-3, 7))  # factors on the second order: from half to four times
_MOST_GAINED = 0.5  # of the divergence: a step that promises more goes beyond where slopes hold


@dataclass(frozen=True, eq=False)
class Slopes:
    """What is known around one plan.

    Attributes:
        first: (units, options) change of the divergence to first order, 0 for the plan's own option.
        second: (units, options) scores of the old and the new option added up where they differ, else 0: twice the size
            that a table gives the second order if both errors have nothing to do with each other.
        divergence: of the plan, on the data of the gradient.
    """

    first: FloatArray
    second: FloatArray
    divergence: float

    @classmethod
    def around(cls, choices: IntArray, first: FloatArray, scores: FloatArray, divergence: float) -> Slopes:
        """Slopes and the (units, options) scores of a table, around a plan."""
        rows = np.arange(len(choices))
        second = np.nan_to_num(scores, posinf=0.0) + scores[rows, choices][:, None]
        second[rows, choices] = 0.0
        return cls(first, second, divergence)


def slope_steps(problem: AllocationProblem, slopes: Slopes, choices: IntArray, predicted: float) -> Iterator[IntArray]:
    """Plans that keep the budgets and are better to first order, from bold steps to careful ones.

        minimise  Σ_u first[u, c_u] + τ k second[u, c_u]     k = divergence / predicted,  τ = 0.5, 0.63, ..., 4

    The second order is the price of going far: a change ΔW = e' - e from one quantisation error to another costs
    ½ ΔW·HΔW, which is score(e') + score(e) where the errors have nothing in common and the table is right. It is wrong
    by some factor, so that a ladder of τ is solved, as in a line search; which step is right, measuring says.

    Args:
        problem: the budgets; its own scores, and those of pairs, are not looked at. Its norm is 1.
        slopes: around the plan.
        choices: the plan.
        predicted: the sum of the table's scores of the plan, more than 0.

    Example:
        Two layers of one size. The first gains more from six bits than the second loses with two:

        >>> problem = AllocationProblem([[0.2, 0.05, 0]] * 2, resources={"size": [[2, 4, 6]] * 2}, budgets={"size": 8})
        >>> plan, first = np.array([1, 1]), np.array([[0.9, 0, -0.3], [0.05, 0, -0.01]])
        >>> slopes = Slopes.around(plan, first, problem.objective, divergence=0.1)
        >>> [step.tolist() for step in slope_steps(problem, slopes, plan, predicted=0.1)]
        [[2, 0]]
    """
    rows, seen = np.arange(len(choices)), {choices.tobytes()}
    budgets = replace(problem, pairs={})
    for trust in TRUSTS:
        scores = slopes.first + trust * slopes.divergence / predicted * slopes.second
        found = optimum_of(budgets, scores)
        if found is None or found.tobytes() in seen:
            continue
        if 0 < -float(scores[rows, found].sum()) < _MOST_GAINED * slopes.divergence:
            seen.add(found.tobytes())
            yield found
