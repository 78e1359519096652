"""The k best plans: against all plans sorted, lists of dynamic programming, and with every shortcut forced."""

import itertools

import numpy as np
import pytest

from mpq.problem import AllocationProblem, InfeasibleError
from mpq.random_problems import close, hard_problem, random_problem
from mpq.solver_conformance import answer, scaled
from mpq.solvers import ILPSolver, crowd, plan_enumeration
from mpq.solvers.narrowing import Outcome
from mpq.solvers.ranked_plans import k_best
from mpq.solvers.reduction import merge


def all_plans(problem):
    """(objective, choices) of every feasible plan, in order, one by one."""
    layers, options = problem.objective.shape
    plans = itertools.product(range(options), repeat=layers)
    return sorted((problem.evaluate(plan)[0], plan) for plan in plans if problem.is_feasible(plan))


def check(problem, k, *, in_order=True):
    """The first k of all plans, every one proved; whether there are any."""
    plans = all_plans(problem)[:k]
    if not plans:
        with pytest.raises(InfeasibleError):
            k_best(problem, k)
        return False
    found = k_best(problem, k)
    assert len(found) == len(plans)
    assert len({tuple(allocation.choices) for allocation in found}) == len(found)
    for allocation, (objective, _) in zip(found, plans, strict=True):
        assert problem.is_feasible(allocation.choices)
        assert (allocation.objective, allocation.usage) == problem.evaluate(allocation.choices)
        assert close(allocation.objective, objective)
        assert allocation.proof.status == "optimal"
    objectives = [allocation.objective for allocation in found]
    assert objectives == sorted(objectives)
    if in_order and problem.norm == 1:
        assert [tuple(allocation.choices) for allocation in found] == [plan for _, plan in plans]
    return True


@pytest.mark.parametrize("wide", [False, True])
def test_equals_all_plans_sorted_for_every_kind_of_problem(wide):
    drawn, plans = set(), 0
    for seed in range(8000, 8045):
        problem = random_problem(seed, wide=wide)
        drawn |= problem.features
        plans += check(problem, (1, 2, 10, 50, 2000)[seed % 5])
    assert drawn == ILPSolver.features
    assert plans > 25


@pytest.mark.parametrize("seed", range(12))
def test_with_many_branches_in_small_crowds(seed, monkeypatch):
    """As on problems too large for one crowd: every branch gives up at once and is split, plans go three at a time."""
    monkeypatch.setattr(plan_enumeration, "WORK", 5)
    monkeypatch.setattr(plan_enumeration, "WIDTH", 3)
    for draw in range(3):
        check(random_problem(8100 + 3 * seed + draw), (1, 4)[draw % 2])


@pytest.mark.parametrize("seed", range(12))
def test_with_useless_partial_plans_dropped(seed, monkeypatch):
    """As in large crowds. Of equal plans others than the first may come then."""
    monkeypatch.setattr(crowd, "LARGE", 0)
    for draw in range(3):
        check(random_problem(8200 + 3 * seed + draw, kinds=("whole", "ties", "peaks")), 3, in_order=False)


def test_with_more_equal_plans_than_are_compared(monkeypatch):
    monkeypatch.setattr(plan_enumeration, "TIES", 2)
    for seed in range(20):
        check(random_problem(8300 + seed, kinds=("whole",)), 5, in_order=False)


def lists_by_size(problem, k):
    """The k least objectives by dynamic programming over whole sizes: the k best of every sum so far."""
    lists = {0: [0.0]}
    for scores, sizes in zip(problem.objective, problem.resources["size"], strict=True):
        grown = {}
        for used, values in lists.items():
            for score, size in zip(scores, sizes, strict=True):
                grown.setdefault(used + int(size), []).extend(value + score for value in values)
        lists = {used: sorted(values)[:k] for used, values in grown.items() if used <= problem.budgets["size"]}
    return sorted(itertools.chain(*lists.values()))[:k]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_sixty_layers_by_dynamic_programming(scale):
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, (60, 1)) * np.array([2, 3, 4])
    scores = scale * rng.lognormal(0, 2, (60, 1)) * 4.0 ** -np.array([2, 3, 4]) * rng.lognormal(0, 0.3, (60, 3))
    problem = AllocationProblem(
        objective=scores, resources={"size": sizes}, budgets={"size": int(0.7 * sizes[:, 2].sum())}
    )
    found = k_best(problem, 100)
    assert len({tuple(allocation.choices) for allocation in found}) == 100
    for allocation, objective in zip(found, lists_by_size(problem, 100), strict=True):
        assert close(allocation.objective, objective)


