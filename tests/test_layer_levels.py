"""Levels of layers: plans of rows and groups refined layer by layer, the budget kept to the byte."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from small_models import cnn, images

import mpq
from mpq.evaluator import Evaluator
from mpq.layer_levels import LayerLevels, LevelEvaluator
from mpq.plan_keys import key_of
from mpq.planning import choices_of
from mpq.refinement import refine
from mpq.score_blocks import sorted_blocks
from mpq.solvers import solve
from mpq.solvers.multipliers import shadow_prices

BITS = np.array([2.0, 3, 4, 6, 8])
DATA = images(4, 16)
QUICK = {"patience": 2, "offspring": 6, "kbest": 4, "level": 0.3}


def problem_of(seed=0, layers=5, units=40, **more):
    """Units of layers that differ in how sensitive they are, and in size."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(layers), units)
    sizes = rng.integers(1, 9, len(index)).astype(float)
    scores = rng.lognormal(0, 1, layers)[index, None] * rng.lognormal(0, 1, (len(index), 1)) * 4.0**-BITS
    resources = {"size": sizes[:, None] * BITS, "latency": sizes[:, None] * np.sqrt(BITS)}
    budgets = {"size": 3.7 * sizes.sum(), "latency": 1.95 * sizes.sum()}
    return mpq.AllocationProblem(scores, resources=resources, budgets=budgets, **more), index


def levels_of(seed=0, **settings):
    problem, index = problem_of(seed)
    return LayerLevels(problem, index, solve(problem).choices, **settings)


def test_every_level_by_a_loop_over_units():
    levels = levels_of(reach=3)
    prices = shadow_prices(levels.fine)
    assert any(prices.values())
    for level in range(7):
        if level == 3:
            continue
        factor = levels.step ** (level - 3)
        for unit in range(len(levels.start)):
            costs = [
                factor * levels.fine.objective[unit, option]
                + sum(price * levels.fine.resources[name][unit, option] for name, price in prices.items())
                for option in range(5)
            ]
            assert costs[levels.plans[level, unit]] == min(costs)
    assert np.array_equal(levels.plans[3], levels.start)
    assert np.array_equal(levels.expanded(levels.middle), levels.start)


def test_what_levels_add_up_to_is_what_their_units_do():
    levels, rng = levels_of(), np.random.default_rng(1)
    for _ in range(20):
        plan = np.array([rng.choice(np.flatnonzero(row)) for row in levels.problem.allowed])
        value, usage = levels.problem.evaluate(plan)
        expected, fine = levels.fine.evaluate(levels.expanded(plan))
        assert value == pytest.approx(expected)
        assert usage == pytest.approx(fine)
        assert levels.problem.is_feasible(plan) == levels.fine.is_feasible(levels.expanded(plan))


def test_the_start_is_the_best_of_the_table_and_higher_levels_cost_more():
    levels = levels_of()
    best = solve(levels.problem)
    start = levels.problem.evaluate(levels.middle)[0]
    assert best.objective == pytest.approx(start, rel=2e-3)
    sizes = levels.problem.resources["size"]
    assert (np.diff(sizes, axis=1) >= 0).all()
    assert (sizes[:, -1] > 1.2 * sizes[:, 0]).all()
    same = [np.array_equal(*pair) for pair in _neighbours(levels)]
    assert not any(same)


def _neighbours(levels):
    """What a layer takes at levels next to each other that are both allowed."""
    for layer in range(len(levels.problem.objective)):
        rows = levels.plans[:, levels.layer_index == layer]
        allowed = np.flatnonzero(levels.problem.allowed[layer])
        yield from ((rows[one], rows[other]) for one, other in itertools.pairwise(allowed))


def test_what_is_the_same_is_one_level_the_nearest_to_the_start():
    problem, index = problem_of(seed=2, units=3)
    levels = LayerLevels(problem, index, solve(problem).choices, reach=4)
    masked = 0
    for layer in range(5):
        for side in (range(4, 9), range(4, -1, -1)):
            seen = []
            for level in side:
                taken = levels.plans[level, levels.layer_index == layer].tolist()
                assert levels.problem.allowed[layer, level] == (taken not in seen)
                masked += taken in seen
                seen.append(taken)
    assert masked > 5


def test_layers_that_cannot_change_have_one_level():
    problem, index = problem_of()
    scores = problem.objective.copy()
    scores[index == 2, 1:] = np.inf
    fixed = replace(problem, objective=scores)
    levels = LayerLevels(fixed, index, solve(fixed).choices)
    assert levels.problem.allowed.sum(1)[2] == 1
    assert levels.problem.allowed[2, levels.reach]


