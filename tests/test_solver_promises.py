"""What every answer promises, on thousands of problems that hypothesis makes up and shrinks to the smallest failure."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq.problem import AllocationProblem, InfeasibleError, SparsePeak
from mpq.random_problems import by_loops, close
from mpq.solver_conformance import answer
from mpq.solvers import SOLVERS, DynamicSolver, solve

EXAMPLES = int(os.environ.get("MPQ_EXAMPLES", "60"))
many = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
SCORES = st.one_of(st.integers(0, 9).map(float), st.floats(1e-6, 1e6), st.floats(-5, 5))


def tables(rows, columns, values):
    """Arrays of (rows, columns)."""
    return st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows).map(np.array)


@st.composite
def problems(draw, features=frozenset(), budgets=3):
    """Up to 5 layers and 4 options, up to three budgets, and the features named."""
    layers, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    objective = draw(tables(layers, options, SCORES))
    forbidden = draw(tables(layers, options, st.sampled_from([False, False, False, True])))
    forbidden[:, 0] = False
    names = ["size", "latency", "energy"][: draw(st.integers(0, budgets))]
    resources = {name: draw(tables(layers, options, st.one_of(st.integers(0, 9), st.floats(-3, 9)))) for name in names}
    limits = {}
    for name, table in resources.items():
        low, high = table.min(1).sum(), table.max(1).sum()
        limits[name] = float(low + draw(st.floats(-0.05, 1.05)) * (high - low))
    pair = st.tuples(st.integers(0, layers - 1), st.integers(0, layers - 1)).filter(lambda key: key[0] != key[1])
    keys = st.lists(pair, max_size=3, unique_by=frozenset) if layers > 1 else st.just([])
    blocks = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).uniform(-3, 3, (options, options)))
    extra = {"ties": draw(keys)} if draw(st.booleans()) else {}
    if "pairs" in features:
        extra["pairs"] = {key: draw(blocks) for key in draw(keys)}
    if "transitions" in features and names:
        extra["transitions"] = {names[0]: {key: np.abs(draw(blocks)) for key in draw(keys)}}
    if "peak budgets" in features and draw(st.booleans()):
        dense = np.abs(draw(tables(2 * layers, options, st.integers(0, 5)))).reshape(2, layers, options)
        extra |= {"peak_resources": {"memory": SparsePeak.from_dense(dense)}}
        extra |= {"peak_budgets": {"memory": float(draw(st.integers(0, 5 * layers)))}}
    if "max_formats" in features:
        extra["max_formats"] = draw(st.one_of(st.none(), st.integers(1, options)))
    if "format_costs" in features and draw(st.booleans()):
        extra["format_costs"] = draw(tables(1, options, st.floats(0, 3)))[0]
    if "norm" in features and not {"pairs", "format_costs"} & extra.keys():
        extra["norm"] = draw(st.sampled_from([1, 2, np.inf]))
        objective = np.abs(objective)
    objective = np.where(forbidden, np.inf, objective)
    offsets = {name: float(draw(st.integers(-2, 2))) for name in names[:1]}
    return AllocationProblem(objective=objective, resources=resources, budgets=limits, offsets=offsets, **extra)


EVERYTHING = frozenset({"pairs", "transitions", "peak budgets", "max_formats", "format_costs", "norm"})
SUMS = problems()
ALL = problems(EVERYTHING)


def check(solver, problem):
    """One answer against enumeration."""
    best, reachable = by_loops(problem)
    found = answer(solver, problem)
    if best is None:
        assert isinstance(found, InfeasibleError)
        for name, value in found.reachable.items():
            assert close(value, reachable[name])
        return
    assert not isinstance(found, InfeasibleError), found
    assert problem.is_feasible(found.choices)
    assert (found.objective, found.usage) == problem.evaluate(found.choices)
    assert found.objective >= best or close(found.objective, best)
    if found.proof.bound is not None:
        assert found.proof.bound <= best or close(found.proof.bound, best)
    if solver.exact or found.proof.status == "optimal":
        assert found.proof.status == "optimal"
        assert close(found.objective, best)


def takes(solver, problem):
    """Whether a solver declares that it takes a problem; what it refuses it must refuse by naming one that does."""
    if isinstance(solver, DynamicSolver) and len({*map(frozenset, blocks_of(problem))}) > 1:
        return False  # couplings may close a circle; chains and trees are tested where the solver is
    if problem.features <= solver.features:
        return True
    with pytest.raises(ValueError, match="use solver="):
        solver.solve(problem)
    return False


def blocks_of(problem):
    """Keys of every pair and transition."""
    return [*problem.pairs, *(key for blocks in problem.transitions.values() for key in blocks)]


@pytest.mark.parametrize("name", SOLVERS)
@many
@given(problem=SUMS)
def test_sums_and_ties(name, problem):
    solver = SOLVERS[name]()
    if takes(solver, problem):
        check(solver, problem)


@pytest.mark.parametrize("name", SOLVERS)
@many
@given(problem=ALL)
def test_every_feature(name, problem):
    solver = SOLVERS[name]()
    try:
        taken = takes(solver, problem)
    except InfeasibleError:
        return
    if taken:
        check(solver, problem)


@many
@given(problem=ALL, objective=st.integers(-12, 12), resource=st.integers(-12, 12))
def test_units_do_not_matter(problem, objective, resource):
    up, unit = 10.0**objective, 10.0**resource
    blocks = {name: {key: block * unit for key, block in terms.items()} for name, terms in problem.transitions.items()}
    again = replace(
        problem,
        objective=problem.objective * up,
        resources={name: table * unit for name, table in problem.resources.items()},
        budgets={name: limit * unit for name, limit in problem.budgets.items()},
        offsets={name: offset * unit for name, offset in problem.offsets.items()},
        pairs={key: block * up for key, block in problem.pairs.items()},
        transitions=blocks,
        format_costs=None if problem.format_costs is None else problem.format_costs * up,
    )
    first, second = answer(solver_of("auto"), problem), answer(solver_of("auto"), again)
    if isinstance(first, InfeasibleError) or isinstance(second, InfeasibleError):
        tight = [abs(v - w) <= 1e-8 * max(abs(w), 1) for v, w in _edges(problem)]
        assert type(first) is type(second) or any(tight)  # a budget met to the last digit may fall either way
    else:
        assert close(second.objective, first.objective * up) or any(
            abs(v - w) <= 1e-8 * max(abs(w), 1) for v, w in _edges(problem)
        )


def _edges(problem):
    """Sums of every plan's usage next to the budget: rounding of another unit may decide those."""
    layers, options = problem.objective.shape
    for choices in np.ndindex(*[options] * layers):
        usage = problem.evaluate(choices)[1]
        yield from ((usage[name], limit) for name, limit in problem.budgets.items())