@pytest.mark.parametrize(
    "forced", [{}, {"WORK": 20, "WIDTH": 3}, {"WIDTH": 3}], ids=["usual", "branches", "small crowds"]
)
@pytest.mark.parametrize("budgets", ["a", "abc"])
def test_eight_layers_by_all_plans_at_once(budgets, forced, monkeypatch):
    for name, value in forced.items():
        monkeypatch.setattr(plan_enumeration, name, value)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        bits = np.array([2.0, 3.0, 4.0, 8.0])
        scores = rng.lognormal(0, 1.5, (8, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (8, 4))
        resources = {name: rng.lognormal(3, 1, (8, 1)) * bits * rng.uniform(0.5, 1, (8, 4)) for name in budgets}
        limits = {name: float(0.55 * table.max(1).sum()) for name, table in resources.items()}
        problem = AllocationProblem(objective=scores, resources=resources, budgets=limits)
        plans = np.indices((4,) * 8).reshape(8, -1)
        total = {name: table[np.arange(8)[:, None], plans].sum(0) for name, table in resources.items()}
        fits = np.logical_and.reduce([total[name] <= limits[name] for name in budgets])
        objectives = np.sort(scores[np.arange(8)[:, None], plans].sum(0)[fits])
        for k in (5, 200):
            found = [allocation.objective for allocation in k_best(problem, k)]
            assert found == pytest.approx(objectives[:k].tolist(), rel=1e-12)


def test_over_a_budget_by_less_than_the_rounding_of_sums():
    budget = 1 / (1 + 1e-9 * (1 + 1e-4))
    problem = AllocationProblem(
        objective=[[0.0, 1.0], [0.0, 5.0]], resources={"size": [[1.0, 0.5], [0.0, 0.0]]}, budgets={"size": budget}
    )
    assert not problem.is_feasible([0, 0])
    assert [allocation.choices.tolist() for allocation in k_best(problem, 9)] == [[1, 0], [1, 1]]


def test_units_do_not_matter():
    for seed in range(8400, 8415):
        problem = random_problem(seed, kinds=("ties", "forbidden", "negative", "norm"))
        try:
            found = k_best(problem, 20)
        except InfeasibleError:
            continue
        again = k_best(scaled(problem, objective=1e-12, resource=1e9), 20)
        assert all(close(b.objective, a.objective * 1e-12) for a, b in zip(found, again, strict=True))


def test_a_dominated_option_can_be_second():
    problem = AllocationProblem(objective=[[1.0, 2.0, 9.0]], resources={"size": [[1.0, 1.0, 1.0]]}, budgets={"size": 1})
    assert [allocation.choices.tolist() for allocation in k_best(problem, 2)] == [[0], [1]]


def test_tied_layers_move_together():
    problem = AllocationProblem(objective=[[0.0, 1.0]] * 3, ties=[(0, 2)])
    found = [allocation.choices.tolist() for allocation in k_best(problem, 9)]
    assert found == [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]]


def test_the_max_norm_orders_plans_with_one_worst_score_by_their_sums():
    problem = AllocationProblem(objective=[[5.0, 6.0], [1.0, 4.0], [2.0, 3.0]], norm=np.inf)
    assert [allocation.choices.tolist() for allocation in k_best(problem, 5)] == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [1, 60])
def test_all_plans_equal(layers):
    """More equal plans than could be looked at, all exactly at the budget."""
    rows = {name: np.tile([0.1, 0.2, 0.3], (layers, 1)) for name in ("size", "latency")}
    budgets = dict.fromkeys(rows, 0.2 * layers)
    problem = AllocationProblem(objective=np.tile([0.3, 0.2, 0.1], (layers, 1)), resources=rows, budgets=budgets)
    found = k_best(problem, 50)
    assert len({tuple(allocation.choices) for allocation in found}) == (50 if layers > 1 else 2)
    assert all(allocation.proof.status == "optimal" for allocation in found)
    assert close(found[0].objective, 0.2 * layers)
    assert layers == 1 or close(found[-1].objective, 0.2 * layers)


def test_chains_of_transitions_and_peaks():
    """The first of the list is the integer program's optimum where no enumeration reaches."""
    rng = np.random.default_rng(1)
    size = rng.lognormal(3, 1, (25, 1)) * np.array([2.0, 4.0, 8.0])
    change = np.abs(np.subtract.outer(np.arange(3), np.arange(3))) * 20.0
    problem = AllocationProblem(
        objective=rng.lognormal(0, 2, (25, 1)) * 4.0 ** -np.array([2.0, 4.0, 8.0]),
        resources={"size": size},
        budgets={"size": 0.5 * size[:, -1].sum()},
        transitions={"size": {(i, i + 1): change for i in range(24)}},
        peak_resources={"memory": size[None] * (rng.random((4, 25, 1)) < 0.3)},
        peak_budgets={"memory": 0.25 * size[:, -1].sum()},
    )
    found = k_best(problem, 30)
    assert close(found[0].objective, ILPSolver().solve(problem).objective)
    assert {allocation.proof.status for allocation in found} == {"optimal"}
    for (
        allocation
    ) in found:  # without this plan's neighbour in rank nothing is in between: a change of one layer shows it
        for layer, option in itertools.product(range(25), range(3)):
            other = allocation.choices.copy()
            other[layer] = option
            if problem.is_feasible(other) and problem.evaluate(other)[0] < found[-1].objective * (1 - 1e-9):
                assert any((other == known.choices).all() for known in found)