def test_tied_units_take_what_is_best_for_their_sum():
    ties = [(0, 7, 3), (5, 1), (81, 99)]
    problem, index = problem_of(ties=ties)
    start = solve(problem).choices
    levels = LayerLevels(problem, index, start, reach=3)
    prices = shadow_prices(problem)
    assert LayerLevels.fit(problem, index)
    assert any(prices.values())
    for level in range(7):
        plan = levels.plans[level]
        for tie in [*ties, (2,), (80,)]:
            units = list(tie)
            value = levels.step ** (level - 3) * problem.objective[units].sum(0)
            value += sum(price * problem.resources[name][units].sum(0) for name, price in prices.items())
            assert len(set(plan[units])) == 1
            assert level == 3 or value[plan[units[0]]] == pytest.approx(value.min())


def test_couplings_are_refused():
    problem, index = problem_of(ties=[(0, 1), (2, 40)])
    assert not LayerLevels.fit(problem, index)
    with pytest.raises(ValueError, match="the problem has ties across layers"):
        LayerLevels(problem, index, np.zeros(len(index), dtype=int))
    problem, index = problem_of(max_formats=3)
    with pytest.raises(ValueError, match="the problem has max_formats"):
        LayerLevels(problem, index, np.zeros(len(index), dtype=int))


@pytest.fixture(scope="module", params=["rows:1", "groups:3"])
def table(request):
    """Scores that are wrong by a factor a layer, as tables are."""
    space = mpq.SearchSpace(["int2", "int3", "int4", "int6", "int8"], ties=None)
    found = mpq.measure(cnn(), DATA, space, sensitivity="weight_error", granularity=request.param, progress=False)
    factor = np.array([30.0, 0.03, 1.0, 1.0])[: len(found.layers)][found.layer_index]
    wrong = found.quantities | {"sensitivity": found.quantity("sensitivity") * factor[:, None]}
    return replace(found, quantities={name: wrong[name] for name in found.quantities if not name.endswith("_se")})


BUDGET = {"size": "3.5 bits values"}


def test_finer_units_are_refined_layer_by_layer(table):
    found = refine(cnn(), DATA, table, BUDGET, holdout=images(3, 5), evaluations=40, seed=1, **QUICK)
    assert found.is_improved
    assert found.selection.best < 0.97 * found.selection.start
    assert found.plan.value_bytes <= found.plan.budgets[0].limit * (1 + 1e-9)
    limit = table.problem(BUDGET)
    choices = [choices_of(table, plan) for plan in (found.plan, found.start)]
    assert all(limit.is_feasible(plan) for plan in choices)
    assert np.array_equal(choices[1], solve(limit).choices)
    direct = Evaluator(cnn(), DATA, table).measure(found.plan)
    assert found.selection.best == pytest.approx(direct.divergence)
    assert found.evaluations <= 40


def test_sorted_blocks_are_refined_as_blocks(table):
    blocks = sorted_blocks(table, 4)
    found = refine(cnn(), DATA, blocks, BUDGET, evaluations=40, seed=1, **QUICK)
    assert found.is_improved
    choices = choices_of(blocks, found.plan)
    assert all(len(set(choices[list(tie)])) == 1 for tie in blocks.ties)
    assert found.plan.value_bytes <= found.plan.budgets[0].limit * (1 + 1e-9)


def test_measures_what_the_levels_stand_for(table):
    problem = table.problem(BUDGET)
    levels = LayerLevels(problem, table.layer_index, solve(problem).choices)
    evaluator = LevelEvaluator(Evaluator(cnn(), DATA, table, evaluations=3), levels)
    other = levels.middle.copy()
    other[0] = np.flatnonzero(levels.problem.allowed[0])[0]
    found = evaluator.measure_all([levels.middle, other], 16)
    plain = Evaluator(cnn(), DATA, table)
    for plan, one in zip((levels.middle, other), found, strict=True):
        assert one.per_sample == pytest.approx(plain.measure(levels.expanded(plan), 16).per_sample)
    assert evaluator.measured.keys() == {key_of(levels.middle), key_of(other)}
    evaluator.measure(other)
    assert evaluator.measure(other, 16).samples == 16
    assert evaluator.measured[key_of(other)].samples == evaluator.samples == 64
    assert evaluator.spent == 1.25
