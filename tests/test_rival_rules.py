"""Against the rules of other tools: never worse on any instance, and how far off they are."""

import numpy as np
import pytest
from rival_rules import RULES, beam_dynamic_program, one_step_greedy, sorted_prefix, threshold_bisection

from mpq.problem import AllocationProblem
from mpq.solvers import solve


def bit_table(layers, noise, seed, bits=(2, 3, 4, 6, 8)):
    """Sizes over three decades, errors falling as 4**-bits with noise, so that some steps gain nothing."""
    rng = np.random.default_rng(seed)
    weights, curvature = 10 ** rng.uniform(4, 7, layers), 10 ** rng.uniform(-3, 2, layers)
    error = 4.0 ** -np.array(bits) * rng.lognormal(0, noise, (layers, len(bits)))
    cost = weights[:, None] * np.array(bits) / 8
    low, high = cost.min(1).sum(), cost.max(1).sum()
    return curvature[:, None] * error, cost, low + rng.uniform(0.1, 0.6) * (high - low)


def gap(problem, rule, best):
    """How far above the optimum a rule ends, relative; None where it finds no plan or exceeds the budget."""
    choice = rule(problem.objective, problem.resources["size"], problem.budgets["size"])
    if choice is None or problem.violations(choice):
        return None
    return problem.evaluate(choice)[0] / best - 1


@pytest.mark.parametrize("layers", [10, 28, 120])
@pytest.mark.parametrize("noise", [0.0, 0.35, 0.8])
def test_never_worse_than_any_rule(layers, noise):
    worst = dict.fromkeys(RULES, 0.0)
    for seed in range(12):
        objective, cost, budget = bit_table(layers, noise, seed)
        problem = AllocationProblem(objective=objective, resources={"size": cost}, budgets={"size": budget})
        best = solve(problem).objective
        for rule in RULES:
            distance = gap(problem, rule, best)
            if distance is not None:
                assert distance >= -1e-9, rule.__name__
                worst[rule] = max(worst[rule], distance)
    assert worst[threshold_bisection] > 0.05  # it minimises the worst layer, not the sum
    assert worst[sorted_prefix] > 0.05
    assert noise == 0 or worst[one_step_greedy] > 0.05  # stuck behind flat steps


def test_the_rules_do_what_they_are_known_for():
    """Two layers: the first must pass a flat step; the beam of one state keeps the cheap prefix only."""
    objective, cost = np.array([[9.0, 9.0, 0.0], [5.0, 4.0, 3.0]]), np.array([[1.0, 2.0, 3.0]] * 2)
    assert one_step_greedy(objective, cost, 4.0).tolist() == [0, 2]
    assert solve(
        AllocationProblem(objective=objective, resources={"size": cost}, budgets={"size": 4.0})
    ).choices.tolist() == [2, 0]
    assert beam_dynamic_program(objective, cost, 4.0).tolist() == [2, 0]
    assert beam_dynamic_program(objective, cost, 1.0) is None
    assert threshold_bisection(objective, cost, 6.0).tolist() == [2, 0]  # two units of the budget are left unused
    assert sorted_prefix(objective, cost, 4.0).tolist() == [2, 0]