@pytest.mark.parametrize("effort", [1, 300, 3000, 30000])
def test_stopped_early_the_bound_holds_for_all_that_is_left_out(effort):
    core = merge(hard_problem(layers=9, options=4))
    every = plan_enumeration.best_plans(core, 40, np.inf)
    found = plan_enumeration.best_plans(core, 20, np.inf, effort=effort)
    assert len(every.plans) == 40
    assert every.bound == np.inf
    known = {tuple(plan) for plan in found.plans}
    left = [core.value(plan) for plan in every.plans if tuple(plan) not in known]
    assert found.bound <= min(left) + 1e-9 * abs(min(left)) or found.bound == np.inf
    if found.bound == np.inf:
        assert effort > 1
        assert sorted(known) == sorted(tuple(plan) for plan in every.plans[:20])


def test_out_of_time_nothing_unproved_is_called_optimal():
    problem = hard_problem(layers=30, options=5)
    best = ILPSolver().solve(problem).objective
    for seconds in (1e-9, 0.5):
        found = k_best(problem, 20, time_limit=seconds)
        assert all(problem.is_feasible(allocation.choices) for allocation in found)
        assert all(allocation.objective >= best * (1 + 1e-12) for allocation in found)
        late = [allocation for allocation in found if allocation.proof.status == "feasible"]
        assert late
        assert all(allocation.proof.bound < allocation.objective for allocation in late)


def test_no_plan_in_time_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(plan_enumeration, "descend", lambda core: None)
    monkeypatch.setattr(plan_enumeration, "minimise", lambda core, search: Outcome("unknown", None, -np.inf))
    with pytest.raises(TimeoutError, match="time_limit=1e-09 s"):
        k_best(hard_problem(), 3, time_limit=1e-9)


def test_infeasible_in_words():
    problem = AllocationProblem(objective=[[5.0, 1.0]] * 2, resources={"size": [[2.0, 4.0]] * 2}, budgets={"size": 3.0})
    with pytest.raises(InfeasibleError, match="size 4 .*budget 3"):
        k_best(problem, 3)
    assert answer(ILPSolver(), problem).reachable == {"size": 4.0}


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_is_a_whole_number(k):
    with pytest.raises(ValueError, match=f"k must be a whole number from 1, got {k}"):
        k_best(AllocationProblem(objective=[[1.0]]), k)


def test_the_time_limit_is_positive():
    with pytest.raises(ValueError, match="time_limit must be positive, got 0"):
        k_best(AllocationProblem(objective=[[1.0]]), 1, time_limit=0)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_dropped_has_k_others_nowhere_worse(rows, whole):
    rng = np.random.default_rng(rows)
    values = rng.uniform(0, 12, (rows, 2000))
    values = np.floor(values) if whole or rows == 3 else values
    kept = crowd._undominated(values, 3) if rows < 3 else crowd._few_equal(values, 3)
    assert 3 <= len(kept) < 2000
    for index in sorted({*range(2000)} - {*kept.tolist()}):
        others = np.delete(values, index, axis=1)
        assert (others <= values[:, [index]]).all(0).sum() >= 3
        assert (values[:, kept] <= values[:, [index]]).all(0).sum() >= 3


def test_certificates_never_pass_a_plan_by():
    """Every row at its end is what it says: the objective, a bound on it, or a limited sum above its limit."""
    for seed in range(60):
        core = merge(random_problem(8500 + seed, kinds=("pairs", "transitions", "peaks", "ties", "negative")))
        rows = plan_enumeration.certificates(core, np.arange(1.0, 1 + len(core.limits)))
        growth = crowd.Growth(core, rows, 10**6)
        grown = growth.within(growth.empty(), np.inf)
        while grown.stage < len(growth.order):
            grown = growth.extended(grown, np.inf)
        feasible = {tuple(plan): value for value, plan in growth.finished(grown)}
        options = [np.flatnonzero(row) for row in core.allowed]
        plans = [plan for plan in itertools.product(*options) if core.is_feasible(np.array(plan))]
        assert set(feasible) == set(plans)
        assert all(rows.zero + feasible[plan] == pytest.approx(core.value(np.array(plan))) for plan in plans)
        assert (grown.level[rows.priced] <= grown.level[0] + 1e-9).all()
