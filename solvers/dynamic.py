"""Dynamic programming over lists of partial plans: exact for one budget, without rounding any cost."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import Allocation, AllocationProblem

from .descent import descend
from .exchange import improve
from .features import refuse
from .forest import Forest, Remainder, plant, remainder
from .ilp import ILPSolver
from .infeasibility import aimed_at, explain
from .labels import choices
from .prices import prices
from .pruning import ROOM, NoWorseThan
from .reduction import ROUNDING, Core, merge
from .sweep import sweep

PRICES = 96  # at which the bound is looked at
ENTRIES = 3e6  # options of all groups times prices; large problems are looked at with fewer prices
TESTS = 6  # of these, how many every label has to pass
FRACTIONS = (0.03, 0.25)  # of the gap: limits on the value that are tried before the best plan known


@dataclass(frozen=True, kw_only=True)
class DynamicSolver:
    """Nemhauser–Ullmann lists: the exact optimum under one budget, for layers alone or coupled in chains and trees.

    Layers are taken one after another. Of the plans for the layers so far, only those are kept that no other equals in
    usage and score (Nemhauser & Ullmann 1969, Management Science 15(9)), and only those that might still, by a
    Lagrangian bound on the layers left, beat the best plan known. Costs stay floating-point numbers: there are no bins
    that a budget could be missed by. Of layers coupled by pairs or transitions, one list is kept for every option of
    the neighbour, so that the couplings have to form chains or trees. Tied layers count as one.

    Limits on the score are tried from the bound upwards: a plan found below the first of them is the best there is.
    The max norm is solved by bisection over the worst score; among plans with the least one, that with the least sum is
    returned.

    Use it for one budget: it needs no integer-programming code and gives nothing away. Cost: layers × options × length
    of the lists; they are short where the bound tells plans apart (0.1 s for 200 layers of 8 options), and can grow
    exponentially where all options offer the same score per unit of budget.

    Args:
        labels: the most partial plans that one list may hold; a million take some ten megabytes a layer.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = DynamicSolver().solve(problem)
        >>> allocation.options, allocation.proof.status
        (('int8', 'int4'), 'optimal')
    """

    labels: int = 2_000_000

    exact: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = frozenset({"p-norm", "max norm", "pairs", "transitions"})

    def __post_init__(self) -> None:
        if self.labels < 1:
            raise ValueError(f"labels must be at least 1, got {self.labels}")

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The best plan under the budget, if there is one.

        Raises:
            InfeasibleError: if there is none, with the smallest usage that can be reached.
            ValueError: for several budgets, peak budgets or format limits, couplings that close a circle, and where
                there are more partial plans than `labels`.
        """
        refuse("dynamic", self.features, problem)
        core = merge(problem)
        try:
            choice = _least_maximum(core, self.labels) if core.has_goal else least(core, self.labels)
            if choice is None:
                choice = explain(core, lambda aimed: (least(aimed, self.labels), True))
            while (nearer := core.refocused(choice)) is not None:
                core, found = nearer, least(nearer, self.labels)
                choice = choice if found is None else found
        except _AtTheEdgeError:
            return ILPSolver().solve(problem)
        if not core.has_goal:
            return problem.allocation(core.expand(choice), status="optimal")
        worst = problem.evaluate(core.expand(choice))[0]
        scores = np.where(problem.objective <= worst, problem.objective, np.inf)
        best = self.solve(replace(problem, objective=scores, norm=1))
        return problem.allocation(best.choices, status="optimal")


class _AtTheEdgeError(Exception):
    """Plans that keep the budget and plans that do not differ by less than the rounding of a sum."""


def least(core: Core, most: int) -> IntArray | None:
    """The best plan of a core with one budget or none, None where there is none."""
    plant(core, "dynamic")  # couplings that close a circle are refused whatever else there is
    tight = core.tightened()
    if tight is None:
        return None
    best = _start(tight)
    if best is not None:
        tight = core.tightened(best)
        if tight is None:
            return best
    forest = plant(tight, "dynamic")
    value = math.inf if best is None else tight.distance(tight.floors(), best) * (1 + ROUNDING)
    bounds = _priced(forest)
    bound = float(bounds.dual.max())
    for fraction in (*FRACTIONS, 1.0):
        limit = bound + fraction * (value - bound) if value < math.inf else value
        smaller = _without_hopeless(forest, bounds, limit)
        if smaller is not None:
            found = _best_below(smaller, bounds, limit, most)
            if found is not None or value == math.inf:
                return found
    return best


