"""What other budgets would buy, in a report: best plans, simple rules, random plans and measured ones, as points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpq.baseline_plans import BaselinePlans
from mpq.budgets import format_quantity
from mpq.limits import Limit
from mpq.planning import choices_of, predict, solve_units
from mpq.problem import InfeasibleError
from mpq.report_axes import Axis
from mpq.report_layers import short_loss
from mpq.report_subject import Choices, Subject
from mpq.table_problem import totals
from mpq.verification_report import FULL_PRECISION, Measured

STEPS = 36  # budgets that are solved for, evenly from the least to the most
MOST_PICTURES = 3
MOST_CELLS = 400_000  # units x options: beyond, solving so often takes too long for a page
MOST_RAISES = 1_500_000  # units x units x options: beyond, plans are not filled at random, a layer at a time
MOST_CODES = 40_000  # options of layers that all points of a picture may carry
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Point:
    """A plan on the picture.

    Attributes:
        kind: "best", "uniform", "random", "plan", or "measured".
        name: what it is called.
        cost, loss: in base units; of a measured point the loss is what was measured.
        ends: of the measured interval.
        choices: (units,) where they are known.
    """

    kind: str
    name: str
    cost: float
    loss: float
    ends: tuple[float, float] | None = None
    choices: Choices | None = None
    fits: bool | None = None


@dataclass(frozen=True, eq=False)
class Exchange:
    """One picture: a quantity against the loss.

    Attributes:
        quantity: on the horizontal axis.
        points: all of them.
        x, y: the axes; `measured_y` where measured figures are no losses and so have an axis of their own.
        lines: budgets, by axis.
        proof: how sure the best plans are.
        held: the other budgets, which every best plan keeps, in words.
    """

    quantity: str
    measure: str
    points: tuple[Point, ...]
    x: Axis
    y: Axis
    measured_y: Axis | None
    lines: tuple[tuple[str, float], ...]
    proof: str
    held: str

    def of(self, *kinds: str) -> list[Point]:
        """The points of some kinds."""
        return [point for point in self.points if point.kind in kinds]


def exchanges(subject: Subject) -> list[Exchange]:
    """A picture for every quantity with a budget, else for the size; none where the table is too large."""
    table = subject.table
    if table is None or "sensitivity" not in table.quantities:
        return []
    if len(table.units) * len(table.options) > MOST_CELLS:
        return []
    asked = [subject.objective, *subject.limits, "size", "latency"]
    names = [name for name in dict.fromkeys(asked) if name in table.quantities and name != "sensitivity"]
    if subject.limits:
        names = [name for name in names if name in subject.limits or name == subject.objective] or ["size"]
    return [_exchange(subject, name) for name in names[:MOST_PICTURES] if _varies(subject, name)]


def _varies(subject: Subject, name: str) -> bool:
    if subject.table is None or name not in subject.table.quantities:
        return False
    low, high = subject.table.reachable(name)
    return high > low


def _exchange(subject: Subject, quantity: str) -> Exchange:
    table = subject.table
    if table is None:
        raise ValueError("a picture of exchanges needs the cost table, got none")
    best, proof = _best(subject, quantity)
    points = (*best, *_uniform(subject, quantity), *_random(subject, quantity), *_own(subject, quantity))
    measured = tuple(_measured(subject, quantity))
    predicted_losses = [point.loss for point in points]
    found = [end for point in measured for end in (point.loss, *(point.ends or ())) if math.isfinite(end)]
    limit = subject.limits.get(quantity)
    costs = [point.cost for point in (*points, *measured)]
    floor = subject.limits.get("sensitivity")
    lines = tuple((axis, value) for axis, value in (("x", limit), ("y", floor)) if value is not None)
    shared = subject.is_comparable
    above = [value for value in found if value > 0] if shared else []
    name = _name_of_measured(subject)
    return Exchange(
        quantity=quantity,
        measure=table.measures[quantity],
        points=(*points, *measured),
        x=Axis.over(quantity, table.measures[quantity], [*costs, *([] if limit is None else [limit])]),
        y=Axis.over(subject.loss_name, table.measures["sensitivity"], predicted_losses + above),
        measured_y=Axis.over(f"measured {name}", "loss", found) if found and not shared else None,
        lines=lines,
        proof=proof,
        held=_held(subject, quantity),
    )


def _held(subject: Subject, quantity: str) -> str:
    others = [name for name in subject.limits if name not in (quantity, "sensitivity")]
    return " and ".join(f"{n} ≤ {format_quantity(subject.limits[n], subject.measures.get(n, ''))}" for n in others)


def _others(subject: Subject, quantity: str) -> dict[str, float]:
    known = () if subject.table is None else subject.table.quantities
    return {n: v for n, v in subject.limits.items() if n not in (quantity, "sensitivity") and n in known}


def _best(subject: Subject, quantity: str) -> tuple[list[Point], str]:
    """The plan with the least predicted loss under every one of some budgets, and how sure that is."""
    table = subject.table
    if table is None:
        return [], ""
    low, high = table.reachable(quantity)
    pins = subject.plan.pins(*subject.plan.edited) if subject.pinned is not None and _is_whole(subject) else {}
    count = max(4, min(STEPS, MOST_CODES // max(1, len(table.layers)), 4 * MOST_CELLS // table.allowed.size))
    found: dict[bytes, Point] = {}
    statuses: dict[str, int] = {}
    for limit in np.linspace(low, high, count).tolist():
        try:
            solution = solve_units(table, {**_others(subject, quantity), quantity: limit}, pins=pins)
        except (InfeasibleError, ValueError):
            continue
        choices = solution.allocation.choices.astype(np.int64)
        if (key := choices.tobytes()) in found:
            continue
        statuses[solution.proof.status] = statuses.get(solution.proof.status, 0) + 1
        loss, cost = solution.totals["sensitivity"], solution.totals[quantity]
        found[key] = Point("best", "best plan", cost, loss, choices=choices)
    return _efficient(list(found.values())), ", ".join(statuses)


def _efficient(points: list[Point]) -> list[Point]:
    """Points in order of their cost, without those that another beats."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def _is_whole(subject: Subject) -> bool:
    return subject.table is not None and subject.table.granularity == "layer"


