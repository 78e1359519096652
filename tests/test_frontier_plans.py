"""What a frontier is asked for: the plan at a budget, its knee, what it gains on another."""

from dataclasses import replace

import numpy as np
import pytest
from pictured import table_of

from mpq.budgets import format_quantity
from mpq.frontier import Frontier
from mpq.problem import InfeasibleError
from mpq.solvers.evolution import evolve
from mpq.solvers.pareto import pareto_frontier

TABLE = table_of(6)
FRONT = TABLE.pareto("size")


def measured(front=FRONT, factor=1.5, every=2):
    rows = slice(None, None, every)
    kept = {name: getattr(front, name)[rows] for name in ("resource", "choices")}
    objective = np.abs(front.objective[rows]) * factor + 1e-3
    return replace(
        front,
        **kept,
        objective=objective,
        standard_error=objective / 5,
        provenance={"measured": "KL"},
        is_heuristic=True,
    )


@pytest.mark.parametrize("at", ["35%", "0.7 kB", "4.5 bits", 700.0])
def test_a_plan_is_what_solving_finds(at):
    found, solved = FRONT.plan(at=at), TABLE.solve({"size": at})
    assert found.predicted["sensitivity"] == pytest.approx(solved.predicted["sensitivity"], rel=1e-12)
    assert found.predicted["size"] <= solved.budgets[0].limit
    assert found.proof.status == "optimal"
    assert found.budgets[0].limit == solved.budgets[0].limit
    assert found.table is TABLE
    assert found.fingerprint == "f"
    allocation = FRONT.allocation(at=at)
    assert list(found.options.values()) == list(allocation.options)


def test_a_plan_keeps_the_budgets_of_the_frontier():
    front = TABLE.pareto("size", {"latency": "0.7 ms"})
    plan = front.plan(at="100%")
    assert plan.predicted["latency"] <= 0.7e-3
    assert {budget.quantity: budget.limit for budget in plan.budgets}["latency"] == 0.7e-3


def test_every_point_is_its_own_plan(tmp_path):
    for index, point in enumerate(FRONT):
        plan = FRONT.plan(point)
        assert plan.predicted["size"] == pytest.approx(FRONT.resource[index], rel=1e-12)
        assert plan.predicted["sensitivity"] == pytest.approx(FRONT.objective[index], rel=1e-9, abs=1e-15)
    plan.save(tmp_path / "plan.json")


def test_several_resources_by_text():
    front = replace(pareto_frontier(TABLE.problem({}), ["size", "latency"]), table=TABLE, minimised="sensitivity")
    plan = front.plan(at={"size": "40%", "latency": "0.6 ms"})
    assert plan.predicted["latency"] <= 0.6e-3
    assert front.plan(at=("40%", "0.6 ms")).options == plan.options
    assert front.plan(front[2]).predicted["size"] == front.resource[2, 0]
    assert evolve(TABLE.problem({}), ["size"]).knee().resource > 0


def test_a_measured_plan_says_what_was_measured():
    front = measured()
    plan = front.plan(at="60%")
    said = plan.provenance["frontier"]
    point = int(np.flatnonzero(front.objective == said["value"])[0])
    assert plan.predicted["size"] == front.resource[point]
    assert said == {
        "measured": "KL",
        "value": front.objective[point],
        "standard_error": front.standard_error[point],
    }
    assert plan.proof.status == "heuristic"
    assert plan.predicted["sensitivity"] != said["value"]
    assert plan.measured == {}


def test_what_cannot_be_asked_is_said():
    bare = pareto_frontier(TABLE.problem({}), "size")
    with pytest.raises(ValueError, match="does not know its table.*table.pareto"):
        bare.plan(at=700)
    assert bare.allocation(at="0.7 kB").usage["size"] <= 700
    with pytest.raises(ValueError, match="needs a cost table"):
        bare.allocation(at="40%")
    with pytest.raises(ValueError, match="unit of B, got '3 ms'"):
        FRONT.plan(at="3 ms")
    both = replace(TABLE, quantities={**TABLE.quantities, "value_size": TABLE.quantities["size"] * 0.9})
    with pytest.raises(ValueError, match="limits value_size, not size"):
        both.pareto("size").plan(at="4 bits values")
    with pytest.raises(InfeasibleError, match="no point of the frontier"):
        FRONT.plan(at="1 B")
    with pytest.raises(ValueError, match="number for each of size"):
        FRONT.plan(at=float("nan"))


