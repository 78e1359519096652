"""The default solver: optimal wherever enumeration can tell, and whatever it says of the rest is true."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lagrangian import units
from test_solvers import check_monotone

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import KINDS, by_loops, close, hard_problem, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import auto
from mpq.solvers.auto import AutoSolver
from mpq.solvers.core_search import Effort, search
from mpq.solvers.exhaustive import ExhaustiveSolver
from mpq.solvers.ilp import ILPSolver
from mpq.solvers.lagrangian_dual import maximise
from mpq.solvers.reduction import merge

SUMS = ("ties", "forbidden", "negative", "whole", "norm")


class TestAuto(SolverConformance):
    @pytest.fixture
    def solver(self):
        return AutoSolver()


class TestAutoExactly(SolverConformance):
    seeds = range(20)

    @pytest.fixture
    def solver(self):
        return AutoSolver(gap=0.0)


def compare(problem):
    """Auto against enumeration; whether there was a plan."""
    best, found = answer(ExhaustiveSolver(), problem), answer(AutoSolver(), problem)
    if isinstance(best, InfeasibleError):
        assert {k: pytest.approx(v, rel=1e-9) for k, v in best.reachable.items()} == found.reachable
        return False
    assert found.proof.status == "optimal"
    assert problem.is_feasible(found.choices)
    assert close(found.objective, best.objective)
    return True


@pytest.mark.parametrize("wide", [False, True])
def test_the_optimum_of_small_sums(wide):
    plans = 0
    for seed in range(600):
        problem = random_problem(seed, kinds=SUMS, wide=wide)
        if problem.features <= auto.SUMS:
            plans += compare(problem)
    assert plans > 300


def test_the_optimum_of_every_kind():
    assert sum(compare(random_problem(seed, kinds=KINDS)) for seed in range(2000, 2040)) > 15


tables = st.integers(1, 4).flatmap(
    lambda options: st.lists(
        st.lists(st.tuples(*[st.integers(-3, 9)] * 3), min_size=options, max_size=options), min_size=1, max_size=6
    )
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tables, st.integers(-10, 40), st.integers(-10, 40))
def test_small_whole_tables(table, size, latency):
    """Zeros, duplicates, plateaus and negative numbers, two budgets."""
    rows = np.array(table, dtype=float)
    resources = {"size": rows[:, :, 1], "latency": rows[:, :, 2]}
    compare(AllocationProblem(objective=rows[:, :, 0], resources=resources, budgets={"size": size, "latency": latency}))


def whole_problem(seed, layers=14, options=5):
    """Too many plans to look at, whole numbers so that equal sums abound."""
    rng = np.random.default_rng(seed)
    resources = {name: rng.integers(0, 30, (layers, options)).astype(float) for name in ("size", "latency")}
    budgets = {name: float(round(table.mean() * layers * 0.8)) for name, table in resources.items()}
    names = list(budgets)[: 1 + seed % 2]
    return AllocationProblem(
        objective=rng.integers(0, 60, (layers, options)).astype(float),
        resources=resources,
        budgets={name: budgets[name] for name in names},
    )


def by_table(problem):
    """Least objective by dynamic programming over whole usages."""
    (name, *rest), best = list(problem.budgets), {(0, 0): 0.0}
    others = problem.resources[rest[0]] if rest else np.zeros_like(problem.objective)
    for score, size, other in zip(problem.objective, problem.resources[name], others, strict=True):
        following = {}
        for (used, more), value in best.items():
            for s, a, b in zip(score, size, other, strict=True):
                state = (used + a, more + b)
                if state[0] <= problem.budgets[name] and (not rest or state[1] <= problem.budgets[rest[0]]):
                    following[state] = min(following.get(state, math.inf), value + s)
        best = following
    return min(best.values())


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_against_dynamic_programming(seed):
    problem = whole_problem(seed)
    found = AutoSolver(gap=0.0).solve(problem)
    assert (found.objective, found.proof.status) == (by_table(problem), "optimal")


@pytest.mark.parametrize(("layers", "budgets"), [(40, 1), (40, 2), (40, 3), (80, 2)])
def test_medium_problems_against_the_integer_program(layers, budgets):
    for seed in range(3):
        problem = units(layers, 6, budgets, seed)
        found, best = AutoSolver(gap=0.0).solve(problem), ILPSolver().solve(problem)
        assert found.proof.status == best.proof.status == "optimal"
        assert close(found.objective, best.objective)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter_in_medium_problems(scale):
    problem = units(60, 6, 2)
    again = AllocationProblem(objective=problem.objective * scale, resources=problem.resources, budgets=problem.budgets)
    assert close(AutoSolver().solve(again).objective, AutoSolver().solve(problem).objective * scale)


@pytest.mark.parametrize("budgets", [2, 3])
def test_what_is_certified_is_true(budgets, monkeypatch):
    """With hardly any work allowed: the bound still holds, and "optimal" is still only said of the optimum."""
    statuses = set()
    for seed in range(12):
        problem = units(20, 5, budgets, seed)
        best = ILPSolver().solve(problem).objective
        monkeypatch.setattr(auto, "SMALL", 0.0)
        monkeypatch.setattr(auto, "EFFORTS", (Effort(3 + 5 * seed, 40.0 * 4**seed),))
        found = AutoSolver(gap=0.5).solve(problem)
        assert found.objective >= best or close(found.objective, best)
        assert found.proof.bound <= best or close(found.proof.bound, best)
        assert found.proof.status != "optimal" or close(found.objective, best)
        statuses.add(found.proof.status)
    assert statuses == {"optimal", "feasible"}


def test_a_time_limit_never_turns_a_plan_into_the_optimum(monkeypatch):
    problem = hard_problem(layers=40)
    monkeypatch.setattr(auto, "EFFORTS", (Effort(50, 1e3),))
    found = AutoSolver(time_limit=0.3, gap=0.0).solve(problem)
    assert problem.is_feasible(found.choices)
    assert found.proof.status == "feasible"
    assert found.proof.bound < found.objective


@pytest.mark.parametrize("budgets", [1, 2])
def test_a_looser_budget_is_never_worse(budgets):
    for seed in range(6):
        check_monotone(AutoSolver(gap=0.0), units(30, 5, budgets, seed))


def test_the_gap_asked_for_is_kept():
    for seed in range(4):
        found = AutoSolver(gap=1e-3).solve(units(300, 8, 3, seed))
        assert found.proof.gap <= 1e-3


def test_p_norms_against_the_integer_program():
    for seed in range(4):
        problem = units(25, 5, 2, seed)
        powers = AllocationProblem(
            objective=problem.objective, resources=problem.resources, budgets=problem.budgets, norm=3
        )
        assert close(AutoSolver(gap=0.0).solve(powers).objective, ILPSolver().solve(powers).objective)


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_core_search_finds_what_loops_find(budgets):
    """Complete searches from any plan and with any gap agree with enumeration."""
    improved = excluded = 0
    for seed in range(60):
        problem = random_problem(seed, kinds=("negative", "whole"), budgets=budgets)
        best, core = by_loops(problem)[0], merge(problem)
        dual = maximise(core)
        if best is None or dual is None or len(problem.budgets) < budgets:
            continue
        plans = itertools.product(*(np.flatnonzero(allowed) for allowed in core.allowed))
        start = next(np.array(plan) for plan in plans if problem.is_feasible(plan))
        for gap in (0.5 * (best - dual.bound), 1.5 * (best - dual.bound), math.inf):
            found = search(core, dual, start, gap, Effort(10**6))
            assert found.is_complete
            reached = core.value(found.choice)
            if best - dual.bound < gap * (1 - 1e-6):
                assert close(reached, best)
                improved += found.choice is not start
            else:
                excluded += 1
                assert reached >= best or close(reached, best)
    assert improved > 3
    assert excluded > 10


def test_settings_are_checked():
    with pytest.raises(ValueError, match="time_limit"):
        AutoSolver(time_limit=0)
    with pytest.raises(ValueError, match="gap"):
        AutoSolver(gap=-1)
