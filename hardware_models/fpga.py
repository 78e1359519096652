"""FPGA dataflow as FINN builds it: every layer has a unit of its own, all work at once, on different frames.

    latency = batch * max over layers of cycles / clock  (steady state: interval between frames, times batch)
    luts, dsps, bram18, urams = sums over layers, at most the share of the board that still closes timing

The folding of every unit is the smallest that meets `target_fps` (`finn_folding`), so formats show in resources before
they show in latency; `finn_resources` has the equations, `minifloat_luts` the proposal for minifloats. Filling the
pipeline, which the first frame waits for, is not part of the latency. A row of `[[engine]]` says which formats a unit
multiplies, in lookup tables or in DSP slices. Outputs are taken to have the option's activation format; `thresholds`
says how they are made of sums (`finn_thresholds`), without the key they are not counted, as FINN's estimates do not
where the tools choose their memory. The last layer's are counted, though FINN may leave them to the host.

Good for what bits cost in lookup tables and block memories, and for which layer is the slowest; synthesis moves lookup
tables by some ten per cent either way. FINN has no unit for grouped convolutions other than depthwise, for transposed
ones and for stacks of experts: they are refused, as are lookups in embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mpq.formats import UnsignedInteger
from mpq.layers import Layer

from .cells import Cells
from .device_numbers import Entry, Number
from .device_schema import FORMAT_PAIR, Key, TableSchema, integer, number
from .finn_folding import depthwise_folding, matrix_folding
from .finn_resources import (
    Arithmetic,
    Folding,
    Window,
    block_rams,
    integer_arithmetic,
    ultra_rams,
    unit_dsps,
    unit_luts,
    weight_luts,
)
from .finn_thresholds import Thresholds, parallel_thresholds, searched_thresholds
from .kernel_rows import REFUSED, Rows, TableRow, doubled_pairs, no_kernel, pick, rows_of
from .minifloat_luts import Operand, minifloat_arithmetic
from .prices import DeviceTables, Family, Mask, Prices, Reasons, Table

Floats = NDArray[np.float64]

RESOURCES = ("luts", "dsps", "bram18", "urams")
KINDS = ("linear", "conv1d", "conv2d", "depthwise_conv1d", "depthwise_conv2d")
THRESHOLDS = {"parallel": parallel_thresholds, "search": searched_thresholds}
_MULTIPLIED = re.compile(r"u?int\d+|fp[3-8](_e\d+m\d+)?")

SCHEMA = {
    "fpga": TableSchema(
        (
            number("frequency_hz", "cycles a second", "frequency", required=True),
            number("target_fps", "frames a second that the folding aims at", "target", required=True),
            *(integer(name, f"{name} of the board", name, required=name != "urams") for name in RESOURCES),
            *(number(f"usable_{name}", f"share of the {name} with which timing closes", f"usable_{name}", below=1.0)
              for name in RESOURCES),
            Key("weights", "text", required=True, choices=("block", "distributed", "ultra")),
            Key("thresholds", "text", choices=tuple(THRESHOLDS)),
        )
    ),
    "engine": TableSchema(
        (
            Key("name", "text", required=True),
            *FORMAT_PAIR,
            Key("multiplier", "text", required=True, choices=("lut", "dsp")),
            integer("macs_per_dsp", "multiplications that share a DSP slice", "macs_per_dsp"),
            number("shifter_luts_per_bit", "lookup tables a bit and stage of a minifloat's shifter", "shifter"),
        ),
        repeated=True,
        named_by="name",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dataflow:
    """A FINN pipeline on one board: `board` has its resources, clock and target, `rows` what its units multiply.

    Example:
        >>> from mpq.hardware_models.device_file import load
        >>> load("zu3eg-finn").models[0].limits
        {'luts': 49700.0, 'dsps': 288.0, 'bram18': 329.6}
    """

    board: Entry
    rows: tuple[TableRow, ...]

    @property
    def limits(self) -> Mapping[str, float]:
        """What a design may use and still close timing."""
        names = [name for name in RESOURCES if name in self.board]
        return {name: float(self.board[name]) * float(self.board.get(f"usable_{name}", 1.0)) for name in names}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s], lookup tables, DSP slices and block memories of every cell, and bits that its unit reads."""
        units = _Units(self, cells)
        refused = np.where(units.row == REFUSED, np.nan, 0.0)
        latency = units.cycles / float(self.board["frequency_hz"])
        tables = {"latency": latency, **{name: units.resources[name] for name in self.limits}}
        columns = (cells.work.m * cells.work.k * cells.work.repeats)[:, None]
        return Prices(
            tables={name: table + refused for name, table in tables.items()},
            measures={name: name for name in self.limits},
            reasons=_reasons(units.row, cells),
            aggregates={"latency": "max"},
            accesses={
                "weight_buffer": cells.work.macs[:, None] * cells.weight_bits + refused,
                "input_buffer": columns * cells.activation_bits + refused,
            },
            rests_on=lambda used: self._numbers(units.row, used),
            notes={
                "latency": "a pipeline in its steady state: the slowest unit's time a frame, times the batch",
                "luts": "FINN's estimates before synthesis, without FIFOs and pooling",
            },
        )

    def describe(self) -> list[str]:
        """One line a row, and the rate that the folding aims at."""
        lines = [
            f"{row.entry['name']}: {' '.join(row.weights)} x {' '.join(row.activations)}"
            + f" multiplied in {'lookup tables' if row.entry['multiplier'] == 'lut' else 'DSP slices'}"
            for row in self.rows
        ]
        return [*lines, f"every unit is folded for {self.board['target_fps']:g} frames a second"]

    def _numbers(self, row: Rows, used: Mask) -> Mapping[str, Iterable[Number]]:
        rate = tuple(number for number in self.board.numbers if number.key in ("frequency_hz", "target_fps"))
        rows = [self.rows[index].entry for index in np.unique(row[used]) if index != REFUSED]
        own = {"luts": "shifter_luts_per_bit", "dsps": "macs_per_dsp"}
        found = {name: [n for entry in rows for n in entry.numbers if n.key == own.get(name)] for name in self.limits}
        return {"latency": rate, **{name: (*rate, *numbers) for name, numbers in found.items()}}


