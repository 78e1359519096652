"""The reference of the other solvers, held to plain loops itself."""

import pytest
from test_solvers import check_monotone

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import KINDS, by_loops, close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import ExhaustiveSolver, exhaustive


class TestExhaustive(SolverConformance):
    @pytest.fixture
    def solver(self):
        return ExhaustiveSolver()


def test_equals_plain_loops_for_every_kind_of_problem():
    drawn = set()
    for seed in range(400):
        problem = random_problem(seed, wide=seed % 2 == 0)
        best, reachable = by_loops(problem)
        found = answer(ExhaustiveSolver(), problem)
        drawn |= problem.features
        if best is not None:
            assert close(found.objective, best), seed
            assert problem.is_feasible(found.choices)
        elif all(value < float("inf") for value in reachable.values()):
            assert all(close(found.reachable[name], value) for name, value in reachable.items()), seed
    assert drawn == ExhaustiveSolver.features
    assert len(KINDS) == 10


def test_chunks_do_not_matter(monkeypatch):
    expected = [str(answer(ExhaustiveSolver(), random_problem(seed))) for seed in range(40)]
    monkeypatch.setattr(exhaustive, "CHUNK", 1)  # the smallest chunk, 256 plans
    assert [str(answer(ExhaustiveSolver(), random_problem(seed))) for seed in range(40)] == expected


def test_equal_plans_the_first():
    assert ExhaustiveSolver().solve(AllocationProblem(objective=[[1.0, 1.0]] * 3)).choices.tolist() == [0, 0, 0]


def test_monotone():
    for seed in range(60):
        check_monotone(ExhaustiveSolver(), random_problem(seed, kinds=("ties", "forbidden", "norm")))


def test_formats_that_cannot_be_met():
    inf = float("inf")
    problem = AllocationProblem(objective=[[1.0, inf, inf], [inf, 1.0, inf], [1.0, inf, 1.0]], max_formats=1)
    found = answer(ExhaustiveSolver(), problem)
    assert isinstance(found, InfeasibleError)
    assert "max_formats=1" in str(found)
    assert "need 2" in str(found)
