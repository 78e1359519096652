"""The few groups that prices leave open, decided together: two halves enumerated, pruned by bounds, and joined."""

import math
from typing import NamedTuple

import numpy as np

from mpq.arrays import FloatArray, IntArray

from .core_labels import SAME, Front, Labels, Target, bounds, enumerated
from .lagrangian_dual import Dual
from .reduction import Core

ROWS = 512  # partial plans that meet those of the other half at a time


class Effort(NamedTuple):
    """Limits: partial plans at a time, pairs of them, and open groups, the likeliest ones."""

    labels: int
    pairs: float = math.inf
    groups: int = 2000


class Found(NamedTuple):
    """The best plan seen, and whether every better one (within the gap asked for) is excluded."""

    choice: IntArray | None
    is_complete: bool


def dive(core: Core, dual: Dual, best: IntArray | None, effort: Effort) -> Found:
    """Look for a plan better than ``best`` (None: for any) among the likeliest open groups, all in one run.

    Every group starts at the option that is least at the prices. An option whose priced score is above that by more
    than the gap between ``best`` and the bound is in no better plan; groups with any other option left form the core
    (Pisinger 1995, Eur. J. Oper. Res. 83). They are decided one after another (`enumerated`), the likeliest first.
    Peak budgets, couplings and formats are not looked at. Cost: labels × open groups × options, vectorised.
    """
    target = Target(core, dual, best, math.inf)
    front, is_whole = _opened(core, dual, target.gap, effort.groups)
    target.measure(front)
    tests = bounds(front, front, front.part(slice(0, 0)), target)
    labels = enumerated(front, tests, target, effort.labels)
    return _found(target, best, is_whole and labels.is_complete)


def search(core: Core, dual: Dual, best: IntArray, gap: float, effort: Effort) -> Found:
    """Look for a plan better than ``best``, with a score at most ``gap`` above the bound; in two halves.

    The open groups are dealt out into two halves, and the partial plans of each are enumerated. Two of them make a
    plan (Horowitz and Sahni 1974, J. ACM 21): as its priced score is to stay within the gap, it must nearly use up
    every budget that has a price, so that for each partial plan only those of the other half in a small window of
    usage are looked at. The smaller the gap, the smaller are core, halves and windows.

    Where the limits of ``effort`` are reached, the answer is a good plan without a proof.
    """
    target = Target(core, dual, best, gap)
    front, is_whole = _opened(core, dual, target.gap, effort.groups)
    target.measure(front)
    halves = front.part(slice(0, None, 2)), front.part(slice(1, None, 2))
    first, second = (
        enumerated(half, bounds(front, half, other, target), target, effort.labels)
        for half, other in (halves, halves[::-1])
    )
    is_joined = _join(first, second, target, effort.pairs)
    return _found(target, best, is_whole and is_joined and first.is_complete and second.is_complete)


def distance(core: Core, dual: Dual, best: IntArray) -> float:
    """How far a plan's score is above the bound, free of the cancellation that their difference would have."""
    return Target(core, dual, best, math.inf).gap


def penalties(core: Core, dual: Dual) -> FloatArray:
    """Priced scores above the least of the group, (groups, options); +inf where forbidden."""
    priced: FloatArray = core.table[0].copy()
    for price, row in zip(dual.price, core.table[1:], strict=True):
        priced += price * row
    priced -= priced[np.arange(len(priced)), dual.choice][:, None]
    priced[~core.allowed] = np.inf
    return priced


def _found(target: Target, best: IntArray | None, is_whole: bool) -> Found:
    if target.choice is not best and target.choice is not None and not target.core.is_feasible(target.choice):
        return Found(best, False)
    return Found(target.choice, is_whole and target.is_certain)


def _opened(core: Core, dual: Dual, gap: float, most: int) -> tuple[Front, bool]:
    """The open groups by the least penalty of another option, and whether there are no more of them than ``most``."""
    penalty = penalties(core, dual)
    rival = penalty.copy()
    rival[np.arange(len(rival)), dual.choice] = np.inf
    least = rival.min(1)
    edge = gap * (1 + 1e-9) + SAME * float(np.abs(core.table[0]).max())
    group = np.flatnonzero((least < np.inf) & (least <= edge))
    is_whole = len(group) <= most
    if not is_whole:
        group = np.sort(group[np.argpartition(least[group], most)[:most]])
    group = group[np.argsort(least[group], kind="stable")]
    allowed = core.allowed[group] & (penalty[group] <= edge)
    now = core.table[:, group, dual.choice[group]]
    change = np.where(allowed, core.table[:, group] - now[:, :, None], 0.0)
    return Front(group, allowed, np.where(allowed, np.maximum(penalty[group], 0.0), np.inf), change), is_whole


def _join(first: Labels, second: Labels, target: Target, most: float) -> bool:
    """Offer every pair of partial plans that may be better than the best plan seen; whether all were looked at."""
    if not first.state.size or not second.state.size:
        return True
    row = _sharpest(second, target)
    price, room = float(target.price[row]), float(target.room[row] + target.rounding[row])
    by_usage = np.argsort(second.state[row + 1], kind="stable")
    usage = second.state[row + 1, by_usage]
    weights = np.append(1.0, target.price)
    penalty = weights @ first.state
    likeliest, looked = np.argsort(penalty, kind="stable"), 0
    for start in range(0, len(likeliest), ROWS):
        some = likeliest[start : start + ROWS]
        left = target.gap - penalty[some]
        some, left = some[left > 0], left[left > 0]
        high = np.searchsorted(usage, room - first.state[row + 1, some], side="right")
        low = np.zeros_like(high)
        if price > 0:  # a plan that leaves more unused loses more than the gap
            unused = left * (1 + 1e-9) / price + 2 * target.rounding[row] + target.same / price
            low = np.searchsorted(usage, room - unused - first.state[row + 1, some])
        count = np.maximum(high - low, 0)
        looked += int(count.sum())
        if looked > most:
            return False
        _offer_pairs(first, second, target, np.repeat(some, count), by_usage[_ranges(low, count)])
    return True


def _sharpest(labels: Labels, target: Target) -> int:
    """The budget whose windows hold the fewest labels."""
    spread = labels.state[1:].max(1) - labels.state[1:].min(1)
    return int((spread * target.price).argmax())


def _ranges(start: IntArray, count: IntArray) -> IntArray:
    """start[i], start[i] + 1, … count[i] of them, one after another."""
    before = np.cumsum(count) - count
    numbers: IntArray = np.arange(int(count.sum())) + np.repeat(start - before, count)
    return numbers


def _offer_pairs(first: Labels, second: Labels, target: Target, one: IntArray, other: IntArray) -> None:
    score = first.state[0, one] + second.state[0, other]
    better = np.flatnonzero(score < target.distance - target.same)
    one, other = one[better], other[better]
    state = first.state[:, one] + second.state[:, other]

    def plan(pair: int) -> IntArray:
        return second.applied(first.applied(target.start, int(one[pair])), int(other[pair]))

    target.offer(state, plan)
