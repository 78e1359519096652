"""Partial plans of a few groups, enumerated breadth first: labels of score and usage, pruned by bounds."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .lagrangian_dual import Dual
from .reduction import ROUNDING, Core

SAME = 1e-13  # relative to what is summed: scores nearer to each other than that are equal
SHIFTS = (2, 16, 100)  # ranks of the open options whose changes give the prices tried beside the best ones


class Front(NamedTuple):
    """What open groups may do: deviations from the plan that is least at the prices, likeliest groups first."""

    group: IntArray  # (open,)
    allowed: BoolArray  # (open, options)
    penalty: FloatArray  # (open, options), priced score above the least
    change: FloatArray  # (1 + budgets, open, options), of score and usage

    def part(self, some: slice) -> "Front":
        """Some of the groups."""
        return Front(self.group[some], self.allowed[some], self.penalty[some], self.change[:, some])

    def least(self, weights: FloatArray) -> FloatArray:
        """Least weighted change of every group, (weights, open)."""
        change = np.tensordot(weights, self.change, 1)
        least: FloatArray = np.where(self.allowed, change, np.inf).min(2, initial=np.inf)
        return least


class Target:
    """The best plan seen, what is to be beaten, and the room there is; all relative to the least priced plan.

    Attributes:
        choice: the best plan seen, None where there is none.
        distance: its score above that of the least priced plan, or what is asked for.
        room: ``(budgets,)`` usage that the least priced plan leaves; negative where it exceeds a budget.
        rounding: ``(budgets,)`` how far sums of usage may be off.
        same: scores nearer to each other than that are equal.
        is_certain: False once a plan was at a budget's edge by rounding, and over it: another that would have kept
            the budget may have been taken for no better.
    """

    def __init__(self, core: Core, dual: Dual, best: IntArray | None, gap: float) -> None:
        every = np.arange(len(dual.choice))
        start = core.table[:, every, dual.choice]
        self.core, self.price, self.start, self.choice = core, dual.price, dual.choice, best
        self.distance = math.inf
        if best is not None:
            self.distance = math.fsum((core.table[0, every, best] - start[0]).tolist())
        self.room = core.limits - np.array([math.fsum(row.tolist()) for row in start[1:]])
        self.distance = min(self.distance, gap - float(dual.price @ self.room))
        offsets = np.array([core.problem.offsets.get(name, 0.0) for name in core.names])
        self.rounding = ROUNDING * (np.abs(start[1:]).sum(1) + np.abs(core.limits) + np.abs(offsets))
        self.same, self.is_certain = 0.0, True

    @property
    def gap(self) -> float:
        """Score of the best plan seen above the Lagrangian bound."""
        return self.distance + float(self.price @ self.room)

    def measure(self, front: Front) -> None:
        """Take in how large the sums over a front may become."""
        widest = np.abs(front.change).max(2, initial=0).sum(1)
        self.rounding = self.rounding + ROUNDING * widest[1:]
        self.same = SAME * float(widest[0] + self.price @ (widest[1:] + np.abs(self.room)))

    def offer(self, state: FloatArray, plan: Callable[[int], IntArray]) -> None:
        """Take the best of some plans, columns of score and usage, if it is better than the best seen."""
        score = np.where((state[1:] <= (self.room + self.rounding)[:, None]).all(0), state[0], np.inf)
        while score.size:
            at = int(score.argmin())
            if not score[at] < self.distance - self.same:
                return
            choice = plan(at)
            if (state[1:, at] <= self.room - self.rounding).all() or self.core.is_feasible(choice):
                self.distance, self.choice = float(score[at]), choice
                return
            self.is_certain = False
            score[at] = np.inf


class Tests(NamedTuple):
    """What partial plans must pass: least usage of the groups to come, and bounds on the score at several prices μ.

    A bound is score + μ · (usage − room) + Σ over groups to come of the least score + μ · usage.
    """

    weights: FloatArray  # (prices, 1 + budgets)
    usage: FloatArray  # (groups + 1, budgets), of the groups from number i on
    score: FloatArray  # (groups + 1, prices), the same, less μ · room

    def passed(self, state: FloatArray, place: int, target: Target) -> tuple[IntArray, FloatArray]:
        """Labels that may lead to a better plan, and their bounds."""
        most = target.room + target.rounding - self.usage[place]
        kept = np.flatnonzero((state[1:] <= most[:, None]).all(0))
        bounds = self.weights @ state[:, kept]
        bounds += self.score[place][:, None]
        bound = bounds.max(0)
        better = bound < target.distance - target.same
        return kept[better], bound[better]


class Labels(NamedTuple):
    """Partial plans of a half."""

    front: Front
    state: FloatArray  # (1 + budgets, labels)
    stages: list[tuple[IntArray, IntArray]]  # parent and option of every label after each group
    is_complete: bool

    def applied(self, plan: IntArray, label: int) -> IntArray:
        """A plan with the options of a label in place of its own."""
        choice = plan.copy()
        for place in range(len(self.stages) - 1, -1, -1):
            parent, option = self.stages[place]
            choice[self.front.group[place]] = option[label]
            label = int(parent[label])
        return choice

    def completed(self, plan: IntArray) -> Callable[[int], IntArray]:
        """`applied` to one plan."""
        return lambda label: self.applied(plan, label)


def bounds(front: Front, half: Front, other: Front, target: Target) -> Tests:
    """The tests for the groups of one half, of which those of the other half are to come as well."""
    prices = np.array([target.price, *_shifted(front, target.price)])
    budgets = len(target.price)
    weights = np.hstack([np.ones((len(prices), 1)), prices])
    every = np.vstack([np.eye(budgets + 1)[1:], weights])
    least = half.least(every)
    rest = np.zeros((least.shape[1] + 1, len(every)))
    rest[:-1] = np.cumsum(least[:, ::-1], axis=1)[:, ::-1].T
    rest += other.least(every).sum(1)
    return Tests(weights, rest[:, :budgets], rest[:, budgets:] - prices @ target.room)


def _shifted(front: Front, price: FloatArray) -> list[FloatArray]:
    """Prices around the best ones: one budget or all together, up or down as far as makes some open options least."""
    prices = []
    for direction in [*np.eye(len(price)), *([price] if len(price) > 1 else [])]:
        usage = np.tensordot(direction, front.change[1:], 1)
        for sign in (1.0, -1.0):
            moving = front.allowed & (sign * usage < 0)
            shifts = np.sort(front.penalty[moving] / np.abs(usage[moving]))
            for amount in sign * shifts[[rank for rank in SHIFTS if rank < len(shifts)]]:
                shifted = price + amount * direction
                if amount and (shifted >= 0).all():
                    prices.append(shifted)
    return prices


def enumerated(front: Front, tests: Tests, target: Target, most: int) -> Labels:
    """The partial plans of a half that may lead to a plan better than the best seen.

    The groups are decided one after another. A label goes if it cannot be completed within the budgets, if a bound for
    any of several prices says that it leads to nothing better, or if another is nowhere worse (for several budgets: of
    the same usage). Every label that keeps the budgets is a plan, all other groups left as they are. Of more than
    ``most`` labels those with the least bounds go on.
    """
    state, stages, is_complete = np.zeros((len(front.change), 1)), [], True
    for place in range(len(front.group)):
        left = target.gap - target.same - tests.weights[0] @ state
        options = np.flatnonzero(front.allowed[place])
        near = front.penalty[place, options][:, None] < left
        row, parent = np.divmod(np.flatnonzero(near), len(left))
        state = state[:, parent] + front.change[:, place, options][:, row]
        kept, bound = tests.passed(state, place + 1, target)
        some = _undominated(state[:, kept])
        kept, bound = kept[some], bound[some]
        if len(kept) > most:
            kept, is_complete = kept[np.sort(np.argpartition(bound, most)[:most])], False
        state = state[:, kept]
        stages.append((parent[kept], options[row[kept]]))
        target.offer(state, Labels(front, state, stages, is_complete).completed(target.start))
    return Labels(front, state, stages, is_complete)


def _undominated(state: FloatArray) -> IntArray:
    """Labels to keep: for one budget the frontier of usage and score, for several the least score of every usage."""
    if len(state) == 1:
        return np.argsort(state[0], kind="stable")[:1]
    if len(state) == 2:
        order = np.lexsort((state[0], state[1]))
        score = state[0, order]
        lower = score < np.minimum.accumulate(np.append(np.inf, score))[:-1]
        return np.compress(lower, order)
    first = np.sort(state[1])
    if not (first[1:] == first[:-1]).any():
        return np.arange(state.shape[1])
    order = np.lexsort(state)
    usage = state[1:, order]
    return np.compress(np.append(True, (usage[:, 1:] != usage[:, :-1]).any(0)), order)
