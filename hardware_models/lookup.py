"""Look-up: a layer takes what its kernel took when it was measured, in a table keyed by operator, shape and formats.

    t = calls * table[kind, m / calls, k, n, repeats, taps, weight format, activation format]

as HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680, section 3.4: latencies of every layer on a T4 go into its integer
program) and HAQ's simulator (a table over layer, weight bits and activation bits). Right by construction for one kernel
by itself; a network is less than the sum of its kernels, by a factor of 1.3 to 1.6 for HAWQ-V3's tables, because fused
neighbours keep data in caches: calibrate (`calibration.py`).

Nothing is extrapolated: a cell without an entry is refused. A format with groups takes an entry of its own group size,
else one of the format without; m that experts do not share evenly is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry
from .device_schema import Key, TableSchema, integer
from .lookup_table import LookupTable, format_keys, read_lookup_table
from .prices import DeviceTables, Family, Prices, Reasons

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

SCHEMA = {
    "lookup": TableSchema(
        (
            Key("file", "file", required=True),
            integer("entries", "measured kernels in the table", "entries", required=True),
        )
    )
}

_MEASURES = {"latency": "s", "energy": "J"}
_NONE = -1


@dataclass(frozen=True)
class LookUp:
    """Prices of a table; `entry` is what the device file says of it, `memory` what the traffic goes to."""

    table: LookupTable
    entry: Entry
    memory: Entry | None = None

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s], energy [J] where the table has it, and traffic where the device file has a [memory.dram]."""
        positions = self._positions(cells)
        work = cells.work
        is_lookup = np.array([kind == "lookup" for kind in cells.kinds], dtype=bool)
        free = is_lookup[:, None] & self._readable(cells)
        calls = np.where(is_lookup, 0.0, work.calls)[:, None]
        tables = {}
        for name, values in self.table.quantities.items():
            found = np.where(positions == _NONE, np.nan, np.append(values, np.nan)[positions])
            tables[name] = np.where(free, 0.0, calls * found)
        refused = (positions == _NONE) & ~free
        return Prices(
            tables=tables,
            measures={name: _MEASURES[name] for name in tables},
            reasons=_reasons(cells, refused) if refused.any() else None,
            accesses={} if self.memory is None else {self.memory.where.removeprefix("memory."): traffic_bits(cells)},
            rests_on=lambda used: dict.fromkeys(tables, self.entry.numbers),
        )

    def describe(self) -> list[str]:
        """One line a kind of layer: how many kernels, in which formats."""
        lines = []
        for kind in dict.fromkeys(self.table.kinds):
            own = [position for position, other in enumerate(self.table.kinds) if other == kind]
            pairs = dict.fromkeys(f"{self.table.weights[i]} x {self.table.activations[i]}" for i in own)
            shapes = len(np.unique(self.table.sizes[own], axis=0))
            lines.append(f"{kind}: {len(own)} measured kernels of {shapes} shapes: {', '.join(pairs)}")
        return lines

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], dict[tuple[str, str], int], dict[str, int], Positions]:
        """Distinct (kind, sizes); pairs of formats; kinds; the entry of each (shape, pair), _NONE without."""
        kinds = {kind: code for code, kind in enumerate(dict.fromkeys(self.table.kinds))}
        codes = np.array([kinds[kind] for kind in self.table.kinds], dtype=np.int64)
        shapes, row = np.unique(np.column_stack([codes, self.table.sizes]), axis=0, return_inverse=True)
        pairs = list(zip(self.table.weights, self.table.activations, strict=True))
        order = {pair: code for code, pair in enumerate(dict.fromkeys(pairs))}
        entries = np.full((len(shapes) + 1, len(order) + 1), _NONE, dtype=np.intp)
        entries[row.reshape(-1), [order[pair] for pair in pairs]] = np.arange(len(pairs))
        return shapes, order, kinds, entries

    def _positions(self, cells: Cells) -> Positions:
        """The entry of every cell, (layers, columns)."""
        shapes, order, kinds, entries = self._index
        work = cells.work
        sizes = np.column_stack(
            [np.ceil(work.m / np.maximum(work.calls, 1) - 1e-9), work.k, work.n, work.repeats, work.taps]
        ).astype(np.int64)
        codes = np.array([kinds.get(kind, _NONE) for kind in cells.kinds], dtype=np.int64)
        asked = np.column_stack([codes, sizes])
        distinct, where = np.unique(np.concatenate([shapes, asked]), axis=0, return_inverse=True)
        row_of = np.full(len(distinct), len(shapes), dtype=np.intp)
        row_of[where.reshape(-1)[: len(shapes)]] = np.arange(len(shapes))
        rows = row_of[where.reshape(-1)[len(shapes) :]]
        found = np.full(cells.shape, _NONE, dtype=np.intp)
        for column, names in enumerate(format_pairs(cells)):
            for pair in reversed(names):  # the narrowest last: it overwrites
                own = entries[rows, order.get(pair, len(order))]
                found[:, column] = np.where(own == _NONE, found[:, column], own)
        return found

    def _readable(self, cells: Cells) -> NDArray[np.bool_]:
        """Columns whose weights some kernel reads, or that are the model's own."""
        known = {*self.table.weights, cells.dtype.name}
        return np.array([any(weight in known for weight, _ in names) for names in format_pairs(cells)], dtype=bool)


