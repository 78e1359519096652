"""What a cost table holds, in a terminal: sensitivity by option, what budgets can reach, where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpq.budgets import format_quantity
from mpq.json_answers import additive, reach_answer
from mpq.terminal import open_console, print_table

if TYPE_CHECKING:
    from mpq.tables import CostTable

MOST_UNITS = 200  # printed one by one
MOST_OPTIONS = 10  # columns


def show_table(table: CostTable) -> None:
    """Sensitivity of every unit in every option, the reach of every quantity, and where the table came from."""
    console = open_console()
    if "sensitivity" in table.quantities and len(table.units) <= MOST_UNITS and len(table.options) <= MOST_OPTIONS:
        print_table(
            console,
            ("sensitivity of", "weights", *table.options),
            list(_rows(table)),
            right=tuple(range(1, 2 + len(table.options))),
        )
    reaches = [_reach(table, name) for name in additive(table)]
    print_table(console, ("budget", "smallest", "largest", "100% is"), reaches, right=(1, 2, 3))
    for line in _lines(table):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _rows(table: CostTable) -> Iterator[tuple[str, ...]]:
    weights = [""] * len(table.units) if table.parameters is None else [f"{n:,}" for n in table.parameters.tolist()]
    scores = table.quantities["sensitivity"]
    for unit, count, row, allowed in zip(
        map(str, table.units), weights, scores.tolist(), table.allowed.tolist(), strict=True
    ):
        cells = (f"{value:.3g}" if may else "-" for value, may in zip(row, allowed, strict=True))
        yield unit, count, *cells


def _reach(table: CostTable, name: str) -> tuple[str, ...]:
    found = reach_answer(table, name)
    figures = (found["smallest"], found["largest"], found["whole"])
    return name, *("" if value is None else format_quantity(value, found["measure"]) for value in figures)


def _lines(table: CostTable) -> Iterator[str]:
    origin = table.provenance
    units = "layers" if table.granularity == "layer" else f"units ({table.granularity})"
    yield f"{len(table.units):,} {units}, {len(table.options)} options: {', '.join(table.options)}"
    if method := origin.get("sensitivity"):
        samples = f" on {origin['samples']} samples" if "samples" in origin else ""
        yield f"scored by {str(method).split('(', maxsplit=1)[0]}{samples}, in {table.measures['sensitivity']}"
    if device := origin.get("hardware", {}).get("target"):
        yield f"priced on {device}"
    if masked := int((~table.allowed).sum()):
        yield f"{masked} choices are not allowed (-)"
    if estimates := origin.get("estimates"):
        yield f"rests on estimated device numbers: {', '.join(estimates)}"
