"""HAWQ-V3's published integer programs of ResNet-18: the plans that were published, and the trap of their scale."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpq.problem import AllocationProblem
from mpq.solvers import ExhaustiveSolver, GreedySolver, ILPSolver
from mpq.solvers.dynamic import DynamicSolver
from mpq.solvers.pareto import pareto_frontier

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no published data at {REFERENCE}")

PUBLISHED = {  # fraction of the way from all int4 to all int8: total sensitivity, bits in the order of the layers
    "size": {
        0.25: (0.118300, "8888888888888844444"),
        0.5: (0.074506, "8888888888888884844"),
        0.75: (0.033441, "8888888888888488884"),
    },
    "bops": {
        0.25: (0.460424, "8884848444444444444"),
        0.5: (0.215689, "8884888848884444444"),
        0.75: (0.079965, "8888888848888484884"),
    },
    "latency": {
        0.25: (0.460424, "8884848444444444444"),
        0.5: (0.202674, "8888848848884484844"),
        0.75: (0.079965, "8888888848888484884"),
    },
}


@pytest.fixture(scope="module")
def data():
    return json.loads((REFERENCE / "hawq_ilp_resnet18.json").read_text())


@pytest.fixture(scope="module")
def optima():
    return json.loads((REFERENCE / "hawq_ilp_resnet18_optima.json").read_text())["constraints"]


def published_costs(data, constraint):
    """(layers, 2) in the units of the notebook: MiB, GBOPs over 16, ms."""
    if constraint == "latency":
        return np.array([data["latency_int4_ms"], data["latency_int8_ms"]]).T
    if constraint == "size":
        return np.outer(data["parameters_raw"], [4, 8]) / 8 / 1024 / 1024
    return np.outer(data["bops_raw"], [1 / 64, 1 / 16]) / 1e6


def resnet18(data, costs, limit, scale=1.0):
    trace = np.array(data["hutchinson_trace_per_param"])
    return AllocationProblem(
        objective=scale * trace[:, None] * np.array([data["delta_w_sq_int4"], data["delta_w_sq_int8"]]).T,
        resources={"cost": costs},
        budgets={"cost": limit},
        ties=data["tied_groups_0based"],
        layers=data["layers"],
        options=("4", "8"),
    )


@pytest.mark.parametrize("constraint", PUBLISHED)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("solver", [ILPSolver(), ExhaustiveSolver()], ids=["ilp", "exhaustive"])
def test_published_plans(data, constraint, fraction, solver):
    costs = published_costs(data, constraint)
    low, high = costs.sum(0)
    found = solver.solve(resnet18(data, costs, low + fraction * (high - low)))
    objective, bits = PUBLISHED[constraint][fraction]
    assert "".join(found.options) == bits
    assert found.objective == pytest.approx(objective, abs=5e-7)
    assert found.proof.status == "optimal"
    for tie in data["tied_groups_0based"]:
        assert len({found.options[layer] for layer in tie}) == 1


def whole_costs(data, constraint):
    """(layers, 2) in the whole units of the optima: nibbles, MACs × 16, 1e-8 ms."""
    if constraint == "latency":
        return np.round(1e8 * published_costs(data, "latency"))
    return np.outer(
        data["parameters_raw" if constraint == "size" else "bops_raw"], [1, 2 if constraint == "size" else 4]
    )


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("constraint", PUBLISHED)
def test_the_gain_is_optimal_at_every_scale(data, optima, constraint, scale):
    """19 programs a constraint. At 1e-6 of the scale, CBC and HiGHS called 40 of 42 wrong plans optimal."""
    costs, grid = whole_costs(data, constraint), optima[constraint]["alpha_grid"]
    assert len(grid) == 19
    for case in grid:
        problem = resnet18(data, costs, case["limit"], scale)
        found = ILPSolver().solve(problem)
        assert [int(label) for label in found.options] == case["bits"]
        gain = problem.objective[:, 0].sum() - found.objective
        assert gain / scale == pytest.approx(case["gain"], abs=1e-9)
        assert found.usage["cost"] == case["cost"]
        assert found.proof.status == "optimal"


@pytest.mark.parametrize("constraint", PUBLISHED)
def test_greedy_is_close_and_its_bound_holds(data, optima, constraint):
    costs = whole_costs(data, constraint)
    for case in optima[constraint]["alpha_grid"]:
        problem = resnet18(data, costs, case["limit"])
        found = GreedySolver().solve(problem)
        best = problem.objective[:, 0].sum() - case["gain"]
        assert found.proof.bound <= best + 1e-9
        assert best - 1e-9 <= found.objective <= best * 1.1
        assert not problem.violations(found.choices)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6, 1 / 3])
@pytest.mark.parametrize("constraint", PUBLISHED)
def test_complete_front(data, optima, constraint, unit):
    """29, 24 and 41 points, in any unit: sums that differ by rounding are one point."""
    costs = unit * whole_costs(data, constraint)
    front = pareto_frontier(resnet18(data, costs, float(costs[:, 1].sum())), "cost")
    assert len(front) == optima[constraint]["pareto_front_size"] == {"size": 29, "bops": 24, "latency": 41}[constraint]
    for case in optima[constraint]["alpha_grid"]:
        found = front.allocation(at=unit * case["limit"])
        assert [int(label) for label in found.options] == case["bits"]
        assert found.proof.status == "optimal"


@pytest.mark.parametrize("constraint", PUBLISHED)
def test_dynamic_programming_agrees(data, optima, constraint):
    costs = whole_costs(data, constraint)
    for case in optima[constraint]["alpha_grid"]:
        found = DynamicSolver().solve(resnet18(data, costs, case["limit"], 1e-12))
        assert [int(label) for label in found.options] == case["bits"]
