"""Roofline: a layer takes as long as its arithmetic or its traffic, whichever is longer, and its overheads.

    t = max(2 macs p_k p_mn / (e_c * peak), bytes / (e_m * bandwidth)) + unpacked * dequant + calls * launch
    bytes = reads * weight bits / 8 + (inputs + outputs) * b_a / 8
    p_k = K' / K                                                       padding of the sum
    p_mn = M' N' / (M N) * W U / (T S)                                 padding of the output, and the last wave
    T = repeats M'/t_m N'/t_n tiles,  S of 1 ... S_max parts of K that makes p_mn least,  W = ceil(T S / U) waves
    unpacked = weights * reads * ceil(M / d_m)

after Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model"; e_c and e_m are the
shares of the peaks that kernels reach. The pair of formats picks the line of the target's table: which unit multiplies
them, natively or as a fallback. X' is X rounded up: K to `align_k`, N to `align_n` and t_n (`tile_n`), M to t_m
(`tile_m`), where the file has them; M is that of one call. U (`units`) processors of the chip each compute one tile at
a time, so the last wave of tiles keeps fewer of them busy (NVIDIA's matrix multiplication guide calls it wave
quantisation; formula from memory); kernels cut K into at most S_max (`split_k`) parts to fill it, which is free here.
Grouped and depthwise convolutions are not lowered to tiles.

Weights that are narrower than what the unit multiplies are unpacked once a call, or once for every d_m rows of the
output (`dequant_tile_m`): each tile of rows unpacks its own copy, which is why 4-bit block matmuls of onnxruntime win
at one row and lose from 16 rows on. Outputs are written in the option's activation format, as the next layer's
requantised input. With a `[scratchpad]` activations stay on the chip, and so do the weights that fit: the share of the
weights beyond its capacity, counted with the whole model in the option's format, is read from memory in every pass.
Attention is an offset (see `attention`), of which a planned cache takes its part (`attention_units`).

Good for the order and the ratio of options on layers that fill the chip; wrong for caches that hold a layer's data
between layers, and for units whose efficiency depends on the shape. Latency need not fall with bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.suggestions import did_you_mean

from .attention import attention_work, cache_bytes, moved_bits
from .cells import Cells
from .device_numbers import Entry, Number
from .device_schema import EFFICIENCY, FORMAT_PAIR, Key, TableSchema, integer, number
from .kernel_rows import REFUSED, TableRow, doubled_pairs, first_row, no_kernel, pick, rows_of
from .prices import DeviceTables, Family, Prices

Floats = NDArray[np.float64]

_UNPACKING = (
    number("dequant_s_per_weight", "seconds a weight", "dequant"),
    integer("dequant_tile_m", "rows of the output that one unpacking serves", "dequant_tile_m"),
)

SCHEMA = {
    "compute": TableSchema(
        (
            Key("unit", "text", required=True),
            *FORMAT_PAIR,
            number("ops_per_s", "operations a second, two a multiply-add, dense", "ops", required=True),
            EFFICIENCY,
            number("launch_overhead_s", "seconds a call", "launch_overhead", required=True),
            integer("align_k", "inputs a tile", "align_k"),
            integer("align_n", "outputs a tile", "align_n"),
            integer("tile_m", "rows of a tile of the output", "tile_m"),
            integer("tile_n", "columns of a tile of the output", "tile_n"),
            integer("units", "tiles computed at a time", "units"),
            integer("split_k", "parts at most that a sum is cut into", "split_k"),
            *_UNPACKING,
        ),
        repeated=True,
        named_by="unit",
    ),
    "fallback": TableSchema((Key("runs_as", "text", required=True), *FORMAT_PAIR, *_UNPACKING), repeated=True,
                            named_by="runs_as"),
    "scratchpad": TableSchema((integer("capacity_bytes", "bytes", "capacity", required=True),)),
}  # fmt: skip


@dataclass(frozen=True)
class KernelRow(TableRow):
    """Format pairs and the unit that multiplies them: natively where `entry` is the unit's own table."""

    unit: Entry

    @property
    def is_native(self) -> bool:
        """Whether it is the unit's own row, not a fallback to it."""
        return self.entry is self.unit

    @property
    def ops_per_s(self) -> float:
        """Operations a second that its kernels reach."""
        return float(self.unit["ops_per_s"] * self.unit["efficiency"])

    @property
    def numbers(self) -> tuple[Number, ...]:
        """What its latency rests on."""
        if self.is_native:
            return self.unit.numbers
        return (*self.entry.numbers, *(n for n in self.unit.numbers if not n.key.startswith("dequant")))


