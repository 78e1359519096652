"""Local improvement: never worse, never over a budget, and no single change left that would help."""

import itertools

import numpy as np

from mpq.random_problems import random_problem
from mpq.solvers.exchange import improve
from mpq.solvers.reduction import merge


def single_changes(core, plan):
    for group, option in np.argwhere(core.allowed):
        if option != plan[group]:
            changed = plan.copy()
            changed[group] = option
            yield changed


def test_no_single_change_is_left_by_loops():
    plans = 0
    for seed in range(250):
        problem = random_problem(seed)
        core = merge(problem)
        options = [np.flatnonzero(row) for row in core.allowed]
        feasible = (np.array(plan) for plan in itertools.product(*options) if core.is_feasible(np.array(plan)))
        for plan in itertools.islice(feasible, 3):
            better = improve(core, plan)
            assert core.is_feasible(better)
            assert core.value(better) <= core.value(plan)
            plans += 1
            if core.has_goal:
                continue
            for changed in single_changes(core, better):
                if core.counts_formats and set(changed) != set(better):  # giving up a format is not looked at
                    continue
                if core.is_feasible(changed):
                    gain = core.value(better) - core.value(changed)
                    assert gain <= 1e-12 * abs(core.value(better))
    assert plans > 300


def test_double_changes_by_loops():
    """On plain cores, small enough to be looked through, no pair of changes is left either."""
    for seed in range(150):
        core = merge(random_problem(seed, kinds=("ties", "negative", "forbidden")))
        options = [np.flatnonzero(row) for row in core.allowed]
        feasible = (np.array(plan) for plan in itertools.product(*options) if core.is_feasible(np.array(plan)))
        for plan in itertools.islice(feasible, 2):
            better = improve(core, plan)
            for once in single_changes(core, better):
                for twice in single_changes(core, once):
                    if core.value(twice) < core.value(better) - 1e-12 * abs(core.value(better)):
                        assert not core.is_feasible(twice)
