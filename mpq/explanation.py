"""Why a plan looks as it does: which budgets stop it from getting better, and what each choice saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.budgets import format_quantity
from mpq.table_problem import coupled, totals
from mpq.tables import held

if TYPE_CHECKING:
    from mpq.tables import CostTable

Choices = NDArray[np.int64]  # (units,) option indices
FloatTable = NDArray[np.float64]


@dataclass(frozen=True)
class Binding:
    """How a budget holds a plan back.

    Attributes:
        quantity: What is limited.
        measure: Its base unit.
        used: What the plan takes of it.
        limit: What it may take.
        stops: Better choices (of one layer, or of tied ones together) that would exceed this budget.
        better: All better choices there are.
    """

    quantity: str
    measure: str
    used: float
    limit: float
    stops: int
    better: int

    def __str__(self) -> str:
        used, limit = (format_quantity(value, self.measure) for value in (self.used, self.limit))
        if not self.stops:
            return f"{self.quantity} {used} of {limit}: not the limit"
        return f"{self.quantity} {used} of {limit}: stops {self.stops} of {self.better} more accurate choices"


def bindings(
    table: CostTable, choices: Choices, limits: Mapping[str, float], objective: str = "sensitivity"
) -> list[Binding]:
    """Which budgets stop a plan from getting better by one more choice, those that stop most first.

    A better choice moves one layer, or the layers of one tie, to an option of a lower predicted objective. A budget
    stops it if the plan would exceed the budget then. A budget that stops none could be tightened to what is used
    without a change.

    Args:
        table: What the plan was solved from.
        choices: The plan.
        limits: The budgets in base units.
        objective: The quantity that was minimised.

    Example:
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["conv", "fc"], options=["int4", "int8"], quantities={
        ...     "sensitivity": [[2.0, 0.5], [3.0, 0.1]], "size": [[50, 100], [10, 20]], "latency": [[1, 2], [1, 1]]})
        >>> print(*bindings(table, np.array([0, 1]), {"size": 90, "latency": 9}), sep="; ")
        size 70 B of 90 B: stops 1 of 1 more accurate choices; latency 2.00 s of 9.00 s: not the limit
    """
    groups, used = _groups(table), totals(table, choices)
    score = _moved(table, objective, choices, groups)
    is_better = (score < used[objective]) & _allowed(table, groups)
    found = []
    for quantity, limit in limits.items():
        after = _moved(table, quantity, choices, groups)
        stopped = is_better & (after > limit + 1e-9 * abs(limit))
        found.append(
            Binding(quantity, table.measures[quantity], used[quantity], limit, int(stopped.sum()), int(is_better.sum()))
        )
    return sorted(found, key=lambda binding: -binding.stops)


def savings(
    table: CostTable, choices: Choices, quantities: Sequence[str], objective: str = "sensitivity"
) -> dict[str, NDArray[np.float64]]:
    """What each unit's choice saves against its most accurate option, a quantity; (units,), negative where it costs.

    Example:
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["conv", "fc"], options=["int4", "int8"], quantities={
        ...     "sensitivity": [[2.0, 0.5], [3.0, 0.1]], "size": [[50, 100], [10, 20]]})
        >>> savings(table, np.array([0, 1]), ["size"])["size"].tolist()
        [50.0, 0.0]
    """
    rows = np.arange(len(table.units))
    best = np.where(table.allowed, table.quantity(objective), np.inf).argmin(axis=1)
    return {name: table.quantity(name)[rows, best] - table.quantity(name)[rows, choices] for name in quantities}


def _groups(table: CostTable) -> list[NDArray[np.int64]]:
    """Units that move together."""
    tied = {unit for group in table.ties for unit in group}
    alone = (np.array([unit]) for unit in range(len(table.units)) if unit not in tied)
    return [*alone, *(np.array(group) for group in table.ties)]


def _allowed(table: CostTable, groups: list[NDArray[np.int64]]) -> NDArray[np.bool_]:
    return np.array([table.allowed[group].all(axis=0) for group in groups])


def _moved(table: CostTable, name: str, choices: Choices, groups: list[NDArray[np.int64]]) -> FloatTable:
    """The total of a quantity when one group takes another option, (groups, options)."""
    values = np.where(table.allowed, table.quantity(name), 0.0)
    current = values[np.arange(len(choices)), choices]
    change = values - current[:, None]
    if table.aggregates[name] == "sum":
        base = totals(table, choices)[name]
        after = base + np.array([change[group].sum(axis=0) for group in groups])
        return after + _transitions(table, name, choices, groups)
    offset = table.offsets.get(name, 0.0)
    return offset + np.array(list(_peaks(table, name, current, change, groups)))


def _transitions(table: CostTable, name: str, choices: Choices, groups: list[NDArray[np.int64]]) -> FloatTable:
    """What the terms of two units together change by."""
    owner = {int(unit): index for index, group in enumerate(groups) for unit in group}
    found = np.zeros((len(groups), len(table.options)))
    for (i, j), block in coupled(table).get(name, {}).items():
        now = block[choices[i], choices[j]]
        if owner[i] == owner[j]:
            found[owner[i]] += np.diagonal(block) - now
        else:
            found[owner[i]] += block[:, choices[j]] - now
            found[owner[j]] += block[choices[i], :] - now
    return found


def _peaks(
    table: CostTable, name: str, current: NDArray[np.float64], change: FloatTable, groups: list[NDArray[np.int64]]
) -> Iterator[FloatTable]:
    """The largest step when one group takes another option, (options,) a group."""
    units = np.arange(len(current))
    step, unit, factor = (
        (units, units, np.ones(len(units))) if table.aggregates[name] == "max" else held(table.alive[name])
    )
    sums = np.bincount(step, weights=factor * current[unit])
    for group in groups:
        mine = np.isin(unit, group)
        after = np.repeat(sums[:, None], change.shape[1], axis=1)
        np.add.at(after, step[mine], factor[mine, None] * change[unit[mine]])
        yield after.max(axis=0)
