"""What an array of processing elements multiplies, and the matrix products that a network asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry, Number
from .kernel_rows import Rows, no_kernel
from .prices import Reasons

Floats = NDArray[np.float64]

BUFFERS = {"inputs": "input_buffer", "weights": "weight_buffer", "outputs": "output_buffer"}


@dataclass(frozen=True)
class Products:
    """The matrix products of each layer: `count` calls of `groups` products of (m, k) by (k, n); all (layers, 1).

    `inputs` and `outputs` are elements of one product as they lie in memory, without im2col; `weight_bits` (layers,
    columns) are the stored bits of one product's weight, scales included. A lookup has no product: count 0.
    """

    count: Floats
    groups: Floats
    m: Floats
    k: Floats
    n: Floats
    taps: Floats
    inputs: Floats
    outputs: Floats
    weight_bits: Floats

    @property
    def matmul(self) -> tuple[Floats, Floats, Floats]:
        """m, k and n."""
        return self.m, self.k, self.n


def products_of(cells: Cells) -> Products:
    """The products of every layer, each group of a convolution and each expert by itself.

    Example:
        >>> from mpq.layers import Layer, Network
        >>> conv = Layer("c", "conv2d", (4, 2, 3, 3), 72, 4608, (1, 4, 8, 8), (1, 4, 8, 8), groups=2, kernel=(3, 3))
        >>> products = products_of(Cells.of(Network((conv,)), []))
        >>> [float(x[0, 0]) for x in (products.m, products.k, products.n, products.groups, products.inputs)]
        [64.0, 18.0, 2.0, 2.0, 128.0]
    """
    work = cells.work
    runs = np.maximum(work.calls, 1.0)
    rows = (work.calls, work.repeats, work.m / runs, work.k, work.n, work.taps)
    shares = (work.inputs / (runs * work.repeats), work.outputs / (runs * work.repeats))
    count, groups, m, k, n, taps, inputs, outputs = (vector[:, None] for vector in (*rows, *shares))
    m = np.where(count > 0, m, 1.0)
    return Products(count, groups, m, k, n, taps, inputs, outputs, 8 * cells.weight_bytes / groups)


def lookup_bits(cells: Cells) -> Floats:
    """Bits that lookups in a table read from it, 0 for every other layer, (layers, columns)."""
    reads = np.where(cells.work.calls > 0, 0.0, cells.work.weight_reads)
    return 8 * cells.weight_bytes * reads[:, None]


def refusals(rows: Rows, cells: Cells, *, max_bits: float) -> Reasons:
    """Why cells are refused: no kernel for the formats, or an operand wider than the multipliers."""
    reasons = no_kernel(rows, cells)
    widest = np.maximum(cells.weight_bits, cells.activation_bits)
    too_wide = (widest > max_bits) & (cells.work.calls > 0)[:, None] & (reasons == "")
    phrase = f"multiplies operands of at most {max_bits:g} bits"
    return np.where(too_wide, phrase, reasons)


def bits_a_cycle(dram: Entry, frequency_hz: float) -> float:
    """What the memory delivers in a cycle of the array.

    Example:
        >>> bits_a_cycle(Entry("memory.dram", {"bandwidth_Bps": 16e9, "efficiency": 0.75}, ()), 5e8)
        192.0
    """
    return float(8 * dram["bandwidth_Bps"] * dram["efficiency"] / frequency_hz)


def half_buffers(memories: Mapping[str, Entry]) -> dict[str, float]:
    """Bits that a tile of inputs, weights and outputs may have while the next one is loaded.

    Half of the operand's own buffer, a sixth of a buffer that all three share, unlimited where the file names no
    capacity.

    Example:
        >>> half_buffers({"buffer": Entry("memory.buffer", {"capacity_bytes": 1200}, ())})["weights"]
        1600.0
    """
    shared = memories.get("buffer")
    found = {}
    for operand, name in BUFFERS.items():
        own, share = (memories[name], 2) if name in memories else (shared, 6)
        capacity = own.get("capacity_bytes") if own is not None else None
        found[operand] = np.inf if capacity is None else 8 * capacity / share
    return found


def by_memory(memories: Mapping[str, Entry], moved: Mapping[str, Floats]) -> dict[str, Floats]:
    """Bits at the memories that the file names; what operands move in a shared buffer is added up.

    Args:
        memories: by name.
        moved: bits by operand, and by name of memory for all else.
    """
    found: dict[str, Floats] = {}
    for what, bits in moved.items():
        own = BUFFERS.get(what, what)
        name = "buffer" if what in BUFFERS and own not in memories else own
        if name in memories:
            found[name] = found[name] + bits if name in found else bits
    return found


def memories_of(tables: Mapping[str, Iterable[Entry]]) -> dict[str, Entry]:
    """The memories that a device file names, without the prefix."""
    prefix = "memory."
    return {
        name.removeprefix(prefix): next(iter(own)) for name, own in tables.items() if name.startswith(prefix) and own
    }


def dram_problems(table: str, tables: Mapping[str, Iterable[Entry]]) -> Iterable[tuple[str, str, int, str]]:
    """What is missing of the memory that feeds an array."""
    dram = next(iter(tables["memory.dram"]), None)
    if dram is None or "bandwidth_Bps" not in dram or "efficiency" not in dram:
        yield f"[memory.dram] with bandwidth_Bps and efficiency is missing: [{table}] needs it", "", 0, ""


def numbers_behind(array: Entry, memories: Mapping[str, Entry]) -> tuple[Number, ...]:
    """What the latency of an array rests on: its own numbers, bandwidth and capacities; not energies."""
    own = (number for entry in memories.values() for number in entry.numbers if number.key != "energy_pJ_per_bit")
    return (*array.numbers, *own)
