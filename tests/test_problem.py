"""The problem, its checks, and what choices come to."""

import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from mpq.problem import Allocation, AllocationProblem, InfeasibleError, Proof, SparsePeak
from mpq.random_problems import random_problem

LABELS = {"layers": ("stem", "head"), "options": ("int4", "int8")}
SMALL = {
    "objective": [[5.0, 1.0], [3.0, 0.5]],
    "resources": {"size": [[2.0, 4.0], [4.0, 8.0]]},
    "budgets": {"size": 9.0},
    **LABELS,
}


def problem(**changes):
    return AllocationProblem(**{**SMALL, **changes})


def test_evaluate_adds_every_term():
    both = problem(
        offsets={"size": 100.0},
        pairs={(0, 1): [[0.0, 10.0], [20.0, 40.0]]},
        transitions={"size": {(1, 0): [[0.0, 1000.0], [2000.0, 0.0]]}},
        format_costs=[0.25, 0.125],
    )
    # stem int8, head int4: 1 + 3 + pair[1][0] + both formats; 4 + 4 + offset + transition[head int4][stem int8]
    assert both.evaluate([1, 0]) == (1 + 3 + 20 + 0.375, {"size": 4 + 4 + 100 + 1000})
    assert both.evaluate([1, 1]) == (1 + 0.5 + 40 + 0.125, {"size": 4 + 8 + 100})


@pytest.mark.parametrize(("norm", "value"), [(1, 7.0), (2, 5.0), (3, 91 ** (1 / 3)), (math.inf, 4.0)])
def test_norms(norm, value):
    assert problem(objective=[[4.0, 9.0], [3.0, 9.0]], norm=norm).evaluate([0, 0])[0] == pytest.approx(value, rel=1e-15)


def test_power_norm_neither_overflows_nor_vanishes():
    for scale in (1e-200, 1e200):
        value = problem(objective=np.array([[4.0, 9.0], [3.0, 9.0]]) * scale, norm=2).evaluate([0, 0])[0]
        assert value == pytest.approx(5 * scale, rel=1e-15)


def test_sums_are_exact():
    table = [[0.1]] * 10
    tenths = AllocationProblem(objective=table, resources={"size": table}, budgets={"size": 1.0})
    assert tenths.evaluate([0] * 10) == (1.0, {"size": 1.0})  # a running sum gives 0.9999999999999999


def test_peaks_dense_sparse_and_by_loops():
    rng = np.random.default_rng(0)
    held = rng.uniform(-1, 1, (4, 3, 2)) * (rng.random((4, 3, 2)) < 0.5)
    step, layer, option = np.nonzero(held)
    half = held[step, layer, option] / 2
    sparse = SparsePeak(*(np.tile(index, 2) for index in (step, layer, option)), np.tile(half, 2), steps=4)
    for choices in itertools.product(range(2), repeat=3):
        expected = max(sum(held[s, i, k] for i, k in enumerate(choices)) for s in range(4)) + 0.5
        for peak in (held, sparse):
            made = AllocationProblem(
                objective=np.zeros((3, 2)), peak_resources={"memory": peak}, offsets={"memory": 0.5}
            )
            assert made.evaluate(choices)[1]["memory"] == pytest.approx(expected, abs=1e-15)


def test_an_empty_step_counts_as_zero():
    peak = SparsePeak(step=[0], layer=[0], option=[0], value=[-3.0], steps=2)
    assert AllocationProblem(objective=[[1.0]], peak_resources={"memory": peak}).evaluate([0])[1] == {"memory": 0.0}
    nothing = SparsePeak(step=[], layer=[], option=[], value=[])
    assert AllocationProblem(objective=[[1.0]], peak_resources={"memory": nothing}).evaluate([0])[1] == {"memory": 0.0}


def test_violations_leave_room_for_rounding_only():
    table = {"size": [[1.0]]}
    for budget, is_kept in ((1 - 0.9e-9, True), (1 - 1.1e-9, False), (1.0, True), (0.5, False)):
        made = AllocationProblem(objective=[[1.0]], resources=table, budgets={"size": budget})
        assert made.is_feasible([0]) == is_kept
        assert made.violations([0]) == ({} if is_kept else {"size": 1 - budget})


def test_feasibility_covers_ties_formats_and_forbidden_options():
    assert problem(budgets={}).is_feasible([0, 1])
    assert not problem(budgets={}, ties=[(0, 1)]).is_feasible([0, 1])
    assert not problem(budgets={}, max_formats=1).is_feasible([0, 1])
    assert not problem(budgets={}, objective=[[5.0, 1.0], [3.0, math.inf]]).is_feasible([0, 1])
    assert problem(budgets={}, objective=[[5.0, 1.0], [3.0, math.inf]]).evaluate([0, 1])[0] == math.inf


