"""The program says what the core says, and its bound holds for any prices."""

import itertools

import numpy as np
import pytest

from mpq.problem import AllocationProblem
from mpq.random_problems import random_problem
from mpq.solvers.linear_program import ROOM, SCALE, linear_program
from mpq.solvers.reduction import merge


def cores(seeds):
    for seed in seeds:
        core = merge(random_problem(seed)).tightened()
        if core is not None and (core.allowed.sum(1) > 1).any():
            yield core


def column_values(program, core, plan):
    """The point of a plan: products and formats as they follow from it, t as small as its rows allow."""
    values = np.zeros(len(program.names))
    first = {int(np.argmax(core.problem.groups == group)): group for group in range(len(plan))}
    for number, name in enumerate(program.names):
        kind, *indices = name.split("_")
        index = [int(text) for text in indices]
        if kind == "x":
            values[number] = plan[first[index[0]]] == index[1]
        elif kind == "y":
            values[number] = plan[first[index[0]]] == index[1] and plan[first[index[2]]] == index[3]
        elif kind == "u":
            values[number] = index[0] in plan
    if "t" in program.names:
        t = program.names.index("t")
        rows = [row for row in program.rows if t in row.columns]
        values[t] = max([0.0, *(float(row.values @ values[row.columns] - row.rhs) for row in rows)])
    return values


def test_plans_are_points_and_cost_what_they_should():
    for core in cores(range(150)):
        program, floors = linear_program(core, 7.0), core.floors()
        for plan in itertools.product(*(np.flatnonzero(row) for row in core.allowed)):
            choice = np.array(plan)
            values = column_values(program, core, choice)
            over = [row.values @ values[row.columns] - row.rhs for row in program.rows]
            exact = [row.is_equality for row in program.rows]
            holds = all(abs(o) < 1e-9 if e else o < 1e-9 for o, e in zip(over, exact, strict=True))
            assert holds == core.is_feasible(choice)
            if holds:
                assert program.cost @ values == pytest.approx(7.0 * core.distance(floors, choice), rel=1e-9, abs=1e-9)
                assert program.choice(values, core).tolist() == list(plan)


def test_the_bound_holds_for_any_prices():
    """No price vector, however wrong, gives a bound above a plan, and no extra is above what its option costs."""
    rng = np.random.default_rng(0)
    for core in cores(range(120)):
        program = linear_program(core, 1.0)
        found = []
        for plan in itertools.product(*(np.flatnonzero(row) for row in core.allowed)):
            choice = np.array(plan)
            if core.is_feasible(choice):
                found.append((program.cost @ column_values(program, core, choice), choice))
        for size in (0.0, 1e-3, 1.0, 1e3):
            bound, extra = program.bound(rng.normal(0, size or 1, len(program.rows)) * (size > 0))
            for value, choice in found:
                taken = program.column[np.arange(len(choice)), choice]
                most = max((extra[column] for column in taken if column >= 0), default=0.0)
                assert bound + most <= value + 1e-9 * (1 + abs(bound) + most)


def test_rows_are_scaled_and_those_that_cannot_bind_left_out():
    problem = AllocationProblem(
        objective=[[2.0, 0.0], [1.0, 0.0]],
        resources={"size": [[1e-9, 3e-9], [1e-9, 2e-9]], "time": [[1.0, 2.0], [1.0, 2.0]]},
        budgets={"size": 4e-9, "time": 5.0},
    )
    program = linear_program(merge(problem), 1.0)
    assert program.names == ("x_0_0", "x_0_1", "x_1_0", "x_1_1")
    (row,) = program.rows
    assert row.rhs == pytest.approx(SCALE * (1 + ROOM), rel=1e-15)
    assert row.values == pytest.approx([SCALE, SCALE / 2], rel=1e-8)


def test_products_of_a_pair_are_tight():
    """The relaxation of one pair alone has its optimum at a plan: the bound from good prices closes the gap."""
    from mpq.solvers import pulp_adapter

    rng = np.random.default_rng(3)
    problem = AllocationProblem(objective=rng.uniform(0, 1, (2, 4)), pairs={(0, 1): rng.uniform(-5, 5, (4, 4))})
    core = merge(problem)
    program = linear_program(core, 1.0)
    relaxed = pulp_adapter.run(program, backend="auto", time_limit=10, relaxed=True)
    best = min(core.value(np.array(plan)) for plan in itertools.product(range(4), repeat=2))
    assert core.floor() + program.bound(relaxed.duals)[0] == pytest.approx(best, abs=1e-5)
