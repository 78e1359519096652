"""The budgets of a plan in a report: which of them stop it from getting better, and what more of each would buy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np

from mpq.budgets import format_quantity
from mpq.explanation import Binding, bindings
from mpq.problem import InfeasibleError
from mpq.report_axes import tick_text
from mpq.report_layers import short_loss
from mpq.report_subject import Subject
from mpq.table_problem import build_problem

MOST_UNITS = 100_000  # beyond, prices would take longer than the page is worth


@dataclass(frozen=True)
class BudgetLine:
    """One budget.

    Attributes:
        quantity: what is limited.
        meaning: the budget in words.
        used, limit: texts.
        share: of the limit in use, where the limit is positive.
        binds: "binds", "not the limit" or "" where that is not known.
        reason: why.
        price: what more of it would buy, a sentence; empty where it is not known.
    """

    quantity: str
    meaning: str
    used: str
    limit: str
    share: float | None
    binds: str
    reason: str
    price: str


def budget_lines(subject: Subject) -> list[BudgetLine]:
    """Every budget, those that hold the plan back first."""
    plan, found = subject.plan, _bindings(subject)
    prices, reason = _prices(subject)
    lines = []
    for quantity, limit in subject.limits.items():
        asked = next(b for b in plan.budgets if b.quantity == quantity and b.limit == limit)
        used = _used(subject, quantity)
        binding = found.get(quantity)
        binds, why = _binds(binding, subject, quantity)
        price = _price(subject, prices.get(quantity), limit, asked.measure, quantity) if prices else reason
        lines.append(
            BudgetLine(
                quantity=quantity,
                meaning=asked.meaning,
                used="not known" if used is None else format_quantity(used, asked.measure),
                limit=format_quantity(limit, asked.measure),
                share=used / limit if used is not None and limit > 0 else None,
                binds=binds,
                reason=why,
                price=price,
            )
        )
    return sorted(lines, key=lambda line: line.binds != "binds")


def _used(subject: Subject, quantity: str) -> float | None:
    if quantity == "size":
        return subject.plan.size_bytes
    return subject.totals.get(quantity, subject.plan.predicted.get(quantity))


def _bindings(subject: Subject) -> dict[str, Binding]:
    table, choices = subject.table, subject.choices
    if table is None or choices is None or table.granularity != "layer" or subject.objective not in table.quantities:
        return {}
    if subject.pinned is not None:
        free = (subject.pinned < 0)[:, None] | (np.arange(len(table.options)) == subject.pinned[:, None])
        table = replace(table, quantities={n: np.where(free, v, np.nan) for n, v in table.quantities.items()})
    limits = {name: limit for name, limit in subject.limits.items() if name in table.quantities}
    return {binding.quantity: binding for binding in bindings(table, choices, limits, subject.objective)}


def _binds(binding: Binding | None, subject: Subject, quantity: str) -> tuple[str, str]:
    if binding is None:
        words = next((text for text in subject.plan.provenance.get("binding", ()) if text.startswith(quantity)), "")
        return ("" if not words else "not the limit" if words.endswith("not the limit") else "binds"), words
    if not binding.better:
        return "not the limit", "every layer has its most accurate option already"
    if not binding.stops:
        return "not the limit", f"none of {binding.better} more accurate choices of one layer would exceed it"
    return "binds", f"stops {binding.stops} of {binding.better} more accurate choices of one layer"


def _prices(subject: Subject) -> tuple[dict[str, float], str]:
    """Lagrange multipliers of the budgets, or why there are none."""
    table = subject.table
    if table is None:
        return {}, "What more of it would buy is known with the table: give --table TABLE.parquet"
    if subject.choices is None or len(table.units) > MOST_UNITS:
        return {}, "What more of it would buy is not known for this plan"
    if "norm" in subject.plan.provenance or "robust" in subject.plan.provenance:
        return {}, "What more of it would buy is known for sums alone, not for norms and robust plans"
    try:
        problem = build_problem(table, subject.limit_records, subject.objective, _pins(subject), {})
        prices: dict[str, float] = import_module("mpq.solvers.multipliers").shadow_prices(problem)
    except (ValueError, InfeasibleError) as error:
        return {}, f"What more of it would buy is not known: {error}"
    return prices, ""


def _pins(subject: Subject) -> dict[str, str]:
    if subject.pinned is None or subject.table is None or subject.table.granularity != "layer":
        return {}
    return subject.plan.pins(*subject.plan.edited)


def _price(subject: Subject, price: float | None, limit: float, measure: str, quantity: str) -> str:
    if price is None:
        return "What more of it would buy is not known: it is no sum over layers"
    if price <= 0:
        return "More of it would buy nothing"
    step = max(round_step(limit), 1.0 if measure == "B" else 0.0)
    objective_measure = subject.measures.get(subject.objective, "")
    what = subject.loss_name if subject.objective == "sensitivity" else f"predicted {subject.objective}"
    gain = short_loss(price * step, objective_measure)
    amount = tick_text(step, measure)
    more = f"{amount} more" if measure else f"{amount} more of {quantity}"
    total = subject.totals.get(subject.objective)
    share = f", {price * step / total:.1%} of it" if total and total > 0 else ""
    return f"{more} would lower the {what} by about {gain}{share}"


def round_step(limit: float) -> float:
    """A power of ten near 3 % of a limit: a step people think in.

    Example:
        >>> round_step(23_050.0), round_step(0.0059), round_step(7.2e7)
        (1000.0, 0.0001, 1000000.0)
    """
    return float(10.0 ** round(math.log10(0.03 * abs(limit)))) if limit else 1.0
