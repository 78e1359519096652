"""Which partial plans can still become a plan that is asked for: the rules a sweep goes by."""

from dataclasses import dataclass

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .dominance import nondominated, staircase
from .sweep import Rules

ROOM = 1e-11  # relative; for the rounding of bounds, so that no plan is lost
GRID = 129  # places where the rule for a front is worked out; between them it is interpolated from above


class TooManyLabelsError(ValueError):
    """More partial plans than were allowed."""


def cheapest_best(cost: FloatArray, value: FloatArray) -> IntArray:
    """Non-dominated labels of one cost, or the best label where nothing costs anything."""
    if not len(cost):
        return np.array([value.argmin()]) if len(value) else np.zeros(0, dtype=np.int64)
    return staircase(cost[0], value)


@dataclass(frozen=True, kw_only=True)
class NoWorseThan:
    """For one plan: partial plans that might still cost and be worth no more than a limit, by every price.

    At prices λ a plan is worth at least value + λ · cost + (the least of the rest at λ) − λ · slack.
    """

    value: float
    price: FloatArray  # (prices, budgets)
    slack: FloatArray  # (budgets,)
    most: int  # labels of one list

    def __call__(self, rest: FloatArray) -> Rules:
        """Rules for labels when the rest comes to ``rest`` at least, one number a price."""
        spent = self.price @ self.slack
        limit = self.value + spent - rest + ROOM * (abs(self.value) + spent)

        def keep(cost: FloatArray, value: FloatArray) -> BoolArray:
            kept: BoolArray = np.logical_and.reduce(cost <= self.slack[:, None], axis=0)
            kept &= value <= self.value + ROOM * abs(self.value)
            for price, most in zip(self.price, limit, strict=True):
                kept &= value + price @ cost <= most
            return kept

        def select(cost: FloatArray, value: FloatArray) -> IntArray:
            chosen = cheapest_best(cost, value)
            if len(chosen) > self.most:
                raise TooManyLabelsError(
                    f"more than {self.most:,} partial plans are in the running: give the solver more labels, or use "
                    "solver='ilp', which needs none"
                )
            return chosen

        return Rules(keep, select)


@dataclass(frozen=True, kw_only=True)
class NearTheFront:
    """For a front: partial plans that might still become a plan below ``ceiling`` at some price.

    Every λ stands for a stretch of the front, ``ceiling`` for the largest value + λ · cost a plan there can have that
    is not known to be dominated. The limit on the value is a maximum of straight lines in the cost, hence convex, and
    lies below its chords.
    """

    price: FloatArray  # (prices,)
    ceiling: FloatArray  # (prices,)
    slack: float

    def __call__(self, rest: FloatArray) -> Rules:
        """Rules for labels when the rest comes to ``rest`` at least, one number a price."""
        top = self.ceiling - rest + ROOM * np.abs(self.ceiling)

        def keep(cost: FloatArray, value: FloatArray) -> BoolArray:
            cost = cost[0]
            if not len(cost):
                return np.zeros(0, dtype=bool)
            places = cost if len(cost) <= GRID else np.linspace(float(cost.min()), float(cost.max()), GRID)
            limit = (top - places[:, None] * self.price).max(1)
            if places is not cost:
                limit = np.interp(cost, places, limit)
            return np.asarray((value <= limit) & (cost <= self.slack))

        return Rules(keep, cheapest_best)


@dataclass(frozen=True, kw_only=True)
class InEveryCoordinate:
    """For several costs: the non-dominated labels in value and all costs.

    The first ``free`` costs are coordinates of the front, the ``bounded`` ones have budgets. Below a budget by more
    than all the rest can take, it no longer matters by how much.

    With a ``step`` the value and the free costs, counted from ``−origin``, are looked at in factors of exp(step): of
    labels that agree in all of them, one is kept. A cost that is free and has a budget should then be bounded too.
    """

    free: int
    bounded: list[int]
    slack: FloatArray  # (costs,), inf without a budget
    origin: FloatArray  # (1 + free,)
    step: float
    most: int

    def __call__(self, rest: FloatArray) -> Rules:
        """Rules for labels when the rest takes at most ``−rest``, one number a bounded cost."""
        harmless = self.slack[self.bounded] + rest

        def keep(cost: FloatArray, value: FloatArray) -> BoolArray:
            return np.asarray(np.logical_and.reduce(cost <= self.slack[:, None], axis=0))

        def select(cost: FloatArray, value: FloatArray) -> IntArray:
            goals = np.concatenate([value[None], cost[: self.free]])
            if self.step:
                with np.errstate(divide="ignore"):
                    goals = np.floor(np.log(goals + self.origin[:, None]) / self.step)
            budgets = np.maximum(cost[self.bounded], harmless[:, None])
            chosen = nondominated(np.concatenate([goals, budgets]).T)
            if len(chosen) > self.most:
                raise ValueError(
                    f"the front has more than {self.most:,} partial plans: ask for fewer resources or budgets, or for "
                    f"epsilon=1e-2, or solve for a list of budgets with solver='ilp'"
                )
            return chosen

        return Rules(keep, select)
