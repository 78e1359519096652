"""A plan as a strip: its layers in order, format as colour, weights as width, what they lose as height."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpq.arrays import FloatArray
from mpq.budgets import format_quantity
from mpq.format_colours import bits_colour
from mpq.options import Option
from mpq.picture import Axis, Bars, Picture, Points, axis_of, below_note, short_name

if TYPE_CHECKING:
    from mpq.plan import Entry, Plan

LEAST_SHARE = 0.2  # of an even share of the strip: the width of layers with hardly any weights
NAMED = 24  # layers, up to which their names stand below


def plan_picture(plan: Plan, *, quantity: str | None = None) -> Picture:
    """The strip of a plan.

    Args:
        plan: any plan; one that knows its table shows what the table says, any other the bits alone.
        quantity: height of the layers. "bits": stored bits of a value. A quantity of the table: pale, what the layer
            would take at its option of the fewest bits, and solid, what it takes as planned. By default "sensitivity"
            where there is a table, else "bits".

    Raises:
        ValueError: if the quantity needs a table that the plan does not know, or is not in it.
    """
    if quantity is None:
        quantity = "sensitivity" if plan.table is not None and "sensitivity" in plan.table.quantities else "bits"
    weights = np.array([entry.layer.parameters for entry in plan.entries], dtype=np.float64)
    width = np.maximum(weights, LEAST_SHARE * weights.mean())
    left = np.concatenate([[0.0], np.cumsum(width)[:-1]])
    ticks = _ticks(plan, left + width / 2)
    x = Axis(title="layers in order, as wide as their weights" + (" (the thinnest wider)" * _widened(width, weights)),
             ticks=ticks)  # fmt: skip
    colours = [bits_colour(entry.value_bits) for entry in plan.entries]
    hover = [_text(entry) for entry in plan.entries]
    if quantity == "bits":
        bits = np.array([entry.value_bits for entry in plan.entries])
        marks: tuple[Bars | Points, ...] = _by_option(
            plan, Bars(left=left, width=width, height=bits, colour=colours, hover=hover)
        )
        return Picture(x=x, y=Axis(title="bits of a stored weight"), marks=marks, title=_title(plan))
    planned, lowest = _heights(plan, quantity)
    measure = plan.table.measures[quantity] if plan.table is not None else ""
    y = axis_of(quantity, [planned, lowest], measure)
    hover = [
        f"{text}\n{quantity} {format_quantity(now, measure)}, at the fewest bits {format_quantity(then, measure)}"
        for text, now, then in zip(hover, planned.tolist(), lowest.tolist(), strict=True)
    ]
    pale = Bars(left=left, width=width, height=y.placed(lowest), colour=colours, hover=hover, is_pale=True)
    solid = Bars(left=left, width=width, height=y.placed(planned), colour=colours, hover=hover)
    note = "; ".join(filter(None, ["pale: at the fewest bits, solid: as planned", below_note(y, planned, lowest)]))
    marks = (pale, *_by_option(plan, solid))
    return Picture(x=x, y=y, marks=marks, title=_title(plan), note=note)


def _by_option(plan: Plan, bars: Bars) -> tuple[Bars, ...]:
    """The bars of each option by themselves, so that a legend names it."""
    labels = np.array([str(entry.choice) if isinstance(entry.choice, Option) else "split" for entry in plan.entries])
    bits = {str(label): min(e.value_bits for e, own in zip(plan.entries, labels, strict=True) if own == label)
            for label in np.unique(labels)}  # fmt: skip
    found = []
    for label in sorted(bits, key=lambda each: (bits[each], each)):
        own = np.flatnonzero(labels == label).tolist()
        count = f"{len(own)} layer{'s' * (len(own) != 1)}"
        found.append(
            Bars(
                left=bars.left[own],
                width=bars.width[own],
                height=bars.height[own],
                colour=[bars.colour[index] for index in own],
                label=f"{label} ({count})",
                hover=[bars.hover[index] for index in own],
            )
        )
    return tuple(found)


def _heights(plan: Plan, quantity: str) -> tuple[FloatArray, FloatArray]:
    """(layers,): a quantity as planned, and at the layer's allowed option of the fewest bits; units added up."""
    from mpq.planning import choices_of

    table = plan.table
    if table is None:
        raise ValueError(f"the height {quantity!r} needs the plan's table, which is not saved with it: take 'bits'")
    values, index = table.quantity(quantity), np.asarray(table.layer_index)
    cost = table.quantities.get("value_size", table.quantities.get("size", values))
    rows = np.arange(len(values))
    lowest = np.where(table.allowed, cost, np.inf).argmin(axis=1)
    layers = len(table.layers)
    planned, least = (
        np.bincount(index, weights=values[rows, choices], minlength=layers).astype(np.float64)
        for choices in (choices_of(table, plan), lowest)
    )
    return planned, least


def _title(plan: Plan) -> str:
    size = f"{format_quantity(plan.size_bytes, 'B')}, " if plan.entries else ""
    return f"Plan of {len(plan.entries)} layers: {size}{plan.average_bits:.2f} bits a weight"


def _text(entry: Entry) -> str:
    layer, size = entry.layer, format_quantity(entry.storage_bits / 8, "B")
    return f"{layer.name} ({layer.kind})\n{entry.choice}, {size}\n{layer.parameters:,} weights"


def _ticks(plan: Plan, middles: FloatArray) -> tuple[list[float], list[str]]:
    if len(plan.entries) > NAMED:
        return [], []
    return middles.tolist(), [short_name(entry.layer.name) for entry in plan.entries]


def _widened(width: FloatArray, weights: FloatArray) -> bool:
    return bool((width > weights).any())
