"""Microcontrollers: cycles a multiply-add by kernel and runtime, one layer after the other, weights in flash.

    cycles  = macs / r + outputs * c_out + m k repeats [taps > 1] * c_column + calls * c_call
    t       = cycles / frequency
    scratch = max over layers with taps > 1 of columns * k repeats * bits / 8

r multiply-adds a cycle, c_out what it takes to requantise and store an output, c_column to gather one input of a patch
into a column (im2col), c_call to start a kernel: a row of the device file gives them for pairs of formats on kinds of
layers. A depthwise layer has k = taps and one repeat a channel. Kernels that read their input as it is, one tap, need
neither columns nor scratch.

The steps are those of Lai, Suda and Chandra (2018), "CMSIS-NN", whose kernels gather columns and multiply them; the
sum is ours. With r of linear layers, r of convolutions and c_out fitted, it reproduces the networks of MLPerf Tiny v1.1
within 6 % for runtimes that work layer by layer (X-CUBE-AI 7.3 and 8.0, microTVM with CMSIS-NN, HALE), and within 26 %
for ones with kernels of their own for some shapes (X-CUBE-AI 8.1, Plumerai, ONNC). Scratch: CMSIS-NN,
`arm_convolve_s8_get_buffer_size` (two columns of int16) and `arm_depthwise_conv_s8_opt_get_buffer_size_dsp` (one).

Good for a runtime whose rates were measured on networks like the one planned: another runtime on the same chip is up to
20 times slower. Fewer bits are not faster without instructions for them: kernels unpack to 16 bits and multiply those;
rows say what a pair costs, and pairs without a row are refused. Caches, flash wait states and patch-wise execution are
in the rates or nowhere. Memories with `holds` bound the weights (flash) and the activations (SRAM) of a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry, Number
from .device_schema import FORMAT_PAIR, Key, TableSchema, integer, number
from .kernel_rows import Rows, TableRow, doubled_pairs, no_kernel, pick, rows_of
from .prices import DeviceTables, Family, Mask, Prices
from .workload import Work

Floats = NDArray[np.float64]

SCRATCH_KEYS = ("scratch_columns", "scratch_bits")

SCHEMA = {
    "mcu": TableSchema((number("frequency_hz", "cycles a second", "frequency", required=True),)),
    "kernel": TableSchema(
        (
            Key("name", "text", required=True),
            *FORMAT_PAIR,
            number("macs_per_cycle", "multiply-adds a cycle, all cores", "macs_per_cycle", required=True),
            number("cycles_per_output", "cycles an output, to requantise and store it", "cycles_per_output"),
            number("cycles_per_column_input", "cycles an input copied into a column", "cycles_per_column_input"),
            number("cycles_per_call", "cycles a call", "cycles_per_call"),
            integer("scratch_columns", "columns of inputs that lie in SRAM", "scratch"),
            integer("scratch_bits", "bits of an input in a column", "scratch"),
        ),
        repeated=True,
        named_by="name",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KernelRates:
    """What a kernel takes, one number a cell or broadcast to (layers, columns).

    Attributes:
        macs_per_cycle: multiply-adds a cycle.
        cycles_per_output: cycles an output.
        cycles_per_column_input: cycles an input gathered into a column.
        cycles_per_call: cycles a call.
    """

    macs_per_cycle: Floats
    cycles_per_output: Floats
    cycles_per_column_input: Floats
    cycles_per_call: Floats


def kernel_cycles(work: Work, rates: KernelRates) -> Floats:
    """Cycles of every layer with every kernel, (layers, columns).

    Args:
        work: of the layers, all (layers,).
        rates: of the kernels, (layers, columns) or (columns,).

    Example:
        A 3x3 convolution from 4 to 8 channels onto 16 x 16 positions: 73728 / 2 + 2048 x 3 + 256 x 36 x 0.5 + 100.

        >>> from mpq.layers import Layer, Network
        >>> from mpq.hardware_models.workload import work_of
        >>> conv = Layer("conv", "conv2d", (8, 4, 3, 3), 288, 73728, (1, 4, 16, 16), (1, 8, 16, 16), kernel=(3, 3))
        >>> rates = KernelRates(*(np.array([x]) for x in (2.0, 3.0, 0.5, 100.0)))
        >>> kernel_cycles(work_of(Network((conv,))), rates)
        array([[47716.]])
    """
    columns = work.m * work.k * work.repeats * (work.taps > 1)
    return (
        work.macs[:, None] / rates.macs_per_cycle
        + work.outputs[:, None] * rates.cycles_per_output
        + columns[:, None] * rates.cycles_per_column_input
        + work.calls[:, None] * rates.cycles_per_call
    )


def scratch_bytes(work: Work, columns: Floats, bits: Floats) -> Floats:
    """Bytes of the columns that a kernel gathers its inputs in, (layers, columns).

    Example:
        CMSIS-NN keeps two columns of int16 for a 3x3 convolution of 16 channels: 2 x 144 x 2 bytes.

        >>> from mpq.layers import Layer, Network
        >>> from mpq.hardware_models.workload import work_of
        >>> conv = Layer("c", "conv2d", (8, 16, 3, 3), 1152, 294912, (1, 16, 16, 16), (1, 8, 16, 16), kernel=(3, 3))
        >>> scratch_bytes(work_of(Network((conv,))), np.array([2.0]), np.array([16.0]))
        array([[576.]])
    """
    column = work.k * work.repeats * (work.taps > 1)
    return column[:, None] * columns * bits / 8


@dataclass(frozen=True)
class Microcontroller:
    """Kernels of one runtime on one chip: `rows` at the clock of `core`; `flash` and `sram` name its memories.

    Example:
        >>> from mpq.hardware_models.device_file import load
        >>> load("stm32h743-tinyengine").models[0].describe()
        ['int8: int8 x int8 uint8 at 0.491 MACs a cycle']
    """

    core: Entry
    rows: tuple[TableRow, ...]
    flash: str
    sram: str

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own: the memories of the device file bound size and activation_peak."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s] of every cell, the largest scratch as offset of activation_peak [B], bits read and written."""
        row, work = rows_of(self.rows, cells), cells.work
        columns = self._column("scratch_columns", 0.0, row)
        scratch = np.nan_to_num(scratch_bytes(work, columns, self._column("scratch_bits", 8.0, row)))
        largest = float(scratch.max(initial=0.0))
        traffic = np.outer(work.inputs + work.outputs, cells.activation_bits)
        accesses = {self.flash: 8 * cells.weight_bytes * work.weight_reads[:, None]}
        accesses[self.sram] = accesses.get(self.sram, 0.0) + traffic
        return Prices(
            tables={"latency": kernel_cycles(work, self._rates(row)) / float(self.core["frequency_hz"])},
            reasons=no_kernel(row, cells),
            offsets={"activation_peak": largest} if largest and "activation_peak" in so_far.tables else {},
            accesses=accesses,
            rests_on=lambda used: self._numbers(row, used),
        )

    def describe(self) -> list[str]:
        """One line a row."""
        return [
            f"{row.entry['name']}: {' '.join(row.weights)} x {' '.join(row.activations)}"
            + f" at {row.entry['macs_per_cycle']:g} MACs a cycle"
            + ("" if row.kinds == ("*",) else f" ({' '.join(row.kinds)} only)")
            for row in self.rows
        ]

    def _rates(self, row: Rows) -> KernelRates:
        return KernelRates(
            macs_per_cycle=self._column("macs_per_cycle", np.inf, row),
            cycles_per_output=self._column("cycles_per_output", 0.0, row),
            cycles_per_column_input=self._column("cycles_per_column_input", 0.0, row),
            cycles_per_call=self._column("cycles_per_call", 0.0, row),
        )

    def _column(self, key: str, default: float, row: Rows) -> Floats:
        # lookups read their rows of the table and are part of no kernel: the entry past the last row
        return pick(np.array([*(r.entry.get(key, default) for r in self.rows), default], dtype=np.float64), row)

    def _numbers(self, row: Rows, used: Mask) -> Mapping[str, Iterable[Number]]:
        rows = [self.rows[index] for index in np.unique(row[used]) if 0 <= index < len(self.rows)]
        numbers = [number for each in rows for number in each.entry.numbers]
        return {
            "latency": (*self.core.numbers, *(number for number in numbers if number.key not in SCRATCH_KEYS)),
            "activation_peak": tuple(number for number in numbers if number.key in SCRATCH_KEYS),
        }


