"""Frontiers: every non-dominated plan of an enumeration and no other, the promise of epsilon, and the orders kept."""

import itertools
import math

import numpy as np
import pytest
from test_dynamic import closes_a_circle, knapsack

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close, random_problem
from mpq.solver_conformance import scaled
from mpq.solvers import ILPSolver, bands, pruning
from mpq.solvers.pareto import pareto_frontier
from mpq.solvers.thinning import distinct_points

TAKEN = ("ties", "forbidden", "pairs", "transitions", "negative", "whole")
NAMES = ("size", "latency", "energy")


def plans(problem):
    """Every plan within the budgets."""
    layers, options = problem.objective.shape
    return (plan for plan in itertools.product(range(options), repeat=layers) if problem.is_feasible(plan))


def by_loops(problem, names, feasible=None):
    """The points (resources, objective) that no other is as good as everywhere, equal ones once."""
    front = []
    for plan in plans(problem) if feasible is None else feasible:
        objective, usage = problem.evaluate(plan)
        point = (*(usage[name] for name in names), objective)
        if not any(no_worse(other, point) for other in front):
            front = [other for other in front if not no_worse(point, other)] + [point]
    return sorted(front)


def no_worse(point, other):
    return all(a <= b + 1e-9 * max(abs(b), 1e-12) for a, b in zip(point, other, strict=True))


def points(front):
    return np.column_stack([front.resource, front.objective])


def equal(front, expected):
    found = points(front)
    return len(found) == len(expected) and all(
        close(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)
    )


