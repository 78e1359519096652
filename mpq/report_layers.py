"""The layers of a plan in a report: a table of them, and a strip in which each is a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.attention_operators import is_named
from mpq.budgets import format_quantity
from mpq.report_axes import Axis
from mpq.report_formats import Look, choice_text, entry_look
from mpq.report_subject import Subject

MOST_BARS = 1000  # of the strip; of more layers neighbours share a bar
MOST_ROWS = 1000  # of the table
LEAST_BAR = 0.3  # percent of the strip, where there is room for that
LABEL_PIXELS = 15  # that a bar's text needs
BAR_PIXELS = 4.6  # of a bar on average, on narrow screens, where the strip scrolls
NARROW = 260  # pixels that every screen has
LOWEST_BAR = 5.0  # percent of the strip's height: bars of nothing stay visible


@dataclass(frozen=True)
class LayerRow:
    """One layer: numbers in base units, and the texts a reader sees."""

    index: int
    name: str
    kind: str
    parameters: int
    option: str
    look: Look
    bits: float
    bytes: float
    size: str
    share: float
    worst: float | None
    worst_text: str
    worst_option: str
    loss: float | None
    loss_text: str
    mark: str

    @property
    def sentence(self) -> str:
        """The layer in words, for readers of screens and for hovering."""
        parts = [f"{self.name}: {self.kind}, {self.parameters:,} weights in {self.option}", f"{self.size}"]
        if self.worst is not None:
            parts.append(f"predicted loss {self.loss_text}, up to {self.worst_text} in {self.worst_option}")
        return ", ".join([*parts, *([self.mark] if self.mark else [])])


@dataclass(frozen=True)
class Bar:
    """A bar of the strip, in percent of its width and height; `text` where it fits; `index` of its (first) layer."""

    index: int
    left: float
    width: float
    height: float
    step: float
    text: str
    look: Look
    title: str


@dataclass(frozen=True)
class Strip:
    """All bars, how wide the strip is at least in pixels, and the axis of the heights (None: heights say nothing)."""

    bars: tuple[Bar, ...]
    least_pixels: int
    axis: Axis | None
    levels: tuple[tuple[float, str], ...]
    per_bar: int


def layer_rows(subject: Subject, looks: Mapping[str, Look]) -> list[LayerRow]:
    """Every layer of the plan in order."""
    plan, worst, losses = subject.plan, subject.worst, subject.per_layer("sensitivity")
    measure = subject.measures.get("sensitivity", "loss")
    whole = sum(entry.storage_bits for entry in plan.entries)
    marks = _marks(subject)
    rows = []
    for index, entry in enumerate(plan.entries):
        layer, bits = entry.layer, entry.storage_bits
        top = None if worst is None else float(worst[0][index])
        loss = None if losses is None else float(losses[index])
        rows.append(
            LayerRow(
                index=index,
                name=layer.name,
                kind=layer.kind,
                parameters=layer.parameters,
                option=choice_text(entry),
                look=entry_look(entry, looks),
                bits=entry.value_bits,
                bytes=bits / 8,
                size=format_quantity(bits / 8, "B"),
                share=bits / whole,
                worst=top,
                worst_text="" if top is None else short_loss(top, measure),
                worst_option="" if worst is None else worst[1][index],
                loss=loss,
                loss_text="" if loss is None else short_loss(loss, measure),
                mark=marks.get(layer.name, ""),
            )
        )
    return rows


def short_loss(value: float, measure: str) -> str:
    """A predicted loss in three digits."""
    return f"{value:.3g}" if measure in ("loss", "score", "") else format_quantity(value, measure)


def _marks(subject: Subject) -> dict[str, str]:
    """Why a layer was not free: pinned, or tied to others."""
    plan = subject.plan
    names = [entry.layer.name for entry in plan.entries]
    pinned = [*plan.edited, *plan.provenance.get("pins", {})]
    marks = {name: "pinned" for name in names if name in plan.edited or any(is_named(name, p) for p in pinned)}
    ties = subject.table.ties if subject.table is not None and subject.table.granularity == "layer" else ()
    for number, group in enumerate(ties, 1):
        for unit in group:
            name = names[unit]
            marks[name] = f"{marks[name]}, tied {number}" if name in marks else f"tied {number}"
    return marks


def strip(rows: Sequence[LayerRow]) -> Strip:
    """The bars: as wide as a layer has weights, as high as its loss in its least accurate option."""
    per_bar = -(-len(rows) // MOST_BARS)
    groups = [rows[start : start + per_bar] for start in range(0, len(rows), per_bar)]
    weights = np.array([sum(row.parameters for row in group) for group in groups], float)
    widths = _widths(weights)
    lefts = np.concatenate([[0.0], np.cumsum(widths)[:-1]])
    tops = [max(row.worst for row in group) for group in groups] if rows[0].worst is not None else []  # type: ignore[type-var]
    axis = Axis.over("predicted loss", "loss", tops) if tops else None  # type: ignore[arg-type]
    bits = [float(np.average([r.bits for r in g], weights=[max(r.parameters, 1) for r in g])) for g in groups]
    levels = _levels(bits)
    least = int(max(NARROW, BAR_PIXELS * len(groups)))
    bars = []
    for position, group in enumerate(groups):
        first, wide = group[0], widths[position]
        height = 100.0 if axis is None else LOWEST_BAR + (100 - LOWEST_BAR) * axis.place(tops[position]) / 100  # type: ignore[arg-type]
        has_room = wide * least / 100 >= LABEL_PIXELS
        bars.append(
            Bar(
                index=first.index,
                left=round(float(lefts[position]), 3),
                width=round(float(wide), 3),
                height=round(height, 1),
                step=_level(bits[position], levels),
                text=f"{bits[position]:.2g}" if has_room else "",
                look=first.look,
                title=first.sentence if len(group) == 1 else f"{first.name} to {group[-1].name}, {len(group)} layers",
            )
        )
    return Strip(tuple(bars), least, axis, levels, per_bar)


def _widths(weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Percent of the strip: in proportion to the weights, none below the least where there is room."""
    least = min(LEAST_BAR, 50.0 / len(weights))
    share = weights / weights.sum()
    widths = least + (100 - least * len(weights)) * share
    return np.asarray(widths)


def _levels(bits: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Places in percent from the bottom and texts of the whole numbers of bits in use."""
    marks = sorted({round(value) for value in bits})
    if len(marks) == 1:
        return ((50.0, f"{marks[0]}"),)
    return tuple((round(100 * position / (len(marks) - 1), 1), f"{mark}") for position, mark in enumerate(marks))


def _level(bits: float, levels: tuple[tuple[float, str], ...]) -> float:
    """Where a number of bits is between the marks."""
    marks = [float(text) for _, text in levels]
    return round(float(np.interp(bits, marks, [place for place, _ in levels])), 1)
