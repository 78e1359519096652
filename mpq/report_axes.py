"""Axes of the pictures in a report: places in percent, ticks at round values, logarithms where values span decades."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mpq.budgets import format_quantity

SPREAD = 30.0  # beyond this ratio of the largest to the smallest an axis is logarithmic
MARGIN = 0.04  # of the axis, beyond the outermost values


@dataclass(frozen=True)
class Axis:
    """One axis: from 0 to 100 percent of its length.

    Attributes:
        title: what it shows.
        measure: base unit, for the ticks.
        low, high: its ends; of a logarithmic axis both are positive.
        logarithmic: whether places go by logarithms; what is not positive is then put at the low end.
    """

    title: str
    measure: str
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, title: str, measure: str, values: Iterable[float]) -> Axis:
        """An axis that has room for all finite values.

        Example:
            >>> axis = Axis.over("size", "B", [1000.0, 9000.0])
            >>> axis.logarithmic, round(axis.place(5000.0))
            (False, 50)
            >>> axis = Axis.over("loss", "loss", [1e-5, 1e-1, 0.0])
            >>> axis.logarithmic, round(axis.place(1e-3)), axis.place(-1.0)
            (True, 50, 0.0)
        """
        finite = [float(value) for value in values if math.isfinite(value)]
        positive = [value for value in finite if value > 0]
        # a few values at or below 0, which are rounding of a measurement, do not flatten all others
        if positive and 2 * len(positive) > len(finite) and max(positive) > SPREAD * min(positive):
            low, high = math.log(min(positive)), math.log(max(positive))
            room = MARGIN * (high - low) * (2 if len(positive) < len(finite) else 1)
            return cls(title, measure, math.exp(low - room), math.exp(high + room), True)
        low, high = min(finite, default=0.0), max(finite, default=1.0)
        room = MARGIN * (high - low) or 0.5 * abs(high) or 0.5
        return cls(title, measure, low - room, high + room, False)

    def place(self, value: float) -> float:
        """Where a value is, in percent of the axis, kept within it."""
        if self.logarithmic:
            if value <= self.low:
                return 0.0
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of round values, three to seven of them.

        Example:
            >>> Axis.over("size", "B", [10_000.0, 40_000.0]).ticks[:2]
            [(3.7, '10 kB'), (19.14, '15 kB')]
        """
        values = self._decades() if self.logarithmic else self._steps()
        return [(self.place(value), tick_text(value, self.measure)) for value in values]

    def _steps(self) -> list[float]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / raw)))
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _decades(self) -> list[float]:
        low, high = math.log10(self.low), math.log10(self.high)
        tens = range(math.ceil(low), math.floor(high) + 1)
        if len(tens) >= 3:
            return [10.0**power for power in list(tens)[:: math.ceil(len(tens) / 7)]]
        wide = range(math.floor(low), math.ceil(high) + 1)
        values = [factor * 10.0**power for power in wide for factor in (1, 2, 5)]
        return [value for value in values if self.low <= value <= self.high]


def tick_text(value: float, measure: str) -> str:
    """A round value as short as it can be written.

    Example:
        >>> tick_text(20_000.0, "B"), tick_text(0.0015, "s"), tick_text(1e-05, "loss"), tick_text(0.0, "s")
        ('20 kB', '1.5 ms', '1e-5', '0 s')
    """
    if measure in ("", "loss", "score"):
        return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
    number, _, unit = format_quantity(value, measure).partition(" ")
    short = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{short} {unit}".strip()