def _own(subject: Subject, quantity: str) -> Iterator[Point]:
    found = subject.totals
    if quantity in found and "sensitivity" in found:
        yield Point("plan", "this plan", found[quantity], found["sensitivity"], choices=subject.choices)


def _uniform(subject: Subject, quantity: str) -> Iterator[Point]:
    """One option everywhere; layers that may not take it keep what they have in the plan, and the name says so."""
    table = subject.table
    if table is None:
        return
    fallback = subject.choices if subject.choices is not None else table.allowed.argmax(axis=1)
    for column, label in enumerate(table.options):
        can = table.allowed[:, column]
        if not can.any():
            continue
        choices = np.where(can, column, fallback).astype(np.int64)
        name = f"uniform {label}" + ("" if can.all() else f", where allowed ({int(can.sum())} of {len(can)})")
        yield _predicted(subject, quantity, ("uniform", name), choices)


def _predicted(subject: Subject, quantity: str, what: tuple[str, str], choices: Choices) -> Point:
    table = subject.table
    if table is None:
        raise ValueError("a prediction needs the cost table, got none")
    found = totals(table, choices)
    fits = all(found[n] <= limit * (1 + 1e-9) for n, limit in subject.limits.items() if n in found)
    return Point(*what, found[quantity], found["sensitivity"], choices=choices, fits=fits)


def _random(subject: Subject, quantity: str) -> Iterator[Point]:
    """Random plans that fill the budget on this quantity, at the plan's and at budgets around it."""
    table = subject.table
    if table is None or not _is_whole(subject) or table.allowed.size * len(table.units) > MOST_RAISES:
        return
    low, high = table.reachable(quantity)
    own = [limit for limit in subject.limit_records if limit.resource not in (quantity, "sensitivity")]
    for share in (0.2, 0.4, 0.6, 0.8):
        limit = Limit(quantity, low + share * (high - low), "", "")
        maker = BaselinePlans(table=table, limits=(*own, limit), fixed=subject.pinned)
        try:
            drawn = maker.choices("random")[::4]
        except (InfeasibleError, ValueError):
            continue
        for choices in drawn:
            yield _predicted(subject, quantity, ("random", "random plan"), choices)


def _measured(subject: Subject, quantity: str) -> Iterator[Point]:
    """Plans that were measured: those of the verification, else this plan as the search measured it."""
    if subject.verification is not None:
        for row in subject.verification.rows:
            if row.name != FULL_PRECISION:
                yield from _measured_row(subject, quantity, row)
        return
    name = _name_of_measured(subject)
    if name and quantity in subject.totals:
        value = subject.plan.measured[name]
        margin = 1.96 * subject.plan.measured[f"{name}_se"]
        ends = (value - margin, value + margin)
        yield Point("measured", "this plan, measured", subject.totals[quantity], value, ends, subject.choices)


def _name_of_measured(subject: Subject) -> str:
    if subject.verification is not None:
        return subject.verification.divergence_name
    return next((name for name in subject.plan.measured if f"{name}_se" in subject.plan.measured), "")


def _measured_row(subject: Subject, quantity: str, row: Measured) -> Iterator[Point]:
    costs: Mapping[str, Any] = {**row.costs, "size": row.size_bytes}
    if quantity not in costs:
        return
    figure = row.estimates["divergence"]
    name = f"{'this plan' if row.name == 'plan' else row.name}, measured"
    point = Point("measured", name, costs[quantity], figure.value, (figure.low, figure.high), fits=row.fits)
    table = subject.table
    if table is not None and row.plan is not None:
        try:
            predict(table, row.plan)
            point = replace(point, choices=choices_of(table, row.plan))
        except ValueError:  # an option that the table does not price: a point without its layers
            pass
    yield point


def layer_codes(subject: Subject, choices: Choices) -> str | list[float]:
    """The option of every layer, a letter each; of split layers, and of many options, a number each."""
    table = subject.table
    if table is None:
        raise ValueError("options of layers need the cost table, got none")
    if _is_whole(subject):
        if len(table.options) <= len(ALPHABET):
            return "".join(ALPHABET[code] for code in choices.tolist())
        return [float(code) for code in choices.tolist()]
    weights = np.ones(len(choices)) if table.parameters is None else np.maximum(table.parameters, 1.0)
    bits = _option_bits(table.options)[choices]
    count = len(table.layers)
    total = np.bincount(table.layer_index, weights=weights * bits, minlength=count)
    mean = total / np.bincount(table.layer_index, weights=weights, minlength=count)
    return [round(value, 1) for value in mean.tolist()]


def _option_bits(labels: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    from mpq.format_colours import option_bits

    return np.array([option_bits(label) for label in labels])


def point_text(point: Point, exchange: Exchange, measure: str) -> str:
    """A point in words."""
    cost = format_quantity(point.cost, exchange.measure)
    what = "measured" if point.kind == "measured" else "predicted"
    ends = (
        "" if point.ends is None else f" ({short_loss(point.ends[0], measure)} to {short_loss(point.ends[1], measure)})"
    )
    fits = {True: "", False: ", over budget", None: ""}[point.fits]
    return f"{point.name}: {exchange.quantity} {cost}, {what} {short_loss(point.loss, measure)}{ends}{fits}"
