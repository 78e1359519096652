"""Small random problems of every kind, and what they come to by plain loops: what solvers are tested against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.arrays import FloatArray
from mpq.problem import AllocationProblem, InfeasibleError, SparsePeak

KINDS = (
    "ties",
    "forbidden",
    "pairs",
    "transitions",
    "max_formats",
    "format_costs",
    "peaks",
    "negative",
    "whole",
    "norm",
)


def random_problem(
    seed: int, *, kinds: Sequence[str] | None = None, wide: bool = False, budgets: int | None = None
) -> AllocationProblem:
    """A problem of up to 5 layers and 4 options.

    Args:
        seed: of everything drawn.
        kinds: those of `KINDS` that may be drawn, each with probability 0.3; all by default.
        wide: scores span 12 decades and resources 6.
        budgets: how many; one to three by default.

    Example:
        >>> random_problem(3, kinds=("ties",), budgets=1)
        AllocationProblem(3 layers, 2 options, budgets: size <= 3.28268)
    """
    rng = np.random.default_rng(seed)
    drawn = {kind for kind in KINDS if rng.random() < 0.3}
    drawn &= set(KINDS if kinds is None else kinds)
    shape = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    objective, norm = _scores(rng, shape, drawn, wide)
    names = ["size", "latency", "energy"][: budgets or int(rng.integers(1, 4))]
    resources = {name: _amounts(rng, shape, drawn, wide) for name in names}
    if "negative" in drawn:
        resources[names[0]] = resources[names[0]] - 3
    problem: dict[str, Any] = {
        "objective": objective,
        "norm": norm,
        "resources": resources,
        "offsets": {names[0]: float(rng.uniform(-2, 2))},
        "ties": _ties(rng, shape) if "ties" in drawn else [],
        "pairs": _blocks(rng, shape, 3, signed=True) if "pairs" in drawn and norm == 1 else {},
        "transitions": {names[-1]: _blocks(rng, shape, 2)} if "transitions" in drawn else {},
        "max_formats": int(rng.integers(1, 3)) if "max_formats" in drawn else None,
        "format_costs": rng.uniform(0, 5, shape[1]) if "format_costs" in drawn and norm == 1 else None,
    }
    problem["budgets"] = _budgets(rng, problem, drawn)
    if "peaks" in drawn:
        held = rng.uniform(0, 4, (3, *shape)) * (rng.random((3, shape[0], 1)) < 0.6)
        problem["peak_resources"] = {"memory": SparsePeak.from_dense(held) if rng.random() < 0.5 else held}
        problem["peak_budgets"] = {"memory": float(rng.uniform(0.5, 8))}
    try:
        return AllocationProblem(**problem)
    except InfeasibleError:  # a tie without a common option: draw again
        return random_problem(seed + 1_000_003, kinds=kinds, wide=wide, budgets=budgets)


def _scores(rng: np.random.Generator, shape: tuple[int, int], drawn: set[str], wide: bool) -> tuple[FloatArray, float]:
    scores = 10.0 ** rng.uniform(-6, 6, shape) if wide else rng.uniform(0, 10, shape)
    if "whole" in drawn:
        scores = np.floor(scores)
    if shape[1] > 1 and rng.random() < 0.2:
        scores[:, 1] = scores[:, 0]
    norm = (math.inf, 2, 3.5)[rng.integers(3)] if "norm" in drawn else 1
    if "negative" in drawn and norm in (1, math.inf):
        scores = scores - 5
    if "forbidden" in drawn:
        forbidden = rng.random(shape) < 0.25
        forbidden[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = False
        scores = np.where(forbidden, np.inf, scores)
    return scores, norm


def _amounts(rng: np.random.Generator, shape: tuple[int, int], drawn: set[str], wide: bool) -> FloatArray:
    if "whole" in drawn:
        return rng.integers(0, 10, shape).astype(float)
    return rng.uniform(0, 1, shape) * (10.0 ** rng.uniform(-3, 3, shape) if wide else 1.0)


def _ties(rng: np.random.Generator, shape: tuple[int, int]) -> list[tuple[int, ...]]:
    if shape[0] == 1:
        return []
    return [tuple(rng.choice(shape[0], 2, replace=False).tolist()) for _ in range(int(rng.integers(1, 3)))]


def _blocks(
    rng: np.random.Generator, shape: tuple[int, int], count: int, *, signed: bool = False
) -> dict[tuple[int, ...], FloatArray]:
    if shape[0] == 1:
        return {}
    keys = [tuple(rng.choice(shape[0], 2, replace=False).tolist()) for _ in range(count)]
    return {key: rng.uniform(-3 if signed else 0, 3, (shape[1], shape[1])) for key in keys}


def _budgets(rng: np.random.Generator, problem: dict[str, Any], drawn: set[str]) -> dict[str, float]:
    allowed, tight = np.isfinite(problem["objective"]), rng.uniform(-0.05, 1.0)
    budgets = {}
    for name, table in problem["resources"].items():
        low = np.where(allowed, table, np.inf).min(1).sum()
        high = np.where(allowed, table, -np.inf).max(1).sum()
        amount = low + rng.uniform(tight, 1) * (high - low) + problem["offsets"].get(name, 0.0)
        budgets[name] = float(round(amount) if "whole" in drawn else amount)
    if len(budgets) > 1 and rng.random() < 0.1:
        budgets.popitem()
    return budgets


def by_loops(problem: AllocationProblem) -> tuple[float | None, dict[str, float]]:
    """Least objective (None: no plan), and the least usage of every budget with the others in force, or else alone."""
    layers, options = problem.objective.shape
    names = [*problem.budgets, *problem.peak_budgets]
    best, together, alone = None, dict.fromkeys(names, math.inf), dict.fromkeys(names, math.inf)
    for choices in itertools.product(range(options), repeat=layers):
        if not all(problem.objective[layer, option] < math.inf for layer, option in enumerate(choices)):
            continue
        if any(len({choices[layer] for layer in tie}) > 1 for tie in problem.ties):
            continue
        if problem.max_formats is not None and len(set(choices)) > problem.max_formats:
            continue
        objective, usage = problem.evaluate(choices)
        over = set(problem.violations(choices))
        if not over and (best is None or objective < best):
            best = objective
        for name in names:
            alone[name] = min(alone[name], usage[name])
            if not over - {name}:
                together[name] = min(together[name], usage[name])
    return best, {name: together[name] if together[name] < math.inf else alone[name] for name in names}


def close(value: float, reference: float) -> bool:
    """Equal to 1e-9, the relative tolerance of every promise."""
    return abs(value - reference) <= 1e-9 * max(abs(reference), 1e-12)


def hard_problem(layers: int = 60, options: int = 6, seed: int = 0) -> AllocationProblem:
    """Strongly correlated, three budgets: an integer program that takes thousands of nodes."""
    rng = np.random.default_rng(seed)
    weight = np.sort(rng.integers(1000, 100_000, (layers, options)).astype(float), axis=1)
    resources = {name: weight * rng.uniform(0.9, 1.1, weight.shape) for name in ("size", "latency", "energy")}
    budgets = {
        name: float(table.min(1).sum() + 0.4 * (table.max(1).sum() - table.min(1).sum()))
        for name, table in resources.items()
    }
    objective = -(weight + 1000.0 * rng.integers(0, 3, weight.shape))
    return AllocationProblem(objective=objective, resources=resources, budgets=budgets)
