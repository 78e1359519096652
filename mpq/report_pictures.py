"""Pictures of points in a report: places in percent of the picture, so that it fits any width of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.budgets import format_quantity
from mpq.report_agreement import AgreementPicture
from mpq.report_axes import Axis
from mpq.report_exchange import Exchange, Point, point_text
from mpq.report_layers import LayerRow, short_loss
from mpq.report_subject import Subject
from mpq.table_problem import totals

SHAPES = {"best": "circle", "uniform": "square", "random": "cross", "plan": "star", "measured": "ring"}
MEANINGS = {
    "best": "best plan at a budget (predicted)",
    "uniform": "one format everywhere (predicted)",
    "random": "random plans that fill a budget (predicted)",
    "plan": "this plan (predicted)",
    "measured": "measured, with its 95% interval",
}


@dataclass(frozen=True)
class Mark:
    """A point: places in percent from the left and the top, what it looks like, and what it says.

    `layer` is the layer that it stands for, `whisker` the two ends of its interval from the top, `choices` the options
    of all units behind it.
    """

    left: float
    top: float
    kind: str
    shape: str
    text: str
    colour: str = ""
    whisker: tuple[float, float] | None = None
    layer: int | None = None
    choices: object = None
    figures: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A straight line between two places, and what it says at its end."""

    ends: tuple[float, float, float, float]
    kind: str
    text: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: axes, marks in drawing order, a curve through some, lines, and a legend of (shape, kind, meaning)."""

    name: str
    title: str
    summary: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    curve: tuple[tuple[float, float], ...] = ()
    lines: tuple[Line, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()
    note: str = ""

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Places from the left, and texts."""
        return self.x.ticks

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Places from the top, and texts."""
        return [(round(100 - place, 2), text) for place, text in self.y.ticks]


def exchange_pictures(subject: Subject, exchange: Exchange) -> Iterator[Picture]:
    """The predicted picture, with the measured points where they are the same quantity, else those in a second one."""
    title = f"{exchange.quantity} against {subject.loss_name}"
    kinds = ("random", "uniform", "best", "measured", "plan")
    first = kinds if exchange.measured_y is None else tuple(kind for kind in kinds if kind != "measured")
    yield _exchange_picture(subject, exchange, first, exchange.y, title)
    if exchange.measured_y is not None:
        measured = f"{exchange.quantity} against {exchange.measured_y.title}"
        yield _exchange_picture(subject, exchange, ("measured",), exchange.measured_y, measured)


def _exchange_picture(subject: Subject, exchange: Exchange, kinds: Sequence[str], y: Axis, title: str) -> Picture:
    marks = [_mark(subject, exchange, point, y) for kind in kinds for point in exchange.of(kind)]
    best = [(mark.left, mark.top) for mark in marks if mark.kind == "best"]
    legend = [(SHAPES[kind], kind, MEANINGS[kind]) for kind in reversed(kinds) if exchange.of(kind)]
    pins = ["the pins"] if subject.pinned is not None else []
    kept = " and ".join([*([exchange.held] if exchange.held else []), *pins])
    held = f"Every best and random plan also keeps {kept}." if kept else ""
    proved = f" Best plans: {exchange.proof} for the predicted table." if best and exchange.proof else ""
    count = len(marks)
    return Picture(
        name=f"exchange-{exchange.quantity}-{'-'.join(kinds) if len(kinds) == 1 else 'predicted'}",
        title=title,
        summary=f"{title}: {count} plans. Arrow keys move between them, Enter shows one.",
        x=exchange.x,
        y=y,
        marks=tuple(marks),
        curve=tuple(best),
        lines=tuple(_budget_lines(subject, exchange, y)),
        legend=tuple(legend),
        note=(held + proved).strip() if best else "",
    )


def _mark(subject: Subject, exchange: Exchange, point: Point, y: Axis) -> Mark:
    measure = subject.measures.get("sensitivity", "loss")
    whisker = None
    if point.ends is not None and all(np.isfinite(point.ends)):
        whisker = (round(100 - y.place(point.ends[1]), 2), round(100 - y.place(point.ends[0]), 2))
    return Mark(
        left=exchange.x.place(point.cost),
        top=round(100 - y.place(point.loss), 2),
        kind=point.kind,
        shape=SHAPES[point.kind],
        text=point_text(point, exchange, measure),
        whisker=whisker,
        choices=point.choices,
        figures=tuple(_figures(subject, exchange, point)),
    )


def _figures(subject: Subject, exchange: Exchange, point: Point) -> Iterator[tuple[str, str, str]]:
    """What a point comes to, next to the plan: name, its figure, the plan's."""
    own, table = subject.totals, subject.table
    theirs = {exchange.quantity: point.cost}
    if point.choices is not None and table is not None:
        theirs |= totals(table, point.choices)
    for name in dict.fromkeys((exchange.quantity, *subject.limits)):
        if name in theirs and name != "sensitivity":
            that, mine = (format_quantity(v[name], subject.measures[name]) if name in v else "" for v in (theirs, own))
            yield name, that, mine
    measure = subject.measures.get("sensitivity", "loss")
    if (loss := theirs.get("sensitivity", point.loss if point.kind != "measured" else None)) is not None:
        mine = short_loss(own["sensitivity"], measure) if "sensitivity" in own else ""
        yield subject.loss_name, short_loss(loss, measure), mine
    if point.kind == "measured":
        same = next((p.loss for p in exchange.of("measured") if p.name.startswith("this plan")), None)
        yield "measured", short_loss(point.loss, "loss"), "" if same is None else short_loss(same, "loss")