def test_overlapping_ties_are_one_group():
    made = AllocationProblem(objective=np.zeros((6, 2)), ties=[(5, 3), (1, 4), (3, 4)])
    assert made.groups.tolist() == [0, 1, 2, 1, 1, 1]


def test_features():
    assert problem().features == frozenset()
    assert problem(ties=[(0, 1)]).features == frozenset()
    rich = problem(
        peak_resources={"memory": np.ones((1, 2, 2))},
        peak_budgets={"memory": 3.0},
        pairs={(0, 1): np.zeros((2, 2))},
        transitions={"size": {(0, 1): np.zeros((2, 2))}},
        max_formats=2,
        format_costs=[0.0, 0.0],
    )
    assert rich.features == {
        "several budgets", "peak budgets", "pairs", "transitions", "max_formats", "format_costs",
    }  # fmt: skip
    assert problem(norm=2).features == {"p-norm"}
    assert problem(norm=math.inf).features == {"max norm"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": [1.0, 2.0]}, ["objective", "(layers, options)", "(2,)"]),
        ({"objective": [[5.0, math.nan], [3.0, 0.5]]}, ["objective", "nan", "stem", "int8"]),
        ({"objective": [[5.0, 1.0], [-math.inf, 0.5]]}, ["objective", "-inf", "head", "int4"]),
        ({"objective": [[5.0, -1.0], [3.0, 0.5]], "norm": 2}, ["negative", "norm=2", "stem", "int8"]),
        ({"objective_se": [[0.1, 0.1], [-0.1, 0.1]]}, ["objective_se", "head", "int4"]),
        ({"norm": 0.5}, ["norm", "0.5"]),
        ({"norm": math.nan}, ["norm", "nan"]),
        ({"resources": {"size": [[2.0, 4.0]]}}, ["size", "(2, 2)", "(1, 2)"]),
        ({"resources": {"size": [[2.0, 4.0], [4.0, math.nan]]}}, ["size", "finite", "head", "int8"]),
        ({"budgets": {"sizes": 1.0}}, ["sizes", "'size'"]),
        ({"budgets": {"size": math.inf}}, ["size", "finite", "inf"]),
        ({"budgets": {"size": math.nan}}, ["size", "finite", "nan"]),
        ({"peak_budgets": {"size": 1.0}}, ["peak_budgets", "size"]),
        ({"peak_resources": {"size": np.zeros((1, 2, 2))}}, ["size", "not both"]),
        ({"peak_resources": {"memory": np.zeros((1, 3, 2))}}, ["memory", "(steps, 2, 2)", "(1, 3, 2)"]),
        ({"peak_resources": {"memory": SparsePeak([0], [2], [0], [1.0])}}, ["memory", "layer", "below 2"]),
        ({"offsets": {"sise": 1.0}}, ["offsets", "sise", "'size'"]),
        ({"ties": [(0, 2)]}, ["ties", "0..1", "2"]),
        ({"ties": [(0, 0.5)]}, ["ties", "whole"]),
        ({"pairs": {(1, 1): np.zeros((2, 2))}}, ["pairs", "two different", "(1, 1)"]),
        ({"pairs": {(0, 7): np.zeros((2, 2))}}, ["pairs", "0..1", "(0, 7)"]),
        ({"pairs": {(0, 1): np.zeros((2, 3))}}, ["pairs", "(2, 2)", "(2, 3)"]),
        ({"pairs": {(0, 1): [[0, math.inf], [0, 0]]}}, ["pairs", "inf", "stem", "int4", "head", "int8"]),
        ({"pairs": {(0, 1): np.zeros((2, 2))}, "norm": math.inf}, ["pairs", "norm"]),
        ({"transitions": {"time": {(0, 1): np.zeros((2, 2))}}}, ["transitions", "time", "size"]),
        ({"transitions": {"size": {(0, 0): np.zeros((2, 2))}}}, ["transitions", "size", "(0, 0)"]),
        ({"max_formats": 0}, ["max_formats", "0"]),
        ({"max_formats": 1.5}, ["max_formats", "1.5"]),
        ({"format_costs": [1.0]}, ["format_costs", "2"]),
        ({"format_costs": [1.0, -1.0]}, ["format_costs", "-1"]),
        ({"layers": ("stem",)}, ["layers", "2", "1"]),
        ({"layers": ("stem", "stem")}, ["layers", "'stem'"]),
        ({"options": ("int4", "int4")}, ["options", "'int4'"]),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        problem(**changes)
    assert not isinstance(caught.value, InfeasibleError)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nothing_to_choose_from_is_infeasible_from_the_start():
    with pytest.raises(InfeasibleError, match="'head'"):
        problem(objective=[[5.0, 1.0], [math.inf, math.inf]])
    with pytest.raises(InfeasibleError, match=r"\['stem', 'head'\]"):
        problem(objective=[[math.inf, 1.0], [3.0, math.inf]], ties=[(0, 1)])


def test_forbidden_entries_may_hold_anything():
    held = np.array([[[1.0, np.nan], [1.0, 1.0]]])
    made = problem(
        objective=[[5.0, math.inf], [3.0, 0.5]],
        resources={"size": [[2.0, math.nan], [4.0, 8.0]]},
        peak_resources={"memory": held},
        pairs={(0, 1): [[1.0, 1.0], [math.nan, math.inf]]},
    )
    assert made.evaluate([0, 0]) == (9.0, {"size": 6.0, "memory": 2.0})


@pytest.mark.parametrize("choices", [[0], [0, 2], [-1, 0], [[0, 1]], [0.5, 0]])
def test_choices_are_checked(choices):
    with pytest.raises(ValueError, match="choices"):
        problem().evaluate(choices)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (([0], [0, 1], [0], [1.0]), "one length"),
        (([0], [0], [0], [math.inf]), "finite"),
        (([0], [0], [0.5], [1.0]), "whole"),
        (([0], [-1], [0], [1.0]), "negative"),
    ],
)
def test_sparse_peaks_are_checked(entries, words):
    with pytest.raises(ValueError, match=words):
        SparsePeak(*entries)
    with pytest.raises(ValueError, match="at least 3"):
        SparsePeak([2], [0], [0], [1.0], steps=2)


