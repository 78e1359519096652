"""What can be reached where not everything can."""

import math

import pytest

import mpq
from mpq.planning import solve_units
from mpq.problem import AllocationProblem, InfeasibleError
from mpq.solvers import ILPSolver

SIZE = [[2.0, 4.0], [4.0, 8.0]]
TIME = [[9.0, 3.0], [7.0, 1.0]]


def error(**changes):
    problem = {
        "objective": [[5.0, 1.0], [3.0, 0.5]],
        "resources": {"size": SIZE, "time": TIME},
        "layers": ("stem", "head"),
        "options": ("int4", "int8"),
    }
    with pytest.raises(InfeasibleError) as caught:
        ILPSolver().solve(AllocationProblem(**{**problem, **changes}))
    return caught.value


def test_smallest_with_the_others_in_force():
    """Time 10 needs at least one int8; the smaller one is the stem: 4 + 4. Size 7 leaves int4 for both: 16."""
    found = error(budgets={"size": 7.0, "time": 10.0})
    assert found.reachable == {"size": 8.0, "time": 16.0}
    assert found.budgets == {"size": 7.0, "time": 10.0}
    assert "size 8 with the other budgets in force (budget 7)" in str(found)
    assert "time 16 with the other budgets in force (budget 10)" in str(found)


def test_smallest_alone_where_the_others_conflict():
    found = error(budgets={"size": 5.0, "time": 3.0})
    assert found.reachable == {"size": 6.0, "time": 4.0}
    assert str(found).count("on its own, the other budgets conflict already") == 2


def test_offsets_are_part_of_the_number():
    assert error(budgets={"size": 105.0}, offsets={"size": 100.0}).reachable == {"size": 106.0}


def test_peaks():
    held = [[[5.0, 1.0], [2.0, 3.0]], [[1.0, 4.0], [1.0, 2.0]]]  # plans 44: 7, 48: 8, 84: 5, 88: 6
    found = error(peak_resources={"memory": held}, peak_budgets={"memory": 4.5})
    assert found.reachable == {"memory": 5.0}
    found = error(peak_resources={"memory": held}, peak_budgets={"memory": 5.5}, budgets={"size": 6.0})
    assert found.reachable == {"size": 8.0, "memory": 7.0}


def test_ties_in_the_way_are_named():
    found = error(objective=[[5.0, 1.0], [math.inf, 0.5]], budgets={"size": 10.5}, ties=[(0, 1)])
    assert found.reachable == {"size": 12.0}
    assert str(found).endswith("; in the way: tie (stem, head) for size")
    assert found.obstacles == ("tie (stem, head) for size",)
    assert "ties" not in str(error(budgets={"size": 5.0}, ties=[(0, 1)]))


def test_formats_that_cannot_be_met():
    found = error(objective=[[5.0, math.inf], [math.inf, 0.5]], max_formats=1, budgets={"size": 1.0})
    assert found.reachable == {}
    assert "max_formats=1 cannot be kept" in str(found)
    assert str(found).endswith("need 2")


def test_formats_count_with_the_budgets():
    """One format: int4 for both (size 6, time 16) or int8 for both (12, 4); two would do."""
    found = error(budgets={"size": 9.0, "time": 12.0}, max_formats=1)
    assert found.reachable == {"size": 12.0, "time": 16.0}
    assert ILPSolver().solve(
        AllocationProblem(
            objective=[[0, 0], [0, 0]], resources={"size": SIZE, "time": TIME}, budgets={"size": 9, "time": 12}
        )
    ).usage == {"size": 8.0, "time": 10.0}


def test_pins_in_the_way_are_named():
    """Either pin alone leaves a plan; together with the budget the wide one does not."""
    table = mpq.CostTable(
        units=["stem", "head"],
        options=["int4", "int8"],
        quantities={"sensitivity": [[5.0, 1.0], [3.0, 0.5]], "size": [[2.0, 4.0], [4.0, 8.0]]},
    )
    pins = {"head": "int8", "stem": "int4"}
    with pytest.raises(InfeasibleError, match=r"can be reached is 10 B; in the way: pin head=int8$") as no:
        solve_units(table, {"size": 9}, pins=pins)
    assert no.value.obstacles == ("pin head=int8",)
    assert solve_units(table, {"size": 9}, pins={"stem": "int4"}).options == {"stem": "int4", "head": "int4"}