def consistent(problem, front):
    """Every point is what its choices come to."""
    for index in range(len(front)):
        objective, usage = problem.evaluate(front.choices[index])
        amounts = [usage[name] for name in front.names]
        assert problem.is_feasible(front.choices[index])
        np.testing.assert_allclose(points(front)[index], [*amounts, objective], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_equals_enumeration(count, wide):
    """Offsets, ties, forbidden options, negative amounts, duplicates, couplings, other budgets in force."""
    seen, found, impossible = set(), 0, 0
    for seed in range(90):
        problem = random_problem(seed, kinds=TAKEN, wide=wide, budgets=max(count, seed % 3 + 1))
        names = NAMES[:count]
        everything = AllocationProblem(
            **{name: getattr(problem, name) for name in ("objective", "ties", "pairs", "transitions")},
            resources=problem.resources,
            budgets={**dict.fromkeys(names, 1e9), **problem.budgets},
        )
        if closes_a_circle(everything):
            with pytest.raises(ValueError, match="circle"):
                pareto_frontier(problem, names)
            continue
        expected = by_loops(problem, names)
        if not expected:
            with pytest.raises(InfeasibleError):
                pareto_frontier(problem, names)
            impossible += 1
            continue
        front = pareto_frontier(problem, names if count > 1 else names[0])
        assert equal(front, expected), seed
        consistent(problem, front)
        seen |= problem.features
        found += 1
    assert seen == {"several budgets", "pairs", "transitions"}
    assert found > 50
    assert impossible > 5


def test_p_norms():
    for seed in range(60):
        problem = random_problem(seed, kinds=("ties", "forbidden", "norm"), budgets=1)
        expected = by_loops(problem, ("size",)) if problem.norm < math.inf else []
        if expected:
            assert equal(pareto_frontier(problem, "size"), expected), seed


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_epsilon_keeps_its_promise(epsilon):
    shorter = 0
    for seed in range(60):
        count = seed % 3 + 1
        problem = random_problem(seed, kinds=TAKEN, wide=seed % 2 == 0, budgets=count)
        if closes_a_circle(problem):
            continue
        expected = np.array(by_loops(problem, NAMES[:count]))
        if len(expected):
            front = pareto_frontier(problem, NAMES[:count], epsilon=epsilon)
            shorter += len(front) < len(expected)
            check_promise(front, expected)
            consistent(problem, front)
    assert shorter > 0 or epsilon < 0.1


def check_promise(front, expected):
    floor = np.append(front.floor[1:], front.floor[0])
    for point in expected:
        most = point + front.epsilon * (point - floor) + 1e-9 * np.abs(point)
        assert (points(front) <= most).all(1).any(), point


@pytest.mark.parametrize("epsilon", [0.003, 0.05])
def test_epsilon_on_a_long_front(epsilon):
    objective, size, _ = knapsack(0, layers=30, options=5)
    problem = AllocationProblem(objective=objective, resources={"size": size})
    exact, front = (pareto_frontier(problem, "size", epsilon=value) for value in (0.0, epsilon))
    assert len(front) < len(exact) / 2 or epsilon < 0.01
    check_promise(front, points(exact))
    for at in np.quantile(exact.resource, [0.1, 0.5, 0.9]):
        best, found = exact.allocation(at=at), front.allocation(at=at)
        assert found.proof.bound <= best.objective * (1 + 1e-12)
        assert found.proof.status == "feasible"


def plain_front(objective, size):
    """One dominance merge a layer, without bounds."""
    cost, value = np.zeros(1), np.zeros(1)
    for scores, sizes in zip(objective, size, strict=True):
        cost, value = (cost[:, None] + sizes).ravel(), (value[:, None] + scores).ravel()
        order = np.lexsort((value, cost))
        cost, value = cost[order], value[order]
        kept = np.append(True, value[1:] < np.minimum.accumulate(value)[:-1])
        cost, value = cost[kept], value[kept]
    return cost, value


@pytest.mark.parametrize("prices", [4, 256])
@pytest.mark.parametrize("grid", [5, 129])
def test_bounds_lose_nothing(monkeypatch, prices, grid):
    """Thousands of points, whatever the number of prices and the coarseness of the limits."""
    monkeypatch.setattr(bands, "PRICES", prices)
    monkeypatch.setattr(pruning, "GRID", grid)
    for seed in range(3):
        objective, size, _ = knapsack(seed, layers=30, options=5)
        front = pareto_frontier(AllocationProblem(objective=objective, resources={"size": size}), "size")
        cost, value = plain_front(objective, size)
        assert len(cost) > 1000
        assert len(front) == len(cost)
        np.testing.assert_allclose(front.resource, cost, rtol=1e-12)
        np.testing.assert_allclose(front.objective, value, rtol=1e-12)


def test_every_budget_is_answered_by_the_front():
    objective, size, budget = knapsack(3, layers=40, options=6)
    problem = AllocationProblem(objective=objective, resources={"size": size}, budgets={"size": budget})
    front = pareto_frontier(problem, "size")
    assert front.resource[-1] <= budget
    for at in np.linspace(front.resource[0], budget, 5):
        tight = AllocationProblem(objective=objective, resources={"size": size}, budgets={"size": at})
        assert close(front.allocation(at=at).objective, ILPSolver().solve(tight).objective)


def test_units_do_not_matter():
    for seed in range(30):
        problem = random_problem(seed, kinds=("ties", "forbidden", "negative", "whole"), budgets=1)
        if not by_loops(problem, ("size",)):
            continue
        front = pareto_frontier(problem, "size")
        for objective, resource in ((1e-12, 1e12), (1e12, 1e-12), (1e-6 / 3, 1e6 / 7)):
            again = pareto_frontier(scaled(problem, objective=objective, resource=resource), "size")
            assert equal(again, points(front) * [resource, objective]), seed


def test_the_same_plan_many_times_is_one_point():
    """Forty equal layers whose sizes add up with rounding: 41 points for 2^40 plans."""
    problem = AllocationProblem(objective=[[0.3, 0.1]] * 40, resources={"size": [[0.1, 0.7]] * 40})
    front = pareto_frontier(problem, "size")
    assert len(front) == 41
    assert np.array_equal(front.choices.sum(1), np.arange(41))


def in_order(problem, priority):
    """Plans in which no layer of larger priority takes an earlier option."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(priority)), 2) if priority[i] > priority[j]]
    return [plan for plan in plans(problem) if all(plan[i] >= plan[j] for i, j in pairs)]


def test_monotone_equals_enumeration():
    for seed in range(80):
        rng = np.random.default_rng(seed)
        problem = random_problem(seed, kinds=("forbidden", "negative", "whole"), budgets=1 + seed % 2)
        layers, options = problem.objective.shape
        priority = rng.permutation(layers) if seed % 3 else rng.integers(0, 2, layers)
        kept = in_order(problem, priority)
        if seed % 3 and np.isfinite(problem.objective).all() and len(list(plans(problem))) == options**layers:
            assert len(kept) == math.comb(layers + options - 1, options - 1)
        expected = by_loops(problem, ("size",), kept)
        if not expected:
            with pytest.raises(InfeasibleError):
                pareto_frontier(problem, "size", monotone=priority)
            continue
        front = pareto_frontier(problem, "size", monotone=priority)
        assert equal(front, expected), seed
        assert front.allocation(at=front.resource[-1]).proof.status == "heuristic"


def test_what_is_not_taken_is_refused_with_the_way_out():
    zero, sizes = np.zeros((3, 2)), {"resources": {"size": np.ones((3, 2))}}
    for extra, word in (
        ({"max_formats": 1}, "max_formats.*'ilp'"),
        ({"norm": math.inf}, "max norm.*'ilp'"),
        ({"peak_resources": {"m": np.ones((1, 3, 2))}, "peak_budgets": {"m": 1.0}}, "peak budgets.*'ilp'"),
        ({"pairs": {(0, 1): np.eye(2), (1, 2): np.eye(2), (0, 2): np.eye(2)}}, "circle.*'ilp'"),
    ):
        with pytest.raises(ValueError, match=word):
            pareto_frontier(AllocationProblem(objective=zero, **sizes, **extra), "size")
    problem = AllocationProblem(objective=zero, **sizes)
    for arguments, word in (
        (("sise",), "did you mean 'size'"),
        (((),), "up to 3"),
        ((("size", "size"),), "different"),
    ):
        with pytest.raises(ValueError, match=word):
            pareto_frontier(problem, *arguments)
    with pytest.raises(ValueError, match="epsilon must be from 0"):
        pareto_frontier(problem, "size", epsilon=-0.1)
    with pytest.raises(ValueError, match="priority for each of 3 layers"):
        pareto_frontier(problem, "size", monotone=[1, 2])


def test_too_many_plans_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("mpq.solvers.pareto.MOST", 100)
    rng = np.random.default_rng(0)
    resources = {name: rng.random((12, 3)) for name in NAMES}
    problem = AllocationProblem(objective=rng.random((12, 3)), resources=resources)
    with pytest.raises(ValueError, match="more than 100 partial plans.*epsilon"):
        pareto_frontier(problem, NAMES)


def test_two_chains_and_layers_alone():
    """Lists go from one tree to the next, and only along one branch of each."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        objective, size = np.sort(rng.uniform(0, 9, (7, 3)))[:, ::-1], np.sort(rng.uniform(0, 9, (7, 3)))
        edges = [(0, 1), (2, 1), (3, 4), (4, 5)]
        problem = AllocationProblem(
            objective=objective,
            resources={"size": size},
            pairs={edge: rng.uniform(0, 2, (3, 3)) for edge in edges},
            transitions={"size": {edge: rng.uniform(0, 2, (3, 3)) for edge in edges}},
        )
        assert equal(pareto_frontier(problem, "size"), by_loops(problem, ("size",))), seed


def test_points_that_differ_by_rounding_are_one():
    """The better one where only the resource agrees, the cheaper one where only the objective does."""
    near = 1 + 5e-10
    found = np.array([[1.0, 9.0], [near, 8.0], [2.0, 8.0 / near], [3.0, 7.0], [3.0 * (1 + 1e-8), 6.0]])
    assert distinct_points(found, np.zeros(2)).tolist() == [1, 3, 4]
    assert distinct_points(found - [2.0, 0.0], np.array([1e-7, 0.0])).tolist() == [1, 4]
    run = np.stack([1 + 4e-10 * np.arange(10), -np.arange(10.0)], axis=1)  # wider than rounding from end to end
    assert len(distinct_points(run, np.zeros(2))) == 4


def test_long_chains_of_couplings():
    """Thirty layers in a row with conversion costs, at three budgets, against the integer program."""
    rng = np.random.default_rng(0)
    objective, size, _ = knapsack(5, layers=30, options=3)
    change = {(i, i + 1): np.median(size) * rng.uniform(0, 0.2, (3, 3)) for i in range(29)}
    problem = AllocationProblem(objective=objective, resources={"size": size}, transitions={"size": change})
    front = pareto_frontier(problem, "size")
    consistent(problem, front.__class__(**{**vars(front), **thinned(front)}))
    for index in range(0, len(front), len(front) // 3):
        budgets = {"size": float(front.resource[index])}
        best = ILPSolver().solve(
            AllocationProblem(
                objective=objective, resources={"size": size}, transitions={"size": change}, budgets=budgets
            )
        )
        assert close(front.objective[index], best.objective)


def thinned(front):
    return {name: getattr(front, name)[:: max(1, len(front) // 50)] for name in ("resource", "objective", "choices")}