def test_arrays_are_copied_and_read_only():
    table = np.array([[5.0, 1.0], [3.0, 0.5]])
    made = problem(objective=table)
    table[:] = 0
    assert made.objective.tolist() == [[5.0, 1.0], [3.0, 0.5]]
    for array in (made.objective, made.resources["size"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    with pytest.raises(AttributeError):
        made.norm = 2


def test_allocation_reads_well():
    allocation = problem().allocation([1, 0], status="feasible", bound=3.0)
    assert allocation.options == ("int8", "int4")
    assert allocation.choices.dtype == np.int64
    assert allocation.proof == Proof("feasible", 3.0, 0.25)
    assert repr(allocation) == "Allocation(objective 4, size 8, feasible, gap 0.25, {stem: int8, head: int4})"
    assert "layer 0: option 1" in repr(AllocationProblem(objective=[[1.0, 0.5]]).allocation([1], status="optimal"))


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [(4.0, 3.0, 0.25), (0.0, 0.0, 0.0), (0.0, -1.0, math.inf), (-4.0, -5.0, 0.25), (4.0, 4.1, 0.0), (4.0, None, None)],
)
def test_gaps(objective, bound, gap):
    proof = Proof.of(objective, bound, "feasible")
    assert proof.gap == gap
    assert proof.bound is None or proof.bound <= objective


def test_optimal_means_no_gap():
    assert problem().allocation([1, 0], status="optimal").proof == Proof("optimal", 4.0, 0.0)
    assert isinstance(problem().allocation([1, 0], status="heuristic"), Allocation)
    assert problem().allocation([1, 0], status="heuristic").proof == Proof("heuristic", None, None)


@pytest.mark.parametrize("seed", range(30))
def test_evaluation_by_loops(seed):
    made = random_problem(seed)
    rng = np.random.default_rng(seed)
    chosen = [int(rng.choice(np.flatnonzero(row))) for row in made.allowed]
    scores = [made.objective[i, k] for i, k in enumerate(chosen)]
    expected = max(scores) if made.norm == math.inf else sum(s**made.norm for s in scores) ** (1 / made.norm)
    if made.norm == 1:
        expected = sum(scores) + sum(block[chosen[i]][chosen[j]] for (i, j), block in made.pairs.items())
        expected += 0 if made.format_costs is None else sum(made.format_costs[k] for k in set(chosen))
    objective, usage = made.evaluate(chosen)
    assert objective == pytest.approx(expected, rel=1e-12, abs=1e-12)
    for name, table in made.resources.items():
        total = sum(table[i, k] for i, k in enumerate(chosen)) + made.offsets.get(name, 0)
        total += sum(block[chosen[i]][chosen[j]] for (i, j), block in made.transitions.get(name, {}).items())
        assert usage[name] == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_imports_are_light():
    heavy = ("torch", "pulp", "scipy", "pandas")
    code = f"import sys, mpq.problem, mpq.solvers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
