"""Greedy: never better than the optimum, never over budget, its bound never above the optimum, and near it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import ExhaustiveSolver, GreedySolver, ILPSolver
from mpq.solvers.descent import _hull_path, descend
from mpq.solvers.reduction import merge

TAKEN = ("ties", "forbidden", "negative", "whole", "norm")


class TestGreedy(SolverConformance):
    @pytest.fixture
    def solver(self):
        return GreedySolver()


@pytest.mark.parametrize("wide", [False, True])
def test_between_bound_and_optimum(wide):
    optimal = 0
    for seed in range(700):
        problem = random_problem(seed, kinds=TAKEN, wide=wide)
        if not problem.features <= GreedySolver.features:
            continue
        best, found = answer(ExhaustiveSolver(), problem), answer(GreedySolver(), problem)
        if isinstance(best, InfeasibleError):
            assert {k: pytest.approx(v, rel=1e-9) for k, v in best.reachable.items()} == found.reachable
            continue
        assert problem.is_feasible(found.choices)
        assert found.objective >= best.objective or close(found.objective, best.objective)
        assert found.proof.bound <= best.objective or close(found.proof.bound, best.objective)
        assert found.proof.status != "optimal" or close(found.objective, best.objective)
        optimal += close(found.objective, best.objective)
    assert optimal > 350


tables = st.integers(1, 4).flatmap(
    lambda options: st.lists(
        st.lists(st.tuples(st.integers(-3, 9), st.integers(-3, 9)), min_size=options, max_size=options),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tables, st.integers(-10, 40))
def test_small_whole_tables(table, budget):
    """Zeros, duplicates, plateaus and negative numbers, one budget."""
    pairs = np.array(table, dtype=float)
    problem = AllocationProblem(objective=pairs[:, :, 0], resources={"size": pairs[:, :, 1]}, budgets={"size": budget})
    best, found = answer(ExhaustiveSolver(), problem), answer(GreedySolver(), problem)
    if isinstance(best, InfeasibleError):
        assert found.reachable == best.reachable
    else:
        assert found.proof.bound <= best.objective + 1e-9 <= found.objective + 2e-9
        assert not problem.violations(found.choices)


def test_the_hull_looks_past_flat_steps():
    """A step that gains nothing hides a good one: a rule that only offers the next option is stuck before it."""
    score, cost = np.array([[0.0, 9.0, 9.0, 10.0]]), np.array([[4.0, 3.0, 2.0, 1.0]])
    path = _hull_path(score, cost, np.ones((1, 4), dtype=bool))
    assert path.start.tolist() == [0]
    assert path.after.tolist() == [3]  # 10 for 3 units; by way of the flat step, 9 for 2 and 1 for 1, costs more first
    assert path.slope.tolist() == [10 / 3]


def test_hulls_by_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(200):
        score, cost = rng.integers(0, 8, (2, 1, 5)).astype(float)
        path = _hull_path(score, cost, np.ones((1, 5), dtype=bool))
        corners = [int(path.start[0]), *path.after.tolist()]
        for share in rng.uniform(0, 1, 20):  # prices between the slopes: some corner is best
            price = share * 10
            assert min(score[0] + price * cost[0]) == pytest.approx(min((score[0] + price * cost[0])[corners]))
        assert (np.diff(path.slope) >= 0).all()
        assert score[0, corners[0]] == score.min()
        assert cost[0, corners[-1]] == cost.min()


def test_the_bound_is_that_of_the_linear_relaxation():
    """Two layers, one budget: best 5 + 1 fits 5/6 of the way down the steeper of two hulls."""
    core = merge(
        AllocationProblem(
            objective=[[0.0, 6.0], [0.0, 9.0]], resources={"size": [[6.0, 0.0], [6.0, 0.0]]}, budgets={"size": 7.0}
        )
    )
    found = descend(core)
    assert found.choice.tolist() == [1, 0]
    assert found.bound == pytest.approx(5.0, rel=1e-8)  # 6 × 5/6


def test_exchange_uses_what_is_left():
    """The hull step frees more than needed; a double exchange takes a cheaper pair instead."""
    problem = AllocationProblem(
        objective=[[0.0, 10.0], [0.0, 8.5]],
        resources={"size": [[10.0, 0.0], [6.0, 0.0]]},
        budgets={"size": 10.0},
    )
    assert GreedySolver().solve(problem).objective == ExhaustiveSolver().solve(problem).objective == 8.5


def test_the_best_plan_within_budget_is_optimal_at_once():
    problem = AllocationProblem(objective=[[0.3, 0.1]] * 3, resources={"size": [[1.0, 2.0]] * 3}, budgets={"size": 6.0})
    assert GreedySolver().solve(problem).proof.status == "optimal"


def test_what_it_does_not_take_is_refused_with_the_way_out():
    zero = np.zeros((2, 2))
    for extra in (
        {"pairs": {(0, 1): zero}},
        {"max_formats": 1},
        {"format_costs": [0, 0]},
        {"norm": np.inf},
        {"peak_resources": {"memory": np.zeros((1, 2, 2))}, "peak_budgets": {"memory": 1.0}},
    ):
        with pytest.raises(ValueError, match="'greedy' does not take .*'ilp'"):
            GreedySolver().solve(AllocationProblem(objective=zero, **extra))


def one_step_heap(problem):
    """The rule of other tools: from the cheapest options, always the next wider option with the best gain per byte."""
    objective, size = problem.objective, problem.resources["size"]
    choices, budget = [0] * len(objective), problem.budgets["size"]
    while True:
        used = sum(size[i, k] for i, k in enumerate(choices))
        steps = [
            ((objective[i, k] - objective[i, k + 1]) / (size[i, k + 1] - size[i, k]), i)
            for i, k in enumerate(choices)
            if k + 1 < objective.shape[1] and used + size[i, k + 1] - size[i, k] <= budget
        ]
        if not steps or max(steps)[0] <= 0:
            return choices
        choices[max(steps)[1]] += 1


def sorted_prefix(problem):
    """Another: layers sorted by their gain from the narrowest to the widest option, widened while they fit."""
    objective, size = problem.objective, problem.resources["size"]
    choices, budget = [0] * len(objective), problem.budgets["size"]
    for layer in np.argsort(objective[:, -1] - objective[:, 0]):
        wider = [*choices[:layer], objective.shape[1] - 1, *choices[layer + 1 :]]
        if sum(size[i, k] for i, k in enumerate(wider)) <= budget:
            choices = wider
    return choices


def lognormal(seed, layers=12, noise=0.8):
    rng = np.random.default_rng(seed)
    count, bits = rng.lognormal(10, 1, (layers, 1)), np.array([2.0, 3.0, 4.0, 6.0, 8.0])
    objective = count * rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits * rng.lognormal(0, noise, (layers, 5))
    size = count * bits / 8
    budget = size[:, 0].sum() + rng.uniform(0.1, 0.6) * (size[:, -1] - size[:, 0]).sum()
    return AllocationProblem(objective=objective, resources={"size": size}, budgets={"size": budget})


def test_rules_of_other_tools_are_never_better():
    """One-step heap and sorted prefix, against the optimum; greedy stays within a few percent on average."""
    gaps = []
    for seed in range(40):
        problem = lognormal(seed)
        best, found = ILPSolver().solve(problem), GreedySolver().solve(problem)
        for rule in (one_step_heap, sorted_prefix):
            choices = rule(problem)
            assert not problem.violations(choices)
            assert best.objective <= problem.evaluate(choices)[0] * (1 + 1e-12)
        gaps.append(found.objective / best.objective - 1)
    assert np.mean(gaps) < 0.02


def test_many_layers_are_near_the_bound():
    for found in itertools.islice((GreedySolver().solve(lognormal(seed, layers=400)) for seed in range(5)), 5):
        assert found.proof.gap < 2e-3
