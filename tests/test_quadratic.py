"""Pairs of layers: against enumeration, bounds below the optimum, and never worse than the plan without pairs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import ExhaustiveSolver, ILPSolver, tabu
from mpq.solvers.budget_prices import budget_prices
from mpq.solvers.exchange import improve
from mpq.solvers.pair_bound import pair_bound
from mpq.solvers.quadratic import QuadraticSolver
from mpq.solvers.reduction import merge
from mpq.solvers.tabu import Effort, _best_double, _rows, _Walk, tabu_search

TAKEN = ("ties", "forbidden", "pairs", "transitions", "max_formats", "format_costs", "peaks", "negative", "whole")


class TestQuadratic(SolverConformance):
    seeds = range(8)

    @pytest.fixture
    def solver(self):
        return QuadraticSolver(iterations=50)


def interacting(layers, options, *, seed=0, strength=0.1, reach=None):
    """Errors of layers that add up or cancel; only those of layers less than ``reach`` apart."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, options)
    score = rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (layers, options))
    size = rng.lognormal(3, 1, (layers, 1)) * bits
    pairs = {
        (i, j): strength
        * rng.normal()
        * np.sqrt(np.outer(score[i], score[j]))
        * rng.lognormal(0, 0.3, (options, options))
        for i, j in itertools.combinations(range(layers), 2)
        if reach is None or j - i < reach
    }
    budgets = {"size": float(0.5 * size[:, -1].sum())}
    return AllocationProblem(objective=score, resources={"size": size}, budgets=budgets, pairs=pairs)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("settings", [{}, {"iterations": 30, "proof_plans": 0}], ids=["proved", "searched"])
def test_between_bound_and_optimum(wide, settings):
    plans = optimal = best_found = 0
    for seed in range(30):
        problem = random_problem(seed, kinds=TAKEN, wide=wide)
        best, found = answer(ExhaustiveSolver(), problem), answer(QuadraticSolver(**settings), problem)
        assert isinstance(found, InfeasibleError) == isinstance(best, InfeasibleError)
        if isinstance(best, InfeasibleError):
            assert found.reachable == {name: pytest.approx(value, rel=1e-9) for name, value in best.reachable.items()}
            continue
        plans += 1
        assert problem.is_feasible(found.choices)
        assert found.objective >= best.objective or close(found.objective, best.objective)
        assert found.proof.bound <= best.objective or close(found.proof.bound, best.objective)
        assert found.proof.status in ("optimal", "heuristic")
        optimal += found.proof.status == "optimal"
        best_found += close(found.objective, best.objective)
        if found.proof.status == "optimal":
            assert close(found.objective, best.objective)
    assert best_found == plans if not settings else best_found > 0.9 * plans
    assert settings or optimal == plans


def test_an_exact_quadratic_form():
    """Three layers, two options, ½ xᵀCx: the terms of C split into scores and pairs give that value for every plan."""
    rng = np.random.default_rng(0)
    error = rng.normal(size=(6, 6))
    matrix = error @ error.T
    blocks = matrix.reshape(3, 2, 3, 2)
    scores = 0.5 * np.array([[blocks[i, k, i, k] for k in range(2)] for i in range(3)])
    pairs = {(i, j): blocks[i, :, j] for i, j in itertools.combinations(range(3), 2)}
    problem = AllocationProblem(objective=scores, pairs=pairs)
    values = {}
    for plan in itertools.product(range(2), repeat=3):
        x = np.zeros((3, 2))
        x[range(3), plan] = 1
        values[plan] = 0.5 * x.ravel() @ matrix @ x.ravel()
        assert problem.evaluate(plan)[0] == pytest.approx(values[plan], abs=1e-12)
    found = QuadraticSolver().solve(problem)
    assert found.objective == pytest.approx(min(values.values()), rel=1e-12)
    assert found.proof.status == "optimal"


def test_all_pairs_of_twelve_layers_by_all_plans():
    for seed in range(2):
        problem = interacting(12, 2, seed=seed, strength=0.5)
        found = QuadraticSolver().solve(problem)
        assert found.proof.status == "optimal"
        assert close(found.objective, ExhaustiveSolver().solve(problem).objective)


