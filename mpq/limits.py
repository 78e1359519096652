"""Budgets applied to a table: what a limit is in base units, and what its 100 % or its denominator was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpq.budgets import Budget, format_quantity, parse_budget
from mpq.tables import MEASURES

if TYPE_CHECKING:
    from mpq.tables import CostTable


@dataclass(frozen=True)
class Limit:
    """A budget in base units.

    `resource` is the table's quantity it limits (`"4 bits values"` limits `value_size`), `asked` the text it came from,
    `meaning` says in words what 100 % or the denominator is.
    """

    resource: str
    value: float
    asked: str
    meaning: str


def apply_budgets(table: CostTable, budgets: Mapping[str, float | str]) -> tuple[Limit, ...]:
    """Every budget as a limit in base units.

    Percent is of the model as it stands, unquantised, on the same target; where the target cannot run that, of the most
    expensive allowed option. Bits are an average over the weights of the planned layers, pinned ones included. What the
    target has of a quantity is a limit as well, where plans could exceed it.

    Raises:
        ValueError: if the table lacks the quantity or what the budget refers to, or the unit is wrong.

    Example:
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["fc"], options=["int4"], quantities={"size": [[50.0]]},
        ...                   parameters=[100], offsets={"size": 8.0}, reference={"size": 408.0})
        >>> [limit.value for limit in apply_budgets(table, {"size": "25%"})]
        [102.0]
        >>> [limit.value for limit in apply_budgets(table, {"size": "4 bits"})]
        [58.0]
    """
    limits = []
    for quantity, asked in budgets.items():
        table.quantity(quantity)
        budget = parse_budget(quantity, asked, table.measures[quantity])
        limits.append(_applied(table, budget, str(asked)))
    return (*limits, *_of_target(table))


def limit_of(quantity: str, asked: float | str, table: CostTable | None = None) -> Limit:
    """What is asked of one quantity as a limit on that very quantity; a plain number may be anything, infinity as well.

    Without a table, text has the units that mpq itself gives the quantity, and there is no 100 % and no bits.

    Raises:
        ValueError: if the unit is wrong, or the limit is one on another quantity ("4 bits values").

    Example:
        >>> limit_of("latency", "3 ms").value, limit_of("size", math.inf).meaning
        (0.003, 'size without a limit')
    """
    own = {name: units[0] for name, units in MEASURES.items()}
    measure = own.get(quantity, "") if table is None else table.measures[quantity]
    if not isinstance(asked, str):
        value = float(asked)
        most = f"at most {format_quantity(value, measure)}" if math.isfinite(value) else "without a limit"
        return Limit(quantity, value, f"{value:.9g}", f"{quantity} {most}")
    budget = parse_budget(quantity, asked, measure)
    if table is None:
        if budget.kind != "absolute":
            raise ValueError(f"{asked!r} of {quantity} needs a cost table to be counted from: write base units instead")
        return limit_of(quantity, budget.value)
    limit = _applied(table, budget, asked)
    if limit.resource != quantity:
        raise ValueError(f"{asked!r} limits {limit.resource}, not {quantity}: write it without 'values'")
    return limit


def _of_target(table: CostTable) -> Iterator[Limit]:
    """What the target has, where a plan could ask for more."""
    for name, most in table.limits.items():
        if name in table.quantities and table.reachable(name)[1] > most:
            device = table.provenance.get("hardware", {}).get("target", "the target")
            meaning = f"{name} at most {format_quantity(most, table.measures[name])}, all that {device} has"
            yield Limit(name, most, "the target's", meaning)


def _applied(table: CostTable, budget: Budget, asked: str) -> Limit:
    name, measure = budget.quantity, table.measures[budget.quantity]
    if budget.kind == "absolute":
        return Limit(name, budget.value, asked, f"{name} at most {format_quantity(budget.value, measure)}")
    if budget.kind == "fraction":
        whole, what = _whole(table, name)
        limit = budget.value * whole
        meaning = f"{name} at most {budget} = {format_quantity(limit, measure)}; 100% is {what}, "
        return Limit(name, limit, asked, meaning + format_quantity(whole, measure))
    if table.parameters is None:
        raise ValueError(f"budget of {name} in bits needs the table's parameters, it has none: write bytes or percent")
    weights = int(table.parameters.sum())
    resource = name if budget.kind == "bits" else "value_size"
    table.quantity(resource)
    limit = budget.value * weights / 8 + table.offsets.get(resource, 0.0)
    meaning = f"{name} at most {budget} averaged over {weights:,} weights of planned layers = "
    return Limit(resource, limit, asked, meaning + format_quantity(limit, measure))


def _whole(table: CostTable, name: str) -> tuple[float, str]:
    if name in table.reference:
        return table.reference[name], "the model as it stands"
    return table.reachable(name)[1], "the dearest allowed option everywhere"
