"""How formats are told apart in a report: a colour by their bits, a hatching where these are equal, shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq.format_colours import bits_colour, option_bits, option_colour, text_colour
from mpq.plan import Split

if TYPE_CHECKING:
    from mpq.plan import Entry, Plan

HATCHINGS = ("", "rising", "falling", "dots")  # names of patterns in the page
SHAPES = ("circle", "square", "triangle", "diamond", "down", "hexagon", "cross", "bar")


@dataclass(frozen=True)
class Look:
    """How one format is drawn: its colour, the text colour on it, a hatching, a shape, and how many layers take it.

    `position` is its place in the legend; None for a mix of formats.
    """

    label: str
    colour: str
    ink: str
    hatching: str
    shape: str
    layers: int = 0
    position: int | None = None


def looks(plan: Plan, options: Sequence[str]) -> dict[str, Look]:
    """How every option of the search, and of the plan, is drawn; fewest bits first.

    Example:
        >>> from mpq.plan import Plan
        >>> [(look.label, look.hatching, look.shape) for look in looks(Plan((), ""), ["int8", "int4", "nf4"]).values()]
        [('int4', '', 'circle'), ('nf4', 'rising', 'square'), ('int8', '', 'triangle')]
    """
    counts: dict[str, int] = {}
    for entry in plan.entries:
        for option in entry.options:
            counts[str(option)] = counts.get(str(option), 0) + 1
    labels = list(dict.fromkeys([*options, *counts]))
    bits = {label: option_bits(label) for label in labels}
    labels.sort(key=lambda label: math.inf if math.isnan(bits[label]) else bits[label])
    seen: dict[str, int] = {}
    found = {}
    for position, label in enumerate(labels):
        colour = option_colour(label)
        rank = seen.get(colour, 0)
        seen[colour] = rank + 1
        found[label] = Look(
            label=label,
            colour=colour,
            ink=text_colour(colour),
            hatching=HATCHINGS[rank % len(HATCHINGS)],
            shape=SHAPES[position % len(SHAPES)],
            layers=counts.get(label, 0),
            position=position,
        )
    return found


def common_ending(labels: Sequence[str]) -> str:
    """What all labels end with after their format, which is then said once; empty where they differ.

    Example:
        >>> common_ending(["int4@group64", "int8@group64"]), common_ending(["int4", "int8@group64"])
        ('@group64', '')
    """
    endings = {label[label.index("@") :] if "@" in label else "" for label in labels}
    return endings.pop() if len(endings) == 1 and len(labels) > 1 else ""


def entry_look(entry: Entry, known: Mapping[str, Look]) -> Look:
    """How a layer is drawn: as its option, or of a split layer in the colour of its average bits."""
    if not isinstance(entry.choice, Split):
        return known[str(entry.choice)]
    used = entry.options
    if len(used) == 1:
        return known[str(used[0])]
    colour = bits_colour(entry.value_bits)
    return Look(choice_text(entry), colour, text_colour(colour), "", "circle")


def choice_text(entry: Entry) -> str:
    """What a layer takes, short: its option, or of a split layer the options and how many units take each."""
    if not isinstance(entry.choice, Split):
        return str(entry.choice)
    counts = entry.choice.counts()
    return ", ".join(f"{label} ×{count:,}" for label, count in counts.items()) + f" ({entry.choice.granularity})"
