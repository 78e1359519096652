"""What one frontier gains on another at equal resource."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mpq.arrays import BoolArray, FloatArray
from mpq.budgets import format_quantity
from mpq.problem import BUDGET_TOLERANCE

if TYPE_CHECKING:
    import pandas as pd

    from mpq.frontier import Frontier

_SAME = 1e-9  # relative; objectives nearer than that are equal


@dataclass(frozen=True, eq=False)
class FrontierGain:
    """Two frontiers of one resource, compared at every resource where either has a point and both have a plan.

    At a resource r a frontier is worth the objective of its best point within r, and gain = second's − first's, so it
    is positive where the first frontier loses less.

    Raises:
        ValueError: if they trade another resource or objective, or several resources; or one of them is measured and
            the other is not.

    Example:
        >>> from mpq.frontier import Frontier
        >>> from mpq.problem import AllocationProblem
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]})
        >>> both = [Frontier(problem=problem, names=("size",), resource=resource, objective=objective,
        ...                  choices=[[0, 0]] * len(resource))
        ...         for resource, objective in (([6, 8, 12], [8, 4, 1.5]), ([6, 12], [8, 1.5]))]
        >>> print(FrontierGain(*both))  # doctest: +NORMALIZE_WHITESPACE
        The first frontier has the lower objective at 1 of 3 values of size from 6 to 12 and the same at 2. Where it is
        ahead, it is lower by 50 % in the median and by 50 % at most (at 8).
    """

    first: Frontier
    second: Frontier

    def __post_init__(self) -> None:
        one, two = self.first, self.second
        if len(one.names) > 1 or one.names != two.names:
            raise ValueError(
                f"frontiers are compared along one resource, the same in both; got {', '.join(one.names)} and "
                f"{', '.join(two.names)}"
            )
        if (one.is_measured, one.objective_name) != (two.is_measured, two.objective_name):
            names = [("measured " if each.is_measured else "predicted ") + each.objective_name for each in (one, two)]
            raise ValueError(f"frontiers must trade the same objective, got {names[0]} and {names[1]}")

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a resource: the resource, `first`, `second`, `gain` and `ratio` (first by second).

        `gain_se` is there where standard errors are known: as of independent measurements, too large where both
        frontiers were measured on the same samples. `attrs["measures"]` has the unit of the resource.
        """
        import pandas as pd

        name = self.first.names[0]
        resource = np.union1d(self.first.resource, self.second.resource)
        resource = resource[resource >= max(self.first.resource.min(), self.second.resource.min())]
        (first, first_se), (second, second_se) = (_worth(each, resource) for each in (self.first, self.second))
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {
                name: resource,
                "first": first,
                "second": second,
                "gain": second - first,
                "ratio": first / second,
            }
        if self.first.standard_error is not None or self.second.standard_error is not None:
            columns["gain_se"] = np.hypot(first_se, second_se)
        frame = pd.DataFrame(columns)
        frame.attrs["measures"] = self.first.measures
        return frame

    def __str__(self) -> str:
        frame, name = self.frame, self.first.names[0]
        ends = " to ".join(self._text(frame[name].iloc[end]) for end in (0, -1))
        span = f"{len(frame)} values of {name} from {ends}" if len(frame) > 1 else f"{name} {ends.split(' to ')[0]}"
        ahead, behind = self._decided()
        what = ("measured " if self.first.is_measured else "") + self.first.objective_name
        if not ahead.any() and not behind.any():
            return (
                f"Both frontiers have the same {what} at all {span}." if len(frame) > 1 else f"Same {what} at {span}."
            )
        lines = []
        for which, mine, other in (("first", ahead, behind), ("second", behind, ahead)):
            if mine.any():
                lines.append(f"The {which} frontier has the lower {what} at {mine.sum()} of {span}")
                same = len(frame) - int(mine.sum() + other.sum())
                lines[-1] += (f" and the same at {same}." if same else ".") + self._by_how_much(mine, which)
        return " ".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import gain_card

        return gain_card(self)

    def _decided(self) -> tuple[BoolArray, BoolArray]:
        """Where the first frontier is ahead, and where it is behind."""
        frame = self.frame
        noise = _SAME * np.maximum(frame["first"].abs(), frame["second"].abs())
        return (frame["gain"] > noise).to_numpy(), (frame["gain"] < -noise).to_numpy()

    def _by_how_much(self, where: BoolArray, ahead: str) -> str:
        rows = self.frame[where]
        gain, worse = rows["gain"].abs().to_numpy(), rows["second" if ahead == "first" else "first"].to_numpy()
        if (worse >= gain).all():  # both are at least 0: shares mean something
            gain = gain / worse
            texts = [f"{100 * value:.3g} %" for value in (np.median(gain), gain.max())]
        else:
            texts = [f"{value:.3g}" for value in (np.median(gain), gain.max())]
        where_most = self._text(float(rows[self.first.names[0]].iloc[int(gain.argmax())]))
        return (
            f" Where it is ahead, it is lower by {texts[0]} in the median and by {texts[1]} at most (at {where_most})."
        )

    def _text(self, resource: float) -> str:
        measure = self.first.measures.get(self.first.names[0])
        return f"{resource:.6g}" if measure is None else format_quantity(float(resource), measure)


def _worth(front: Frontier, resource: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The best objective within every resource and its standard error, 0 where none is known; (resources,) each."""
    order = np.argsort(front.resource, kind="stable")
    objective = front.objective[order]
    is_better = objective < np.concatenate([[np.inf], np.minimum.accumulate(objective)[:-1]])
    best = np.maximum.accumulate(np.where(is_better, np.arange(len(order)), 0))
    room = BUDGET_TOLERANCE * np.abs(resource)
    last = best[np.searchsorted(front.resource[order], resource + room, side="right") - 1]
    error = np.zeros(len(order)) if front.standard_error is None else front.standard_error[order]
    return objective[last], error[last]
