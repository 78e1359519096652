"""From a table and limits to an `AllocationProblem`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.limits import Limit
from mpq.options import matching
from mpq.problem import AllocationProblem, SparsePeak
from mpq.suggestions import did_you_mean

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

    Raises:
        ValueError: if the objective is unknown, a pin matches nothing, or a unit has no option left.
    """
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
    if objective in budgets:
        raise ValueError(f"{objective!r} must be the objective or have a budget, not both")
    error = table.quantities.get(f"{objective}_se")
    return AllocationProblem(
        objective=np.where(allowed, table.quantity(objective), np.inf),
        objective_se=None if error is None else np.where(allowed, error, 0.0),
        resources=resources,
        budgets={name: value for name, value in budgets.items() if name in resources},
        peak_resources=peaks,
        peak_budgets={name: value for name, value in budgets.items() if name in peaks},
        ties=table.ties,
        pairs=dict(table.pairs),
        transitions={name: dict(blocks) for name, blocks in table.transitions.items() if name in resources},
        offsets={name: value for name, value in table.offsets.items() if name in resources or name in peaks},
        layers=tuple(np.asarray(table.units).tolist()),
        options=tuple(table.options),
        **features,
    )


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
    steps = np.stack([units, units], axis=1) if how == "max" else table.alive[name]
    options = np.arange(len(table.options))
    step, unit = np.repeat(steps, len(options), axis=0).T
    option = np.tile(options, len(steps))
    return SparsePeak(step=step, layer=unit, option=option, value=finite[unit, option])
