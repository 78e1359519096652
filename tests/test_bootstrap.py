"""Plans of drawn tables against the same draws by loops."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import by_loops, close, random_problem
from mpq.solvers import ExhaustiveSolver, GreedySolver
from mpq.solvers.bootstrap import near_optimal_plans

KINDS = ("ties", "forbidden", "pairs", "transitions", "max_formats", "format_costs", "peaks", "norm")


def noisy(seed):
    problem = random_problem(seed, kinds=KINDS)
    errors = np.random.default_rng(seed).uniform(0, 3, problem.objective.shape)
    return replace(problem, objective_se=errors)


def test_plans_counts_and_frequencies_are_those_of_the_draws():
    several = 0
    for seed in range(40):
        problem = noisy(seed)
        if by_loops(problem)[0] is None:
            with pytest.raises(InfeasibleError):
                near_optimal_plans(problem, draws=3, solver=ExhaustiveSolver())
            continue
        found = near_optimal_plans(problem, draws=20, seed=seed, solver=ExhaustiveSolver())
        again = near_optimal_plans(problem, draws=20, seed=seed, solver=ExhaustiveSolver())
        assert found.choices.tolist() == again.choices.tolist()
        assert found.counts.sum() == 20
        assert len({tuple(plan) for plan in found.choices.tolist()}) == len(found.counts)
        assert found.counts.tolist() == sorted(found.counts.tolist(), reverse=True)
        assert (found.regret >= 0).all()
        frequency = np.zeros(problem.objective.shape)
        for plan, count, objective in zip(found.choices, found.counts, found.objectives, strict=True):
            assert problem.is_feasible(plan)
            assert objective == problem.evaluate(plan)[0]
            for layer, option in enumerate(plan):
                frequency[layer, option] += count / 20
        assert np.allclose(found.frequency, frequency, atol=1e-12)
        kept = [frequency[layer, option] for layer, option in enumerate(found.nominal.choices)]
        assert np.allclose(found.stability, kept, atol=1e-12)
        several += len(found.counts) > 1
    assert several > 5


def test_replicates_are_solved_as_they_are():
    problem = random_problem(4, kinds=("forbidden",))
    rng = np.random.default_rng(0)
    tables = rng.uniform(0, 10, (12, *problem.objective.shape))
    found = near_optimal_plans(problem, replicates=tables, solver=ExhaustiveSolver())
    plans = {}
    for table, regret in zip(tables, found.regret, strict=True):
        drawn = replace(problem, objective=np.where(problem.allowed, table, np.inf))
        plan = tuple(ExhaustiveSolver().solve(drawn).choices.tolist())
        plans[plan] = plans.get(plan, 0) + 1
        assert close(drawn.evaluate(found.nominal.choices)[0] - regret, by_loops(drawn)[0])
    assert {tuple(plan): count for plan, count in zip(found.choices.tolist(), found.counts, strict=True)} == plans


def test_draws_are_normal_with_the_standard_errors():
    """Two options a layer without budgets: the second wins with probability Φ(difference / sqrt(e₁² + e₂²))."""
    rng = np.random.default_rng(1)
    objective, errors = rng.uniform(0, 2, (30, 2)), rng.uniform(0.2, 2, (30, 2))
    problem = AllocationProblem(objective=objective, objective_se=errors)
    found = near_optimal_plans(problem, draws=1500, solver=GreedySolver())
    for layer in range(30):
        distance = (objective[layer, 0] - objective[layer, 1]) / math.hypot(*errors[layer])
        expected = 0.5 * (1 + math.erf(distance / math.sqrt(2)))
        assert found.frequency[layer, 1] == pytest.approx(expected, abs=0.06)


def test_a_sure_layer_is_stable_and_another_seed_draws_other_tables():
    problem = AllocationProblem(objective=[[5.0, 1.0], [3.0, 2.9]], objective_se=[[0.1, 0.1], [1.0, 1.0]])
    first, second = (near_optimal_plans(problem, draws=40, seed=seed, solver=ExhaustiveSolver()) for seed in (0, 1))
    assert first.stability[0] == 1
    assert 0.2 < first.stability[1] < 0.8
    assert first.regret.tolist() != second.regret.tolist()
    assert "40 draws, 2 different plans" in repr(first)


def test_what_cannot_be_drawn_is_said():
    problem = AllocationProblem(objective=[[1.0, 2.0]], objective_se=[[1.0, 1.0]], layers=("fc",))
    with pytest.raises(ValueError, match=r"objective_se.*replicates=\(draws, layers, options\)"):
        near_optimal_plans(replace(problem, objective_se=None))
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        near_optimal_plans(problem, draws=0)
    with pytest.raises(ValueError, match=r"\(draws, 1, 2\), got \(4, 2\)"):
        near_optimal_plans(problem, replicates=np.zeros((4, 2)))
    with pytest.raises(ValueError, match="replicate 1 has nan for 'fc', 'option 0'"):
        near_optimal_plans(problem, replicates=[[[1.0, 2.0]], [[math.nan, 2.0]]])
