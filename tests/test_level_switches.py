"""Children of level switches: always another plan, always within every budget, tie and pin; and repeatable."""

import itertools

import numpy as np
import pytest

from mpq.level_switches import LevelSwitches
from mpq.problem import AllocationProblem, SparsePeak

BITS = np.array([2.0, 3, 4, 5, 6])


def problem_of(rng, layers=12, **more):
    sizes = rng.integers(1, 40, layers).astype(float)
    scores = rng.uniform(0.5, 2, (layers, 1)) * 4.0**-BITS * rng.uniform(0.7, 1.3, (layers, 5))
    size, time = sizes[:, None] * BITS, rng.uniform(1, 3, (layers, 1)) * (1 + BITS / 4)
    settings = {"resources": {"size": size, "time": time}, "budgets": {"size": 4.1 * sizes.sum()}} | more
    return AllocationProblem(scores, **settings)


def cheapest(problem):
    weight = np.where(problem.allowed, problem.resources["size"], np.inf)
    plan = np.empty(len(weight), dtype=np.int64)
    for group in np.unique(problem.groups):
        members = problem.groups == group
        plan[members] = weight[members].sum(0).argmin()
    return plan


def walk(problem, seed, steps=60):
    """Children of children, from the cheapest plan on."""
    rng, switches = np.random.default_rng(seed), LevelSwitches(problem)
    plan = switches.filled(cheapest(problem), rng)
    plans = [plan]
    for _ in range(steps):
        child = switches.child(plan, rng)
        if child is not None:
            plan = child
            plans.append(plan)
    return plans


def kinds():
    rng = np.random.default_rng(5)
    plain = problem_of(rng)
    yield "one budget", plain
    time = plain.resources["time"]
    both = {"size": plain.budgets["size"], "time": float(time[:, 2].sum())}
    yield "two budgets", problem_of(np.random.default_rng(5), budgets=both)
    yield "ties", problem_of(rng, ties=[(0, 1, 2), (4, 7)])
    peak = SparsePeak.from_dense(rng.uniform(0, 1, (4, 12, 1)) * BITS)
    yield "peak", problem_of(rng, peak_resources={"memory": peak}, peak_budgets={"memory": 26.0})
    pinned = problem_of(rng)
    scores = pinned.objective.copy()
    scores[3, [0, 1, 3, 4]] = np.inf
    yield "pin", AllocationProblem(scores, resources=dict(pinned.resources), budgets=dict(pinned.budgets))
    yield "formats", problem_of(rng, max_formats=3)
    steps = {"size": {(i, i + 1): 5.0 * (1 - np.eye(5)) for i in range(11)}}
    yield "transitions", problem_of(rng, transitions=steps)


@pytest.mark.parametrize(("kind", "problem"), list(kinds()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_child_keeps_the_problem_and_differs(kind, problem):
    plans = walk(problem, seed=1)
    assert len(plans) > 10
    assert all(problem.is_feasible(plan) for plan in plans)
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(plans))
    assert {tuple(plan) for plan in plans} != {tuple(plans[0])}


def test_sum_of_bits_stays_what_it_was_where_layers_are_equal():
    bits = np.tile(BITS, (20, 1))
    scores = np.random.default_rng(0).uniform(0.5, 2, (20, 1)) * 4.0**-BITS
    problem = AllocationProblem(scores, resources={"size": bits}, budgets={"size": 81.0})
    for plan in walk(problem, seed=2):
        assert bits[np.arange(20), plan].sum() == 81


def test_children_are_full():
    problem = problem_of(np.random.default_rng(3))
    size, rows = problem.resources["size"], np.arange(12)
    for plan in walk(problem, seed=4)[1:]:
        left = problem.budgets["size"] - size[rows, plan].sum()
        raises = (size - size[rows, plan][:, None] <= left) & (
            problem.objective < problem.objective[rows, plan][:, None]
        )
        assert raises.sum() <= 6  # only those that were just switched down may be left, at most three of them


def test_same_seed_same_children():
    problem = problem_of(np.random.default_rng(3))
    first, second, other = walk(problem, 7), walk(problem, 7), walk(problem, 8)
    assert [plan.tolist() for plan in first] == [plan.tolist() for plan in second]
    assert [plan.tolist() for plan in first] != [plan.tolist() for plan in other]


def test_repair_goes_by_the_scores_given():
    """One layer is said to be worth nothing: it is the one that gives way."""
    problem = AllocationProblem(
        np.tile(4.0**-BITS, (6, 1)), resources={"size": np.tile(BITS, (6, 1))}, budgets={"size": 24.0}
    )
    scores = np.tile(4.0**-BITS, (6, 1))
    scores[5] = 0
    switches, rng = LevelSwitches(problem), np.random.default_rng(0)
    children = [switches.child(np.full(6, 2), rng, scores) for _ in range(600)]
    lowest = np.mean([child for child in children if child is not None], axis=0)
    assert lowest.argmin() == 5


def test_no_child_where_there_is_only_one_plan():
    problem = AllocationProblem([[1.0], [2.0]], resources={"size": [[1.0], [1.0]]}, budgets={"size": 2.0})
    assert LevelSwitches(problem).child(np.zeros(2, dtype=np.int64), np.random.default_rng(0)) is None