@many
@given(problem=SUMS, order=st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(problem, order):
    turn = list(range(len(problem.objective)))
    order.shuffle(turn)
    place = np.argsort(turn)
    again = replace(
        problem,
        objective=problem.objective[turn],
        resources={name: table[turn] for name, table in problem.resources.items()},
        ties=[[int(place[layer]) for layer in tie] for tie in problem.ties],
    )
    first, second = answer(solver_of("auto"), problem), answer(solver_of("auto"), again)
    assert type(first) is type(second)
    if not isinstance(first, InfeasibleError):
        assert close(second.objective, first.objective)


@many
@given(problem=ALL, more=st.floats(0, 3))
def test_a_looser_budget_is_never_worse(problem, more):
    first = answer(solver_of("auto"), problem)
    looser = replace(problem, budgets={name: limit + more for name, limit in problem.budgets.items()})
    if not isinstance(first, InfeasibleError):
        second = solve(looser)
        assert second.objective <= first.objective or close(second.objective, first.objective)


@settings(max_examples=EXAMPLES // 3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=ALL, seconds=st.sampled_from([1e-9, 1e-4, 1e-3, 1e-2]))
def test_a_time_limit_never_makes_a_plan_optimal(problem, seconds):
    for name in ("auto", "ilp"):
        try:
            found = solve(problem, name, time_limit=seconds)
        except (TimeoutError, InfeasibleError):
            continue
        best = by_loops(problem)[0]
        assert problem.is_feasible(found.choices)
        assert found.proof.bound is None or found.proof.bound <= best or close(found.proof.bound, best)
        assert found.proof.status != "optimal" or close(found.objective, best)


def solver_of(name):
    """A solver with its defaults."""
    return SOLVERS[name]()