@dataclass(frozen=True)
class _Units:
    """The units of every layer in every pair of formats; all tables (layers, columns)."""

    model: Dataflow
    cells: Cells

    @cached_property
    def row(self) -> Rows:
        """The row of `[[engine]]` that serves each cell."""
        served = np.array([kind in KINDS for kind in self.cells.kinds], dtype=bool)
        return np.where(served[:, None] & ~self._is_grouped[:, None], rows_of(self.model.rows, self.cells), REFUSED)

    @cached_property
    def _is_depthwise(self) -> NDArray[np.bool_]:
        return np.array([kind.startswith("depthwise") for kind in self.cells.kinds], dtype=bool)

    @property
    def _is_grouped(self) -> NDArray[np.bool_]:
        return (self.cells.work.repeats > 1) & ~self._is_depthwise

    @cached_property
    def folding(self) -> Folding:
        """For the target, or for what the slowest layer reaches in its fastest format where that is slower."""
        target = float(self.model.board["frequency_hz"]) / float(self.model.board["target_fps"])
        folding = self._folded(target)
        reached = np.where(self.row == REFUSED, np.inf, folding.cycles(self._vectors)).min(axis=1, initial=np.inf)
        slowest = float(reached[np.isfinite(reached)].max(initial=0.0))
        return folding if slowest <= target else self._folded(slowest)

    def _folded(self, target: float) -> Folding:
        work, cells = self.cells.work, self.cells
        mw, mh, vectors = work.k, work.n * work.repeats, self._vectors[:, 0]
        dense = matrix_folding(mw, mh, vectors, cells.weight_bits, target)
        depthwise = depthwise_folding(mw, mh, vectors, target)
        is_depthwise = self._is_depthwise[:, None]
        return replace(
            dense,
            simd=np.where(is_depthwise, depthwise.simd, dense.simd),
            pe=np.where(is_depthwise, depthwise.pe, dense.pe),
        )

    @property
    def _vectors(self) -> Floats:
        return (self.cells.work.m / self.cells.batch)[:, None]

    @property
    def cycles(self) -> Table:
        """Of the whole batch."""
        return self.folding.cycles(self._vectors) * self.cells.batch

    @cached_property
    def resources(self) -> Mapping[str, Table]:
        """Lookup tables, DSP slices and block memories."""
        board, bits, folding, arithmetic = self.model.board, self.cells.weight_bits, self.folding, self.arithmetic
        in_dsp = self._column([float(row.entry["multiplier"] == "dsp") for row in self.model.rows])
        sharing = self._column([float(row.entry.get("macs_per_dsp", 1)) for row in self.model.rows])
        thresholds, window, slides = self._thresholds, self._window, (self.cells.work.taps > 1)[:, None]
        luts = unit_luts(folding, arithmetic, thresholds.luts, in_dsp) + window.LUTS * slides
        return {
            "luts": luts + weight_luts(folding, bits) * (board["weights"] == "distributed"),
            "dsps": unit_dsps(folding, bits + self.cells.activation_bits, sharing) * in_dsp,
            "bram18": block_rams(folding, bits) * (board["weights"] == "block")
            + window.block_rams(self.cells.activation_bits) * slides
            + thresholds.block_rams * folding.pe,
            "urams": ultra_rams(folding, bits) * (board["weights"] == "ultra"),
        }

    @property
    def arithmetic(self) -> Arithmetic:
        """What the lanes multiply and add with."""
        cells, mw = self.cells, self.folding.mw
        weight, activation = Operand.of(cells.weights), Operand.of(cells.activations)
        is_signed = np.array([float(not isinstance(fmt, UnsignedInteger)) for fmt in cells.activations])
        shifter = self._column([float(row.entry.get("shifter_luts_per_bit", np.nan)) for row in self.model.rows])
        whole = integer_arithmetic(cells.weight_bits, cells.activation_bits, is_signed, mw)
        floating = minifloat_arithmetic(weight, activation, mw, shifter)
        return floating.where(weight.exponent_bits + activation.exponent_bits > 0, whole)

    @property
    def _thresholds(self) -> Thresholds:
        """Of one element of each unit, for outputs in the option's activation format."""
        count = THRESHOLDS.get(self.model.board.get("thresholds", ""))
        if count is None:
            return Thresholds(np.zeros(self.cells.shape), np.zeros(self.cells.shape))
        bits = np.where(self.row == REFUSED, 0.0, self.cells.activation_bits)
        return count(bits, self.arithmetic.accumulator_bits, self.folding.mh / self.folding.pe)

    @property
    def _window(self) -> Window:
        rows = [_window(layer) for layer in self.cells.network.layers]
        return Window(*np.array(rows, dtype=np.float64).reshape(-1, 4).T)

    def _column(self, values: list[float]) -> Floats:
        return pick(np.array(values), self.row)


