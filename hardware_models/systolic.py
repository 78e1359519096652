"""Systolic arrays: cycles of `systolic_cycles`, behind a memory with double buffers (`double_buffering`).

    latency = calls * (groups * cycles of a product + cycles of the first load) / frequency

Groups of a convolution (depthwise: one a channel) and experts are products of their own, one after the other, and a
depthwise layer leaves all but one column idle. Formats change two things: bits to move, and, where the array packs
operands, the steps along k.

Bits counted at the memories that the device file names: dram; input_buffer, weight_buffer and output_buffer (or one
buffer for all), which the array reads and the memory fills, partial sums written and read back at `accumulator_bits`;
register, four accesses a multiply-add (two operands, a partial sum read and written); array, the operands that a
processing element hands on: inputs and weights under os, what streams and the partial sum under ws and is.

Good for an array's own utilisation by shape (narrow layers, depthwise, one position) and what stalls it. Left out:
vector units, im2col in software, sparsity. Row-stationary machines (Eyeriss) are approximated by ws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .array_kernels import (
    Products,
    bits_a_cycle,
    by_memory,
    dram_problems,
    half_buffers,
    lookup_bits,
    memories_of,
    numbers_behind,
    products_of,
    refusals,
)
from .cells import Cells
from .device_numbers import Entry
from .device_schema import FORMAT_PAIR, Key, TableSchema, integer, number
from .double_buffering import Operands, stalled_cycles
from .kernel_rows import TableRow, rows_of
from .prices import DeviceTables, Family, Prices
from .systolic_cycles import DATAFLOWS, PACKINGS, buffer_accesses, fold_cycles, lanes, mapped

Floats = NDArray[np.float64]

SCHEMA = {
    "array": TableSchema(
        (
            *FORMAT_PAIR,
            integer("rows", "processing elements a column", "rows", required=True),
            integer("columns", "processing elements a row", "columns", required=True),
            Key("dataflow", "text", required=True, choices=DATAFLOWS),
            Key("packing", "text", required=True, choices=PACKINGS),
            integer("multiplier_bits", "bits of a multiplier's operands", "multiplier", required=True),
            integer("accumulator_bits", "bits of a partial sum", "accumulator", required=True),
            number("frequency_hz", "cycles a second", "frequency", required=True),
        )
    )
}


@dataclass(frozen=True)
class SystolicArray:
    """One array with its memories, by name."""

    array: Entry
    memories: Mapping[str, Entry]

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s] of every cell, and the bits that pass at every memory."""
        row = rows_of([TableRow(self.array)], cells)
        reasons = refusals(row, cells, max_bits=self.array["multiplier_bits"])
        refused = reasons.astype(bool)
        rate = bits_a_cycle(self.memories["dram"], self.array["frequency_hz"])
        products, looked_up = products_of(cells), lookup_bits(cells)
        cycles, fill, moved = self._stalled(cells, products, rate)
        total = products.count * (products.groups * cycles + fill) + looked_up / rate
        bits = self._accesses(cells, products, moved)
        bits["dram"] = bits["dram"] + looked_up
        return Prices(
            tables={"latency": np.where(refused, np.nan, total / self.array["frequency_hz"])},
            reasons=reasons,
            accesses={name: np.where(refused, np.nan, table) for name, table in by_memory(self.memories, bits).items()},
            rests_on=lambda used: {"latency": numbers_behind(self.array, self.memories) if used.any() else ()},
            notes={"latency": f"{self.array['dataflow']} dataflow, packing {self.array['packing']}"},
        )

    def describe(self) -> list[str]:
        """One line."""
        rows, columns = self.array["rows"], self.array["columns"]
        formats = f"{' '.join(self.array.texts('weight'))} x {' '.join(self.array.texts('activation'))}"
        return [f"{rows} x {columns} array ({self.array['dataflow']}, packing {self.array['packing']}) runs {formats}"]

    def _steps(self, cells: Cells, products: Products) -> Floats:
        """Steps along k, (layers, columns)."""
        bits = self.array["multiplier_bits"]
        w, a = np.minimum(cells.weight_bits, bits), np.minimum(cells.activation_bits, bits)  # wider ones are refused
        return np.asarray(np.ceil(products.k / lanes(self.array["packing"], w, a, bits)))

    def _stalled(self, cells: Cells, products: Products, rate: float) -> tuple[Floats, Floats, dict[str, Floats]]:
        dataflow, rows, columns = (self.array[key] for key in ("dataflow", "rows", "columns"))
        on_rows, on_columns, streamed = mapped(dataflow, products.m, self._steps(cells, products), products.n)
        inner, outer = (on_rows, rows), (on_columns, columns)
        if dataflow == "os":
            outer, inner = inner, outer
        inputs, weights = products.inputs * cells.activation_bits, products.weight_bits
        chunks, room = self._chunks(products), half_buffers(self.memories)
        part = (
            np.minimum(rows / products.m, 1.0) if dataflow == "os" else 1.0 / chunks
        )  # of an operand, that has to fit
        operands = Operands(
            inputs=inputs,
            weights=weights,
            outputs=products.outputs * cells.activation_bits,
            inputs_stay=inputs * (1.0 if dataflow == "is" else part) <= room["inputs"],
            weights_stay=weights * (part if dataflow == "is" else 1.0) <= room["weights"],
            chunks=chunks,
        )
        fold = fold_cycles(dataflow, streamed / chunks, rows, columns)
        return stalled_cycles(dataflow, operands, (outer, inner), fold, rate)

    def _chunks(self, products: Products) -> Floats:
        """Pieces of what is streamed, so that the partial sums of one piece fit, (layers, 1)."""
        if self.array["dataflow"] == "os":
            return np.ones_like(products.m)
        _, across, streamed = mapped(self.array["dataflow"], *products.matmul)
        sums = streamed * np.minimum(across, self.array["columns"]) * self.array["accumulator_bits"]
        pieces = np.ceil(sums / half_buffers(self.memories)["outputs"])
        return np.asarray(np.minimum(np.maximum(pieces, 1.0), np.ceil(streamed)))

    def _accesses(self, cells: Cells, products: Products, moved: Mapping[str, Floats]) -> dict[str, Floats]:
        dataflow, wide = self.array["dataflow"], self.array["accumulator_bits"]
        steps = self._steps(cells, products)
        size = (self.array["rows"], self.array["columns"])
        input_reads, weight_reads, _ = buffer_accesses(dataflow, products.matmul, *size)
        _, _, written = buffer_accesses(dataflow, (products.m, steps, products.n), *size)
        chunks = self._chunks(products)
        input_reads = input_reads * (chunks if dataflow == "is" else 1)
        weight_reads = weight_reads * (chunks if dataflow == "ws" else 1)
        b_w, b_a = cells.weight_bits, cells.activation_bits
        finished = products.m * products.n
        passed = {
            "inputs": input_reads * b_a + moved["inputs"],
            "weights": weight_reads * b_w + moved["weights"],
            "outputs": 2 * (written - finished) * wide + finished * b_a + moved["outputs"],
        }
        macs = finished * products.k
        handed_on = {"os": b_w + b_a, "ws": b_a + wide, "is": b_w + wide}[dataflow]
        passed |= {"dram": sum(moved.values(), np.zeros(())), "array": macs * handed_on}
        passed |= {"register": macs * (b_w + b_a + 2 * wide)}
        return {name: bits * products.count * products.groups for name, bits in passed.items()}


def _read(tables: DeviceTables) -> SystolicArray | None:
    return SystolicArray(tables["array"][0], memories_of(tables)) if tables["array"] else None


def _check(tables: DeviceTables) -> Iterable[tuple[str, str, int, str]]:
    if tables["array"]:
        yield from dram_problems("array", tables)


FAMILY = Family("systolic", SCHEMA, _read, _check)
