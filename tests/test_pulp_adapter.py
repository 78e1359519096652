"""What PuLP says and what it means, version 3 and 4, and codes that fail."""

from types import SimpleNamespace

import numpy as np
import pulp
import pytest

from mpq.problem import AllocationProblem
from mpq.solvers import ILPSolver, pulp_adapter
from mpq.solvers.linear_program import linear_program
from mpq.solvers.reduction import merge

SMALL = AllocationProblem(
    objective=[[5.0, 1.0], [3.0, 0.5]], resources={"size": [[2.0, 4.0], [4.0, 8.0]]}, budgets={"size": 9.0}
)
PROGRAM = linear_program(merge(SMALL), 1.0)


@pytest.mark.parametrize(
    ("status", "sol_status", "meant"),
    [
        (pulp.LpStatusOptimal, pulp.LpSolutionOptimal, "optimal"),
        (pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible, "feasible"),  # the time was over: status says optimal
        (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible, "infeasible"),
        (pulp.LpStatusInfeasible, pulp.LpSolutionNoSolutionFound, "infeasible"),  # CBC's "Integer infeasible"
        (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound, "unknown"),
        (pulp.LpStatusUndefined, pulp.LpSolutionNoSolutionFound, "unknown"),
    ],
)
def test_statuses_of_version_3(status, sol_status, meant):
    assert pulp_adapter._status(SimpleNamespace(status=status, sol_status=sol_status), status) == meant


@pytest.mark.parametrize(
    ("name", "has_solution", "meant"),
    [
        ("Optimal", True, "optimal"),
        ("GapLimit", True, "optimal"),
        ("Infeasible", False, "infeasible"),
        ("TimeLimit", True, "feasible"),
        ("TimeLimit", False, "unknown"),
        ("NumericalError", False, "unknown"),
    ],
)
def test_statuses_of_version_4(name, has_solution, meant):
    stats = SimpleNamespace(status=SimpleNamespace(name=name), has_solution=has_solution)
    assert pulp_adapter._status(None, stats) == meant


@pytest.mark.parametrize("backend", pulp_adapter.available())
def test_every_solver_that_is_here(backend):
    found = ILPSolver(backend=backend).solve(SMALL)
    assert found.choices.tolist() == [1, 0]
    assert found.proof.status == "optimal"


def test_relaxation_gives_prices():
    answer = pulp_adapter.run(PROGRAM, backend="auto", time_limit=10, relaxed=True)
    assert answer.status == "optimal"
    # 9 bytes: 3 more than the least; both moves gain, 2 each a byte for the stem, 2.5 / 4 for the head
    assert PROGRAM.cost @ answer.values == pytest.approx(4 * 0 + 2.5 * 0.75, abs=1e-6)
    assert PROGRAM.bound(answer.duals)[0] == pytest.approx(2.5 * 0.75, abs=1e-6)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="backend .*'CBD'.*did you mean 'CBC'"):
        pulp_adapter.run(PROGRAM, backend="CBD", time_limit=1)


def test_no_solver_at_all_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pulp_adapter, "available", list)
    with pytest.raises(ValueError, match="pip install highspy"):
        pulp_adapter.run(PROGRAM, backend="auto", time_limit=1)


class Crashes:
    """Fails with its tight settings, then hands over."""

    def __init__(self, real):
        self.real, self.calls = real, []

    def __call__(self, module, backend, wanted, *, is_tight):
        self.calls.append(is_tight)
        solver = self.real(module, backend, wanted, is_tight=is_tight)
        if is_tight:

            def fail(model):
                raise pulp.PulpSolverError("crashed")

            solver.actualSolve = fail
        return solver


def test_a_crash_is_tried_again_with_plain_settings(monkeypatch):
    crashes = Crashes(pulp_adapter._solver)
    monkeypatch.setattr(pulp_adapter, "_solver", crashes)
    answer = pulp_adapter.run(PROGRAM, backend="auto", time_limit=10)
    assert answer.status == "optimal"
    assert crashes.calls == [True, False]
    assert PROGRAM.choice(answer.values, merge(SMALL)).tolist() == [1, 0]


def test_one_thread_no_gap_and_no_output(capfd):
    pulp_adapter.run(PROGRAM, backend="auto", time_limit=10)
    assert capfd.readouterr() == ("", "")
    wanted = {"mip": True, "timeLimit": 3.0, "gapAbs": 0.0, "gapRel": 0.0, "threads": 1}
    solver = pulp_adapter._solver(pulp, "auto", wanted, is_tight=True)
    assert solver.timeLimit == 3.0
    settings = {**solver.optionsDict, **vars(solver)}
    assert settings.get("threads") is None  # CBC's default is one; naming it makes CBC start a worker thread
    assert settings["gapRel"] == 0.0


def test_answers_hold_numbers_only():
    answer = pulp_adapter.run(PROGRAM, backend="auto", time_limit=10)
    assert answer.values.dtype == np.float64
    assert answer.duals is None