def tile_factor(
    sizes: tuple[Floats, Floats, Floats], tile: tuple[Floats, Floats], units: Floats, split_k: Floats
) -> Floats:
    """How many times longer than on a full chip, `p_mn` above, for the output of one call.

    Args:
        sizes: rows, columns and repeats of the output, each (layers, 1).
        tile: rows and columns of a tile, each (layers, columns); 0 where the output is not cut.
        units: tiles computed at a time, (layers, columns); 0 where every number of tiles fills the chip.
        split_k: parts at most that a sum is cut into, (layers, columns).

    Returns:
        Float64 of at least 1, (layers, columns).

    Example:
        >>> one = np.ones((1, 1))
        >>> tile_factor((100 * one, 200 * one, one), (64 * one, 64 * one), 6 * one, one)  # 2 x 4 tiles in two waves
        array([[2.4576]])
        >>> tile_factor((128 * one, 256 * one, one), (64 * one, 64 * one), 20 * one, 2 * one)  # 8 tiles, K halved
        array([[1.25]])
    """
    (rows, columns, repeats), (tile_m, tile_n) = sizes, tile
    padded_rows, padded_columns = rounded_up(rows, tile_m), rounded_up(columns, tile_n)
    tiles = np.ceil(repeats) * (padded_rows / np.maximum(tile_m, 1)) * (padded_columns / np.maximum(tile_n, 1))
    load = np.where(units > 0, tiles / np.maximum(units, 1), 1.0)
    waves = np.ceil(load) / load
    for parts in range(2, int(np.nanmax(split_k, initial=1)) + 1):
        waves = np.where(parts <= split_k, np.minimum(waves, np.ceil(parts * load) / (parts * load)), waves)
    factor: Floats = padded_rows * padded_columns / (rows * columns) * waves
    return factor


def rounded_up(size: Floats, step: Floats) -> Floats:
    """The next multiple of a step, the size itself where the step is 0.

    Example:
        >>> rounded_up(np.array([40.0, 40.0]), np.array([32.0, 0.0]))
        array([64., 40.])
    """
    steps = np.where(step > 0, step, 1.0)
    rounded: Floats = np.where(step > 0, np.ceil(size / steps) * steps, size)
    return rounded


@dataclass(frozen=True)
class Roofline:
    """The roofline of one device: `rows` of kernels before a memory, and perhaps a scratchpad."""

    rows: tuple[KernelRow, ...]
    memory: Entry
    scratchpad: Entry | None = None

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s] of every cell, and the traffic to and from the memory; attention as an offset of the latency."""
        row = rows_of(self.rows, cells)
        work = cells.work
        traffic = self._traffic(cells)
        compute = 2 * work.macs[:, None] * self._padding(cells, row) / pick(self._ops_per_s, row)
        tile_m = pick(self._entries("dequant_tile_m"), row)
        rows_a_call = _a_call(work.m, work.calls)[:, None]
        copies = np.where(tile_m > 0, np.ceil(rows_a_call / np.maximum(tile_m, 1)), 1.0)
        unpack = (work.weights * work.weight_reads)[:, None] * copies * pick(self._entries("dequant_s_per_weight"), row)
        launch = work.calls[:, None] * pick(self._units("launch_overhead_s"), row)
        latency = np.maximum(compute, traffic / self._bytes_per_s) + unpack + launch
        offsets, attention, notes, served = self._attention(cells)
        return Prices(
            tables={"latency": latency},
            reasons=no_kernel(row, cells),
            offsets=offsets,
            accesses={self.memory.where.removeprefix("memory."): 8 * traffic},
            rests_on=lambda used: {"latency": self._numbers([*row[used].tolist(), *served])},
            notes=notes,
            attention=attention,
        )

    def describe(self) -> list[str]:
        """One line a row."""
        return [
            f"{row.unit['unit']} runs {'natively' if row.is_native else 'as a fallback'}: "
            + f"{' '.join(row.weights)} x {' '.join(row.activations)}"
            + ("" if row.kinds == ("*",) else f" ({' '.join(row.kinds)} only)")
            for row in self.rows
        ]

    @property
    def _bytes_per_s(self) -> float:
        return float(self.memory["bandwidth_Bps"] * self.memory["efficiency"])

    # Lookups read their rows of the table and are part of no kernel: the entry past the last row.

    @property
    def _ops_per_s(self) -> Floats:
        return np.array([*(row.ops_per_s for row in self.rows), np.inf], dtype=np.float64)

    def _units(self, key: str) -> Floats:
        return np.array([*(row.unit.get(key, 0) for row in self.rows), 0], dtype=np.float64)

    def _entries(self, key: str) -> Floats:
        return np.array([*(row.entry.get(key, 0) for row in self.rows), 0], dtype=np.float64)

    def _traffic(self, cells: Cells) -> Floats:
        work, weights = cells.work, cells.weight_bytes
        read = weights * work.weight_reads[:, None]
        if self.scratchpad is None:
            moved: Floats = np.outer(work.inputs + work.outputs, cells.activation_bits) / 8
            return read + moved
        total = np.maximum(weights.sum(axis=0), 1.0)
        streamed: Floats = np.maximum(1 - float(self.scratchpad["capacity_bytes"]) / total, 0.0)
        return read * streamed

    def _padding(self, cells: Cells, row: NDArray[np.intp]) -> Floats:
        names = ("align_k", "align_n", "tile_m", "tile_n", "units", "split_k")
        keys = {name: self._units(name) for name in names}
        if not any(values.any() for values in keys.values()):
            return np.ones(cells.shape)
        work, picked = cells.work, {name: pick(values, row) for name, values in keys.items()}
        rows = np.where(work.m > 0, _a_call(work.m, work.calls), 1.0)[:, None]
        k, n, repeats = work.k[:, None], work.n[:, None], work.repeats[:, None]
        aligned = rounded_up(n, picked["align_n"])
        tile = picked["tile_m"], picked["tile_n"]
        factor = tile_factor((rows, aligned, repeats), tile, picked["units"], picked["split_k"])
        factor *= rounded_up(k, picked["align_k"]) / k * aligned / n
        grouped = np.array([layer.groups > 1 for layer in cells.network.layers], dtype=bool)
        return np.where(grouped[:, None], 1.0, factor)

    def _attention(self, cells: Cells) -> tuple[dict[str, float], dict[str, Floats], dict[str, str], list[int]]:
        """The offset of latency, what each run's cache makes of it, notes on it, and the row it runs on."""
        runs, dtype = attention_work(cells), cells.dtype
        if not runs:
            return {}, {}, {}, []
        cached = f"{cache_bytes(runs, dtype.bits):.0f} bytes of keys and values in {dtype.name}, not part of size"
        notes = {"kv_cache": cached} if cells.phase == "decode" else {}
        names = (dtype.name, "fp16", "bf16", "fp32", "int8")
        row = next((i for n in names if (i := first_row(self.rows, n, n, "linear")) != REFUSED), REFUSED)
        if row == REFUSED:
            left = {"latency": f"attention is left out: no kernel multiplies two {dtype.name} tensors"}
            return {}, {}, notes | left, []
        served = self.rows[row]
        compute = np.array([2 * run.macs for run in runs]) / served.ops_per_s
        memory = np.array([run.elements for run in runs]) * dtype.bits / 8 / self._bytes_per_s
        launch = served.unit["launch_overhead_s"]
        seconds = float((np.maximum(compute, memory) + launch).sum())
        notes["latency"] = f"{seconds:.4g} s of attention on {served.unit['unit']} are an offset, in {dtype.name}"
        each = {}
        if cells.phase == "decode":
            each["latency"] = np.maximum(compute[:, None], moved_bits(cells) / 8 / self._bytes_per_s) + launch
        return {"latency": seconds}, each, notes, [row]

    def _numbers(self, rows: Sequence[int]) -> Iterator[Number]:
        yield from self.memory.numbers
        if self.scratchpad is not None:
            yield from self.scratchpad.numbers
        for index in sorted(set(rows)):
            if 0 <= index < len(self.rows):
                yield from self.rows[index].numbers