def _budget_lines(subject: Subject, exchange: Exchange, y: Axis) -> Iterator[Line]:
    for axis, value in exchange.lines:
        if axis == "x":
            place = exchange.x.place(value)
            yield Line((place, 0, place, 100), "budget", f"budget {format_quantity(value, exchange.measure)}")
        elif y is exchange.y:
            place = round(100 - y.place(value), 2)
            text = f"budget {short_loss(value, subject.measures.get('sensitivity', 'loss'))}"
            yield Line((0, place, 100, place), "budget", text)


def scatter_picture(subject: Subject, rows: Sequence[LayerRow]) -> Picture | None:
    """Layers: what each costs in its most accurate option against the loss it would bring in its least accurate one."""
    table = subject.table
    if table is None or not rows or rows[0].worst is None:
        return None
    quantity = next(
        (name for name in (*subject.limits, "size") if name in table.quantities and name != "sensitivity"), ""
    )
    if not quantity:
        return None
    best = np.where(table.allowed, table.quantity("sensitivity"), np.inf).argmin(axis=1)
    dearest = table.quantity(quantity)[np.arange(len(best)), best]
    sums = np.bincount(table.layer_index, weights=dearest, minlength=len(table.layers))
    costs = [float(sums[row.index]) for row in rows]
    worst = [row.worst or 0.0 for row in rows]
    measure = table.measures[quantity]
    x = Axis.over(f"{quantity} in the most accurate format", measure, costs)
    y = Axis.over(f"{subject.loss_name} in the least accurate format", table.measures["sensitivity"], worst)
    marks = [
        Mark(
            left=x.place(cost),
            top=round(100 - y.place(row.worst or 0.0), 2),
            kind="layer",
            shape=row.look.shape,
            text=f"{row.name} in {row.option}: {quantity} up to {format_quantity(cost, measure)}, "
            f"{subject.loss_name} up to {row.worst_text} in {row.worst_option}",
            colour=row.look.colour,
            layer=row.index,
        )
        for row, cost in zip(rows, costs, strict=True)
    ]
    title = f"{quantity} of layers against {subject.loss_name}"
    summary = f"{title}: {len(rows)} layers. Arrow keys move between them."
    return Picture("layer-points", title, summary, x, y, tuple(marks))


def agreement_marks(found: AgreementPicture) -> Picture:
    """Predicted against measured, a point a plan, with the line of equal figures."""
    marks = tuple(
        Mark(
            left=found.x.place(pair.predicted),
            top=round(100 - found.y.place(pair.measured), 2),
            kind=pair.kind,
            shape=SHAPES[pair.kind],
            text=f"{pair.name}: predicted {pair.predicted:.3g}, measured {pair.measured:.3g}",
        )
        for pair in sorted(found.pairs, key=lambda pair: pair.kind == "plan")
    )
    lines = []
    if found.diagonal is not None:
        x1, y1, x2, y2 = found.diagonal
        lines.append(Line((x1, round(100 - y1, 2), x2, round(100 - y2, 2)), "diagonal"))
    title = "predicted against measured"
    summary = f"{title}: {len(marks)} plans. Arrow keys move between them."
    legend = [("star", "plan", "this plan"), ("ring", "measured", "baselines")]
    if lines:
        legend.append(("dash", "diagonal", "where both are equal"))
    return Picture("agreement-plans", title, summary, found.x, found.y, marks, lines=tuple(lines), legend=tuple(legend))
