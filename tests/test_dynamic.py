"""Dynamic programming: equal to enumeration on everything it takes, to the integer program on larger problems."""

import numpy as np
import pytest
from test_solvers import check_monotone

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import ExhaustiveSolver, ILPSolver, dominance
from mpq.solvers.dominance import nondominated, staircase
from mpq.solvers.dynamic import DynamicSolver

TAKEN = ("ties", "forbidden", "pairs", "transitions", "negative", "whole", "norm")


class TestDynamic(SolverConformance):
    budgets = 1

    @pytest.fixture
    def solver(self):
        return DynamicSolver()


def closes_a_circle(problem):
    """More couplings between different groups than a forest has room for."""
    coupled = [tuple(sorted(problem.groups[list(pair)])) for pair in problem.pairs]
    for name in problem.budgets:
        coupled += [tuple(sorted(problem.groups[list(pair)])) for pair in problem.transitions.get(name, {})]
    edges, parts = {edge for edge in coupled if edge[0] != edge[1]}, {group: group for group in problem.groups}
    for first, second in edges:
        if parts[first] == parts[second]:
            return True
        parts = {group: parts[first] if part == parts[second] else part for group, part in parts.items()}
    return False


@pytest.mark.parametrize("wide", [False, True])
def test_equals_enumeration(wide):
    seen, circles, impossible = set(), 0, 0
    for seed in range(250):
        problem = random_problem(seed, kinds=TAKEN, wide=wide, budgets=1)
        best = answer(ExhaustiveSolver(), problem)
        if closes_a_circle(problem):
            with pytest.raises(ValueError, match="'dynamic' takes pairs and transitions that form chains .*'ilp'"):
                DynamicSolver().solve(problem)
            circles += 1
            continue
        found = answer(DynamicSolver(), problem)
        if isinstance(best, InfeasibleError):
            assert all(close(found.reachable[name], value) for name, value in best.reachable.items()), seed
            impossible += 1
            continue
        seen |= problem.features
        assert close(found.objective, best.objective), seed
        assert problem.is_feasible(found.choices)
        assert found.proof.status == "optimal"
    assert seen == DynamicSolver.features
    assert circles > 3
    assert impossible > 15


def knapsack(seed, layers=60, options=6):
    """Sizes lognormal, errors falling as 4^−bits with noise; tight enough that no rule of thumb is optimal."""
    rng = np.random.default_rng(seed)
    count, bits = rng.lognormal(10, 1, (layers, 1)), np.linspace(2, 8, options)
    objective = count * rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits * rng.lognormal(0, 0.4, (layers, options))
    size = count * bits / 8
    return objective, size, float(size[:, 0].sum() + rng.uniform(0.1, 0.8) * (size[:, -1] - size[:, 0]).sum())


def test_equals_the_integer_program():
    for seed in range(8):
        objective, size, budget = knapsack(seed)
        problem = AllocationProblem(objective=objective, resources={"size": size}, budgets={"size": budget})
        assert close(DynamicSolver().solve(problem).objective, ILPSolver().solve(problem).objective), seed


def test_a_tree_of_couplings_equals_the_integer_program():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        objective, size, budget = knapsack(seed, layers=14, options=4)
        edges = [(int(rng.integers(0, layer)), layer) for layer in range(1, 14) if rng.random() < 0.9]
        scale = float(np.median(objective)), float(np.median(size))
        problem = AllocationProblem(
            objective=objective,
            resources={"size": size},
            budgets={"size": budget},
            pairs={edge: scale[0] * rng.normal(0, 1, (4, 4)) for edge in edges},
            transitions={"size": {edge: scale[1] * rng.uniform(0, 0.5, (4, 4)) for edge in edges[::2]}},
        )
        assert close(DynamicSolver().solve(problem).objective, ILPSolver().solve(problem).objective), seed


