"""Solvers by name and as objects, their settings, and a promise of the exact ones: a looser budget is never worse."""

import numpy as np
import pytest

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close
from mpq.solver_conformance import answer
from mpq.solvers import ExhaustiveSolver, GreedySolver, ILPSolver, available, solve


def check_monotone(solver, problem):
    """A looser budget is never worse."""
    found = answer(solver, problem)
    if isinstance(found, InfeasibleError):
        return
    for name, budget in problem.budgets.items():
        looser = {**problem.budgets, name: budget + 0.05 * abs(budget)}
        again = solver.solve(
            AllocationProblem(
                objective=problem.objective,
                resources=problem.resources,
                budgets=looser,
                offsets=problem.offsets,
                ties=problem.ties,
                norm=problem.norm,
            )
        )
        assert again.objective <= found.objective or close(again.objective, found.objective)


SMALL = AllocationProblem(
    objective=[[5.0, 1.0], [3.0, 0.5]], resources={"size": [[2.0, 4.0], [4.0, 8.0]]}, budgets={"size": 9.0}
)


@pytest.mark.parametrize("name", available())
def test_solve_by_name(name):
    assert solve(SMALL, name).choices.tolist() == [1, 0]


def test_auto_is_the_default():
    assert solve(SMALL).proof.status == "optimal"


def test_solve_by_instance_and_settings():
    assert solve(SMALL, GreedySolver()).choices.tolist() == [1, 0]
    assert solve(SMALL, "ilp", time_limit=5.0, gap=0.1).objective == 4.0
    with pytest.raises(TypeError, match="time_limit"):
        solve(SMALL, ILPSolver(), time_limit=5.0)
    with pytest.raises(TypeError, match="seconds"):
        solve(SMALL, "ilp", seconds=5.0)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="'gredy': did you mean 'greedy'"):
        solve(SMALL, "gredy")


def test_solvers_are_frozen_values():
    assert ILPSolver(gap=0.1) == ILPSolver(gap=0.1)
    assert repr(GreedySolver()) == "GreedySolver()"
    with pytest.raises(AttributeError):
        ILPSolver().gap = 0.5
    with pytest.raises(TypeError):
        ILPSolver(5.0)


def test_too_many_plans_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"20,000,000 plans at most, got .*: use solver='ilp'"):
        ExhaustiveSolver().solve(AllocationProblem(objective=np.zeros((24, 4)), ties=[tuple(range(13, 24))]))
