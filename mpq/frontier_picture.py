"""A frontier as a staircase, or as points coloured by the objective, with what it is to be compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.arrays import FloatArray
from mpq.budgets import format_quantity
from mpq.format_colours import ACCENT, MUTED, PALETTE, option_bits, option_colour
from mpq.picture import Axis, Limit, Mark, Picture, Points, axis_of, below_note, thinned

if TYPE_CHECKING:
    from mpq.frontier import Frontier
    from mpq.plan import Plan

_OTHERS = (PALETTE[5], PALETTE[16], PALETTE[3], PALETTE[6], MUTED)
_SYMBOLS = "^sDo"
Marked = Any  # a Plan, (resources..., objective), or several of either


def frontier_picture(
    front: Frontier,
    *,
    plan: Plan | None = None,
    points: Mapping[str, Marked] | None = None,
    budget: float | str | Mapping[str, float | str] | None = None,
    uniform: bool = True,
    others: Mapping[str, Frontier] | None = None,
) -> Picture:
    """The picture of a frontier of one, two or three resources; of more than 2000 points evenly spread ones are shown.

    Args:
        front: what is shown.
        plan: a plan to mark, where its table's prediction puts it; its budgets are drawn as lines.
        points: more to mark, by name: plans, or numbers (resources in the frontier's order, then the objective), one
            or several.
        budget: a limit to draw as a line, in the frontier's units or as text; by the resource's name for several.
        uniform: mark the plans that give every layer the same option, where the frontier knows its table. They are
            predictions, and so none is marked on a measured frontier.
        others: more frontiers of the same resources, by name.

    Raises:
        ValueError: if numbers have another length than the frontier has axes, or a plan cannot be placed.
    """
    others = dict(others or {})
    for name, other in others.items():
        if other.names != front.names:
            raise ValueError(f"{name!r} trades {', '.join(other.names)}, this frontier {', '.join(front.names)}")
    marked = {name: _rows(front, given) for name, given in (points or {}).items()}
    same = _uniform(front) if uniform and not front.is_measured else {}
    chosen = None if plan is None else _rows(front, plan)
    rows = [_points(front)[thinned(len(front))], *(_points(other) for other in others.values())]
    every = np.concatenate([*rows, *marked.values(), *same.values(), *([] if chosen is None else [chosen])])
    view = _View.of(front, every)
    x, y, z = view.axes
    marks: list[Mark] = [_shown(front, view), *_other_fronts(others, view)]
    marks += _limits(front, view, budget, plan)
    for label, row in same.items():
        marks.append(view.points(row, colour=option_colour(label), symbol="D", size=42.0, label=f"all {label}"))
    for place, (name, row) in enumerate(marked.items()):
        symbol = _SYMBOLS[place % len(_SYMBOLS)]
        marks.append(view.points(row, colour=_OTHERS[-1 - place % 5], symbol=symbol, size=24.0, label=name))
    if chosen is not None:
        marks.append(
            view.points(chosen, colour=ACCENT if z is None else PALETTE[5], symbol="*", size=220.0, label="the plan")
        )
    how = "measured" if front.is_measured else "predicted"
    note = below_note(view.objective, every[:, -1])
    title = f"{len(front)} plans: {' and '.join(front.names)} against {how} {front.objective_name}"
    return Picture(x=x, y=y, z=z, marks=tuple(marks), title=title, note=note)


@dataclass(frozen=True)
class _View:
    """Which coordinates go on which axes: of one resource the objective goes upwards, of several it is the colour."""

    resources: tuple[Axis, ...]
    objective: Axis

    @classmethod
    def of(cls, front: Frontier, rows: FloatArray) -> _View:
        measures = front.measures
        axes = tuple(
            axis_of(name, [rows[:, column]], measures.get(name, "")) for column, name in enumerate(front.names)
        )
        kind = "measured" if front.is_measured else "predicted"
        measure = "" if front.table is None or front.is_measured else front.table.measures[front.minimised]
        return cls(axes, axis_of(f"{kind} {front.objective_name}", [rows[:, -1]], measure))

    @property
    def axes(self) -> tuple[Axis, Axis, Axis | None]:
        if len(self.resources) == 1:
            return self.resources[0], self.objective, None
        return self.resources[0], self.resources[1], self.resources[2] if len(self.resources) > 2 else self.objective

    def points(self, rows: FloatArray, **style: Any) -> Points:
        """Rows (resources..., objective) as points."""
        placed = [axis.placed(rows[:, column]) for column, axis in enumerate((*self.resources, self.objective))]
        hover = [self._text(row) for row in rows]
        if len(self.resources) == 1:
            return Points(x=placed[0], y=placed[1], hover=hover, **style)
        return Points(x=placed[0], y=placed[1], z=placed[2], hover=hover, **style)

    def _text(self, row: FloatArray) -> str:
        axes = (*self.resources, self.objective)
        return "\n".join(f"{axis.title}: {value / axis.unit:.4g}" for axis, value in zip(axes, row, strict=True))


def _shown(front: Frontier, view: _View) -> Points:
    """The frontier itself."""
    kept = thinned(len(front))
    rows = _points(front)[kept]
    label = "frontier" if len(kept) == len(front) else f"frontier ({len(kept)} of {len(front)} points)"
    if len(front.names) == 1:
        error = None if front.standard_error is None else front.standard_error[kept] / view.objective.unit
        return view.points(rows, colour=PALETTE[8], join="steps", error=error, size=16.0, label=label)
    size: Any = 28.0
    if len(front.names) > 2:
        third = rows[:, 2] - rows[:, 2].min()
        size = 12.0 + 90.0 * third / (third.max() or 1.0)
        label += f", larger: more {front.names[2]}"
    value = view.objective.placed(rows[:, -1])
    return view.points(rows, value=value, value_axis=view.objective, size=size, label=label)


def _other_fronts(others: Mapping[str, Frontier], view: _View) -> Iterable[Points]:
    for place, (name, other) in enumerate(others.items()):
        kept = thinned(len(other))
        error = None if other.standard_error is None else other.standard_error[kept] / view.objective.unit
        join = "steps" if len(other.names) == 1 else "none"
        style: dict[str, Any] = {"join": join, "error": error, "size": 12.0, "is_open": join == "none"}
        yield view.points(_points(other)[kept], colour=_OTHERS[place % len(_OTHERS)], label=name, **style)


def _limits(front: Frontier, view: _View, budget: Any, plan: Plan | None) -> list[Limit]:
    from mpq.limits import limit_of

    if budget is not None and not isinstance(budget, Mapping):
        budget = {front.names[0]: budget}
    asked = [(asked.quantity, asked.limit) for asked in (plan.budgets if plan is not None else ())]
    asked += [(name, limit_of(name, limit, front.table).value) for name, limit in (budget or {}).items()]
    found = []
    for name, value in dict.fromkeys(asked):
        if name in front.names[:2] and np.isfinite(value):
            place = front.names.index(name)
            at = value / view.resources[place].unit
            text = format_quantity(value, front.measures.get(name, ""))
            found.append(Limit(value=at, along="y" if place else "x", label=f"{name} at most {text}"))
    return found


def _points(front: Frontier) -> FloatArray:
    """(points, resources + 1), the objective last."""
    return np.column_stack([front.resource.reshape(len(front), -1), front.objective])


def _rows(front: Frontier, given: Marked) -> FloatArray:
    """Plans or numbers as rows (resources..., objective)."""
    from mpq.plan import Plan

    if isinstance(given, Plan):
        return _placed(front, given)[None]
    if isinstance(given, Sequence) and len(given) and isinstance(given[0], Plan):
        return np.array([_placed(front, plan) for plan in given])
    rows = np.atleast_2d(np.asarray(given, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != len(front.names) + 1:
        raise ValueError(
            f"a point needs {len(front.names) + 1} numbers ({', '.join(front.names)}, {front.objective_name}), "
            f"got the shape {rows.shape}"
        )
    return rows


def _placed(front: Frontier, plan: Plan) -> FloatArray:
    """Where a plan is: by what it is predicted, on a measured frontier by what was measured of it there."""
    from mpq.planning import choices_of, predict

    if front.table is None:
        raise ValueError("a plan can only be marked where the frontier knows its table: mark numbers instead")
    found = predict(front.table, plan)
    loss = found[front.minimised]
    if front.is_measured:
        same = np.flatnonzero((front.choices == choices_of(front.table, plan)).all(1))
        if not len(same):
            raise ValueError("the plan is no point of this measured frontier: mark (resource, measured loss) instead")
        loss = float(front.objective[same[0]])
    return np.array([*(found[name] for name in front.names), loss])


def _uniform(front: Frontier) -> dict[str, FloatArray]:
    """Rows of the plans with one option everywhere; units that may not take it take their nearest in bits."""
    from mpq.table_problem import totals

    if front.table is None or not hasattr(front.table, "allowed"):
        return {}
    found = {}
    for column, label in enumerate(front.table.options):
        if front.table.allowed[:, column].mean() > 0.5:
            codes = _nearest(front.table.allowed, front.table.options, column)
            whole = totals(front.table, codes)
            found[label] = np.array([[*(whole[name] for name in front.names), whole[front.minimised]]])
    return dict(sorted(found.items(), key=lambda item: np.nan_to_num(option_bits(item[0]))))


def _nearest(allowed: NDArray[np.bool_], options: Sequence[str], column: int) -> NDArray[np.int64]:
    bits = np.array([np.nan_to_num(option_bits(label)) for label in options])
    away = np.abs(bits - bits[column]) + 1e-6 * np.abs(np.arange(len(options)) - column)
    nearest: NDArray[np.int64] = np.where(allowed, away, np.inf).argmin(axis=1).astype(np.int64)
    return nearest
