"""From a table and limits to an `AllocationProblem`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.limits import Limit
from mpq.options import matching
from mpq.problem import AllocationProblem, SparsePeak
from mpq.suggestions import did_you_mean
from mpq.tables import held

if TYPE_CHECKING:
    from mpq.tables import CostTable


def build_problem(
    table: CostTable,
    limits: Sequence[Limit],
    objective: str,
    pins: Mapping[str, str],
    features: Mapping[str, Any],
) -> AllocationProblem:
    """The problem: the objective where allowed, every other quantity as a resource, limits as budgets.

    Interactions (`pairs` of the table) belong to the sensitivity, conversions (`transitions`) to their quantity: they
    follow it, whichever is the objective. Offsets of the objective are left out: a constant decides nothing.

    Raises:
        ValueError: if the objective is unknown or a peak, a pin matches nothing, or a unit has no option left.
    """
    _check_roles(table, limits, objective)
    allowed = _allowed(table, pins)
    resources: dict[str, Any] = {}
    peaks: dict[str, Any] = {}
    for name, values in table.quantities.items():
        if name != objective and not name.endswith("_se"):
            finite = np.where(allowed, values, 0.0)
            (resources if table.aggregates[name] == "sum" else peaks)[name] = _resource(table, name, finite)
    budgets: dict[str, float] = {}
    for limit in limits:
        budgets[limit.resource] = min(limit.value, budgets.get(limit.resource, np.inf))
    error = table.quantities.get(f"{objective}_se")
    blocks = coupled(table)
    return AllocationProblem(
        objective=np.where(allowed, table.quantity(objective), np.inf),
        objective_se=None if error is None else np.where(allowed, error, 0.0),
        resources=resources,
        budgets={name: value for name, value in budgets.items() if name in resources},
        peak_resources=peaks,
        peak_budgets={name: value for name, value in budgets.items() if name in peaks},
        ties=table.ties,
        pairs=blocks.get(objective, {}),
        transitions={name: pairs for name, pairs in blocks.items() if name in resources},
        offsets={name: value for name, value in table.offsets.items() if name in resources or name in peaks},
        layers=tuple(np.asarray(table.units).tolist()),
        options=tuple(table.options),
        **_features(table, objective, features),
    )


def coupled(table: CostTable) -> dict[str, dict[tuple[int, int], Any]]:
    """The (options, options) terms of two units together, by the quantity they add to."""
    blocks = {name: dict(pairs) for name, pairs in table.transitions.items() if pairs}
    if table.pairs:
        both = blocks.setdefault("sensitivity", {})
        for key, block in table.pairs.items():
            both[key] = np.asarray(block, float) + np.asarray(both.get(key, 0.0), float)
    return blocks


def totals(table: CostTable, choices: NDArray[np.int64]) -> dict[str, float]:
    """What every quantity comes to for one option index a unit: offsets and couplings included, summed exactly."""
    rows, found, blocks = np.arange(len(table.units)), {}, coupled(table)
    for name, values in table.quantities.items():
        if name.endswith("_se"):
            continue
        chosen, offset = values[rows, choices], table.offsets.get(name, 0.0)
        if table.aggregates[name] == "sum":
            terms = [block[choices[i], choices[j]] for (i, j), block in blocks.get(name, {}).items()]
            found[name] = math.fsum([offset, *chosen.tolist(), *terms])
        elif table.aggregates[name] == "max":
            found[name] = offset + float(chosen.max())
        else:
            step, unit, factor = held(table.alive[name])
            first = np.zeros(len(rows), dtype=np.int64)
            found[name] = offset + SparsePeak(step, unit, first[unit], factor * chosen[unit]).largest(first)
    return found


def _check_roles(table: CostTable, limits: Sequence[Limit], objective: str) -> None:
    for role, name in (("the objective", objective), *(("a budget", limit.resource) for limit in limits)):
        if name.endswith("_se"):
            raise ValueError(f"{name!r} holds standard errors, which do not add up: it cannot be {role}")
    if any(limit.resource == objective for limit in limits):
        raise ValueError(f"{objective!r} must be the objective or have a budget, not both")
    if table.aggregates.get(objective) == "peak":
        raise ValueError(f"{objective!r} is a peak over steps: it can have a budget, but not be the objective")


def _features(table: CostTable, objective: str, features: Mapping[str, Any]) -> dict[str, Any]:
    """Features of the problem; the objective adds up as its aggregate says, costs of formats go by their label."""
    asked = {name: value for name, value in features.items() if value is not None}
    if table.aggregates.get(objective) == "max":
        asked.setdefault("norm", math.inf)
    costs = asked.get("format_costs")
    if isinstance(costs, Mapping):
        labels = {str(option): float(cost) for option, cost in costs.items()}
        for label in labels:
            if label not in table.options:
                raise ValueError(
                    f"format_costs of {label!r} must be for an option of the table{did_you_mean(label, table.options)}"
                )
        asked["format_costs"] = [labels.get(option, 0.0) for option in table.options]
    return asked


def _allowed(table: CostTable, pins: Mapping[str, str]) -> NDArray[np.bool_]:
    allowed = table.allowed.copy()
    names = [layer.name for layer in table.layers] or [str(unit) for unit in table.units]
    for pattern, option in pins.items():
        if option not in table.options:
            raise ValueError(f"pin of {pattern!r} must be an option of the table{did_you_mean(option, table.options)}")
        layers = np.isin(np.asarray(names), matching(pattern, names, "pins"))
        units = layers[table.layer_index]
        keep = np.array([label == option for label in table.options])
        allowed[units] = table.allowed[units] & keep  # a later pattern overrides an earlier one
    for unit in np.flatnonzero(~allowed.any(axis=1))[:1]:
        raise ValueError(
            f"{str(table.units[unit])!r} has no option left: " + _why(table, int(unit)) + "; widen its options"
        )
    return allowed


def _why(table: CostTable, unit: int) -> str:
    reasons = [f"{o} has no finite {', '.join(q)}" for u, o, q in table.masked if u == table.units[unit]]
    reasons += [text for text in table.provenance.get("refused", ()) if text.startswith(f"{table.units[unit]}: ")]
    return "; ".join(reasons) or "its pin is no candidate of it"


def _resource(table: CostTable, name: str, finite: NDArray[np.float64]) -> Any:
    how = table.aggregates[name]
    if how == "sum":
        return finite
    units = np.arange(len(table.units))
    step, unit, factor = (units, units, np.ones(len(units))) if how == "max" else held(table.alive[name])
    count = len(table.options)
    option = np.tile(np.arange(count), len(step))
    value = np.repeat(factor, count) * finite[np.repeat(unit, count), option]
    return SparsePeak(step=np.repeat(step, count), layer=np.repeat(unit, count), option=option, value=value)
