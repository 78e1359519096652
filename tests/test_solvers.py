"""What every solver promises: subclass `SolverContract` with a ``solver`` to hold it to that."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from random_problems import by_loops, close, random_problem

from mpq.problem import AllocationProblem, InfeasibleError, Proof
from mpq.solvers import ExhaustiveSolver, GreedySolver, ILPSolver, available, solve


def answer(solver, problem):
    """Allocation, or the error that there is none."""
    try:
        return solver.solve(problem)
    except InfeasibleError as error:
        return error


def scaled(problem, *, objective=1.0, resource=1.0):
    """The same problem in other units."""
    return AllocationProblem(
        objective=problem.objective * objective,
        resources={name: table * resource for name, table in problem.resources.items()},
        budgets={name: budget * resource for name, budget in problem.budgets.items()},
        offsets={name: offset * resource for name, offset in problem.offsets.items()},
        ties=problem.ties,
        norm=problem.norm,
    )


class SolverContract:
    """Promises of a solver. Override ``solver``, and ``kinds`` of `random_problem` with what it takes."""

    solver = None
    kinds = ("ties", "forbidden", "negative", "whole")
    seeds = range(40)

    def problems(self, **how):
        return (random_problem(seed, kinds=self.kinds, **how) for seed in self.seeds)

    def test_plans_are_feasible_bounds_are_bounds_and_exact_is_exact(self):
        plans = 0
        for problem in itertools.chain(self.problems(), self.problems(wide=True)):
            best, reachable = by_loops(problem)
            found = answer(self.solver, problem)
            if best is None:
                assert isinstance(found, InfeasibleError)
                assert all(close(found.reachable[name], value) for name, value in reachable.items() if value < np.inf)
                continue
            plans += 1
            assert problem.is_feasible(found.choices)
            assert (found.objective, found.usage) == problem.evaluate(found.choices)
            assert found.objective >= best or close(found.objective, best)
            assert found.proof.bound is None or found.proof.bound <= best or close(found.proof.bound, best)
            if self.solver.exact:
                assert found.proof.status == "optimal"
            if found.proof.status == "optimal":
                assert close(found.objective, best)
        assert plans > len(self.seeds) / 2

    def test_units_do_not_matter(self):
        for problem in self.problems():
            found = answer(self.solver, problem)
            for objective, resource in ((1e-12, 1e9), (1e12, 1e-9)):
                again = answer(self.solver, scaled(problem, objective=objective, resource=resource))
                if isinstance(found, InfeasibleError):
                    assert all(close(again.reachable[name], v * resource) for name, v in found.reachable.items())
                else:
                    assert close(again.objective, found.objective * objective)
                    assert again.proof.status == found.proof.status

    def test_order_of_layers_does_not_matter(self):
        for seed, problem in zip(self.seeds, self.problems(), strict=True):
            order = np.random.default_rng(seed).permutation(len(problem.objective))
            place = np.argsort(order)
            turned = AllocationProblem(
                objective=problem.objective[order],
                resources={name: table[order] for name, table in problem.resources.items()},
                budgets=problem.budgets,
                offsets=problem.offsets,
                ties=[tuple(place[list(tie)]) for tie in problem.ties],
                norm=problem.norm,
            )
            found, again = answer(self.solver, problem), answer(self.solver, turned)
            assert isinstance(again, InfeasibleError) == isinstance(found, InfeasibleError)
            if not isinstance(found, InfeasibleError):
                assert close(again.objective, found.objective)

    def test_one_layer_one_option_and_duplicates(self):
        only = AllocationProblem(objective=[[2.0]], resources={"size": [[3.0]]}, budgets={"size": 3.0})
        assert self.solver.solve(only).proof == Proof("optimal", 2.0, 0.0)
        same = AllocationProblem(objective=[[2.0, 2.0]] * 3, resources={"size": [[3.0, 3.0]] * 3}, budgets={"size": 9})
        assert self.solver.solve(same).objective == 6.0
        free = AllocationProblem(objective=[[2.0, -1.0, 5.0]] * 3)
        assert self.solver.solve(free).choices.tolist() == [1, 1, 1]

    def test_infeasible_in_words(self):
        table = np.array([[2.0, 4.0], [4.0, 8.0]])
        problem = AllocationProblem(
            objective=[[5.0, 1.0], [3.0, 0.5]], resources={"size": table}, budgets={"size": 5.0}, offsets={"size": 1.0}
        )
        with pytest.raises(InfeasibleError, match="size 7 .*budget 5") as caught:
            self.solver.solve(problem)
        assert caught.value.reachable == {"size": 7.0}
        assert caught.value.budgets == {"size": 5.0}

    def test_another_process_gives_the_same_answer(self):
        here = [str(found) for found in (answer(self.solver, problem) for problem in self.problems())]
        code = (
            f"from {type(self.solver).__module__} import {type(self.solver).__name__}\n"
            "import test_solvers as t; from random_problems import random_problem as r\n"
            f"for s in range({len(self.seeds)}): print(t.answer({self.solver!r}, r(s, kinds={self.kinds!r})))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == here


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
