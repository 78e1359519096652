"""A device's numbers of one kind side by side: rates of its kernels, or whatever else several of its tables have."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from mpq.format_colours import MUTED, PALETTE
from mpq.picture import Axis, Bars, Picture, axis_of, layer_ticks
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    from .device_numbers import Number
    from .target import Target

_FIRST = ("ops_per_s", "macs_per_cycle")  # what a kernel computes: shown unless asked for something else


def device_picture(target: Target, *, key: str | None = None) -> Picture:
    """A bar a table of the device file, as high as its number of that key; estimates in grey.

    Args:
        target: any with numbers.
        key: as in the device file, "ops_per_s", "capacity_bytes"; by default the rates of kernels, or else the key that
            most tables have.

    Raises:
        ValueError: if the target has no numbers, or none of that key.
    """
    counts = Counter(number.key for number in target.numbers)
    if not counts:
        raise ValueError(f"{target.name} has no numbers to show: it prices storage alone")
    if key is None:
        key = next((name for name in _FIRST if name in counts), counts.most_common(1)[0][0])
    if key not in counts:
        raise ValueError(f"{target.name} has no number {key!r}{did_you_mean(key, counts)}")
    numbers = [number for number in target.numbers if number.key == key]
    values = np.array([number.value for number in numbers])
    y = axis_of(key, [values])
    marks = []
    for label, colour, is_estimate in (("estimates", MUTED, True), ("with a source", PALETTE[8], False)):
        own = np.flatnonzero([number.is_estimate == is_estimate for number in numbers])
        hover = [_text(numbers[index]) for index in own]
        if len(own):
            left, width = own.astype(np.float64) - 0.35, np.full(len(own), 0.7)
            height = y.placed(values[own])
            marks.append(Bars(left=left, width=width, height=height, colour=colour, label=label, hover=hover))
    x = Axis(ticks=layer_ticks([number.where for number in numbers]))
    return Picture(x=x, y=y, marks=tuple(marks), title=f"{target.name} ({target.kind})", note=numbers[0].unit)


def _text(number: Number) -> str:
    sources = ", ".join(f"{source.id} [{source.kind}]" for source in number.sources)
    return f"{number.where}: {number.key} = {number.value:g}\n{number.unit}\n{sources}"
