"""Arrays whose speed follows the operands' bits: Bit Fusion, Stripes, Loom, BISMO, each by its own law of cycles.

    latency = max(cycles of the law, ceil(bits moved / bits a cycle)) / frequency
    bits moved = outputs + the least of
        inputs * ceil(weights / half the weight buffer) + weights         weights stay, piece by piece
        inputs + ceil(inputs / half the input buffer) * weights           inputs stay
        inputs + weights + 2 (pieces - 1) * partial sums                  both pass once, in pieces of k

Arithmetic and the memory's interface overlap, as in Bit Fusion's simulator, where the longer one sets a layer's time.
It searches tilings to find the bits moved; the closed form above is a design of our own. Pieces of k are as many as
the smaller of the other two counts, and partial sums that fit half of the output buffer do not move. It moves 1 to 4 %
fewer bits than the published tilings for AlexNet's fully connected layers, and up to five times fewer for convolutions,
so convolutions bound by memory come out fast.

Bits counted at the memories that the device file names: dram; input_buffer, weight_buffer and output_buffer (or one
buffer for all). The array reads an input once for all its columns and a weight once for all positions that it works on
together; Bit Fusion's simulator charges a read of an input for every multiply-add. Partial sums are added in the array.

Good for the ratio of formats on arithmetic; see each law for its marks of doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
from .bismo import bismo_cycles
from .bitfusion import bitfusion_cycles, fused_units
from .cells import Cells
from .device_numbers import Entry
from .device_schema import FORMAT_PAIR, Key, TableSchema, integer, number
from .kernel_rows import TableRow, rows_of
from .loom import loom_cycles
from .prices import DeviceTables, Family, Prices
from .stripes import stripes_cycles

Floats = NDArray[np.float64]

NEEDS = {  # keys that a law needs besides rows and columns
    "bitfusion": ("min_bits",),
    "stripes": ("windows",),
    "loom": ("windows",),
    "bismo": ("depth",),
}

SCHEMA = {
    "bit_array": TableSchema(
        (
            Key("law", "text", required=True, choices=tuple(NEEDS)),
            *FORMAT_PAIR,
            integer(
                "rows", "inputs of a product (bismo: positions) that are worked on together", "rows", required=True
            ),
            integer("columns", "outputs that are worked on together", "columns", required=True),
            integer("windows", "positions that are worked on together", "windows"),
            integer("depth", "bits of a product that a cycle takes", "depth"),
            integer("max_bits", "bits of the widest operand", "max_bits", required=True),
            integer("min_bits", "bits of the narrowest unit", "min_bits"),
            integer("accumulator_bits", "bits of a partial sum", "accumulator", required=True),
            integer("fill_cycles", "cycles before a call's first result", "fill"),
            number("frequency_hz", "cycles a second", "frequency", required=True),
        )
    )
}


def moved_bits(
    inputs: ArrayLike, weights: ArrayLike, partials: ArrayLike, room: tuple[float, float, float]
) -> tuple[Floats, Floats, Floats]:
    """Bits of inputs, weights and partial sums that pass at the memory, by the order of loops that moves least.

    Args:
        inputs: bits of a product's inputs.
        weights: bits of its weights.
        partials: bits of its partial sums.
        room: bits of inputs, of weights and of partial sums that a tile may have.

    Example:
        Weights stay in three pieces for which the inputs pass three times; inputs stay in one piece; k is cut in two:

        >>> moved_bits([100, 50, 100], [300, 2000, 900], [999, 999, 20], (50, 100, 10))
        (array([300.,  50., 100.]), array([ 300., 2000.,  900.]), array([ 0.,  0., 40.]))
    """
    i, w, sums = np.broadcast_arrays(*(np.asarray(bits, np.float64) for bits in (inputs, weights, partials)))
    pieces_i, pieces_w = np.maximum(np.ceil(i / room[0]), 1), np.maximum(np.ceil(w / room[1]), 1)
    spilt = 2 * (np.minimum(pieces_i, pieces_w) - 1) * np.where(sums <= room[2], 0.0, sums)
    weights_stay, inputs_stay, both_pass = pieces_w * i + w, i + pieces_i * w, i + w + spilt
    least = np.minimum(weights_stay, np.minimum(inputs_stay, both_pass))
    once, again = least == both_pass, least == weights_stay
    return (
        np.where(once | ~again, i, pieces_w * i),
        np.where(once | again, w, pieces_i * w),
        np.where(once, spilt, 0.0),
    )


@dataclass(frozen=True)
class BitArray:
    """One array with its memories, by name."""

    array: Entry
    memories: Mapping[str, Entry]

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s] of every cell, and the bits that pass at every memory."""
        reasons = refusals(rows_of([TableRow(self.array)], cells), cells, max_bits=self.array["max_bits"])
        refused = reasons.astype(bool)
        products, looked_up = products_of(cells), lookup_bits(cells)
        bits = self._moved(cells, products)
        bits["dram"] = bits["dram"] + looked_up
        waiting = np.ceil(bits["dram"] / bits_a_cycle(self.memories["dram"], self.array["frequency_hz"]))
        working = products.groups * self._cycles(cells, products) + self.array.get("fill_cycles", 0)
        cycles = np.maximum(products.count * working, waiting)
        return Prices(
            tables={"latency": np.where(refused, np.nan, cycles / self.array["frequency_hz"])},
            reasons=reasons,
            accesses={name: np.where(refused, np.nan, table) for name, table in by_memory(self.memories, bits).items()},
            rests_on=lambda used: {"latency": numbers_behind(self.array, self.memories) if used.any() else ()},
            notes={"latency": f"cycles by the law of {self.array['law']}"},
        )

    def describe(self) -> list[str]:
        """One line."""
        formats = f"{' '.join(self.array.texts('weight'))} x {' '.join(self.array.texts('activation'))}"
        return [
            f"{self.array['rows']} x {self.array['columns']} array by the law of {self.array['law']} runs {formats}"
        ]

    def _cycles(self, cells: Cells, products: Products) -> Floats:
        """Cycles of one product, (layers, columns)."""
        law, size = self.array["law"], {"rows": self.array["rows"], "columns": self.array["columns"]}
        bits = self._widths(cells)
        if law == "bitfusion":
            narrow, wide = self.array["min_bits"], self.array["max_bits"]
            units = fused_units(bits[1], bits[0], max_bits=wide, min_bits=narrow)
            return bitfusion_cycles(products.matmul, products.taps, units, **size)
        if law == "bismo":
            return bismo_cycles(products.matmul, bits, **size, depth=self.array["depth"])
        windows = self.array["windows"]
        sample = (products.m / cells.batch, products.k, products.n)
        if law == "stripes":
            return cells.batch * stripes_cycles(sample, bits[1], **size, windows=windows)
        return cells.batch * loom_cycles(sample, bits, **size, windows=windows)

    def _widths(self, cells: Cells) -> tuple[Floats, Floats]:
        """Bits of weights and inputs; wider ones are refused, and priced as the widest until then."""
        widest = float(self.array["max_bits"])
        return np.minimum(cells.weight_bits, widest), np.minimum(cells.activation_bits, widest)

    def _moved(self, cells: Cells, products: Products) -> dict[str, Floats]:
        room = half_buffers(self.memories)
        input_bits, sums = (
            products.inputs * cells.activation_bits,
            products.m * products.n * self.array["accumulator_bits"],
        )
        space = room["inputs"], room["weights"], room["outputs"]
        inputs, weights, partials = moved_bits(input_bits, products.weight_bits, sums, space)
        outputs = products.outputs * cells.activation_bits + partials
        together = self.array.get("windows", self.array["rows"] if self.array["law"] == "bismo" else 1)
        reads = products.m * products.k * np.ceil(products.n / self.array["columns"]) * cells.activation_bits
        weight_reads = np.ceil(products.m / together) * products.k * products.n * cells.weight_bits
        moved = {
            "dram": inputs + weights + outputs,
            "inputs": reads + inputs,
            "weights": weight_reads + weights,
            "outputs": products.m * products.n * cells.activation_bits + outputs,
        }
        return {name: bits * products.count * products.groups for name, bits in moved.items()}


def _read(tables: DeviceTables) -> BitArray | None:
    return BitArray(tables["bit_array"][0], memories_of(tables)) if tables["bit_array"] else None


def _check(tables: DeviceTables) -> Iterable[tuple[str, str, int, str]]:
    for entry in tables["bit_array"]:
        yield from dram_problems("bit_array", tables)
        for key in NEEDS[entry["law"]]:
            if key not in entry:
                yield f"{key} is missing: the law {entry['law']!r} needs it", "bit_array", 0, "law"


FAMILY = Family("bit_array", SCHEMA, _read, _check)
