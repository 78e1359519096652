"""Why a plan looks as it does, against trying every move."""

import itertools

import numpy as np
import pytest

from mpq.explanation import bindings, savings
from mpq.table_problem import totals
from mpq.tables import CostTable

UNITS, OPTIONS = 5, 3


def random_table(seed):
    rng = np.random.default_rng(seed)
    shape = (UNITS, OPTIONS)
    size = np.sort(rng.integers(1, 50, shape), axis=1).astype(float)
    score = -np.sort(-rng.random(shape), axis=1)
    score[1, 0] = np.nan
    return CostTable(
        units=[f"u{i}" for i in range(UNITS)],
        options=["a", "b", "c"],
        quantities={"sensitivity": score, "size": size, "latency": rng.random(shape), "memory": size, "stage": size},
        measures={"memory": "B", "stage": "s"},
        aggregates={"memory": "peak", "stage": "max"},
        alive={"memory": [(0, 0, 1.0), (0, 1, 0.5), (1, 1, 1.0), (1, 2, 1.0), (2, 3, 2.0), (2, 4, 1.0)]},
        ties=[(2, 4)],
        offsets={"size": 7.0, "memory": 3.0},
        pairs={(0, 1): 0.1 * rng.random((3, 3))},
        transitions={"latency": {(0, 2): rng.random((3, 3)), (2, 4): rng.random((3, 3)), (3, 1): rng.random((3, 3))}},
    )


def moves(table, choices):
    """Every plan that differs in one unit, or in the tied ones together."""
    for group in ([0], [1], [3], [2, 4]):
        for option in range(OPTIONS):
            moved = choices.copy()
            moved[group] = option
            if table.allowed[group, option].all() and option != choices[group[0]]:
                yield moved


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_stops_the_better_moves_that_exceed_it(seed):
    table = random_table(seed)
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, OPTIONS, UNITS)
    choices[1], choices[4] = 2, choices[2]
    used = totals(table, choices)
    limits = {name: used[name] * (1 + 0.3 * rng.random()) for name in ("size", "latency", "memory", "stage")}
    better = [m for m in moves(table, choices) if totals(table, m)["sensitivity"] < used["sensitivity"]]
    found = bindings(table, choices, limits)
    assert {b.quantity for b in found} == set(limits)
    assert [b.stops for b in found] == sorted((b.stops for b in found), reverse=True)
    for binding in found:
        over = [m for m in better if totals(table, m)[binding.quantity] > limits[binding.quantity]]
        assert (binding.stops, binding.better) == (len(over), len(better))
        assert (binding.used, binding.limit) == (used[binding.quantity], limits[binding.quantity])


def test_a_plan_of_the_best_options_is_stopped_by_nothing():
    table = random_table(0)
    best = min(
        (np.array(c) for c in itertools.product(range(OPTIONS), repeat=UNITS) if c[2] == c[4] and c[1] != 0),
        key=lambda c: totals(table, c)["sensitivity"],
    )
    (binding,) = bindings(table, best, {"size": 1e9})
    assert binding.better == binding.stops == 0
    assert str(binding).endswith("not the limit")


def test_savings_are_against_the_most_accurate_option():
    table = random_table(3)
    choices = np.array([0, 1, 2, 0, 2])
    saved = savings(table, choices, ["size", "latency"])
    for name, values in saved.items():
        for unit in range(UNITS):
            best = int(np.nanargmin(table.quantity("sensitivity")[unit]))
            assert values[unit] == table.quantity(name)[unit, best] - table.quantity(name)[unit, choices[unit]]
