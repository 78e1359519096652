"""Problems of a table: what follows which quantity, whichever of them is the objective; totals by loops."""

import itertools
import math

import numpy as np
import pytest

from mpq.planning import solve_table, solve_units
from mpq.table_problem import totals
from mpq.tables import CostTable


def coupled_table(**changes):
    rng = np.random.default_rng(9)
    fields = {
        "units": ["a", "b", "c"],
        "options": ["int4", "int8"],
        "quantities": {name: rng.uniform(1, 9, (3, 2)) for name in ("sensitivity", "size", "latency", "stage", "peak")},
        "aggregates": {"stage": "max", "peak": "peak"},
        "alive": {"peak": [(0, 0, 1), (1, 0, 1), (1, 1, 0.5), (2, 2, 2)]},
        "offsets": {"size": 2.5, "latency": 0.5, "stage": 0.25, "peak": 3.0, "sensitivity": 0.0},
        "pairs": {(0, 1): rng.normal(size=(2, 2))},
        "transitions": {"latency": {(1, 2): rng.uniform(size=(2, 2)), (0, 2): rng.uniform(size=(2, 2))}},
    }
    return CostTable(**{**fields, **changes})


def by_loops(table, choices):
    """Every total in plain loops."""
    found = {}
    for name, values in table.quantities.items():
        chosen = [values[unit, option] for unit, option in enumerate(choices)]
        if name == "stage":
            found[name] = max(chosen)
        elif name == "peak":
            steps = {}
            for step, unit, factor in table.alive["peak"]:
                steps[step] = steps.get(step, 0) + factor * chosen[int(unit)]
            found[name] = max(steps.values())
        else:
            found[name] = sum(chosen)
        found[name] += table.offsets.get(name, 0.0)
    for (i, j), block in table.pairs.items():
        found["sensitivity"] += block[choices[i]][choices[j]]
    for (i, j), block in table.transitions["latency"].items():
        found["latency"] += block[choices[i]][choices[j]]
    return found


EVERY = list(itertools.product(range(2), repeat=3))


def test_totals_are_those_of_loops():
    table = coupled_table()
    for choices in EVERY:
        assert totals(table, np.array(choices)) == pytest.approx(by_loops(table, choices))


@pytest.mark.parametrize("objective", ["sensitivity", "size", "latency", "stage"])
def test_couplings_and_offsets_follow_their_quantity(objective):
    table = coupled_table()
    problem = table.problem({}, objective=objective)
    for choices in EVERY:
        value, usage = problem.evaluate(choices)
        expected = by_loops(table, choices)
        assert value == pytest.approx(expected.pop(objective) - table.offsets[objective])
        assert usage == pytest.approx(expected)


def test_interactions_count_where_the_sensitivity_has_a_budget():
    table = coupled_table()
    every = [by_loops(table, choices) for choices in EVERY]
    for limit in sorted(total["sensitivity"] for total in every):
        found = solve_units(table, {"sensitivity": limit + 1e-6}, objective="size")
        fits = [total["size"] for total in every if total["sensitivity"] <= limit + 1e-6]
        assert found.totals["size"] == pytest.approx(min(fits))
        assert found.proof.bound == pytest.approx(min(fits))


def test_standard_errors_belong_to_the_sensitivity_alone():
    quantities = {name: np.ones((3, 2)) for name in ("sensitivity", "sensitivity_se", "size", "latency")}
    noisy = coupled_table(quantities=quantities, aggregates={}, alive={})
    assert noisy.problem({}).objective_se is not None
    assert noisy.problem({}, objective="size").objective_se is None
    for objective in ("sensitivity", "size"):
        assert "sensitivity_se" not in noisy.problem({}, objective=objective).resources


def test_costs_of_formats_go_by_label():
    plain = coupled_table(pairs={})
    assert plain.problem({}, format_costs={"int8": 2}).format_costs.tolist() == [0.0, 2.0]
    assert plain.problem({}, format_costs=[1.0, 2.0]).format_costs.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="format_costs of 'int88'.*did you mean 'int8'"):
        plain.problem({}, format_costs={"int88": 2})
    assert plain.problem({}, norm=2, max_formats=1).features >= {"p-norm", "max_formats"}


def test_a_norm_is_minimised_and_sums_are_predicted():
    table = coupled_table(pairs={}, transitions={"latency": {}})
    scores = table.quantities["sensitivity"]
    for norm in (math.inf, 3.0):
        found = solve_units(table, {"size": 18.0}, norm=norm)
        values = {}
        for choices in EVERY:
            if by_loops(table, choices)["size"] <= 18.0:
                chosen = [scores[unit, option] for unit, option in enumerate(choices)]
                values[choices] = max(chosen) if norm == math.inf else sum(x**norm for x in chosen) ** (1 / norm)
        assert found.allocation.objective == pytest.approx(min(values.values()))
        assert found.totals == pytest.approx(by_loops(table, found.allocation.choices.tolist()))


@pytest.mark.parametrize("norm", [None, 2, math.inf])
def test_robust_answers_hold_for_norms_as_well(norm):
    rng = np.random.default_rng(4)
    table = CostTable(
        units=["a", "b", "c"],
        options=["int4", "int8"],
        quantities={name: rng.uniform(0.5, 3, (3, 2)) for name in ("sensitivity", "sensitivity_se", "size")},
        offsets={"sensitivity": 0.75},
    )
    scores, errors = table.quantities["sensitivity"], table.quantities["sensitivity_se"]
    values = []
    for choices in EVERY:
        if sum(table.quantities["size"][i, c] for i, c in enumerate(choices)) > 6.5:
            continue
        chosen = [(scores[i, c], errors[i, c]) for i, c in enumerate(choices)]
        if norm is None:
            values.append(0.75 + sum(s for s, _ in chosen) + 1.5 * sum(e**2 for _, e in chosen) ** 0.5)
        elif norm == 2:
            values.append(sum((s + 1.5 * e) ** 2 for s, e in chosen) ** 0.5)
        else:
            values.append(max(s + 1.5 * e for s, e in chosen))
    found = solve_units(table, {"size": 6.5}, norm=norm, robust=1.5)
    assert found.worst_case == pytest.approx(min(values))
    assert found.robust.proof.status == "optimal"


def test_what_can_be_reached_is_told_from_the_budget():
    table = CostTable(units=["a"], options=["int4"], quantities={"sensitivity": [[1.0]], "size": [[18_401.0]]})
    with pytest.raises(ValueError, match="reached is 18401 against 18400"):
        solve_units(table, {"size": 18_400})


def test_a_table_without_layers_makes_no_plan():
    with pytest.raises(ValueError, match="no layers to make a plan for"):
        solve_table(coupled_table(), {"size": 20.0})


def test_a_frontier_of_two_resources_has_every_plan_that_no_other_beats_in_all_three():
    table = coupled_table(pairs={}, transitions={"latency": {}})
    front = table.pareto(["size", "latency"])
    assert front.names == ("size", "latency")
    plans = [
        tuple(by_loops(table, plan)[name] for name in ("size", "latency", "sensitivity"))
        for plan in itertools.product(range(2), repeat=3)
    ]
    best = {p for p in plans if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in plans)}
    found = np.column_stack([front.resource, front.objective])
    np.testing.assert_allclose(found[np.lexsort(found.T[::-1])], sorted(best))
