"""Cover cuts: what excludes a plan that is over a budget by less than a code's tolerance, and no plan within it."""

import math
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, IntArray

from .reduction import Core


class Cut(NamedTuple):
    """At most ``most`` of the marked options of a ``(groups, options)`` mask."""

    members: BoolArray
    most: int


def cover_cut(core: Core, choice: IntArray) -> Cut:
    """A cut that every plan within the budgets keeps and this one does not.

    Extended minimal cover (Balas 1975, Math. Program. 8): some groups with this plan's options, all others at their
    least, exceed a budget already; so these groups cannot all take an option that needs as much. Where couplings have
    a part in it, only the very plan is cut off.

    Args:
        core: the core the plan belongs to.
        choice: ``(groups,)``, over some budget by recomputation.
    """
    every = np.arange(len(choice))
    for name in core.problem.violations(core.expand(choice)):
        if name not in core.names:
            continue
        row = core.names.index(name)
        table = core.table[row + 1]
        if any(pair.table[row + 1].any() for pair in core.couplings):
            continue
        taken, least = table[every, choice], np.where(core.allowed, table, np.inf).min(1)
        order = np.argsort(least - taken, kind="stable")
        reached = math.fsum(least.tolist()) + np.cumsum((taken - least)[order])
        rounding = 1e-14 * float(np.abs(table).max(1).sum())
        enough = np.flatnonzero(reached > core.limits[row] + rounding)
        if len(enough):
            members = core.allowed & (table >= taken[:, None])
            members[order[enough[0] + 1 :]] = False
            return Cut(members, int(enough[0]))
    members = np.zeros_like(core.allowed)
    members[every, choice] = True
    return Cut(members, len(choice) - 1)