def format_pairs(cells: Cells) -> list[list[tuple[str, str]]]:
    """The pairs by which each column may be in a table, the narrowest first."""
    pairs = zip(cells.weights, cells.activations, strict=True)
    return [
        [
            (weight, activation)
            for weight in format_keys(own or cells.dtype)
            for activation in format_keys(other or cells.dtype)
        ]
        for own, other in pairs
    ]


def traffic_bits(cells: Cells) -> Floats:
    """Bits read and written, weights, inputs and outputs, (layers, columns); as the roofline counts them."""
    work = cells.work
    elements = work.inputs + work.outputs
    return 8 * cells.weight_bytes * work.weight_reads[:, None] + np.outer(elements, cells.activation_bits)


def _reasons(cells: Cells, refused: NDArray[np.bool_]) -> Reasons:
    work = cells.work
    per_call = work.m / np.maximum(work.calls, 1)
    shapes = [
        f"a {kind}" if kind == "lookup" else f"a {kind} of m={m:.0f}, k={k:.0f}, n={n:.0f}" + _more(repeats, taps)
        for kind, m, k, n, repeats, taps in zip(
            cells.kinds, np.ceil(per_call - 1e-9), work.k, work.n, work.repeats, work.taps, strict=True
        )
    ]
    pairs = ["{} weights and {} inputs".format(*names[0]) for names in format_pairs(cells)]
    phrases = np.full(cells.shape, "", dtype=object)
    for layer, column in np.argwhere(refused):
        phrases[layer, column] = f"has no measured entry for {pairs[column]} in {shapes[layer]}"
    return phrases


def _more(repeats: float, taps: float) -> str:
    return (f", repeats={repeats:.0f}" if repeats > 1 else "") + (f", taps={taps:.0f}" if taps > 1 else "")


def _read(tables: DeviceTables) -> LookUp | None:
    if not tables["lookup"]:
        return None
    entry = tables["lookup"][0]
    return LookUp(read_lookup_table(entry["file"]), entry, next(iter(tables["memory.dram"]), None))


def _check(tables: DeviceTables) -> Iterable[tuple[str, str, int, str]]:
    for entry in tables["lookup"]:
        try:
            table = read_lookup_table(entry["file"])
        except ValueError as error:
            yield from ((f"file: {line}", "lookup", 0, "file") for line in str(error).splitlines())
            continue
        if len(table) != entry["entries"]:
            yield f"entries says {entry['entries']}, the file has {len(table)}: is it whole?", "lookup", 0, "entries"


FAMILY = Family("lookup", SCHEMA, _read, _check)
