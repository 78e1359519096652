"""From a cost table to a plan and back: solve under budgets, predict what any plan costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.budgets import format_quantity
from mpq.limits import Limit, apply_budgets
from mpq.options import Option, matching
from mpq.plan import AskedBudget, Entry, Plan, Split, check_layers
from mpq.problem import Allocation, InfeasibleError
from mpq.table_problem import build_problem

if TYPE_CHECKING:
    from mpq.tables import CostTable


def solve_table(
    table: CostTable,
    budgets: Mapping[str, float | str],
    *,
    objective: str = "sensitivity",
    solver: Any = "auto",
    pins: Mapping[str, Option | str] | None = None,
    **settings: Any,
) -> Plan:
    """The best plan of a table under budgets; needs neither the model nor torch.

    Args:
        table: scores and costs, with the layers they belong to.
        budgets: a limit a quantity, a number in base units or text such as "18%", "4.5 bits", "4 ms".
        objective: the quantity to minimise.
        solver: a name or an instance of `mpq.solvers`.
        pins: name patterns and the option those layers take; `provenance["price_of_pins"]` says what they cost.
        **settings: the solver's, where it is given by name.

    Raises:
        InfeasibleError: if no plan keeps the budgets; it says what could be reached.
        ValueError: if a name, a unit or a pattern is wrong, or the table has no layers.
    """
    if not table.layers:
        raise ValueError(
            "the table has no layers to make a plan for (it was written by hand?): solve table.problem(budgets) instead"
        )
    limits, how = apply_budgets(table, budgets), {"solver": solver, **settings}
    labels = {pattern: str(option) for pattern, option in (pins or {}).items()}
    allocation = _solve(table, limits, objective, labels, how)
    plan = _plan(table, allocation, objective, limits)
    if not labels:
        return plan
    names = [layer.name for layer in table.layers]
    pinned = dict.fromkeys(name for pattern in labels for name in matching(pattern, names, "pins"))
    free = _solve(table, limits, objective, {}, how)
    price = {name: plan.predicted[name] - value for name, value in _predicted(free, objective).items()}
    return replace(plan, edited=tuple(pinned), provenance={**plan.provenance, "price_of_pins": price})


def predict(table: CostTable, plan: Plan) -> dict[str, float]:
    """What the table predicts for a plan, a quantity in base units.

    Raises:
        ValueError: if the plan is for other layers, or takes an option the table does not price.
    """
    problem = build_problem(table, (), "sensitivity", {}, {})
    objective, usage = problem.evaluate(choices_of(table, plan))
    if not np.isfinite(objective):
        raise ValueError("the plan takes an option that the table does not allow for its layer: it has no prediction")
    return {"sensitivity": objective, **usage}


def choices_of(table: CostTable, plan: Plan) -> NDArray[np.int64]:
    """The plan as an option index a unit of the table.

    Raises:
        ValueError: if the plan is for other layers, cut otherwise, or takes an option the table does not price.
    """
    check_layers(plan, [layer.name for layer in table.layers])
    by_name = {entry.layer.name: entry.choice for entry in plan.entries}
    choices = np.empty(len(table.units), dtype=np.int64)
    for position, layer in enumerate(table.layers):
        choice = by_name[layer.name]
        if isinstance(choice, Option):
            codes: Any = _column(table, choice, layer.name)
        elif choice.granularity != table.granularity:
            raise ValueError(f"{layer.name!r} is cut into {choice.granularity}, the table into {table.granularity}")
        else:
            codes = np.array([_column(table, option, layer.name) for option in choice.options])[choice.codes]
        choices[table.layer_index == position] = codes
    return choices


def _column(table: CostTable, option: Option, layer: str) -> int:
    if str(option) not in table.options:
        raise ValueError(f"the table does not price {str(option)!r} ({layer!r}): it has {', '.join(table.options)}")
    return table.options.index(str(option))


def _solve(
    table: CostTable, limits: tuple[Limit, ...], objective: str, pins: Mapping[str, str], how: Mapping[str, Any]
) -> Allocation:
    problem = build_problem(table, limits, objective, pins, {})
    try:
        allocation: Allocation = import_module("mpq.solvers").solve(problem, **how)
    except InfeasibleError as error:
        raise _in_words(error, table, limits) from error
    return allocation


def _in_words(error: InfeasibleError, table: CostTable, limits: tuple[Limit, ...]) -> InfeasibleError:
    """The error with the budgets as they were asked, and what can be reached in the same units."""
    parts = []
    for limit in limits:
        if limit.resource in error.reachable:
            reached, measure = error.reachable[limit.resource], table.measures[limit.resource]
            whole = table.reference.get(limit.resource)
            share = f" ({reached / whole:.1%})" if whole else ""
            parts.append(
                f"{limit.meaning}, but the smallest that can be reached is {format_quantity(reached, measure)}{share}"
            )
    if not parts:
        return error
    also = " with the other budgets in force, or alone where the others already conflict" if len(limits) > 1 else ""
    return InfeasibleError(f"no plan keeps the budgets: {'; '.join(parts)}{also}", error.reachable, error.budgets)


def _predicted(allocation: Allocation, objective: str) -> dict[str, float]:
    return {objective: allocation.objective, **allocation.usage}


def _plan(table: CostTable, allocation: Allocation, objective: str, limits: tuple[Limit, ...]) -> Plan:
    options = tuple(Option.parse(label) for label in table.options)
    entries = []
    for position, layer in enumerate(table.layers):
        mine = np.flatnonzero(table.layer_index == position)
        chosen = allocation.choices[mine]
        if table.granularity == "layer":
            entries.append(Entry(layer, options[chosen[0]]))
        else:
            columns = np.flatnonzero(table.allowed[mine].any(axis=0))
            codes = np.searchsorted(columns, chosen).astype(np.uint8)
            entries.append(Entry(layer, Split(table.granularity, tuple(options[c] for c in columns), codes)))
    return Plan(
        entries=tuple(entries),
        fingerprint=table.fingerprint,
        predicted=_predicted(allocation, objective),
        measures=dict(table.measures),
        proof=allocation.proof,
        budgets=tuple(
            AskedBudget(limit.resource, limit.asked, limit.value, table.measures[limit.resource], limit.meaning)
            for limit in limits
        ),
        outside=dict(table.offsets),
        provenance=dict(table.provenance),
        table=table,
    )
