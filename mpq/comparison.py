"""Where two plans for one network differ, layer by layer, and what each difference costs and loses."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mpq.plan import Entry, Plan, check_layers

if TYPE_CHECKING:
    from mpq.tables import CostTable


@dataclass(frozen=True)
class Difference:
    """A layer that takes something else in two plans.

    Attributes:
        layer: its name.
        first: its option in the first plan, as text.
        second: in the second.
        first_bytes: bytes of its weight in the first plan.
        second_bytes: in the second.
        loss_change: predicted loss in the second less that in the first; NaN without a table that has both options.
    """

    layer: str
    first: str
    second: str
    first_bytes: float
    second_bytes: float
    loss_change: float = math.nan

    @property
    def bytes_change(self) -> float:
        """Bytes in the second plan less those in the first."""
        return self.second_bytes - self.first_bytes

    @property
    def reason(self) -> str:
        """What the second plan bought there, in words."""
        cost = "costs more" if self.bytes_change > 0 else "saves" if self.bytes_change < 0 else "costs the same"
        if math.isnan(self.loss_change):
            return cost
        loss = "loses more" if self.loss_change > 0 else "loses less" if self.loss_change < 0 else "loses the same"
        if self.bytes_change >= 0 and self.loss_change > 0:
            return f"{cost} and {loss}: worse"
        return f"{cost} and {loss}"


@dataclass(frozen=True)
class Comparison:
    """Two plans for the same layers.

    Attributes:
        first: the one.
        second: the other.
        differences: the layers that differ, largest change of bytes first.
        measure: unit of the losses; empty where there are none.
    """

    first: Plan
    second: Plan
    differences: tuple[Difference, ...]
    measure: str = ""

    @cached_property
    def same(self) -> int:
        """Layers that take the same in both."""
        return len(self.first.entries) - len(self.differences)

    @property
    def bytes_change(self) -> float:
        """Bytes of the second plan less those of the first."""
        return self.second.size_bytes - self.first.size_bytes

    @property
    def loss_change(self) -> float:
        """Predicted loss of the second plan less that of the first: the sum over the layers; NaN where one is."""
        return math.fsum(difference.loss_change for difference in self.differences)

    def __str__(self) -> str:
        head = f"{self.same} of {len(self.first.entries)} layers take the same"
        if not self.differences:
            return head
        rows = [("layer", "first", "second", "bytes", "loss", "")]
        rows += [
            (d.layer, d.first, d.second, f"{d.bytes_change:+.0f}", _signed(d.loss_change), d.reason)
            for d in self.differences
        ]
        rows.append(("all", "", "", f"{self.bytes_change:+.0f}", _signed(self.loss_change), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, *lines])


def compare(first: Plan, second: Plan, table: CostTable | None = None) -> Comparison:
    """Where two plans differ.

    Args:
        first: a plan.
        second: another for the same layers.
        table: a cost table of whole layers, by which losses are predicted; by default that of either plan.

    Raises:
        ValueError: if the plans are for different layers.

    Example:
        >>> from mpq.layers import Layer
        >>> from mpq.options import Option
        >>> fc = Layer("fc", "linear", (4, 8), 32, 32, (1, 8), (1, 4))
        >>> print(compare(*(Plan((Entry(fc, Option(bits)),), "") for bits in ("int4", "int8"))))
        0 of 1 layers take the same
        layer  first  second  bytes  loss
        fc     int4   int8    +16    ?     costs more
        all                   +16    ?
    """
    check_layers(first, second.options)
    others = {entry.layer.name: entry for entry in second.entries}
    table = table or first.table or second.table
    losses = _losses(table) if table is not None else {}
    pairs = [(entry, others[entry.layer.name]) for entry in first.entries]
    found = [_difference(one, other, losses) for one, other in pairs if one.choice != other.choice]
    found.sort(key=lambda difference: (-abs(difference.bytes_change), difference.layer))
    measure = table.measures.get("sensitivity", "") if table is not None else ""
    return Comparison(first, second, tuple(found), measure)


def comparison_csv(comparison: Comparison) -> str:
    """The layers that differ as comma-separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layer", "first", "second", "first_bytes", "second_bytes", "loss_change"))
    for each in comparison.differences:
        loss = "" if math.isnan(each.loss_change) else each.loss_change
        writer.writerow((each.layer, each.first, each.second, each.first_bytes, each.second_bytes, loss))
    return text.getvalue()


def _difference(one: Entry, other: Entry, losses: dict[tuple[str, str], float]) -> Difference:
    name = one.layer.name
    before, after = (losses.get((name, str(entry.choice)), math.nan) for entry in (one, other))
    sizes = (one.storage_bits / 8, other.storage_bits / 8)
    return Difference(name, str(one.choice), str(other.choice), *sizes, after - before)


def _losses(table: CostTable) -> dict[tuple[str, str], float]:
    """{(layer, option): predicted loss} of a table whose units are whole layers."""
    if table.granularity != "layer" or "sensitivity" not in table.quantities:
        return {}
    values = table.quantities["sensitivity"]
    return {
        (str(unit), str(option)): float(values[row][column])
        for row, unit in enumerate(table.units)
        for column, option in enumerate(table.options)
    }


def _signed(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:+.4g}"