def _start(tight: Core) -> IntArray | None:
    """A plan to beat: every group's best score where that fits, else the greedy one, improved by exchanges."""
    choice = np.where(tight.allowed, tight.table[0], np.inf).argmin(1).astype(np.int64)
    if tight.is_feasible(choice):
        return improve(tight, choice)
    found = descend(tight)
    return None if found is None else improve(tight, found.choice)


class _Bounds(NamedTuple):
    """Prices of the budget (prices, budgets), the bound that each gives, and what it is made of."""

    price: FloatArray
    dual: FloatArray
    least: Remainder


def _priced(forest: Forest) -> _Bounds:
    """Bounds at prices from the slopes between options, then at finer ones around the best of them."""
    price = np.zeros((1, len(forest.slack)))
    if len(forest.slack):
        price = prices(forest, max(TESTS, min(PRICES, int(ENTRIES // forest.own[0].size))))[:, None]
        dual = _bounds(forest, price).dual
        best = int(dual.argmax())
        low, high = price[max(0, best - 1), 0], price[min(len(price) - 1, best + 1), 0]
        price = np.linspace(low, high, len(price))[:, None]
    return _bounds(forest, price)


def _bounds(forest: Forest, price: FloatArray) -> _Bounds:
    least = remainder(forest, np.append(np.ones((len(price), 1)), price, axis=1))
    return _Bounds(price, least.later[0] - price @ forest.slack, least)


def _without_hopeless(forest: Forest, bounds: _Bounds, limit: float) -> Forest | None:
    """Without the options that no plan within the limit contains, by any price; None where nothing is left."""
    least, core = bounds.least, forest.core
    most = limit - bounds.dual + ROOM * (np.abs(bounds.dual) + bounds.least.later[0])
    allowed = core.allowed.copy()
    for number, nodes in enumerate(forest.trees):
        tree = least.later[number] - least.later[number + 1]
        for node in nodes:
            above = least.inside[node.group] + least.outside[node.group] - tree[:, None]
            allowed[node.group] &= (above <= most[:, None]).all(0)
            if not allowed[node.group].any():
                return None
    return replace(forest, core=replace(core, allowed=allowed))


def _best_below(forest: Forest, bounds: _Bounds, limit: float, most: int) -> IntArray | None:
    """The best plan no worse than a limit."""
    tests = np.sort(np.argsort(-bounds.dual, kind="stable")[:TESTS])
    price = bounds.price[tests]
    least = remainder(forest, np.append(np.ones((len(price), 1)), price, axis=1))
    labels = sweep(forest, least, NoWorseThan(value=limit, price=price, slack=forest.slack, most=most))
    if not len(labels.value):
        return None
    groups, options = forest.core.allowed.shape
    choice = choices(labels, np.array([labels.value.argmin()]), groups, options)[:, 0].astype(np.int64)
    if not forest.core.is_feasible(choice):
        raise _AtTheEdgeError
    return choice


def _least_maximum(core: Core, labels: int) -> IntArray | None:
    """A plan with the least worst rank, by bisection: is the least usage without the options above it low enough?"""
    ranks = np.zeros(core.allowed.shape)
    ranks[core.steps.group] = core.steps.value

    def fitting(most: int) -> IntArray | None:
        allowed = core.allowed & (ranks <= most)
        if not allowed.any(1).all():
            return None
        masked = replace(core, allowed=allowed)
        choice = (
            least(aimed_at(masked, core.names[0], []), labels) if core.names else allowed.argmax(1).astype(np.int64)
        )
        return choice if choice is not None and core.is_feasible(choice) else None

    low, high = 0, int(ranks[core.allowed].max())
    best = fitting(high)
    while best is not None and low < high:
        middle = (low + high) // 2
        found = fitting(middle)
        best = best if found is None else found
        low, high = (middle + 1, high) if found is None else (low, middle)
    return best
