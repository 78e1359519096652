"""A cost table as a line an option over the layers, or one quantity against another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.arrays import FloatArray
from mpq.budgets import format_quantity
from mpq.format_colours import ACCENT, option_bits, option_colour
from mpq.picture import Axis, Picture, Points, Symbol, axis_of, below_note, layer_ticks, thinned

if TYPE_CHECKING:
    from mpq.plan import Plan
    from mpq.tables import CostTable

_SYMBOLS: tuple[Symbol, ...] = ("o", "s", "^", "D")  # options of the same colour differ in their symbol
_MARKED = 60  # units, up to which points on lines are shown, and their errors


def table_picture(
    table: CostTable, *, quantity: str = "sensitivity", against: str | None = None, plan: Plan | None = None
) -> Picture:
    """A quantity of every (unit, option).

    Args:
        table: any; of more than 2000 units evenly spread ones are shown.
        quantity: what is shown upwards; standard errors (`<quantity>_se`) are shown where they are known.
        against: another quantity to the right, in place of the units in order.
        plan: what it takes is ringed.

    Raises:
        ValueError: if a quantity is not in the table, or the plan is for other layers.
    """
    values = table.quantity(quantity)
    units = thinned(len(values))
    y = axis_of(quantity, [values[units]], table.measures[quantity])
    if against is None:
        names = [str(name) for name in np.asarray(table.units)[units]]
        x = Axis(title="layer" if table.granularity == "layer" else "unit", ticks=layer_ticks(names))
        across = np.repeat(np.arange(len(units), dtype=np.float64)[:, None], len(table.options), axis=1)
    else:
        x = axis_of(against, [table.quantity(against)[units]], table.measures[against])
        across = x.placed(table.quantity(against)[units])
    taken = None if plan is None else _taken(table, plan)[units]
    marks = tuple(_option_points(table, quantity, (units, across, y), against is not None))
    if taken is not None:
        rows = np.arange(len(units))
        ring = Points(
            x=across[rows, taken],
            y=y.placed(values[units, taken]),
            colour=ACCENT,
            size=80.0 if len(units) <= _MARKED else 22.0,
            is_open=True,
            label="the plan",
        )
        marks = (*marks, ring)
    left_out = f"{len(units)} of {len(values)} units, evenly spread" if len(units) < len(values) else ""
    note = "; ".join(filter(None, [left_out, below_note(y, values[units][table.allowed[units]])]))
    title = f"{quantity} of {len(values)} {'layers' if table.granularity == 'layer' else 'units'}"
    return Picture(x=x, y=y, marks=marks, title=title + (f" against {against}" if against else ""), note=note)


def _option_points(
    table: CostTable, quantity: str, shown: tuple[NDArray[np.int64], FloatArray, Axis], apart: bool
) -> list[Points]:
    """The points of every option, fewest bits first; joined where the units stand in order."""
    units, across, y = shown
    values, errors = table.quantities[quantity], table.quantities.get(f"{quantity}_se")
    same: dict[float, int] = {}
    found = []
    for column in sorted(range(len(table.options)), key=lambda each: np.nan_to_num(option_bits(table.options[each]))):
        label = table.options[column]
        twin = same[option_bits(label)] = same.get(option_bits(label), -1) + 1
        there = table.allowed[units, column]
        rows = units[there]
        if not len(rows):
            continue
        few = len(units) <= _MARKED
        found.append(
            Points(
                x=across[there, column],
                y=y.placed(values[rows, column]),
                error=errors[rows, column] / y.unit if errors is not None and few else None,
                colour=option_colour(label),
                symbol=_SYMBOLS[twin % len(_SYMBOLS)] if apart or few else "",
                size=26.0 if apart else 18.0,
                label=label,
                join="none" if apart else "lines",
                hover=[
                    f"{table.units[unit]}\n{label}: {quantity} "
                    f"{format_quantity(float(values[unit, column]), table.measures[quantity])}"
                    for unit in rows
                ],
            )
        )
    return found


def _taken(table: CostTable, plan: Plan) -> NDArray[np.int64]:
    from mpq.planning import choices_of

    return choices_of(table, plan)
