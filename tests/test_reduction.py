"""Dropping options never loses the best plan, and the way back to layers is right."""

import itertools

import numpy as np
import pytest

from mpq.problem import AllocationProblem
from mpq.random_problems import by_loops, close, random_problem
from mpq.solvers.cover_cut import cover_cut
from mpq.solvers.reduction import merge


def plans(core):
    """All plans of a core that are in play."""
    options = [np.flatnonzero(row) for row in core.allowed]
    return (np.array(plan) for plan in itertools.product(*options))


def test_ties_merge_and_expand():
    problem = AllocationProblem(
        objective=[[1.0, 2.0], [10.0, 20.0], [100.0, np.inf]],
        resources={"size": [[1.0, 1.0], [2.0, 3.0], [5.0, 7.0]]},
        budgets={"size": 10.0},
        ties=[(0, 2)],
        pairs={(0, 2): [[0.5, 0.0], [0.0, 0.0]], (2, 1): [[0.0, 0.25], [0.0, 0.0]]},
    )
    core = merge(problem)
    assert core.allowed.tolist() == [[True, False], [True, True]]
    assert core.table[0].tolist() == [[101.5, 0.0], [10.0, 20.0]]
    assert core.table[1].tolist() == [[6.0, 0.0], [2.0, 3.0]]
    assert core.expand(np.array([0, 1])).tolist() == [0, 1, 0]
    for plan in plans(core):
        assert core.value(plan) == problem.evaluate(core.expand(plan))[0]


@pytest.mark.parametrize("wide", [False, True])
def test_values_floors_and_tightening(wide):
    for seed in range(150):
        problem = random_problem(seed, wide=wide)
        core, (best, _) = merge(problem), by_loops(problem)
        values = [core.value(plan) for plan in plans(core)]
        assert core.floor() <= min(values) + 1e-12 * (1 + abs(min(values)))
        tight = core.tightened()
        if best is None:
            assert tight is None or not any(tight.is_feasible(plan) for plan in plans(tight))
            continue
        feasible = [plan for plan in plans(tight) if tight.is_feasible(plan)]
        least = min(feasible, key=tight.value)
        assert close(problem.evaluate(core.expand(least))[0], best) or problem.norm > 1
        assert close(core.objective(tight.value(least)), best)
        better = core.tightened(feasible[0])  # no plan as good as a known one is lost
        kept = [] if better is None else [better.value(plan) for plan in plans(better) if better.is_feasible(plan)]
        assert kept
        assert min(kept) == pytest.approx(tight.value(least), rel=1e-9, abs=1e-12)


def test_dominated_options_go_and_of_equal_ones_the_first_stays():
    problem = AllocationProblem(
        objective=[[3.0, 2.0, 2.0, 1.0]], resources={"size": [[3.0, 2.0, 2.0, 4.0]]}, budgets={"size": 5.0}
    )
    assert merge(problem).tightened().allowed.tolist() == [[False, True, False, True]]
    coupled = AllocationProblem(
        objective=[[3.0, 2.0, 2.0, 1.0]] * 2,
        resources={"size": [[3.0, 2.0, 2.0, 4.0]] * 2},
        budgets={"size": 50.0},
        pairs={(0, 1): np.eye(4)},
    )
    assert merge(coupled).tightened().allowed.all()


def test_cover_cuts_cut_off_the_plan_and_no_other_within_budget():
    cuts = 0
    for seed in range(120):
        problem = random_problem(seed, kinds=("ties", "negative", "whole", "transitions"))
        core = merge(problem)
        every = np.array(list(plans(core)))
        within = np.array([core.is_feasible(plan) for plan in every])
        for plan in every[~within][::7]:
            cut = cover_cut(core, plan)
            taken = cut.members[np.arange(every.shape[1]), every].sum(1)
            assert (taken[within] <= cut.most).all()
            assert (taken[(every == plan).all(1)] > cut.most).all()
            cuts += 1
    assert cuts > 400
