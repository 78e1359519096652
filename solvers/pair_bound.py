"""A bound for pairs: their terms moved into those of single groups by dual ascent, the budgets priced along with it."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .budget_prices import budget_prices
from .reduction import Core

ROUNDS = 60  # of sweeps and new prices
SWEEPS = 8  # over all pairs in a round
PROGRESS = 1e-5  # of the largest gain of a round; less is the end


class PairBound(NamedTuple):
    """No plan is below ``bound``; ``core`` is the same problem with the pairs' terms moved, ``price`` its budgets'."""

    bound: float
    price: FloatArray
    core: Core


class _Pairs(NamedTuple):
    """All couplings of a core as arrays, and the classes of those that share no group."""

    first: IntArray  # (pairs,)
    second: IntArray  # (pairs,)
    table: FloatArray  # (1 + budgets, pairs, options, options)
    both: BoolArray  # (pairs, options, options), allowed
    classes: tuple[IntArray, ...]


def pair_bound(core: Core) -> PairBound:
    """Lower bound on the objective of a core with couplings.

    Any message m(k) added to a group's scores and taken from the terms of one of its pairs leaves all plans as they
    are; so does a price times a sum below its limit leave a bound valid. After any of both,

        Σ_g min_k (score + Σ messages + λ · rows) + Σ_pairs min_kl (term − messages + λ · rows) − λ · limits

    is below every plan. Messages are set pair by pair as in MPLP (Globerson and Jaakkola 2007, NIPS 20): both groups
    of a pair take half of what each knows of the other. Pairs without a common group are updated at once. Prices are
    those of `budget_prices` for the scores with their messages. Bound by bound the better is kept; where pairs form a
    tree it is nearly that of the integer program without budgets, where all pairs are coupled it can be far below.
    Steps and formats are left out, which only lowers it. Rounding is subtracted.

    Cost: about a tenth of a millisecond for every class of pairs in a sweep, a few hundred sweeps.
    """
    pairs = _stacked(core)
    messages = np.zeros((2, len(pairs.first), core.allowed.shape[1]))
    price = budget_prices(core)
    best, gain = _value(core, pairs, messages, price), 0.0
    kept = messages.copy(), price
    for _ in range(ROUNDS if len(pairs.first) else 0):
        for _ in range(SWEEPS):
            _sweep(core, pairs, messages, price)
        found = _value(core, pairs, messages, price)
        moved = _moved(core, pairs, messages)
        other = budget_prices(replace(moved, couplings=()), price)
        if _value(core, pairs, messages, other) > found:
            price, found = other, _value(core, pairs, messages, other)
        progress, gain = found - best, max(gain, found - best)
        if progress > 0:
            best, kept = found, (messages.copy(), price)
        if progress <= PROGRESS * gain:
            break
    messages, price = kept
    return PairBound(best, price, _moved(core, pairs, messages))


def _stacked(core: Core) -> _Pairs:
    couplings, options = core.couplings, core.allowed.shape[1]
    first = np.array([pair.first for pair in couplings], dtype=np.int64)
    second = np.array([pair.second for pair in couplings], dtype=np.int64)
    shape = len(couplings), len(core.table), options, options
    table = np.array([pair.table for pair in couplings]).reshape(shape).transpose(1, 0, 2, 3)
    both = core.allowed[first][:, :, None] & core.allowed[second][:, None, :]
    taken: list[set[int]] = []
    members: list[list[int]] = []
    for index, ends in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        place = next((c for c, groups in enumerate(taken) if not groups & set(ends)), len(taken))
        if place == len(taken):
            taken.append(set())
            members.append([])
        taken[place].update(ends)
        members[place].append(index)
    return _Pairs(first, second, table, both, tuple(np.array(part) for part in members))


def _sweep(core: Core, pairs: _Pairs, messages: FloatArray, price: FloatArray) -> None:
    """New messages of every pair, in place."""
    weights = np.append(1.0, price)
    belief = np.tensordot(weights, core.table, 1) + _received(core, pairs, messages)
    terms = np.where(pairs.both, np.tensordot(weights, pairs.table, 1), np.inf)
    for index in pairs.classes:
        ends = pairs.first[index], pairs.second[index]
        one, two = (
            np.where(core.allowed[end], belief[end] - messages[side, index], np.inf) for side, end in enumerate(ends)
        )
        for side, (own, through) in enumerate(
            ((one, (terms[index] + two[:, None, :]).min(2)), (two, (terms[index] + one[:, :, None]).min(1)))
        ):
            allowed = core.allowed[ends[side]]
            known = np.where(allowed, own, 0.0)
            messages[side, index] = np.where(allowed, 0.5 * (np.where(allowed, through, 0.0) - known), 0.0)
            belief[ends[side]] = known + messages[side, index]


def _received(core: Core, pairs: _Pairs, messages: FloatArray) -> FloatArray:
    """Sum of the messages to every group, (groups, options)."""
    total = np.zeros(core.allowed.shape)
    np.add.at(total, pairs.first, messages[0])
    np.add.at(total, pairs.second, messages[1])
    return total


def _value(core: Core, pairs: _Pairs, messages: FloatArray, price: FloatArray) -> float:
    """The bound of these messages and prices, less the rounding of its terms."""
    weights, received = np.append(1.0, price), _received(core, pairs, messages)
    single = np.where(core.allowed, np.tensordot(weights, core.table, 1) + received, np.inf).min(1)
    priced = np.tensordot(weights, pairs.table, 1)
    left = np.where(pairs.both, priced - messages[0][:, :, None] - messages[1][:, None, :], np.inf).min((1, 2))
    size = [np.abs(core.table).max(2, initial=0.0).sum(1) @ weights, np.abs(pairs.table).max((2, 3)).sum(1) @ weights]
    size += [2 * np.abs(messages).max(2).sum(), np.abs(core.limits) @ price]
    rounding = 4e-16 * (8 + math.sqrt(len(pairs.first))) * float(sum(size))
    return math.fsum([*single.tolist(), *left.tolist(), *(-price * core.limits).tolist()]) - rounding


def _moved(core: Core, pairs: _Pairs, messages: FloatArray) -> Core:
    """The core with the messages added to its scores and taken from its pairs."""
    table = core.table.copy()
    table[0] += np.where(core.allowed, _received(core, pairs, messages), 0.0)
    couplings = []
    for pair, one, two in zip(core.couplings, messages[0], messages[1], strict=True):
        terms = pair.table.copy()
        terms[0] -= one[:, None] + two
        couplings.append(replace(pair, table=terms))
    return replace(core, table=table, couplings=tuple(couplings))
