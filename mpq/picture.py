"""A picture before it is drawn: axes and marks in numbers, which matplotlib and plotly draw alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.arrays import FloatArray
from mpq.budgets import format_quantity, parse_budget
from mpq.format_colours import ACCENT, MUTED

Symbol = Literal["o", "s", "D", "^", "*", "_", ""]
DECADES = 2.0  # of positive values, from which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        title: what it shows, with the unit.
        is_log: whether it is logarithmic.
        floor: of a logarithmic axis, where values at or below 0 are drawn; 0 where there are none.
        ticks: positions and their texts, where they are not numbers.
        unit: what values were divided by, in base units.
    """

    title: str = ""
    is_log: bool = False
    floor: float = 0.0
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    unit: float = 1.0

    def placed(self, values: ArrayLike) -> FloatArray:
        """Values in the unit of the axis; what a logarithmic axis has no place for is at its floor."""
        scaled = np.asarray(values, dtype=np.float64) / self.unit
        return np.where(scaled > 0, scaled, self.floor or np.nan) if self.is_log else scaled


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from the bottom (of a logarithmic axis: its lower end).

    Attributes:
        left, width, height: (bars,) each, in units of the axes.
        colour: one, or one a bar.
        label: in the legend; empty for none.
        hover: (bars,) texts, where the picture is interactive.
        is_pale: whether other marks are drawn over them.
    """

    left: FloatArray
    width: FloatArray
    height: FloatArray
    colour: str | Sequence[str]
    label: str = ""
    hover: Sequence[str] = ()
    is_pale: bool = False


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points, joined or not.

    Attributes:
        x, y: (points,).
        z: (points,) of a third axis, which only interactive pictures have.
        value: (points,) shown as colour on a scale of its own, in place of `colour`.
        value_axis: title and scale of that.
        size: area in points², one or one a point.
        error: (points,) standard errors of y.
        label: in the legend; empty for none.
        hover: (points,) texts, where the picture is interactive.
        texts: (points,) written beside them.
        join: how they are joined: not at all, by straight lines, or as a staircase that falls at the next point.
        symbol: "o" circle, "s" square, "D" diamond, "*" star, "_" dash, "" none.
        is_open: whether symbols are outlines.
    """

    x: FloatArray
    y: FloatArray
    z: FloatArray | None = None
    colour: str = MUTED
    value: FloatArray | None = None
    value_axis: Axis = field(default_factory=Axis)
    size: float | FloatArray = 30.0
    error: FloatArray | None = None
    label: str = ""
    hover: Sequence[str] = ()
    texts: Sequence[str] = ()
    join: Literal["none", "lines", "steps"] = "none"
    symbol: Symbol = "o"
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A line across the picture at a value of one axis, with its text beside it."""

    value: float
    along: Literal["x", "y"] = "x"
    label: str = ""
    colour: str = ACCENT


Mark = Bars | Points | Limit


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Axes and marks.

    Attributes:
        x, y: the axes.
        marks: drawn in order, later ones on top.
        title: above.
        z: a third axis of interactive pictures.
        note: a line below: what was left out, or moved to where the axis has a place for it.
        width, height: of a new figure, in inches.
    """

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    title: str = ""
    z: Axis | None = None
    note: str = ""
    width: float = 7.5
    height: float = 4.2

    @property
    def lower_end(self) -> float:
        """Where bars stand: at 0, on a logarithmic axis below the lowest of all."""
        if not self.y.is_log:
            return 0.0
        heights = [mark.height for mark in self.marks if isinstance(mark, Bars)]
        flat = np.concatenate(heights or [np.empty(0)])
        least = float(flat[flat > 0].min(initial=np.inf))
        return self.y.floor or (least / 2 if math.isfinite(least) else 0.1)

    def drawn(self, ax: Any = None, *, interactive: bool = False) -> Any:
        """Matplotlib's Axes (those given, or new ones), or a plotly Figure.

        Raises:
            ImportError: if the library is not installed: ``pip install 'mpq-search[explore]'``.
            ValueError: if Axes are given for an interactive picture.
        """
        if interactive and ax is not None:
            raise ValueError("ax is matplotlib's, an interactive picture is a plotly Figure: leave one of them out")
        if interactive:
            from mpq.picture_plotly import plotly_figure

            return plotly_figure(self)
        from mpq.picture_matplotlib import draw

        return draw(self, ax)


def axis_of(title: str, values: Iterable[ArrayLike], measure: str = "", *, log: bool | None = None) -> Axis:
    """An axis for values in base units: in the unit a person reads, logarithmic where they span decades.

    Example:
        >>> axis_of("size", [[20_000, 66_000]], "B").title, axis_of("loss", [[1e-6, 0.0, 1.0]]).floor
        ('size [kB]', 5e-07)
        >>> axis_of("loss", [[-1.0, 2.0]]).placed([-1.0])
        array([-1.])
    """
    flat = np.concatenate([np.ravel(np.asarray(each, dtype=np.float64)) for each in values] or [np.empty(0)])
    finite = flat[np.isfinite(flat)]
    positive = finite[finite > 0]
    unit, name = unit_of(float(np.abs(finite).max(initial=0.0)), measure)
    shown = f"{title} [{name}]" if name else title
    if log is None:
        spread = math.log10(positive.max() / positive.min()) if len(positive) else 0.0
        log = spread >= DECADES and len(positive) >= len(finite) / 2
    if not log or not len(positive):
        return Axis(title=shown, unit=unit)
    floor = float(positive.min()) / unit / 2 if len(positive) < len(finite) else 0.0
    return Axis(title=shown, is_log=True, floor=floor, unit=unit)


def unit_of(largest: float, measure: str) -> tuple[float, str]:
    """The unit in which the largest of some values is read, in base units, and its name.

    Example:
        >>> unit_of(0.0042, "s"), unit_of(12.0, "luts"), unit_of(0.1, "loss")
        ((0.001, 'ms'), (1.0, 'luts'), (1.0, 'loss'))
    """
    if measure not in ("B", "s", "J", "bops"):
        return 1.0, measure
    name = format_quantity(largest, measure).split(" ", 1)[1]
    return parse_budget(measure, f"1 {name}", measure).value, name


def below_note(axis: Axis, *values: ArrayLike) -> str:
    """What to say of values that a logarithmic axis has no place for; empty where there are none.

    Example:
        >>> below_note(Axis(is_log=True, floor=1e-6), [1.0, 0.0, -2.0])
        '2 values at or below 0 are drawn at the lower end'
    """
    if not axis.is_log:
        return ""
    count = sum(int((np.asarray(each, dtype=np.float64) <= 0).sum()) for each in values)
    return f"{count} value{'s' * (count != 1)} at or below 0 {'are' if count != 1 else 'is'} drawn at the lower end" * (
        count > 0
    )


def layer_ticks(names: Sequence[str], most: int = 40) -> tuple[Sequence[float], Sequence[str]] | None:
    """Names of layers as ticks 0, 1, 2 ..., long ones cut in the middle; None where there are too many to read."""
    return (range(len(names)), [short_name(name) for name in names]) if len(names) <= most else None


def short_name(name: str, most: int = 26) -> str:
    """A name that fits, cut in the middle, where names of layers differ least.

    Example:
        >>> short_name("model.decoder.layers.11.self_attn.q_proj")
        'model.dec…self_attn.q_proj'
    """
    if len(name) <= most:
        return name
    head = (most - 1) * 3 // 8
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def thinned(count: int, most: int = 2000) -> NDArray[np.int64]:
    """Positions of at most so many of `count` things, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
