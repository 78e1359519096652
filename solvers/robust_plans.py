"""Robust allocation: the plan whose worst case within the errors of the scores is the least."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mpq.allocation import Status
from mpq.arrays import FloatArray, IntArray
from mpq.problem import BUDGET_TOLERANCE, Allocation, AllocationProblem, Proof

from .auto import AutoSolver

if TYPE_CHECKING:
    from . import Solver

Uncertainty = Literal["independent", "interval"]


@dataclass(frozen=True, eq=False)
class RobustAllocation:
    """A plan and what it costs at worst.

    Attributes:
        allocation: the plan as the original problem sees it: nominal objective, usage, and a proof whose gap says how
            much nominal objective the caution costs at most.
        worst_case: the objective at the bad end of the errors.
        proof: how good the plan is proved to be for the worst case; its bound is a bound on that.
        deviations: how many standard errors were guarded against.
        uncertainty: "independent" or "interval".
    """

    allocation: Allocation
    worst_case: float
    proof: Proof
    deviations: float
    uncertainty: Uncertainty


def robust(
    problem: AllocationProblem,
    *,
    deviations: float = 1.0,
    uncertainty: Uncertainty = "independent",
    solver: "Solver | None" = None,
) -> RobustAllocation:
    """The plan with the least worst case when scores are only known to their standard errors.

    Formula, with scores s, standard errors e, k deviations and the options c of a plan:

        interval:     minimise  objective with s[i, c_i] + k e[i, c_i] in place of s[i, c_i]
        independent:  minimise  Σ s[i, c_i] + terms that have no error + k sqrt(Σ e[i, c_i]²)

    "interval" guards against every score being too low at once. "independent" takes errors of layers (tied ones too)
    as independent, so that they partly cancel: for normal errors k = 1.645 is the 95 % quantile of a plan's objective.
    The budgets stay as they are: they are costs, not estimates.

    Source: uncertainty by intervals is that of Soyster (1973), by ellipsoids that of Ben-Tal and Nemirovski (1999);
    both from memory. The search below is the dichotomic one of parametric programming: the square root is concave and
    rising, so the best plan is among those that minimise Σ s + λ Σ e² for some λ ≥ 0, which are ordinary problems.
    Solving one gives a plan and the cut Σ s + λ Σ e² ≥ its bound; between two neighbouring cuts no plan is below the
    corner where they meet. The lowest corner is looked at next, with the λ of the line through its two plans, until no
    corner is below the best plan.

    Cost: two solves for "interval"; for "independent" two and as many more as plans lie on that front near the best
    one, mostly two to ten.

    Args:
        problem: with `objective_se`.
        deviations: how many standard errors to guard against, from 0.
        uncertainty: "independent" (a sum as objective only) or "interval" (any norm).
        solver: solves the ordinary problems; `AutoSolver()` by default. "optimal" is only said with an exact one.

    Raises:
        InfeasibleError: if no plan meets all budgets.
        ValueError: without `objective_se`, for a negative `deviations`, an unknown `uncertainty`, or "independent" for
            a norm other than 1.

    Example:
        8 bits scores better by 0.2, but with an error of 1:

        >>> problem = AllocationProblem(objective=[[5.0, 4.8]], objective_se=[[0.1, 1.0]], options=("int4", "int8"))
        >>> cautious = robust(problem, deviations=2.0)
        >>> cautious.allocation.options, cautious.allocation.objective, cautious.worst_case
        (('int4',), 5.0, 5.2)
    """
    _check(problem, deviations, uncertainty)
    inner = AutoSolver() if solver is None else solver
    if uncertainty == "interval":
        shifted = replace(problem, objective=problem.objective + deviations * _errors(problem))
        nominal, found = inner.solve(problem), inner.solve(shifted)
        best, bound, status = found.choices, found.proof.bound, found.proof.status
    else:
        nominal = inner.solve(problem)
        best, bound, status = _front_search(problem, deviations, inner, nominal)
    value = worst_case(problem, best, deviations=deviations, uncertainty=uncertainty)
    is_best = nominal.proof.status == "optimal" and problem.evaluate(best)[0] <= nominal.objective
    return RobustAllocation(
        allocation=problem.allocation(best, status="optimal" if is_best else "heuristic", bound=nominal.proof.bound),
        worst_case=value,
        proof=Proof.of(value, value if status == "optimal" else bound, status),
        deviations=deviations,
        uncertainty=uncertainty,
    )


def worst_case(
    problem: AllocationProblem,
    choices: npt.ArrayLike,
    *,
    deviations: float = 1.0,
    uncertainty: Uncertainty = "independent",
) -> float:
    """The objective of a plan at the bad end of its errors; the formula is that of `robust`.

    Raises:
        ValueError: as `robust`, and for choices that are not one option index a layer.

    Example:
        >>> problem = AllocationProblem(objective=[[1.0], [2.0]], objective_se=[[3.0], [4.0]])
        >>> worst_case(problem, [0, 0]), worst_case(problem, [0, 0], uncertainty="interval")
        (8.0, 10.0)
    """
    _check(problem, deviations, uncertainty)
    errors = _errors(problem)
    if uncertainty == "interval":
        return replace(problem, objective=problem.objective + deviations * errors).evaluate(choices)[0]
    nominal = problem.evaluate(choices)[0]
    chosen = np.asarray(choices, dtype=np.int64)
    return nominal + deviations * math.hypot(*errors[np.arange(len(chosen)), chosen].tolist())


def with_residuals(
    problem: AllocationProblem,
    choices: npt.ArrayLike,
    measured: Sequence[float] | FloatArray,
    *,
    uncertainty: Uncertainty = "independent",
) -> AllocationProblem:
    """The problem with standard errors from how far measured plans lie from their predictions.

    Formula, for plans p with predicted objective x_p and measured one y_p:

        r_p = ln(y_p / x_p),   σ² = Σ n_p (r_p − r̄)² / (plans − 1),   objective_se = σ |objective|

    r̄ = Σ n_p r_p / Σ n_p is left out of the error: a factor common to all plans does not change which is best. To
    first order σ is the relative error of one score. Independent errors partly cancel within a plan, whose relative
    error is σ / sqrt(n_p) with n_p = (Σ |x|)² / Σ x² over its scores, the number of layers that count. For "interval"
    errors nothing cancels: n_p = 1, and σ is the standard deviation of the log ratios.

    Earlier standard errors are replaced: what they stand for is part of the ratios as well.

    Args:
        problem: whose predictions were tested.
        choices: (plans, layers) option indices of the measured plans; from 3 plans.
        measured: (plans,) what was measured for each, positive, in the measure of the objective.
        uncertainty: how `robust` will take the errors.

    Raises:
        ValueError: for fewer than 3 plans, shapes that differ, or a predicted or measured objective that is not
            positive.

    Example:
        >>> problem = AllocationProblem(objective=[[1.0, 2.0]])
        >>> with_residuals(problem, [[0], [1], [1]], [1.1, 2.0, 1.9]).objective_se.round(3)
        array([[0.074, 0.149]])
    """
    _check_name(uncertainty)
    plans, results = np.asarray(choices), np.asarray(measured, dtype=np.float64)
    if plans.ndim != 2 or len(plans) < 3 or results.shape != (len(plans),):
        raise ValueError(
            f"measured must have one entry a plan and choices at least 3 plans (plans, layers), got shapes "
            f"{results.shape} and {plans.shape}"
        )
    predicted = np.array([problem.evaluate(plan)[0] for plan in plans])
    for role, values in (("predicted", predicted), ("measured", results)):
        for plan in np.flatnonzero(~((values > 0) & (values < np.inf)))[:1]:
            raise ValueError(f"ratios need {role} objectives above 0, plan {plan} has {values[plan]}")
    ratios = np.log(results) - np.log(predicted)
    weights = np.ones(len(plans))
    if uncertainty == "independent":
        scores = np.abs(np.take_along_axis(problem.objective, plans.T, axis=1)).T
        scores = scores / scores.max(axis=1, keepdims=True)
        weights = scores.sum(axis=1) ** 2 / (scores**2).sum(axis=1)
    centred = ratios - np.average(ratios, weights=weights)
    spread = math.sqrt(float((weights * centred**2).sum()) / (len(plans) - 1))
    errors = np.where(problem.allowed, spread * np.abs(problem.objective), 0.0)
    return replace(problem, objective_se=errors)


class _Cut(NamedTuple):
    """What one solve says: its plan at (mean, variance), and that mean + weight × variance ≥ bound for every plan."""

    weight: float  # inf: the variance alone
    bound: float
    mean: float
    variance: float
    choices: IntArray
    status: Status


class _Front:
    """Cuts of the (mean, variance) plane, and the worst case of its points: mean + scale × sqrt(variance)."""

    def __init__(self, problem: AllocationProblem, deviations: float, solver: "Solver") -> None:
        errors = _errors(problem)
        unit = float(errors[problem.allowed].max())
        self.problem, self.solver = problem, solver
        self.squares = (errors / unit) ** 2 if unit else errors
        self.scale = deviations * unit

    def worst(self, mean: float, variance: float) -> float:
        return mean + self.scale * math.sqrt(max(variance, 0.0))

    def of(self, cut: _Cut) -> float:
        return self.worst(cut.mean, cut.variance)

    def cut(self, weight: float) -> _Cut:
        if weight == math.inf:
            objective = np.where(self.problem.allowed, self.squares, np.inf)
            asked = replace(self.problem, objective=objective, objective_se=None, pairs={}, format_costs=None)
        else:
            asked = replace(self.problem, objective=self.problem.objective + weight * self.squares, objective_se=None)
        return self.record(weight, self.solver.solve(asked))

    def record(self, weight: float, found: Allocation) -> _Cut:
        variance = math.fsum(self.squares[np.arange(len(found.choices)), found.choices].tolist())
        mean, bound = self.problem.evaluate(found.choices)[0], found.proof.bound
        return _Cut(weight, -math.inf if bound is None else bound, mean, variance, found.choices, found.proof.status)

    def corner(self, left: _Cut, right: _Cut) -> tuple[float, float]:
        """(mean, variance) where two neighbouring cuts meet."""
        if -math.inf in (left.bound, right.bound):
            return -math.inf, 0.0
        if right.weight == math.inf:
            variance = right.bound
        else:
            variance = (right.bound - left.bound) / (right.weight - left.weight)
        return left.bound - left.weight * max(variance, 0.0), max(variance, 0.0)

    def between(self, left: _Cut, right: _Cut) -> float | None:
        """The weight for which both plans are equally good, None where that is outside their own weights."""
        if not right.variance < left.variance:
            return None
        weight = (right.mean - left.mean) / (left.variance - right.variance)
        return weight if left.weight < weight < right.weight else None


def _front_search(
    problem: AllocationProblem, deviations: float, solver: "Solver", nominal: Allocation
) -> tuple[IntArray, float | None, Status]:
    """The best plan for independent errors, a bound on the worst case of any, and what that proves."""
    front = _Front(problem, deviations, solver)
    if not front.scale or not front.squares.any():
        return nominal.choices, nominal.proof.bound, nominal.proof.status
    first, last = front.record(0.0, nominal), front.cut(math.inf)
    cuts, best = [first, last], min(first, last, key=front.of)
    neighbours = [(front.worst(*front.corner(first, last)), 0, first, last)]
    closed = math.inf
    while neighbours:
        corner, _, left, right = heapq.heappop(neighbours)
        weight = front.between(left, right)
        if corner >= front.of(best) - BUDGET_TOLERANCE * abs(front.of(best)) or weight is None:
            closed = min(closed, corner)
            continue
        middle = front.cut(weight)
        cuts.append(middle)
        best = min(best, middle, key=front.of)
        line = left.mean + weight * left.variance
        line -= 1e-12 * (abs(left.mean) + weight * left.variance)
        if middle.bound >= line:
            continue  # an edge of the front: between its ends, which are plans already looked at, there is nothing
        mean, variance = front.corner(left, right)
        if middle.bound <= mean + weight * variance:  # the cut takes nothing away
            closed = min(closed, corner)
            continue
        pairs = ((left, middle), (middle, right))
        corners = [front.worst(*front.corner(*pair)) for pair in pairs]
        if middle.mean + weight * middle.variance >= line:
            closed = min(closed, *corners)  # no plan was found below the line, which does not prove that there is none
            continue
        for place, pair in zip(corners, pairs, strict=True):
            heapq.heappush(neighbours, (place, len(cuts), *pair))
    bound = min(closed, front.of(best))
    if bound >= front.of(best) - BUDGET_TOLERANCE * abs(front.of(best)):
        return best.choices, bound, "optimal"
    proved: Status = "heuristic" if any(cut.status == "heuristic" for cut in cuts) else "feasible"
    return best.choices, None if bound == -math.inf else bound, proved


def _check(problem: AllocationProblem, deviations: float, uncertainty: str) -> None:
    _check_name(uncertainty)
    if problem.objective_se is None:
        raise ValueError(
            "robust allocation needs standard errors: give the problem objective_se, or use with_residuals"
        )
    if not 0 <= deviations < math.inf:
        raise ValueError(f"deviations must be a finite number from 0, got {deviations}")
    if uncertainty == "independent" and problem.norm != 1:
        raise ValueError(
            f"uncertainty='independent' is for a sum, the problem has norm={problem.norm:g}: use uncertainty='interval'"
        )


def _check_name(uncertainty: str) -> None:
    if uncertainty not in get_args(Uncertainty):
        raise ValueError(f"uncertainty must be one of {', '.join(get_args(Uncertainty))}, got {uncertainty!r}")


def _errors(problem: AllocationProblem) -> FloatArray:
    """Standard errors, 0 where an option is forbidden."""
    errors = np.zeros_like(problem.objective) if problem.objective_se is None else problem.objective_se
    return np.where(problem.allowed, errors, 0.0)
