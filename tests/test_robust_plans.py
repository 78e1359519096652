"""The robust mode against enumeration, with solvers that prove much, little and nothing."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpq.problem import AllocationProblem, InfeasibleError, Proof
from mpq.random_problems import close, random_problem
from mpq.solvers import ExhaustiveSolver, GreedySolver, ILPSolver
from mpq.solvers.robust_plans import robust, with_residuals, worst_case

SUMS = ("ties", "forbidden", "pairs", "transitions", "max_formats", "format_costs", "peaks", "negative", "whole")


def noisy(seed, *, scale=1.0, **how):
    problem = random_problem(seed, **how)
    rng = np.random.default_rng(seed + 77)
    errors = rng.uniform(0, 4, problem.objective.shape) ** 2 * (rng.random(problem.objective.shape) < 0.8)
    return replace(problem, objective=problem.objective * scale, objective_se=errors * scale)


def plans(problem):
    """Every plan that keeps all rules."""
    layers, options = problem.objective.shape
    for choices in itertools.product(range(options), repeat=layers):
        if all(problem.objective[i, c] < math.inf for i, c in enumerate(choices)) and problem.is_feasible(choices):
            yield choices


def worst_by_loops(problem, choices, deviations, uncertainty):
    errors = [problem.objective_se[i, c] for i, c in enumerate(choices)]
    if uncertainty == "interval":
        scores = np.array(problem.objective)
        for i, c in enumerate(choices):
            scores[i, c] += deviations * errors[i]
        return replace(problem, objective=scores).evaluate(choices)[0]
    return problem.evaluate(choices)[0] + deviations * sum(error**2 for error in errors) ** 0.5


@dataclass(frozen=True)
class Loose:
    """The worst plan under the budgets, with a bound that is true but far off; or none at all."""

    below: float | None

    def solve(self, problem):
        found = max(plans(problem), key=lambda choices: problem.evaluate(choices)[0])
        least = min(problem.evaluate(choices)[0] for choices in plans(problem))
        bound = None if self.below is None else least - self.below * abs(least)
        return problem.allocation(found, status="heuristic", bound=bound)


@pytest.mark.parametrize(("uncertainty", "kinds"), [("independent", SUMS), ("interval", (*SUMS, "norm"))])
@pytest.mark.parametrize("solver", [ExhaustiveSolver(), ILPSolver()], ids=["exhaustive", "ilp"])
def test_the_least_worst_case_of_all_plans(uncertainty, kinds, solver):
    differs = 0
    for seed in range(60 if isinstance(solver, ExhaustiveSolver) else 12):
        problem = noisy(seed, kinds=kinds)
        deviations = (0.3, 1.0, 4.0)[seed % 3]
        values = [worst_by_loops(problem, choices, deviations, uncertainty) for choices in plans(problem)]
        if not values:
            with pytest.raises(InfeasibleError):
                robust(problem, deviations=deviations, uncertainty=uncertainty, solver=solver)
            continue
        found = robust(problem, deviations=deviations, uncertainty=uncertainty, solver=solver)
        chosen = found.allocation.choices
        assert close(found.worst_case, min(values))
        assert close(found.worst_case, worst_by_loops(problem, chosen, deviations, uncertainty))
        assert found.proof == Proof("optimal", found.worst_case, 0.0)
        assert problem.is_feasible(chosen)
        assert (found.allocation.objective, found.allocation.usage) == problem.evaluate(chosen)
        nominal = min(problem.evaluate(choices)[0] for choices in plans(problem))
        assert found.allocation.proof.bound <= nominal or close(found.allocation.proof.bound, nominal)
        differs += found.allocation.objective > nominal + 1e-9
    assert differs  # caution changed the plan


@pytest.mark.parametrize("solver", [GreedySolver(), Loose(0.0), Loose(0.2), Loose(None)], ids=repr)
@pytest.mark.parametrize("uncertainty", ["independent", "interval"])
def test_solvers_without_a_proof_give_a_plan_and_a_true_bound(solver, uncertainty):
    for seed in range(25):
        problem = noisy(seed, kinds=("ties", "forbidden", "negative"))
        values = [worst_by_loops(problem, choices, 2.0, uncertainty) for choices in plans(problem)]
        if not values:
            continue
        found = robust(problem, deviations=2.0, uncertainty=uncertainty, solver=solver)
        assert found.worst_case >= min(values) or close(found.worst_case, min(values))
        bound = found.proof.bound
        assert bound is None or bound <= min(values) or close(bound, min(values))
        if found.proof.status == "optimal":
            assert close(found.worst_case, min(values))
        if solver == Loose(None):
            assert found.proof == Proof("heuristic") or len(values) == 1


def test_a_loose_bound_is_not_thrown_away():
    problem = AllocationProblem(objective=[[4.0, 5.0], [2.0, 3.0]], objective_se=[[3.0, 0.0], [4.0, 0.0]])
    found = robust(problem, solver=Loose(0.1))
    assert found.proof.bound >= 0.5 * 8.0


def test_units_do_not_matter():
    for seed in range(30):
        problem = noisy(seed, kinds=("ties", "forbidden"))
        if not list(plans(problem)):
            continue
        found = robust(problem, deviations=2.0, solver=ExhaustiveSolver())
        for scale in (1e-200, 1e-12, 1e12, 1e150):
            again = robust(
                noisy(seed, scale=scale, kinds=("ties", "forbidden")), deviations=2.0, solver=ExhaustiveSolver()
            )
            assert close(again.worst_case, found.worst_case * scale)
            assert again.proof.status == "optimal"


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1.0, 1e12, 1e200])
def test_caution_changes_the_plan_at_any_scale(scale):
    problem = AllocationProblem(
        objective=np.array([[5.0, 4.8], [1.0, 2.0]]) * scale, objective_se=np.array([[0.1, 1.0], [0.2, 0.0]]) * scale
    )
    assert robust(problem, deviations=2.0).allocation.choices.tolist() == [0, 0]
    assert robust(problem, deviations=0.1).allocation.choices.tolist() == [1, 0]


class Tiring:
    """Exact twice; from then on the worst plan with the true bound."""

    def __init__(self):
        self.solved = 0

    def solve(self, problem):
        self.solved += 1
        return ExhaustiveSolver().solve(problem) if self.solved <= 2 else Loose(0.0).solve(problem)


def test_a_plan_that_was_not_found_is_not_proved_away():
    unproved = 0
    for seed in range(25):
        problem = noisy(seed, kinds=("forbidden",))
        values = [worst_by_loops(problem, choices, 1.5, "independent") for choices in plans(problem)]
        if not values:
            continue
        found = robust(problem, deviations=1.5, solver=Tiring())
        assert found.proof.bound <= min(values) or close(found.proof.bound, min(values))
        assert found.proof.status != "optimal" or close(found.worst_case, min(values))
        unproved += found.proof.status == "heuristic"
    assert unproved


def test_no_deviations_and_no_errors_are_the_nominal_plan():
    problem = noisy(3, kinds=())
    nominal = ExhaustiveSolver().solve(problem)
    for found in (robust(problem, deviations=0.0), robust(replace(problem, objective_se=problem.objective * 0))):
        assert found.allocation.choices.tolist() == nominal.choices.tolist()
        assert found.worst_case == nominal.objective
        assert found.allocation.proof.gap == 0


def test_more_caution_never_costs_less_nominally_nor_has_more_variance():
    rng = np.random.default_rng(2)
    problem = AllocationProblem(
        objective=rng.uniform(0, 3, (5, 4)),
        objective_se=rng.uniform(0, 3, (5, 4)),
        resources={"size": rng.random((5, 4))},
        budgets={"size": 3.0},
    )
    found = [robust(problem, deviations=k).allocation for k in (0.0, 0.3, 1.0, 4.0)]
    objectives = [allocation.objective for allocation in found]
    variances = [(problem.objective_se[np.arange(5), allocation.choices] ** 2).sum() for allocation in found]
    assert objectives == sorted(objectives)
    assert variances == sorted(variances, reverse=True)
    assert len(set(objectives)) > 1


def test_hundreds_of_layers_take_few_solves():
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.lognormal(0, 1, (200, 5)), axis=1)
    size = np.sort(rng.random((200, 5)), axis=1)
    problem = AllocationProblem(
        objective=scores,
        objective_se=scores * rng.uniform(0, 1, scores.shape),
        resources={"size": size},
        budgets={"size": 90.0},
    )
    solved = []

    @dataclass(frozen=True)
    class Counted:
        def solve(self, asked):
            solved.append(asked)
            return GreedySolver().solve(asked)

    found = robust(problem, deviations=2.0, solver=Counted())
    assert len(solved) <= 12
    assert found.proof.gap < 1e-3


def test_what_cannot_be_asked_is_said():
    problem = AllocationProblem(objective=[[1.0, 2.0]], objective_se=[[1.0, 1.0]])
    with pytest.raises(ValueError, match="give the problem objective_se"):
        robust(replace(problem, objective_se=None))
    with pytest.raises(ValueError, match="deviations must be a finite number from 0, got -1"):
        robust(problem, deviations=-1)
    with pytest.raises(ValueError, match="one of independent, interval, got 'both'"):
        robust(problem, uncertainty="both")
    with pytest.raises(ValueError, match="norm=inf: use uncertainty='interval'"):
        worst_case(replace(problem, norm=math.inf), [0])


def residual_by_loops(problem, choices, measured, counts):
    """σ of with_residuals, in plain loops; ``counts``: the layers that count in each plan."""
    ratios = [math.log(y / problem.evaluate(plan)[0]) for plan, y in zip(choices, measured, strict=True)]
    mean = sum(n * r for n, r in zip(counts, ratios, strict=True)) / sum(counts)
    squares = sum(n * (r - mean) ** 2 for n, r in zip(counts, ratios, strict=True))
    return math.sqrt(squares / (len(ratios) - 1))


def test_residuals_become_relative_errors():
    rng = np.random.default_rng(5)
    objective = np.where([[True, True, False]] * 6, rng.uniform(1, 9, (6, 3)), np.inf)
    problem = AllocationProblem(objective=objective)
    choices = rng.integers(0, 2, (8, 6))
    measured = [problem.evaluate(plan)[0] * math.exp(rng.normal(0.4, 0.1)) for plan in choices]
    counts = []
    for plan in choices:
        scores = [objective[i, c] for i, c in enumerate(plan)]
        counts.append(sum(scores) ** 2 / sum(score**2 for score in scores))
    for uncertainty, n in (("independent", counts), ("interval", [1.0] * 8)):
        noisy_problem = with_residuals(problem, choices, measured, uncertainty=uncertainty)
        sigma = residual_by_loops(problem, choices, measured, n)
        assert np.allclose(noisy_problem.objective_se[:, :2], sigma * objective[:, :2], rtol=1e-12)


def test_residuals_recover_the_error_that_was_put_in():
    rng = np.random.default_rng(6)
    problem = AllocationProblem(objective=rng.uniform(1, 9, (12, 3)))
    choices, rows = rng.integers(0, 3, (4000, 12)), np.arange(12)
    measured = [1.7 * (problem.objective[rows, plan] * (1 + 0.2 * rng.standard_normal(12))).sum() for plan in choices]
    found = with_residuals(problem, choices, measured).objective_se / problem.objective
    assert found == pytest.approx(0.2, rel=0.05)


def test_residuals_need_plans_and_positive_objectives():
    problem = AllocationProblem(objective=[[1.0, -2.0]])
    with pytest.raises(ValueError, match="at least 3 plans"):
        with_residuals(problem, [[0], [0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="predicted objectives above 0, plan 1 has -2"):
        with_residuals(problem, [[0], [1], [0]], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="measured objectives above 0, plan 2 has 0"):
        with_residuals(problem, [[0], [0], [0]], [1.0, 1.0, 0.0])