def test_a_chain_of_two_hundred_layers_is_proved():
    problem = interacting(200, 5, strength=1.0, reach=2)
    found = QuadraticSolver().solve(problem)
    assert found.proof.status == "optimal"
    additive = ILPSolver().solve(replace(problem, pairs={}))
    assert found.objective < problem.evaluate(additive.choices)[0]


@pytest.mark.parametrize("strength", [0.03, 0.5])
def test_all_pairs_of_many_layers_are_no_worse_than_without_pairs(strength):
    problem = interacting(16, 3, strength=strength)
    additive = problem.evaluate(ILPSolver().solve(replace(problem, pairs={})).choices)[0]
    found = QuadraticSolver(iterations=300, proof_plans=5e3).solve(problem)
    assert problem.is_feasible(found.choices)
    assert found.proof.bound <= found.objective <= additive
    assert found.proof.status == ("optimal" if strength < 0.1 else "heuristic")


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale):
    problem = interacting(8, 3, strength=0.4)
    found = QuadraticSolver().solve(problem)
    again = QuadraticSolver().solve(
        replace(
            problem,
            objective=problem.objective * scale,
            pairs={key: block * scale for key, block in problem.pairs.items()},
            resources={"size": problem.resources["size"] / scale},
            budgets={"size": problem.budgets["size"] / scale},
        )
    )
    assert again.choices.tolist() == found.choices.tolist()
    assert again.proof.status == found.proof.status == "optimal"


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(tabu, "DENSE", 0)  # no double changes, which lead to one plan from everywhere
    core = merge(interacting(40, 3, strength=0.4))
    start = core.table[1].argmin(1)
    plans = [tabu_search(core, start, Effort(100, np.inf, seed)).tolist() for seed in (3, 3, 4, 5, 6)]
    assert plans[0] == plans[1]
    assert len(set(map(tuple, plans))) > 1


def test_a_gap_is_kept_and_reported():
    problem = interacting(15, 3, strength=0.05)
    found = QuadraticSolver(gap=0.5).solve(problem)
    assert found.proof.status in ("feasible", "optimal")
    assert found.proof.gap <= 0.5 / (1 - 0.5)


def test_a_time_limit_still_gives_a_plan_and_a_bound():
    problem = interacting(12, 3, strength=0.4)
    found = QuadraticSolver(time_limit=1e-3).solve(problem)
    best = QuadraticSolver().solve(problem)
    assert problem.is_feasible(found.choices)
    assert found.proof.bound <= best.objective <= found.objective


def test_other_norms_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="'quadratic' does not take max norm: use .*ilp'"):
        QuadraticSolver().solve(AllocationProblem(objective=[[1.0]], norm=np.inf))


