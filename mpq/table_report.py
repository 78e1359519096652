"""Answers for saved tables in words, CSV and JSON: an allocation under budgets, a frontier."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.arrays import FloatArray
from mpq.budgets import format_quantity
from mpq.json_answers import json_text, proof_answer
from mpq.problem import Proof
from mpq.terminal import open_console, plan_lines, print_table, show_layers

if TYPE_CHECKING:
    from rich.console import Console

    from mpq.planning import Solution
    from mpq.tables import CostTable

MOST_UNITS = 200  # printed one by one
MOST_LAYERS_PRICED = 100_000  # beyond, prices would take longer than the answer
WIDTH, HEIGHT = 64, 12  # of the plot, in characters


def show_solution(solution: Solution) -> None:
    """The option of every layer or unit, totals against budgets, what binds and what more would buy, the proof."""
    console = open_console()
    if solution.table.layers:
        plan = solution.plan()
        show_layers(console, plan)
        console.print(next(iter(plan_lines(plan))) + "\n", soft_wrap=True, highlight=False)
    else:
        _show_units(console, solution)
    prices = {} if solution.robust else budget_prices(solution)
    header = ("predicted", "total", "limit", "used", f"1% more lowers {solution.objective} by about")[
        : 5 if prices else 4
    ]
    rows = [row[: len(header)] for row in _total_rows(solution, prices)]
    print_table(console, header, rows, right=(1, 2, 3, 4)[: len(header) - 1])
    for line in _solution_lines(solution):
        console.print(line, soft_wrap=True, highlight=False)


def solution_csv(solution: Solution) -> str:
    """The option of every unit as comma-separated values."""
    return _csv([("unit", "option"), *solution.options.items()])


def solution_json(solution: Solution) -> str:
    """The answer as JSON; quantities in base units."""
    prices = budget_prices(solution)
    robust = solution.robust
    content = {
        "minimised": solution.objective,
        "objective": solution.allocation.objective,
        "totals": solution.totals,
        "measures": {name: solution.table.measures[name] for name in solution.totals},
        "budgets": [
            {
                "quantity": limit.resource,
                "asked": limit.asked,
                "limit": limit.value,
                "used": solution.totals[limit.resource],
                "shadow_price": prices.get(limit.resource),
            }
            for limit in solution.limits
        ],
        "proof": proof_answer(solution.proof),
        "robust": None if robust is None else {"worst_case": solution.worst_case, **proof_answer(robust.proof)},
        "options": solution.options,
    }
    return json_text(content)


def budget_prices(solution: Solution) -> dict[str, float]:
    """How much the objective would fall for one more base unit of each budget; empty where that is not known."""
    if len(solution.table.units) > MOST_LAYERS_PRICED:
        return {}
    try:
        found: dict[str, float] = import_module("mpq.solvers.multipliers").shadow_prices(solution.problem)
    except ValueError:  # a problem without prices: a norm, peaks, budgets that can only just be kept
        return {}
    return found


def _show_units(console: Console, solution: Solution) -> None:
    table, choices = solution.table, solution.allocation.choices
    names = list(table.quantities)
    if len(choices) <= MOST_UNITS:
        rows = [
            (unit, option, *(_figure(table, name, table.quantities[name][i, choices[i]]) for name in names))
            for i, (unit, option) in enumerate(solution.options.items())
        ]
        print_table(console, ("unit", "option", *names), rows, right=tuple(range(2, 2 + len(names))))
        return
    console.print(
        f"{len(choices):,} units: {_option_counts(table, choices)}; --csv lists each\n",
        soft_wrap=True,
        highlight=False,
    )


def _total_rows(solution: Solution, prices: dict[str, float]) -> Iterator[tuple[str, ...]]:
    table = solution.table
    limits: dict[str, float] = {}
    for limit in solution.limits:
        limits[limit.resource] = min(limit.value, limits.get(limit.resource, math.inf))
    first = (solution.objective, *limits)
    for name in (*first, *(name for name in solution.totals if name not in first)):
        total, measure = solution.totals[name], table.measures[name]
        shown = format_quantity(total, measure)
        if f"{name}_se" in table.quantities:
            shown += f" ±{_error(solution, name):.2g}"
        if name == solution.objective:
            yield name, shown, "minimised", "", ""
        elif name not in limits:
            yield name, shown, "", "", ""
        else:
            most, price, gain = limits[name], prices.get(name), ""
            if price is not None:
                fall = format_quantity(price * abs(most) / 100, table.measures[solution.objective])
                gain = fall if price > 0 else "nothing: does not bind"
            used = f"{total / most:.1%}" if most > 0 else ""
            yield name, shown, format_quantity(most, measure), used, gain


def _error(solution: Solution, name: str) -> float:
    """Standard error of a total whose terms err independently."""
    errors, choices = solution.table.quantities[f"{name}_se"], solution.allocation.choices
    return float(np.linalg.norm(errors[np.arange(len(choices)), choices]))


def _solution_lines(solution: Solution) -> Iterator[str]:
    for limit in solution.limits:
        yield f"budget: {limit.meaning}"
    norm = solution.problem.norm
    if norm != 1:
        what = "the worst" if norm == math.inf else f"the {norm:g}-norm"
        yield f"minimised: {what} of {solution.objective}, {solution.allocation.objective:.4g}"
    if solution.robust is None:
        yield f"proof: {proof_in_words(solution.proof)}"
        return
    robust = solution.robust
    errors = f"{robust.deviations:g} standard error{'' if robust.deviations == 1 else 's'}"
    worst = f"{solution.objective} {solution.worst_case:.4g} at worst, {errors} off"
    yield f"robust: {worst}; {_price_of_caution(robust)}"
    yield f"proof, for the worst case: {proof_in_words(robust.proof)}"


def _price_of_caution(robust: Any) -> str:
    gap = robust.allocation.proof.gap
    if gap is None:
        return "the price of caution is not known"
    return f"caution costs at most {_percent(gap)} of the total" if gap else "caution costs nothing"


def proof_in_words(proof: Proof) -> str:
    """What is proved about an answer.

    Example:
        >>> proof_in_words(Proof("feasible", 0.99, 0.01))
        'feasible: at most 1% above the best possible; the solver stopped before it knew more'
        >>> proof_in_words(Proof("heuristic"))
        'heuristic: found by a rule, without a bound on how much better it could be'
    """
    if proof.status == "optimal":
        return "optimal: nothing in this table is better under these budgets"
    tail = "the solver stopped before it knew more" if proof.status == "feasible" else "found by a rule"
    if proof.gap is None:
        return f"{proof.status}: {tail}, without a bound on how much better it could be"
    return f"{proof.status}: at most {_percent(proof.gap)} above the best possible; {tail}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g}%" if fraction else "0%"


def show_front(table: CostTable, front: Any, names: Sequence[str], *, points: int, how: str = "") -> None:
    """A frontier as a table of at most so many points, the knee marked; a plot where one resource is traded.

    The last line says how to get at points; by default those of a saved table.
    """
    amounts, console = _amounts(table, front, names), open_console()
    plotted = amounts[:, 0], amounts[:, -1]
    if len(names) == 2:
        knee = knee_of(*plotted)
        chosen = spread(*plotted, points, keep=knee)
    else:  # no order but that of the first resource, in which neighbours may be far apart
        knee, plotted = int((front.choices == front.knee().choices).all(axis=1).argmax()), (np.empty(0), np.empty(0))
        chosen = spread(np.arange(len(amounts), dtype=float), np.zeros(len(amounts)), points, keep=knee)
    rows = [
        (
            *(_amount(table, name, value) for name, value in zip(names, amounts[i], strict=True)),
            _option_counts(table, front.choices[i]),
            "knee" if i == knee else "",
        )
        for i in chosen
    ]
    print_table(console, (*names, "options", ""), rows, right=tuple(range(len(names))))
    for line in plot_lines(*plotted):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    count = len(amounts)
    shown = f"{len(chosen)} of {count:,} points shown" if len(chosen) < count else f"{count} point{'s' * (count > 1)}"
    if not how:
        listed = ", --csv lists all" if len(chosen) < count else ""
        limits = " ".join(f"--budget {name}=LIMIT" for name in names[:-1])
        console.print(f"{shown}{listed}; one of them: mpq solve TABLE {limits}", soft_wrap=True, highlight=False)
        return
    console.print(f"{shown}; {how}", soft_wrap=True, highlight=False)


def _amount(table: CostTable, name: str, value: float) -> str:
    """What was measured is no quantity of the table and has no unit."""
    return format_quantity(value, table.measures.get(name, ""))


def front_csv(table: CostTable, front: Any, names: Sequence[str]) -> str:
    """Every point as comma-separated values, in base units: the quantities, then how many units take each option."""
    header = [f"{name} [{table.measures[name]}]" if table.measures[name] else name for name in names]
    rows: list[Sequence[Any]] = [(*header, *table.options)]
    for amounts, choices in zip(_amounts(table, front, names).tolist(), front.choices, strict=True):
        counts = np.bincount(choices, minlength=len(table.options))
        rows.append((*map(repr, amounts), *counts.tolist()))
    return _csv(rows)


def front_json(table: CostTable, front: Any, names: Sequence[str]) -> str:
    """Every point as JSON, in base units, with the option of every unit by its position in `options`."""
    content = {
        "resource": names[0] if len(names) == 2 else list(names[:-1]),
        "minimised": names[-1],
        "measures": {name: table.measures[name] for name in names},
        "options": list(table.options),
        "units": np.asarray(table.units).tolist(),
        "points": [
            {**dict(zip(names, amounts, strict=True)), "choices": np.asarray(choices).tolist()}
            for amounts, choices in zip(_amounts(table, front, names).tolist(), front.choices, strict=True)
        ],
    }
    return json_text(content)


def _amounts(table: CostTable, front: Any, names: Sequence[str]) -> FloatArray:
    """(points, quantities): the resources and what they buy, with what no option touches."""
    offset = table.offsets.get(names[-1], 0.0) if front.problem.norm == 1 else 0.0
    amounts: FloatArray = np.column_stack([front.resource.reshape(len(front), -1), front.objective + offset])
    return amounts


def spread(x: FloatArray, y: FloatArray, count: int, *, keep: int | None = None) -> list[int]:
    """At most `count` points at even distances along a front, both ends and `keep` among them.

    Example:
        >>> spread(np.arange(9.0), -np.arange(9.0), 3)
        [0, 4, 8]
    """
    if len(x) <= count:
        return list(range(len(x)))
    along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(_unit(x)), np.diff(_unit(_scaled(y)[0]))))])
    stops = np.linspace(0, along[-1], count)
    after = np.searchsorted(along, stops).clip(1, len(x) - 1)
    chosen = set(np.where(stops - along[after - 1] < along[after] - stops, after - 1, after).tolist())
    if keep is not None and keep not in chosen:
        inner = [i for i in chosen if i not in (0, len(x) - 1)]
        if inner:
            chosen.discard(min(inner, key=lambda i: abs(i - keep)))
            chosen.add(keep)
    return sorted(chosen)


def knee_of(x: FloatArray, y: FloatArray) -> int | None:
    """The point furthest below the line through both ends, where more of the resource starts to buy less; None: none.

    Example:
        >>> knee_of(np.array([0.0, 1.0, 2.0, 3.0]), np.array([9.0, 2.0, 1.0, 0.0]))
        1
    """
    if len(x) < 3:
        return None
    below = 1 - _unit(x) - _unit(y)
    best = int(below.argmax())
    return best if below[best] > 0.05 else None


def plot_lines(x: FloatArray, y: FloatArray) -> Iterable[str]:
    """A plot of points in characters; y is logarithmic where it spans more than a factor of 30."""
    if len(x) < 3:
        return []
    scaled, logarithmic = _scaled(y)
    height = _unit(scaled)
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    places = np.stack([(1 - height) * (HEIGHT - 1), _unit(x) * (WIDTH - 1)], axis=1).round().astype(int)
    for row, column in np.unique(places, axis=0).tolist():
        canvas[row][column] = "•"
    marks = {0: f"{y.max():.3g}", HEIGHT - 1: f"{y.min():.3g}" + (" log" if logarithmic else "")}
    margin = max(map(len, marks.values()))
    rows = [f"{marks.get(i, ''):>{margin}} │{''.join(row).rstrip()}" for i, row in enumerate(canvas)]
    return [*rows, " " * margin + " └" + "─" * WIDTH]


def _scaled(y: FloatArray) -> tuple[FloatArray, bool]:
    """Values as they are shown, and whether those are logarithms."""
    logarithmic = bool(y.min() > 0 and y.max() > 30 * y.min())
    return (np.log(y), True) if logarithmic else (y, False)


def _unit(values: FloatArray) -> FloatArray:
    """Values from 0 to 1."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


def _figure(table: CostTable, name: str, value: float) -> str:
    return format_quantity(float(value), table.measures[name])


def _option_counts(table: CostTable, choices: NDArray[np.integer[Any]]) -> str:
    counts = np.bincount(choices, minlength=len(table.options))
    return ", ".join(f"{label} x{n:,}" for label, n in zip(table.options, counts.tolist(), strict=True) if n)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
