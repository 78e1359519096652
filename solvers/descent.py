"""Down the lower convex hulls of all layers at once: the best plan of one price, its bound, and a feasible prefix."""

import math
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .reduction import Core

ROUNDS = 32  # weightings of several budgets that are tried


class Descent(NamedTuple):
    """A feasible plan of groups, a value that no plan is below, and the prices of the budgets that show it."""

    choice: IntArray
    bound: float
    price: FloatArray


class _Path(NamedTuple):
    """Steps from the best scores down the convex hulls, cheapest first."""

    start: IntArray  # (groups,)
    group: IntArray  # (steps,)
    before: IntArray  # (steps,)
    after: IntArray  # (steps,)
    slope: FloatArray  # (steps,), score lost per resource saved


def descend(core: Core, price: FloatArray | None = None) -> Descent | None:
    """The best plan of a few weightings of the budgets, or None where none of them meets all budgets.

    Peak budgets, couplings and formats are not looked at, and the bound is one for the table alone; the plan keeps all
    of them by recomputation. A ``price`` of the budgets that is known to be good saves most of the weightings.
    """
    slack = core.limits - core.floors().base[1:]
    binding = _binding(core, slack)
    weights = binding / max(1, int(binding.sum()))
    if price is not None and (price * slack)[binding].any():
        weights = np.where(binding, price * slack, 0.0) / (price * slack)[binding].sum()
    best, value, bound, shown = None, math.inf, -math.inf, np.zeros(len(slack))
    for _ in range(1 if binding.sum() < 2 else ROUNDS if price is None else 2):
        unit = np.divide(weights, slack, out=np.zeros_like(weights), where=binding)
        path = _hull_path(core.table[0], np.tensordot(unit, core.table[1:], 1), core.allowed)
        count, usage = _first_fitting(core, path)
        priced = unit * (path.slope[min(count, len(path.slope)) - 1] if count and len(path.slope) else 0.0)
        if (low := _bound(core, priced)) > bound:
            bound, shown = low, priced
        choice = _feasible_prefix(core, path, count)
        if choice is not None and core.value(choice) < value:
            best, value = choice, core.value(choice)
        if count == 0 or not binding.any():
            break
        pressure = np.where(binding, (usage - core.limits) / np.where(binding, slack, 1.0), 0.0)
        weights = weights * np.exp(np.clip(4.0 * pressure, -1.0, 1.0))
        weights /= weights.sum()
    return None if best is None else Descent(best, min(bound, value), shown)


def _binding(core: Core, slack: FloatArray) -> BoolArray:
    """The budgets that some plan exceeds, (budgets,)."""
    most = np.where(core.allowed, core.floors().excess[1:], 0.0).max(2).sum(1)
    binding: BoolArray = (slack > 0) & (most > slack)
    return binding


def _feasible_prefix(core: Core, path: _Path, count: int) -> IntArray | None:
    """The plan after so many steps, or one more should the sums be off by rounding."""
    for steps in range(count, min(count + 2, len(path.slope) + 1)):
        choice = path.start.copy()
        choice[path.group[:steps]] = path.after[:steps]
        if core.is_feasible(choice):
            return choice
    return None


def _hull_path(score: FloatArray, cost: FloatArray, allowed: BoolArray) -> _Path:
    """Steps of all groups by slope; a group's own steps stay in order. Jarvis march, all groups at once."""
    every = np.arange(len(score))
    least = np.where(allowed, score, np.inf).min(1, keepdims=True)
    at = np.where(allowed & (score == least), cost, np.inf).argmin(1)
    start, last = at, np.zeros(len(score))
    parts: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
    while True:
        saved = cost[every, at][:, None] - cost
        lost = score - score[every, at][:, None]
        usable = allowed & (saved > 0)
        slope = np.divide(lost, saved, out=np.full(score.shape, np.inf), where=usable)
        lowest = slope.min(1, keepdims=True)
        moving = np.flatnonzero(np.isfinite(lowest[:, 0]))
        if not len(moving):
            break
        following = np.where(usable & (slope == lowest), saved, -np.inf).argmax(1)
        last = np.where(np.isfinite(lowest[:, 0]), np.maximum(last, lowest[:, 0]), last)
        parts.append((moving, at[moving], following[moving], last[moving]))
        at = at.copy()
        at[moving] = following[moving]
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return _Path(start, nothing, nothing, nothing, np.zeros(0))
    group, before, after, slopes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(slopes, kind="stable")
    return _Path(start, group[order], before[order], after[order], slopes[order])


def _first_fitting(core: Core, path: _Path) -> tuple[int, FloatArray]:
    """Least number of steps after which every budget holds (steps + 1 if never), and the usage there or at the end."""
    rows = core.table[1:]
    begin = rows[:, np.arange(len(path.start)), path.start].sum(1, keepdims=True)
    change = rows[:, path.group, path.after] - rows[:, path.group, path.before]
    usage = np.concatenate([begin, begin + np.cumsum(change, axis=1)], axis=1)
    fits: BoolArray = np.logical_and.reduce(usage <= core.limits[:, None], axis=0)
    count = int(fits.argmax()) if fits.any() else len(fits)
    return count, usage[:, min(count, len(fits) - 1)]


def _bound(core: Core, price: FloatArray) -> float:
    """Lagrangian bound Σ_g min_k (score + Σ_b price_b · row_b) − Σ_b price_b · limit_b, less its rounding."""
    priced = core.table[0] + np.tensordot(price, core.table[1:], 1)
    terms = [*np.where(core.allowed, priced, np.inf).min(1).tolist(), *(-price * core.limits).tolist()]
    rounding = 1e-14 * math.fsum(abs(term) for term in terms) if price.any() else 0.0
    return math.fsum(terms) - rounding
