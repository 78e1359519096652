"""The whole trade-off in one call: every allocation that is best for some budget."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mpq.arrays import FloatArray, IntArray
from mpq.frontier import Frontier
from mpq.problem import AllocationProblem, InfeasibleError
from mpq.suggestions import did_you_mean

from .bands import front_lists
from .forest import Forest, plant, remainder
from .ilp import ILPSolver
from .labels import ChoiceArray, Labels, choices
from .monotone import monotone_lists
from .pruning import InEveryCoordinate, cheapest_best
from .recomputed import Chosen, objectives, usages, within
from .reduction import Core, merge
from .sweep import Rules, sweep
from .thinning import distinct_points

TAKEN = frozenset({"several budgets", "p-norm", "pairs", "transitions"})
MOST = 200_000  # partial plans at once, with several resources or budgets
RESOURCES = 3


def pareto_frontier(
    problem: AllocationProblem,
    resource: str | Sequence[str],
    *,
    epsilon: float = 0.0,
    monotone: npt.ArrayLike | None = None,
) -> Frontier:
    """Every non-dominated allocation of the objective against one resource, or up to three.

    Nemhauser–Ullmann lists (1969, Management Science 15(9)), without bins: every point is there, and none twice. Points
    that differ by rounding alone (1e-9 relative in the resource or in the objective) are one. All budgets of the
    problem stay in force: a resource's own ends the frontier there, those of others are further coordinates of the
    lists while they can bind. Couplings have to form chains or trees.

    With an ``epsilon`` the frontier holds, for every plan within the budgets, a point with

        resource ≤ plan's + ε · (plan's resource − its floor),  objective ≤ plan's + ε · (plan's objective − its floor).

    A floor is 0, or, where that is negative, what the sum over the layers of each layer's least comes to; so where
    nothing is negative, ε is relative, and it does not depend on an offset otherwise. (For a p-norm the same holds.)

    Args:
        problem: sum budgets, p-norms, pairs and transitions are taken.
        resource: name of a resource, or up to three of them.
        epsilon: 0 for the exact frontier; 1e-2, say, for a shorter one.
        monotone: ``(layers,)`` priorities, such as average Hessian traces: a layer with a larger one never takes an
            earlier option, options being listed from few bits to many (HAWQ-V2; methods from memory of the paper).
            Tied layers have the mean of their priorities; equal priorities are free among themselves.

    Returns:
        The frontier in order of the (first) resource; objective and resource are recomputed from the choices, by sums
        with a correction for their rounding.

    Raises:
        InfeasibleError: if no plan meets the budgets.
        ValueError: for a name that is no resource, features that are not taken, couplings that close a circle, or a
            frontier of several resources or budgets with more than 200,000 partial plans.

    Cost: one resource: layers × options × points; 200 layers of 6 options and 170,000 points take as long as the bare
    merges of points without choices, about 5 s. An ``epsilon`` pays from 1e-2 on; 1e-4 is finer than such a frontier.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             options=("int4", "int8"))
        >>> front = pareto_frontier(problem, "size")
        >>> front.resource.tolist(), front.objective.tolist()
        ([6.0, 8.0, 12.0], [8.0, 4.0, 1.5])
    """
    names = _checked(problem, resource, epsilon)
    core = _core(problem, names)
    tight = core if monotone is not None else core.tightened()
    if tight is None:
        return _of_one_plan(problem, names)
    forest = plant(tight, "pareto")
    floor = forest.base[: 1 + len(names)] + np.array([0.0, *(problem.offsets.get(name, 0.0) for name in names)])
    trim = _Trim(len(names), np.maximum(floor, 0.0), float(epsilon))
    if monotone is not None:
        lists = _whole(monotone_lists(forest, _priorities(problem, monotone), _order_rules(problem, forest, trim)))
    elif len(forest.own) == 2:
        lists = front_lists(forest, trim.epsilon, trim.origin)
    else:
        lists = _whole([_all_coordinates(problem, forest, trim)])
    found = [_layer_choices(problem, forest, labels, index) for labels, index in lists if len(index)]
    if not found:
        return _of_one_plan(problem, names, is_restricted=monotone is not None)
    chosen = cast(Chosen, np.concatenate(found, axis=1))
    kept = within(problem, chosen)
    if not kept.all():  # over a budget by less than the rounding of a sum; a plan just within it may have gone for it
        best = [ILPSolver().solve(problem).choices[:, None]] if monotone is None else []
        chosen = np.concatenate([chosen[:, kept].astype(np.int64), *best], axis=1)
    return _frontier(problem, names, chosen, _Promise(np.minimum(floor, 0.0), trim.epsilon, monotone is not None))


class _Promise(NamedTuple):
    """What a frontier says about itself."""

    floor: FloatArray
    epsilon: float = 0.0
    is_restricted: bool = False


class _Trim(NamedTuple):
    """How many costs are coordinates of the front, what they and the value are counted from, and how finely."""

    free: int
    origin: FloatArray
    epsilon: float

    def step(self, times: int) -> float:
        """The factor, as a logarithm, by which labels may differ where they are looked at so many times."""
        return math.log1p(self.epsilon) / times


def _checked(problem: AllocationProblem, resource: str | Sequence[str], epsilon: float) -> tuple[str, ...]:
    names = (resource,) if isinstance(resource, str) else tuple(resource)
    if not 0 < len(names) <= RESOURCES or len(set(names)) < len(names):
        raise ValueError(f"resource must be a name or up to {RESOURCES} different ones, got {resource!r}")
    for name in names:
        if name not in problem.resources:
            known = ", ".join(problem.resources) or "none"
            hint = did_you_mean(name, problem.resources)
            raise ValueError(f"resource must name a sum over the layers ({known}), got {name!r}{hint}")
    missing = sorted(problem.features - TAKEN)
    if missing:
        raise ValueError(
            f"pareto_frontier does not take {', '.join(missing)}: solve for a list of budgets with solver='ilp'"
        )
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must be from 0 up to 1, got {epsilon}")
    return names


def _core(problem: AllocationProblem, names: tuple[str, ...]) -> Core:
    """The core whose costs are the resources asked for, with or without a budget, then the budgets that can bind."""
    budgets = {name: problem.budgets.get(name, _never_reached(problem, name)) for name in names}
    others = {name: budget for name, budget in problem.budgets.items() if name not in names}
    core = merge(replace(problem, budgets={**budgets, **others}))
    forest = plant(core, "pareto")
    if others:
        most = -remainder(forest, -np.eye(len(forest.own))[1:]).later[0]
        binding = {name for name, high, slack in zip(core.names, most, forest.slack, strict=True) if high > slack}
        kept = {name: budget for name, budget in others.items() if name in binding}
        core = merge(replace(problem, budgets={**budgets, **kept}))
    return core


def _never_reached(problem: AllocationProblem, name: str) -> float:
    """A budget that no plan comes near."""
    size = float(np.abs(np.where(problem.allowed, problem.resources[name], 0.0)).max(1).sum())
    for (first, second), block in problem.transitions.get(name, {}).items():
        both = np.outer(problem.allowed[first], problem.allowed[second])
        size += float(np.abs(np.where(both, block, 0.0)).max())
    return 2 * (size + abs(problem.offsets.get(name, 0.0)))


def _priorities(problem: AllocationProblem, monotone: npt.ArrayLike) -> FloatArray:
    """Priority of every group: the mean of its layers."""
    priority = np.asarray(monotone, dtype=np.float64)
    if priority.shape != (len(problem.objective),) or not np.isfinite(priority).all():
        raise ValueError(f"monotone must hold a finite priority for each of {len(problem.objective)} layers")
    if problem.pairs or any(problem.transitions.values()):
        raise ValueError("pareto_frontier takes no pairs and transitions with monotone: leave monotone out")
    mean = np.bincount(problem.groups, weights=priority) / np.bincount(problem.groups)
    low, high = (np.full(len(mean), sign * np.inf) for sign in (1, -1))
    np.minimum.at(low, problem.groups, priority)
    np.maximum.at(high, problem.groups, priority)
    return np.where(low == high, low, mean)


def _coordinates(problem: AllocationProblem, forest: Forest, trim: _Trim, times: int) -> InEveryCoordinate:
    # A cost that is a coordinate and has a budget is trimmed as the first, but must not be as the second.
    is_bounded = [
        row >= trim.free or (trim.epsilon > 0 and name in problem.budgets) for row, name in enumerate(forest.core.names)
    ]
    return InEveryCoordinate(
        free=trim.free,
        bounded=np.flatnonzero(is_bounded).tolist(),
        slack=forest.slack,
        origin=trim.origin,
        step=trim.step(times),
        most=MOST,
    )


def _all_coordinates(problem: AllocationProblem, forest: Forest, trim: _Trim) -> Labels:
    """The non-dominated labels in all costs."""
    nodes = [node for tree in forest.trees for node in tree]
    times = len(forest.trees) + 2 * sum(len(node.branches) for node in nodes)
    rules = _coordinates(problem, forest, trim, times)
    most = -np.eye(len(forest.own))[[1 + row for row in rules.bounded]]
    return sweep(forest, remainder(forest, most), rules)


def _order_rules(problem: AllocationProblem, forest: Forest, trim: _Trim) -> Rules:
    rules = _coordinates(problem, forest, trim, 2 * forest.own.shape[1] + 2)
    within_limits, select = rules(np.full(len(rules.bounded), -np.inf))
    plain = len(forest.own) == 2 and not trim.epsilon
    return Rules(within_limits, cheapest_best if plain else select)


def _whole(lists: list[Labels]) -> list[tuple[Labels, IntArray]]:
    return [(labels, np.arange(len(labels.value))) for labels in lists]


def _layer_choices(problem: AllocationProblem, forest: Forest, labels: Labels, index: IntArray) -> ChoiceArray:
    """(layers, labels)."""
    groups, options = forest.core.allowed.shape
    found = choices(labels, index, groups, options)
    return found if groups == len(problem.groups) else found[problem.groups]


def _of_one_plan(problem: AllocationProblem, names: tuple[str, ...], *, is_restricted: bool = False) -> Frontier:
    """The error of a problem without a plan, or the frontier of the plan that turned up instead."""
    best = ILPSolver().solve(problem).choices
    if is_restricted:
        raise InfeasibleError("no plan in the order of the priorities meets all budgets, others do: leave monotone out")
    return _frontier(problem, names, best[:, None], _Promise(np.zeros(1 + len(names))))


def _frontier(problem: AllocationProblem, names: tuple[str, ...], chosen: Chosen, promise: _Promise) -> Frontier:
    """The different non-dominated points among plans (layers, plans), with everything recomputed."""
    columns = [*(usages(problem, name, chosen) for name in names), objectives(problem, chosen)]
    points = np.stack([column.total for column in columns], axis=1)
    picked = distinct_points(points, np.array([column.noise for column in columns]))
    points = points[picked]
    return Frontier(
        problem=problem,
        names=names,
        resource=points[:, 0] if len(names) == 1 else points[:, :-1],
        objective=points[:, -1],
        choices=np.ascontiguousarray(chosen[:, picked].T),
        epsilon=promise.epsilon,
        floor=promise.floor,
        is_restricted=promise.is_restricted,
    )
