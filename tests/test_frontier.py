"""The noun: arrays that cannot be written to, points, the answer at a budget, a table."""

import dataclasses

import numpy as np
import pytest

from mpq.frontier import Frontier
from mpq.problem import AllocationProblem, InfeasibleError

PROBLEM = AllocationProblem(
    objective=[[5, 1], [3, 0.5]],
    resources={"size": [[2, 4], [4, 8]], "latency": [[4, 2], [2, 1]]},
    layers=("stem", "head"),
    options=("int4", "int8"),
)
CHOICES = [[0, 0], [1, 0], [1, 1]]


def front(**changed):
    given = {"names": ("size",), "resource": [6, 8, 12], "objective": [8, 4, 1.5], "choices": CHOICES}
    return Frontier(problem=PROBLEM, **{**given, **changed})


def test_frozen_and_read_only():
    found = front()
    for name in ("resource", "objective", "choices"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.epsilon = 1.0
    assert found.choices.dtype == np.uint8


def test_points_in_order():
    found = front()
    assert len(found) == 3
    assert [point.resource for point in found] == [6, 8, 12]
    assert found[-1].objective == 1.5
    assert found[1].choices.tolist() == [1, 0]
    assert found.layers == ("stem", "head")
    assert found.options == ("int4", "int8")
    assert repr(found) == "Frontier(3 points, size 6 … 12, objective 8 … 1.5)"


@pytest.mark.parametrize(("at", "objective"), [(6, 8), (7.9, 8), (8 * (1 - 1e-12), 4), (11, 4), (12, 1.5), (1e9, 1.5)])
def test_allocation_at_a_budget(at, objective):
    found = front().allocation(at=at)
    assert found.objective == objective
    assert found.proof.status == "optimal"
    assert found.usage["size"] <= at * (1 + 1e-9)


def test_out_of_reach_in_words():
    with pytest.raises(InfeasibleError, match="size from 6 to 12 .asked for 5") as caught:
        front().allocation(at=5)
    assert caught.value.reachable == {"size": 6.0}


def test_with_epsilon_a_bound_and_in_an_order_none():
    found = front(epsilon=0.5, floor=[0.0, 0.0]).allocation(at=8)
    assert (found.proof.status, found.proof.bound) == ("feasible", 1.0)  # 1.5 at 12 stands for at least 1.0 at 8
    assert front(is_restricted=True).allocation(at=8).proof.status == "heuristic"


def test_several_resources():
    found = front(names=("size", "latency"), resource=[[6, 6], [8, 4], [12, 3]])
    assert found.allocation(at=(8, 5)).options == ("int8", "int4")
    assert found.allocation(at={"latency": 3.5}).options == ("int8", "int8")
    assert found[0].resource.tolist() == [6, 6]
    with pytest.raises(InfeasibleError, match="together; it reaches size from 6 to 12 .*latency from 3 to 6"):
        found.allocation(at=(7, 5))
    with pytest.raises(ValueError, match="number for each of size, latency"):
        found.allocation(at=5)
    with pytest.raises(ValueError, match="did you mean 'latency'"):
        found.allocation(at={"latancy": 3})


def test_a_row_a_point():
    frame = front().to_frame()
    assert list(frame.columns) == ["size", "objective", "stem", "head"]
    assert frame["stem"].tolist() == ["int4", "int8", "int8"]
    assert frame["size"].tolist() == [6, 8, 12]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"choices of a frontier must have shape \(3, 2\), got \(2, 2\)"):
        front(choices=CHOICES[:2])