def _read(tables: DeviceTables) -> Microcontroller | None:
    if not tables["mcu"]:
        return None
    rows = tuple(TableRow(entry) for entry in tables["kernel"])
    flash, sram = (_holder(tables, what, default) for what, default in (("weights", "flash"), ("activations", "sram")))
    return Microcontroller(tables["mcu"][0], rows, flash, sram)


def _holder(tables: DeviceTables, what: str, default: str) -> str:
    holders = (
        name.removeprefix("memory.")
        for name, entries in tables.items()
        if name.startswith("memory.") and any("holds" in entry and what in entry.texts("holds") for entry in entries)
    )
    return next(holders, default)


def _check(tables: DeviceTables) -> Iterator[tuple[str, str, int, str]]:
    if tables["mcu"] and not tables["kernel"]:
        yield "[[kernel]] is missing: [mcu] needs to know what its kernels take", "mcu", 0, ""
    if tables["kernel"] and not tables["mcu"]:
        yield "[mcu] with frequency_hz is missing: [[kernel]] counts its cycles", "kernel", 0, ""
    for position, entry in enumerate(tables["kernel"]):
        if ("scratch_columns" in entry) != ("scratch_bits" in entry):
            yield "scratch_columns and scratch_bits go together: give both or none", "kernel", position, ""
    yield from doubled_pairs("kernel", tables["kernel"])


FAMILY = Family("microcontroller", SCHEMA, _read, _check)