def test_the_knee_is_farthest_below_the_chord():
    points = np.column_stack([FRONT.resource, FRONT.objective])
    low, high = points.min(0), points.max(0)
    chord = [
        1 - (x - low[0]) / (high[0] - low[0]) - (y - low[1]) / (high[1] - low[1]) for x, y in points.tolist()
    ]  # times √2: the distance
    knee = FRONT.knee()
    assert knee.resource == FRONT.resource[int(np.argmax(chord))]
    assert FRONT.plan(knee).predicted["size"] == knee.resource
    one = FRONT.allocation(at=FRONT.resource[0])
    single = Frontier(
        problem=FRONT.problem, names=("size",), resource=[1.0], objective=[2.0], choices=one.choices[None]
    )
    assert single.knee().objective == 2.0


def gain_by_loop(first, second):
    """(resource, first's best, second's best) wherever both have a plan."""
    found = []
    for resource in sorted({*first.resource.tolist(), *second.resource.tolist()}):
        best = [
            min((o for r, o in zip(front.resource, front.objective, strict=True) if r <= resource), default=None)
            for front in (first, second)
        ]
        if None not in best:
            found.append((resource, *best))
    return np.array(found)


def test_gain_against_a_loop():
    other = TABLE.pareto("size", epsilon=0.3)
    late = replace(other, **{name: getattr(other, name)[1:] for name in ("resource", "objective", "choices")})
    for first, second in ((FRONT, other), (FRONT, late), (late, FRONT)):
        frame = first.compare(second).frame
        np.testing.assert_array_equal(frame[["size", "first", "second"]].to_numpy(), gain_by_loop(first, second))
        np.testing.assert_array_equal(frame["gain"], frame["second"] - frame["first"])
    assert (FRONT.compare(other).frame["gain"] >= 0).all()
    assert "gain_se" not in frame
    assert frame.attrs["measures"] == {"size": "B"}


def test_gain_in_words():
    half = replace(FRONT, objective=FRONT.objective - 1.0)
    count = len(FRONT)
    ends = " to ".join(format_quantity(FRONT.resource[end], "B") for end in (0, -1))
    assert str(half.compare(FRONT)).startswith(
        f"The first frontier has the lower sensitivity at {count} of {count} values of size from {ends}. "
        "Where it is ahead, it is lower by 1 in the median and by 1 at most (at "
    )
    assert repr(FRONT.compare(half)).startswith("The second frontier has the lower")
    assert (
        str(FRONT.compare(FRONT))
        == f"Both frontiers have the same sensitivity at all {count} values of size from {ends}."
    )
    crossing = replace(FRONT, objective=np.linspace(FRONT.objective.max() + 0.1, FRONT.objective.min() - 0.1, count))
    text = str(FRONT.compare(crossing))
    assert "The first frontier" in text
    assert "The second frontier" in text
    positive = replace(FRONT, objective=np.abs(FRONT.objective) + 1)
    doubled = replace(positive, objective=2 * positive.objective)
    assert "lower by 50 % in the median and by 50 % at most" in str(positive.compare(doubled))


def test_gain_of_measured_frontiers_has_errors():
    frame = measured().compare(measured(factor=2.0)).frame
    assert (frame["gain_se"] > 0).all()
    row = frame.iloc[0]
    assert row["gain_se"] == pytest.approx(np.hypot(row["first"], row["second"]) / 5)


def test_only_alike_frontiers_are_compared():
    with pytest.raises(ValueError, match="measured KL and predicted sensitivity"):
        measured().compare(FRONT)
    with pytest.raises(ValueError, match="got size and latency"):
        FRONT.compare(TABLE.pareto("latency"))


def test_frames_have_units():
    frame = measured().to_frame()
    assert list(frame.columns[:3]) == ["size", "objective", "standard_error"]
    assert frame.attrs == {"measures": {"size": "B"}, "objective": "KL"}
    assert "standard_error" not in FRONT.to_frame()
    ends = " … ".join(format_quantity(FRONT.resource[end], "B") for end in (0, -1))
    assert repr(FRONT).startswith(f"Frontier({len(FRONT)} points, size {ends}, sensitivity 0.37")