def _window(layer: Layer) -> tuple[float, float, float, float]:
    """Kernel rows, stride, width and channels of a convolution's input; ones elsewhere."""
    spatial, out = layer.input_shape[-len(layer.kernel) :], layer.output_shape[-len(layer.kernel) :]
    if not layer.kernel or len(spatial) < len(layer.kernel):
        return 1.0, 1.0, 1.0, 1.0
    stride = max(round(spatial[0] / max(out[0], 1)), 1)
    width = spatial[1] if len(spatial) > 1 else 1
    return float(layer.kernel[0]), float(stride), float(width), float(layer.input_shape[-len(layer.kernel) - 1])


def _reasons(row: Rows, cells: Cells) -> Reasons:
    grouped = [
        f"has no unit for a {kind} in {layer.groups} groups" if layer.groups > 1 and kind == layer.kind else ""
        for kind, layer in zip(cells.kinds, cells.network.layers, strict=True)
    ]
    named = np.array(grouped, dtype=object)[:, None]
    return np.where((row == REFUSED) & (named != ""), named, no_kernel(row, cells))


def _read(tables: DeviceTables) -> Dataflow | None:
    if not tables["fpga"]:
        return None
    return Dataflow(tables["fpga"][0], tuple(TableRow(entry) for entry in tables["engine"]))


def _check(tables: DeviceTables) -> Iterator[tuple[str, str, int, str]]:
    if tables["fpga"] and not tables["engine"]:
        yield "[[engine]] is missing: [fpga] needs to know what its units multiply", "fpga", 0, ""
    if tables["engine"] and not tables["fpga"]:
        yield "[fpga] is missing: [[engine]] needs its clock and resources", "engine", 0, ""
    for board in tables["fpga"]:
        if board["weights"] == "ultra" and "urams" not in board:
            yield 'urams is missing: weights = "ultra" lie in them', "fpga", 0, "weights"
    for position, entry in enumerate(tables["engine"]):
        names = (*entry.texts("weight"), *entry.texts("activation"))
        for name in names:
            if not _MULTIPLIED.fullmatch(name):
                yield f"units multiply int, uint and minifloats of 3 to 8 bits, not {name}", "engine", position, ""
        if any(name.startswith("fp") for name in names) and "shifter_luts_per_bit" not in entry:
            yield "shifter_luts_per_bit is missing: minifloats are shifted into place", "engine", position, ""
    yield from doubled_pairs("engine", tables["engine"])


FAMILY = Family("fpga", SCHEMA, _read, _check)
