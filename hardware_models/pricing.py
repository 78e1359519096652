"""The arithmetic behind `Target.costs`, in arrays: which row of the target serves a cell, and what the cell costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat, parse

from .bops import bit_operations
from .roofline import Rates, roofline
from .size import size_bytes, value_bytes
from .workload import Work, is_lookup, work_of

if TYPE_CHECKING:
    from mpq.layers import Layer, Network
    from mpq.options import Option

    from .target import ComputeUnit, Number, Target

Table = NDArray[np.float64]  # (layers, columns)
Rows = NDArray[np.intp]  # (layers, columns)

REFUSED = -1


@dataclass(frozen=True)
class Pricing:
    """Costs of a network's layers in pairs of formats on a target.

    Each column is a pair: a weight format or None, as it is stored, and an activation format or None, the model's
    dtype. The pair (None, None) is the unquantised model.
    """

    target: Target
    network: Network
    weights: Sequence[NumberFormat | None]
    activations: Sequence[NumberFormat | None]
    work: Work
    batch: int

    @classmethod
    def of(cls, target: Target, network: Network, options: Sequence[Option], batch: int, phase: str | None) -> Pricing:
        """Options in order, then the unquantised model as the last column."""
        weights = [*(option.weight for option in options), None]
        activations = [*(option.activation for option in options), None]
        return cls(target, network, weights, activations, work_of(network, batch, phase), batch)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Every quantity that the target prices; NaN where a table of rates is needed and has no row."""
        layers = self.network.layers
        weight_bits = np.array([(fmt or self.dtype).bits for fmt in self.weights])
        activation_bits = np.array([(fmt or self.dtype).bits for fmt in self.activations])
        tables = {
            "size": size_bytes(layers, self.weights),
            "value_size": value_bytes(layers, self.weights),
            "bops": bit_operations(self.work.macs / self.batch, weight_bits, activation_bits),
        }
        memory = self.target.memory
        if memory is not None:
            rates = _rates(self.target)
            priced = roofline(self.work, rates, self.row, tables["size"], activation_bits.astype(np.float64))
            tables["latency"] = priced.latency
            if memory.pj_per_bit is not None:
                tables["energy"] = priced.energy
        return tables

    @cached_property
    def row(self) -> Rows:
        """The row of the target's table that serves each cell; one past the last for lookups, REFUSED for none."""
        by_kind: dict[str, list[int]] = {}
        for layer in self.network.layers:
            kind = _kind(layer)
            if kind not in by_kind:
                by_kind[kind] = [self._row(kind, column) for column in range(len(self.weights))]
        rows = [by_kind[_kind(layer)] for layer in self.network.layers]
        return np.array(rows, dtype=np.intp).reshape(-1, len(self.weights))

    @cached_property
    def dtype(self) -> NumberFormat:
        """The model's own format."""
        return parse(self.network.dtype)

    def pair(self, column: int) -> tuple[str, str]:
        """Names of the two formats of a column."""
        return (self.weights[column] or self.dtype).name, (self.activations[column] or self.dtype).name

    def reason(self, layer: int, column: int) -> str:
        """Why a cell is refused."""
        kind, (weight, activation) = _kind(self.network.layers[layer]), self.pair(column)
        with_input = "" if kind == "lookup" else f" and {activation} inputs"
        return f"{self.target.name} ({self.target.runtime}) has no kernel for {weight} weights{with_input} in a {kind}"

    def estimates(self, used: Rows) -> dict[str, tuple[str, ...]]:
        """The estimated numbers behind each column that rests on any, given the rows in use."""
        if self.target.memory is None:
            return {}
        tables: list[tuple[Number, ...]] = [self.target.memory.numbers]
        tables += [_numbers(self.target, row) for row in np.unique(used) if 0 <= row < len(self.target.rows)]
        guessed = {n for numbers in tables for n in numbers if n.is_estimate}
        names: dict[str, list[str]] = {"latency": [], "energy": []}
        for number in sorted(guessed, key=lambda n: (n.where, n.key)):
            names["energy" if number.key.startswith("energy") else "latency"].append(f"{number.where}: {number.key}")
        return {column: tuple(found) for column, found in names.items() if found and column in self.tables}

    def _row(self, kind: str, column: int) -> int:
        if self.target.memory is None:
            return 0
        weight, activation = self.pair(column)
        if kind == "lookup":
            readable = weight == self.dtype.name or self.target.reads(weight)
            return len(self.target.rows) if readable else REFUSED
        found = self.target.row(weight, activation, kind)
        return REFUSED if found is None else found


def _kind(layer: Layer) -> str:
    if is_lookup(layer):
        return "lookup"
    return "linear" if layer.kind == "embedding" else layer.kind


def _rates(target: Target) -> Rates:
    entries: list[tuple[ComputeUnit, float]] = [
        (target.unit(row), entry.dequant_s_per_weight) for row, entry in enumerate(target.rows)
    ]

    def column(values: Sequence[float], lookup: float) -> NDArray[np.float64]:
        return np.array([*values, lookup], dtype=np.float64)

    memory = target.memory
    return Rates(
        ops_per_s=column([unit.ops_per_s for unit, _ in entries], np.inf),
        align_k=column([unit.align_k for unit, _ in entries], 1),
        align_n=column([unit.align_n for unit, _ in entries], 1),
        launch_s=column([unit.launch_overhead_s for unit, _ in entries], 0),
        dequant_s_per_weight=column([dequant for _, dequant in entries], 0),
        joules_per_mac=column([(unit.pj_per_mac or 0.0) * 1e-12 for unit, _ in entries], 0),
        bytes_per_s=memory.bytes_per_s if memory else np.inf,
        joules_per_byte=8e-12 * (memory.pj_per_bit or 0.0) if memory else 0.0,
    )


def _numbers(target: Target, row: int) -> tuple[Number, ...]:
    entry, unit = target.rows[row], target.unit(row)
    if entry is unit:
        return unit.numbers
    return (*entry.numbers, *(number for number in unit.numbers if number.key != "dequant_s_per_weight"))
