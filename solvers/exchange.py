"""Local improvement: change one group's option, or two at once, as long as the objective falls and every row holds."""

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .reduction import Core

LOOK = 2e6  # table entries looked at for one double move, about ten milliseconds
SEARCHES = 100  # times that much in all


def improve(core: Core, choice: IntArray, look: float = LOOK) -> IntArray:
    """A plan no worse than a feasible one: best single moves first, then double moves, until neither helps.

    A double move pays for a change that does not fit with one that makes room. Double moves are tried on cores
    without couplings, steps and formats, the most wanted changes first, as far as ``look`` table entries go. A maximum
    as objective is left alone. Cost: a pass over the table a single move, ``look`` entries a double one.
    """
    if core.has_goal:
        return choice
    current, work = choice.copy(), 0.0
    is_plain = not (core.couplings or len(core.steps.limit) or core.counts_formats)
    while work < SEARCHES * look:
        delta = _deltas(core, current)
        moves = _best_single(delta, _fitting(core, current, delta))
        if not moves and is_plain:
            moves, looked = _best_double(core, current, delta, look)
            work += looked
        if not moves:
            break
        work += delta.size
        for group, option in moves:
            current[group] = option
    return current if core.is_feasible(current) and core.value(current) <= core.value(choice) else choice


def _deltas(core: Core, choice: IntArray) -> FloatArray:
    """Change of the objective and of every budgeted sum by every single move, (1 + budgets, groups, options)."""
    delta = core.table - np.take_along_axis(core.table, choice[None, :, None], 2)
    for pair in core.couplings:
        first, second = choice[pair.first], choice[pair.second]
        now = pair.table[:, first, second][:, None]
        delta[:, pair.first] += pair.table[:, :, second] - now
        delta[:, pair.second] += pair.table[:, first, :] - now
    return delta


def _usage(core: Core, choice: IntArray) -> FloatArray:
    usage: FloatArray = core.table[1:, np.arange(len(choice)), choice].sum(1)
    for pair in core.couplings:
        usage += pair.table[1:, choice[pair.first], choice[pair.second]]
    return usage


def _fitting(core: Core, choice: IntArray, delta: FloatArray) -> BoolArray:
    """Single moves that keep every row and need no option that is not in use already (where that matters)."""
    room = core.limits - _usage(core, choice)
    fits: BoolArray = core.allowed & np.logical_and.reduce(delta[1:] <= room[:, None, None], axis=0)
    steps = core.steps
    step_room = steps.limit - steps.sums(choice)
    change = steps.value - steps.value[np.arange(len(steps.group)), choice[steps.group]][:, None]
    np.logical_and.at(fits, steps.group, change <= step_room[steps.row][:, None])
    if core.counts_formats:
        fits[:, ~np.isin(np.arange(fits.shape[1]), choice)] = False
    return fits


def _best_single(delta: FloatArray, fits: BoolArray) -> list[tuple[int, int]]:
    gain = np.where(fits, delta[0], 0.0)
    group, option = divmod(int(gain.argmin()), gain.shape[1])
    return [(group, option)] if gain[group, option] < 0 else []


def _best_double(core: Core, choice: IntArray, delta: FloatArray, look: float) -> tuple[list[tuple[int, int]], float]:
    """The best pair of moves that falls together, and the number of entries looked at."""
    flat = delta.reshape(len(delta), -1)
    usable = np.flatnonzero(core.allowed.ravel() & (delta != 0).any(0).ravel())
    wanted = usable[flat[0, usable] < 0]
    count = max(1, int(look // max(1, len(flat) * len(usable))))
    wanted = wanted[np.argsort(flat[0, wanted], kind="stable")[:count]]
    if not len(wanted):
        return [], float(flat.size)
    options, room = core.allowed.shape[1], core.limits - _usage(core, choice)
    total = flat[0, wanted][:, None] + flat[0, usable]
    fits = (total < 0) & (wanted[:, None] // options != usable // options)
    for row, limit in zip(flat[1:], room, strict=True):
        fits &= row[wanted][:, None] + row[usable] <= limit
    total[~fits] = 0.0
    first, second = divmod(int(total.argmin()), len(usable))
    moves = [divmod(int(wanted[first]), options), divmod(int(usable[second]), options)]
    return (moves if fits[first, second] else []), float(total.size * len(flat))
