"""The option of every layer of an allocation, as bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpq.format_colours import bits_colour, option_bits
from mpq.picture import Axis, Bars, Picture, layer_ticks

if TYPE_CHECKING:
    from mpq.allocation import Allocation


def allocation_picture(allocation: Allocation) -> Picture:
    """A bar a layer, as high as its option has bits; where options are no formats, as high as the option's number."""
    labels = allocation.options
    bits = np.array([option_bits(label) for label in labels])
    has_bits = bool(np.isfinite(bits).all())
    height = bits if has_bits else allocation.choices.astype(np.float64) + 1
    names = allocation.layers or tuple(map(str, range(len(labels))))
    marks = []
    for label in sorted(set(labels), key=lambda each: (np.nan_to_num(option_bits(each)), each)):
        own = np.flatnonzero([each == label for each in labels])
        marks.append(
            Bars(
                left=own.astype(np.float64) - 0.4,
                width=np.full(len(own), 0.8),
                height=height[own],
                colour=bits_colour(option_bits(label)),
                label=f"{label} ({len(own)})",
                hover=[f"{names[index]}\n{label}" for index in own],
            )
        )
    title = f"Allocation: objective {allocation.objective:.4g}, {allocation.proof.status}"
    x = Axis(title="layer", ticks=layer_ticks(names))
    return Picture(x=x, y=Axis(title="bits" if has_bits else "option"), marks=tuple(marks), title=title)
