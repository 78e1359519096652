"""Baselines against brute force on small tables: within the budgets, not to be raised, and drawn up as they say."""

import itertools

import numpy as np
import pytest

from mpq.baseline_plans import DRAWS, BaselinePlans
from mpq.limits import apply_budgets
from mpq.problem import InfeasibleError
from mpq.table_problem import build_problem
from mpq.tables import CostTable

LABELS = ["int2", "int4", "int8"]
BITS = np.array([2, 4, 8])


def random_table(seed, units=5, **fields):
    """Sizes grow with bits; latency is what it likes; a peak of memory over two steps; a pair of layers is tied."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 30, units)
    size = weights[:, None] * BITS / 8.0
    scores = np.sort(rng.exponential(size=(units, 3)), axis=1)[:, ::-1]
    quantities = {"sensitivity": scores, "size": size, "latency": rng.uniform(1, 3, (units, 3)), "memory": size}
    if units > 2 and rng.random() < 0.5:  # an option that one layer may not take
        for values in quantities.values():
            values[1, 1] = np.nan
    alive = [(step, unit) for step in range(2) for unit in range(units) if unit % 2 == step or unit == 0]
    chosen = {
        "measures": {"latency": "s", "memory": "B"},
        "aggregates": {"memory": "peak"},
        "alive": {"memory": alive},
        "parameters": weights,
        "offsets": {"size": 3.0},
        "ties": [(2, 4)] if units > 4 else [],
        **fields,
    }
    return CostTable(units=[f"l{i}" for i in range(units)], options=LABELS, quantities=quantities, **chosen)


def plans_of(table, budgets, **settings):
    return BaselinePlans(table=table, limits=apply_budgets(table, budgets), **settings)


def feasible_plans(table, budgets):
    problem = build_problem(table, apply_budgets(table, budgets), "sensitivity", {}, {})
    every = itertools.product(range(len(table.options)), repeat=len(table.units))
    return problem, {choices for choices in every if problem.is_feasible(choices)}


def budgets_of(table, share):
    """A share of the way from the least to the most of each quantity."""
    found = {}
    for name in ("size", "latency", "memory"):
        low, high = table.reachable(name)
        found[name] = low + share * (high - low)
    return found


def can_be_raised(choices, feasible, fixed=()):
    """Whether some layer, with those tied to it, could take a wider option and nothing else change."""
    groups = [[0], [1], [2, 4], [3]] if len(choices) == 5 else [[i] for i in range(len(choices))]
    for group in groups:
        for option in range(choices[group[0]] + 1, len(LABELS)):
            raised = list(choices)
            for unit in group:
                raised[unit] = option
            if tuple(raised) in feasible and not set(group) & set(fixed):
                return True
    return False


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "shuffled"])
@pytest.mark.parametrize("seed", range(12))
def test_plans_keep_every_budget_and_cannot_be_raised(name, seed):
    table = random_table(seed)
    budgets = budgets_of(table, 0.55)
    _, feasible = feasible_plans(table, budgets)
    if not feasible:
        with pytest.raises(InfeasibleError):
            plans_of(table, budgets).choices(name)
        return
    found = plans_of(table, budgets).choices(name)
    assert found.shape == (DRAWS[name], 5)
    for choices in found.tolist():
        assert tuple(choices) in feasible
        assert not can_be_raised(choices, feasible)


def test_most_of_these_tables_have_plans():
    assert sum(bool(feasible_plans(t, budgets_of(t, 0.55))[1]) for t in map(random_table, range(12))) >= 9


def test_transitions_count():
    block = np.array([[0.0, 0, 9], [0, 0, 9], [9, 9, 0]])
    for seed in range(8):
        table = random_table(seed, transitions={"latency": {(0, 1): block, (4, 2): block, (3, 2): block}})
        budgets = {"latency": table.reachable("latency")[0] + 6}
        _, feasible = feasible_plans(table, budgets)
        for name in ("smallest", "random"):
            for choices in plans_of(table, budgets).choices(name).tolist():
                assert tuple(choices) in feasible
                assert not can_be_raised(choices, feasible)


@pytest.mark.parametrize("seed", range(6))
def test_a_shuffled_table_is_solved_exactly(seed):
    table = random_table(seed, ties=[])
    budgets = {"size": budgets_of(table, 0.5)["size"]}
    problem, feasible = feasible_plans(table, budgets)
    alike = [[u for u in range(5) if (table.allowed[u] == row).all()] for row in np.unique(table.allowed, axis=0)]
    best = set()
    for orders in itertools.product(*(itertools.permutations(members) for members in alike)):
        source = np.arange(5)
        for members, order in zip(alike, orders, strict=True):
            source[members] = order
        score = problem.objective[source]
        best.add(min(feasible, key=lambda choices, s=score: s[np.arange(5), list(choices)].sum()))
    for choices in plans_of(table, budgets).choices("shuffled").tolist():
        assert tuple(choices) in best


def even_table(scores, weights):
    size = np.outer(weights, BITS)
    return CostTable(
        units=[f"l{i}" for i in range(len(weights))],
        options=LABELS,
        quantities={"sensitivity": np.outer(scores, [4, 2, 1]), "size": size},
        parameters=weights,
    )


def test_each_rule_by_hand():
    # 4 layers of 10, 10, 40 and 20 weights; all at 4 bits take 320 of 450, and 130 are left over
    table = even_table([10, 90, 40, 160], [10, 10, 40, 20])
    plans = plans_of(table, {"size": 450.0})
    # scores a weight: 1, 9, 1, 8 -> the second layer (+40), the last (+80); 10 left
    assert plans.choices("sorted").tolist() == [[1, 2, 1, 2]]
    # small first: 10 and 10 (+80); the third takes 160, the last 80: neither fits into 50
    assert plans.choices("smallest").tolist() == [[2, 2, 1, 1]]
    # ends first: the first and last at 8 bits (+120); 10 left
    assert plans.choices("protected").tolist() == [[2, 1, 1, 2]]


def test_a_fixed_layer_stays():
    table = random_table(3)
    fixed = np.array([2, -1, -1, 0, -1])
    plans = plans_of(table, {"size": table.reachable("size")[1] * 0.8}, fixed=fixed)
    for name in DRAWS:
        found = plans.choices(name)
        assert (found[:, 0] == 2).all()
        assert (found[:, 3] == 0).all()


def test_units_of_a_layer_go_together():
    table = random_table(0, units=6, ties=[], layer_index=[0, 0, 1, 1, 2, 2])
    table = CostTable(
        **{**vars_of(table), "quantities": {n: np.nan_to_num(v, nan=5.0) for n, v in table.quantities.items()}}
    )
    found = plans_of(table, {"size": budgets_of(table, 0.6)["size"]}).choices("random")
    assert (found[:, ::2] == found[:, 1::2]).all()
    assert len(np.unique(found, axis=0)) > 1


def vars_of(table):
    names = (
        "units",
        "options",
        "quantities",
        "measures",
        "aggregates",
        "alive",
        "parameters",
        "offsets",
        "layer_index",
    )
    return {name: getattr(table, name) for name in names}


def test_the_same_seed_draws_the_same():
    table = random_table(4)
    budgets = {"size": budgets_of(table, 0.5)["size"]}
    for name in ("random", "shuffled"):
        first, again, other = (plans_of(table, budgets, seed=seed).choices(name) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert name == "shuffled" or not np.array_equal(first, other)


def test_what_cannot_be_is_named():
    table = random_table(0)
    with pytest.raises(ValueError, match=r"protected, smallest, .*'sortd'"):
        plans_of(table, {"size": "100%"}).choices("sortd")
    with pytest.raises(ValueError, match="sensitivity"):
        plans_of(table, {"sensitivity": 3}).choices("random")


def test_a_raise_that_was_refused_is_tried_again_when_others_were_made():
    zero = [[0.0, 0.0], [0.0, 0.0]]
    table = CostTable(
        units=["small", "large"],
        options=["int2", "int8"],
        quantities={"sensitivity": [[2, 1], [2, 1]], "size": [[2, 8], [4, 16]], "latency": zero},
        parameters=[1, 2],
        transitions={"latency": {(0, 1): np.array([[0, 0], [9, 0]])}},  # int8 before int2 is dear
    )
    assert plans_of(table, {"latency": 5.0}).choices("smallest").tolist() == [[1, 1]]
