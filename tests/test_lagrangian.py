"""Prices: the largest Lagrangian bound, never above the optimum; the plan near it, at any size."""

from dataclasses import replace

import numpy as np
import pulp
import pytest

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import by_loops, close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import lagrangian_dual, pulp_adapter
from mpq.solvers.exhaustive import ExhaustiveSolver
from mpq.solvers.lagrangian import LagrangianSolver
from mpq.solvers.lagrangian_dual import maximise
from mpq.solvers.multipliers import shadow_prices
from mpq.solvers.reduction import merge

TAKEN = ("ties", "forbidden", "negative", "whole", "norm")


class TestLagrangian(SolverConformance):
    @pytest.fixture
    def solver(self):
        return LagrangianSolver()


def units(count, options=4, budgets=1, seed=0, tightness=0.4):
    """Many units of lognormal size and sensitivity, errors that fall with the bits."""
    rng = np.random.default_rng(seed)
    size, slope = rng.lognormal(3, 1.2, (count, 1)), rng.lognormal(0, 1.5, (count, 1))
    bits = np.linspace(2, 8, options)
    objective = slope * size * 4.0**-bits * rng.lognormal(0, 0.3, (count, options))
    tables = [size * bits, size * bits * rng.uniform(0.5, 2, (count, 1)), size * rng.uniform(0, 1, (count, options))]
    resources = dict(zip(("size", "latency", "energy"), tables[:budgets], strict=False))
    low = {name: table.min(1).sum() for name, table in resources.items()}
    high = {name: table.max(1).sum() for name, table in resources.items()}
    limits = {name: float(low[name] + tightness * (high[name] - low[name])) for name in resources}
    return AllocationProblem(objective=objective, resources=resources, budgets=limits)


def relaxed(problem):
    """Optimum of the linear relaxation, which is that of the dual, by a general code; None where there is no point."""
    model = pulp.LpProblem("relaxed", pulp.LpMinimize)
    layers, options = problem.objective.shape
    x = {
        (i, k): model.add_variable(f"x_{i}_{k}", 0, 1)
        for i in range(layers)
        for k in range(options)
        if problem.allowed[i, k]
    }
    scale = float(np.abs(problem.objective[problem.allowed]).max()) or 1.0
    model.setObjective(pulp.lpSum(problem.objective[at] / scale * column for at, column in x.items()))
    for i in range(layers):
        model += pulp.lpSum(x[i, k] for k in range(options) if (i, k) in x) == 1
    for name, budget in problem.budgets.items():
        row = pulp.lpSum(float(problem.resources[name][at]) * column for at, column in x.items())
        model += row <= budget - problem.offsets.get(name, 0.0)
    model.solve(pulp_adapter._solver(pulp, "auto", {"mip": False, "timeLimit": 60.0}, is_tight=True))
    return pulp.value(model.objective) * scale if model.sol_status == 1 else None


def dual_value(problem, price):
    """The Lagrangian bound by loops."""
    total = 0.0
    for i, row in enumerate(problem.objective):
        total += min(
            row[k] + sum(p * problem.resources[name][i, k] for name, p in price.items())
            for k in np.flatnonzero(problem.allowed[i])
        )
    room = {name: problem.budgets[name] * (1 + 1e-9) - problem.offsets.get(name, 0.0) for name in price}
    return total - sum(p * room[name] for name, p in price.items())


def test_the_dual_is_the_linear_relaxation():
    checked = 0
    for seed in range(60):
        problem = random_problem(seed, kinds=("forbidden", "negative", "whole"))
        expected, dual = relaxed(problem), maximise(merge(problem))
        if expected is None:
            continue
        checked += 1
        assert dual is not None
        assert dual.bound == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert checked > 30


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_no_price_nearby_is_better(budgets):
    problem = units(300, 6, budgets)
    price = shadow_prices(problem)
    bound = dual_value(problem, price)
    rng = np.random.default_rng(0)
    for size in (1e-6, 1e-3, 0.1, 3.0):
        for _ in range(20):
            other = {name: max(0.0, p + size * rng.normal() * max(price.values())) for name, p in price.items()}
            assert dual_value(problem, other) <= bound * (1 + 1e-9)