@pytest.mark.parametrize("wrong", [{"time_limit": 0}, {"gap": 1.0}, {"iterations": -1}, {"proof_plans": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuadraticSolver(**wrong)


def plans_of(core):
    options = [np.flatnonzero(row) for row in core.allowed]
    return [np.array(plan) for plan in itertools.product(*options)]


@pytest.mark.parametrize("wide", [False, True])
def test_the_bound_and_the_moved_terms(wide):
    """Below every feasible plan; the moved core gives every plan the same objective and usage."""
    coupled = 0
    for seed in range(100, 170):
        core = merge(random_problem(seed, kinds=TAKEN, wide=wide))
        lower, plans = pair_bound(core), plans_of(core)
        feasible = [core.value(plan) for plan in plans if core.is_feasible(plan)]
        size = float(np.abs(core.table[0]).max(1).sum() + sum(np.abs(pair.table[0]).max() for pair in core.couplings))
        if not feasible:
            continue
        assert lower.bound <= min(feasible) + 1e-12 * size
        assert all(lower.core.value(plan) == pytest.approx(core.value(plan), abs=1e-11 * size) for plan in plans)
        assert (lower.price >= 0).all()
        coupled += bool(core.couplings)
    assert coupled > 8


def test_the_bound_of_a_chain_without_budgets_is_its_optimum():
    for seed in range(10):
        problem = replace(interacting(8, 3, seed=seed, strength=1.0, reach=2), budgets={}, resources={})
        best = ExhaustiveSolver().solve(problem).objective
        assert pair_bound(merge(problem)).bound == pytest.approx(best, abs=1e-3 * abs(best))


def test_the_bound_is_above_the_floor_where_pairs_are_strong():
    core = merge(interacting(12, 3, strength=0.3))
    lower = pair_bound(core)
    assert core.floor() < 0 < lower.bound


def lagrangian(core, price):
    priced = core.table[0] + np.tensordot(price, core.table[1:], 1)
    return np.where(core.allowed, priced, np.inf).min(1).sum() - price @ core.limits


def test_prices_of_two_budgets_by_a_grid():
    """No prices on a fine grid give a better bound."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        size = rng.lognormal(0, 1, (2, 12, 4)).cumsum(2)
        scores = -np.sort(-rng.lognormal(0, 1, (12, 4)), axis=1)
        resources = {"size": size[0], "latency": size[1]}
        budgets = {name: float(0.5 * table[:, -1].sum()) for name, table in resources.items()}
        core = merge(AllocationProblem(objective=scores, resources=resources, budgets=budgets))
        found = lagrangian(core, budget_prices(core))
        best = max(lagrangian(core, np.array(price)) for price in itertools.product(np.linspace(0, 1, 60), repeat=2))
        assert found >= best - 1e-6 * abs(best)


def test_prices_of_conflicting_budgets_end():
    problem = AllocationProblem(
        objective=[[0.0, 1.0]] * 2,
        resources={"a": [[0.0, 1.0]] * 2, "b": [[1.0, 0.0]] * 2},
        budgets={"a": 0.9, "b": 0.9},
    )
    core = merge(problem)
    assert lagrangian(core, budget_prices(core)) > 2  # above every objective: there is no plan


def feasible_start(core):
    return next((plan for plan in plans_of(core) if core.is_feasible(plan)), None)


def test_tabu_is_feasible_and_no_worse():
    starts = 0
    for seed in range(300, 400):
        core = merge(random_problem(seed, kinds=TAKEN))
        start = feasible_start(core)
        if start is None:
            continue
        starts += 1
        found = tabu_search(core, start, Effort(40, np.inf, 0))
        assert core.is_feasible(found)
        assert core.value(found) <= core.value(start)
    assert starts > 60


def test_every_step_keeps_its_sums():
    """The rows kept up to date are those of the plan, computed anew."""
    for seed in range(400, 440):
        core = merge(random_problem(seed, kinds=TAKEN))
        rows, start = _rows(core), plans_of(core)[0]
        walk = _Walk(core, rows, start, np.ones(len(rows.limits)))
        for number in range(30):
            walk.step(number, 2, -np.inf)
            fresh = _Walk(core, rows, walk.choice, walk.weights)
            assert walk.field == pytest.approx(fresh.field)
            assert walk.sums == pytest.approx(fresh.sums)
            assert walk.value == pytest.approx(core.value(walk.choice))
            usage = core.problem.evaluate(core.expand(walk.choice))[1]
            offsets = core.problem.offsets
            expected = [usage[name] - offsets.get(name, 0.0) for name in core.names]
            assert walk.sums[1 : 1 + len(expected)] == pytest.approx(np.array(expected))


def test_the_best_two_changes_by_loops():
    improved = 0
    for seed in range(500, 560):
        core = merge(random_problem(seed, kinds=("pairs", "transitions", "ties", "negative")))
        start = feasible_start(core)
        if start is None:
            continue
        near = [plan for plan in plans_of(core) if (plan != start).sum() == 2 and core.is_feasible(plan)]
        least = min(map(core.value, near), default=np.inf)
        found = _best_double(core, start)
        improved += found is not None
        if least < core.value(start) - 1e-9:
            assert found is not None
            assert core.value(found) <= least + 1e-9  # one change may do better than two
        else:
            assert found is None or core.value(found) < core.value(start)
    assert improved > 10


def test_tabu_leaves_a_local_optimum():
    """Three layers must change together before anything is gained."""
    pairs = {pair: [[0.0, 1.0], [1.0, -3.0]] for pair in itertools.combinations(range(3), 2)}
    core = merge(AllocationProblem(objective=[[0.0, 1.0]] * 3, pairs=pairs))
    start = np.zeros(3, dtype=np.int64)
    assert improve(core, start).tolist() == [0, 0, 0]
    assert tabu_search(core, start, Effort(50, np.inf, 0)).tolist() == [1, 1, 1]