def _a_call(total: Floats, calls: Floats) -> Floats:
    each: Floats = total / np.maximum(calls, 1.0)
    return each


def _read(tables: DeviceTables) -> Roofline | None:
    if not tables["compute"]:
        return None
    units = {entry["unit"]: entry for entry in tables["compute"]}
    native = (KernelRow(unit, unit) for unit in units.values())
    fallbacks = (KernelRow(entry, units[entry["runs_as"]]) for entry in tables["fallback"])
    return Roofline((*native, *fallbacks), tables["memory.dram"][0], next(iter(tables["scratchpad"]), None))


def _check(tables: DeviceTables) -> Iterable[tuple[str, str, int, str]]:
    if not tables["compute"] and not tables["fallback"]:
        return
    for key in ("bandwidth_Bps", "efficiency"):
        if not tables["memory.dram"] or key not in tables["memory.dram"][0]:
            yield f"[memory.dram] with {key} is missing: [[compute]] needs it", "", 0, ""
            break
    units = [entry["unit"] for entry in tables["compute"]]
    for position, entry in enumerate(tables["compute"]):
        if (unit := entry["unit"]) in units[:position]:
            yield f"unit {unit!r} is there twice", "compute", position, "unit"
        if "units" in entry and not ("tile_m" in entry and "tile_n" in entry):
            yield "units needs tile_m and tile_n: waves are counted in tiles", "compute", position, "units"
        if "split_k" in entry and "units" not in entry:
            yield "split_k needs units: sums are cut where tiles are fewer", "compute", position, "split_k"
    for position, entry in enumerate(tables["fallback"]):
        if (unit := entry["runs_as"]) not in units:
            problem = f"runs_as: no [[compute]] has the unit {unit!r}{did_you_mean(unit, units)}"
            yield problem, "fallback", position, "runs_as"
    for table in ("compute", "fallback"):
        yield from doubled_pairs(table, tables[table])
        for position, entry in enumerate(tables[table]):
            if "dequant_tile_m" in entry and "dequant_s_per_weight" not in entry:
                problem = "dequant_tile_m needs dequant_s_per_weight: nothing is unpacked without it"
                yield problem, table, position, "dequant_tile_m"


FAMILY = Family("roofline", SCHEMA, _read, _check)