def test_two_chains_and_layers_alone():
    """Lists go from one tree to the next, and only along one branch of each."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        size = np.sort(rng.uniform(0, 9, (7, 3)))
        edges = [(0, 1), (2, 1), (3, 4), (4, 5)]
        problem = AllocationProblem(
            objective=np.sort(rng.uniform(0, 9, (7, 3)))[:, ::-1],
            resources={"size": size},
            budgets={"size": float(size[:, 1].sum() * rng.uniform(0.8, 1.3))},
            pairs={edge: rng.uniform(0, 4, (3, 3)) for edge in edges},
            transitions={"size": {edge: rng.uniform(0, 2, (3, 3)) for edge in edges}},
        )
        assert close(DynamicSolver().solve(problem).objective, ExhaustiveSolver().solve(problem).objective), seed


def test_same_ratio_everywhere():
    """Gain in proportion to size: no price tells plans apart, the budget is a sum of subsets."""
    rng = np.random.default_rng(0)
    size = np.cumsum(rng.integers(1, 9, (12, 3)), axis=1).astype(float)
    problem = AllocationProblem(objective=-size, resources={"size": size}, budgets={"size": size[:, 1].sum() + 0.5})
    assert DynamicSolver().solve(problem).objective == -size[:, 1].sum()


def test_the_edge_of_a_budget():
    """Of 0.1 + 0.2 and 0.3, which are equal but for rounding, both are within a budget of either."""
    for budget in (0.3, 0.1 + 0.2):
        for other in ([0.1, 0.0], [0.0, 0.3]):
            problem = AllocationProblem(
                objective=[[0.0, 1.0], [0.0, 1.0]],
                resources={"size": [[0.2, other[1]], other]},
                budgets={"size": budget},
            )
            best = ExhaustiveSolver().solve(problem)
            assert DynamicSolver().solve(problem).objective == best.objective


def test_a_budget_of_zero_with_numbers_that_cancel():
    rng = np.random.default_rng(1)
    for _ in range(30):
        size = rng.uniform(-1, 1, (5, 3))
        size[-1] = -size[:4, 1].sum() + rng.choice([-1e-15, 0, 1e-15], 3)
        problem = AllocationProblem(objective=rng.uniform(0, 1, (5, 3)), resources={"r": size}, budgets={"r": 0.0})
        best, found = answer(ExhaustiveSolver(), problem), answer(DynamicSolver(), problem)
        assert isinstance(best, InfeasibleError) or close(found.objective, best.objective)


def test_what_it_does_not_take_is_refused_with_the_way_out():
    zero = np.zeros((3, 2))
    circle = {(0, 1): np.eye(2), (1, 2): np.eye(2), (2, 0): np.eye(2)}
    for extra, word in (
        ({"resources": {"a": zero, "b": zero}, "budgets": {"a": 1, "b": 1}}, "several budgets"),
        ({"max_formats": 1}, "max_formats"),
        ({"format_costs": [0, 0]}, "format_costs"),
        ({"pairs": circle}, "circle"),
    ):
        with pytest.raises(ValueError, match=f"'dynamic' .*{word}.*'ilp'"):
            DynamicSolver().solve(AllocationProblem(objective=zero, **extra))


def test_monotone():
    for seed in range(30):
        check_monotone(DynamicSolver(), random_problem(seed, kinds=("ties", "forbidden", "norm"), budgets=1))


def best_by_loops(points):
    return [
        i
        for i, point in enumerate(points)
        if not any(
            (other <= point).all() and ((other < point).any() or j < i) for j, other in enumerate(points) if j != i
        )
    ]


@pytest.mark.parametrize("pairs", [dominance.PAIRS, 8])
def test_dominance_equals_loops(pairs, monkeypatch):
    monkeypatch.setattr(dominance, "PAIRS", pairs)
    rng = np.random.default_rng(0)
    for trial in range(80):
        shape = rng.integers(1, 60), rng.integers(1, 6)
        points = rng.integers(0, 6, shape).astype(float) if trial % 2 else rng.random(shape)
        assert sorted(nondominated(points)) == best_by_loops(points)
        plane = points[:, [0, -1]]
        kept = staircase(plane[:, 0], plane[:, 1])
        assert {tuple(point) for point in plane[kept]} == {tuple(point) for point in plane[best_by_loops(plane)]}
        assert (np.diff(plane[kept, 0]) > 0).all()


def test_noise_does_not_multiply_points():
    cost = np.array([1.0, 1 + 4e-16, 1 + 9e-16, 2.0])
    assert staircase(cost, np.array([4.0, 3.0, 2.0, 1.0])).tolist() == [2, 3]
    wide = 1 + 1e-15 * np.arange(100)  # a run wider than rounding is no noise
    assert len(staircase(wide, -np.arange(100.0))) == 100


def test_lists_that_grow_too_long_are_given_up():
    """All options offer nearly the same score per unit of budget: no bound tells the plans apart."""
    rng = np.random.default_rng(0)
    weight = rng.integers(1000, 100_000, (40, 4)).astype(float)
    score = 1000 * rng.integers(0, 3, weight.shape) - weight
    problem = AllocationProblem(
        objective=score, resources={"size": weight}, budgets={"size": float(weight.sum() / 4) + 0.5}
    )
    with pytest.raises(ValueError, match="more than 50 partial plans .* use solver='ilp'"):
        DynamicSolver(labels=50).solve(problem)
    with pytest.raises(ValueError, match="labels must be at least 1"):
        DynamicSolver(labels=0)