def test_a_dense_grid_of_prices_is_no_better():
    problem = units(12, 4)
    dual = maximise(merge(problem))
    grid = np.concatenate([[0.0], dual.price[0] * np.geomspace(1e-3, 1e3, 4001)])
    values = [dual_value(problem, {"size": price}) for price in grid]
    assert max(values) <= dual.bound * (1 + 1e-9)
    assert max(values) >= dual.bound * (1 - 1e-3)


@pytest.mark.parametrize("budgets", [1, 3])
def test_a_sample_leads_to_the_same_prices(budgets, monkeypatch):
    problem = units(20_000, 4, budgets)
    whole = maximise(merge(problem))
    monkeypatch.setattr(lagrangian_dual, "SAMPLE", 500)
    sampled = maximise(merge(problem))
    assert sampled.bound == pytest.approx(whole.bound, rel=1e-10)


@pytest.mark.parametrize("wide", [False, True])
def test_between_bound_and_optimum(wide):
    optimal = 0
    for seed in range(300):
        problem = random_problem(seed, kinds=TAKEN, wide=wide)
        if not problem.features <= LagrangianSolver.features:
            continue
        best, found = answer(ExhaustiveSolver(), problem), answer(LagrangianSolver(), problem)
        if isinstance(best, InfeasibleError):
            assert {k: pytest.approx(v, rel=1e-9) for k, v in best.reachable.items()} == found.reachable
            continue
        assert problem.is_feasible(found.choices)
        assert found.objective >= best.objective or close(found.objective, best.objective)
        assert found.proof.bound <= best.objective or close(found.proof.bound, best.objective)
        assert found.proof.status != "optimal" or close(found.objective, best.objective)
        optimal += close(found.objective, best.objective)
    assert optimal > 150


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_the_gap_is_that_of_a_few_units(budgets):
    allocation = LagrangianSolver().solve(units(100_000, 4, budgets))
    assert 0 <= allocation.proof.gap <= 1e-6 * budgets**2


def test_ties_and_forbidden_options_at_size():
    problem = units(3000, 4, 2)
    objective = problem.objective.copy()
    objective[::7, 0] = np.inf
    tied = AllocationProblem(
        objective=objective, resources=problem.resources, budgets=problem.budgets, ties=[(0, 1), (5, 9, 11)]
    )
    allocation = LagrangianSolver().solve(tied)
    assert tied.is_feasible(allocation.choices)
    assert allocation.proof.gap < 1e-4


def test_what_it_does_not_take_is_named_with_the_way_out():
    problem = AllocationProblem(objective=np.zeros((2, 2)), max_formats=1)
    with pytest.raises(ValueError, match="max_formats.*'auto'"):
        LagrangianSolver().solve(problem)


def test_shadow_price_is_the_slope_of_the_envelope():
    problem = units(400, 6)
    price, budget = shadow_prices(problem)["size"], problem.budgets["size"]
    step = 0.01 * budget
    bounds = [maximise(merge(replace(problem, budgets={"size": b}))) for b in (budget - step, budget, budget + step)]
    assert (bounds[1].bound - bounds[2].bound) / step <= price * (1 + 1e-9)
    assert price <= (bounds[0].bound - bounds[1].bound) / step * (1 + 1e-9)


def test_shadow_price_of_a_loose_budget_is_0():
    problem = units(50, 4, 2)
    loose = AllocationProblem(
        objective=problem.objective, resources=problem.resources, budgets={**problem.budgets, "latency": 1e12}
    )
    assert shadow_prices(loose)["latency"] == 0.0
    assert shadow_prices(loose)["size"] > 0
    assert shadow_prices(AllocationProblem(objective=[[1.0, 2.0]])) == {}


def test_shadow_prices_refuse_what_has_none():
    with pytest.raises(ValueError, match="max_formats"):
        shadow_prices(AllocationProblem(objective=np.zeros((2, 2)), max_formats=1))
    impossible = AllocationProblem(objective=[[1.0, 2.0]], resources={"size": [[3.0, 4.0]]}, budgets={"size": 2.0})
    with pytest.raises(InfeasibleError, match="size 3"):
        shadow_prices(impossible)


def test_best_of_the_plans_of_a_price_by_loops():
    """The bound holds for every plan that enumeration finds."""
    for seed in range(40):
        problem = random_problem(seed, kinds=("negative",), wide=True)
        best, _ = by_loops(problem)
        dual = maximise(merge(problem))
        assert dual is not None or best is None
        if best is not None:
            assert dual.bound <= best or close(dual.bound, best)
