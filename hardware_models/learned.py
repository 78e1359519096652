"""Learned: a layer takes what a predictor trained on measured kernels says; its formulas are in `predictor.py`.

    t = calls * predictor(kind, m / calls, k, n, repeats, taps, weight format, activation format)

Good where a machine was measured on other shapes than those of the network at hand. Its error on shapes that it has not
seen is part of the device file (`mape`, `kendall_tau`). Shapes beyond the range it was trained on are predicted and
named in the cost table's notes; a kind of layer or a pair of formats that it has not seen is refused, since no
measurement says that there is a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry
from .device_schema import Key, TableSchema, integer, number
from .lookup import format_pairs, traffic_bits
from .predictor import Predictor
from .prices import DeviceTables, Family, Prices, Reasons

SCHEMA = {
    "predictor": TableSchema(
        (
            Key("file", "file", required=True),
            integer("samples", "kernels it was trained on", "samples", required=True),
            number("mape", "mean absolute relative error on held-out shapes", "mape", required=True),
            number("kendall_tau", "rank correlation on held-out shapes", "kendall_tau", required=True, above=-1.0),
        )
    )
}

_NONE = -1


@dataclass(frozen=True)
class Learned:
    """Prices of a predictor; `entry` is what the device file says of it, `memory` what the traffic goes to."""

    predictor: Predictor
    entry: Entry
    memory: Entry | None = None

    @property
    def limits(self) -> Mapping[str, float]:
        """None of its own."""
        return {}

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """Latency [s], and traffic where the device file has a [memory.dram]."""
        kind, sizes, pair = self._coded(cells)
        is_lookup = np.array([name == "lookup" for name in cells.kinds], dtype=bool)
        free = is_lookup[:, None] & (pair != _NONE).any(axis=0)
        known = (kind[:, None] != _NONE) & (pair != _NONE) & ~is_lookup[:, None]
        known &= self.predictor.trained[kind[:, None], pair]
        latency = np.where(free, 0.0, np.nan)
        layer, column = np.nonzero(known)
        asked = np.column_stack([kind[layer], pair[layer, column], sizes[layer]])
        distinct, back = np.unique(asked, axis=0, return_inverse=True)
        codes = distinct[:, :2].astype(np.intp)
        seconds = self.predictor.latency(codes[:, 0], distinct[:, 2:], codes[:, 1])
        latency[known] = cells.work.calls[layer] * seconds[back.reshape(-1)]
        return Prices(
            tables={"latency": latency},
            measures={"latency": "s"},
            reasons=_reasons(cells, ~known & ~free),
            accesses={} if self.memory is None else {self.memory.where.removeprefix("memory."): traffic_bits(cells)},
            rests_on=lambda used: {"latency": self.entry.numbers},
            notes=self._notes(kind, sizes, known.any(axis=1)),
        )

    def describe(self) -> list[str]:
        """What it was trained on, and its error."""
        features, good = self.predictor.features, self.predictor.held_out
        lines = [
            f"predictor: {len(self.predictor.forest.roots)} trees on {good.samples} kernels of {good.shapes} shapes; "
            f"on held-out shapes {good.mape:.1%} off in the mean, rank correlation {good.kendall_tau:.3f}, "
            f"{good.tau_within:.3f} among the formats of a shape"
        ]
        for code, kind in enumerate(features.kinds):
            own = [" x ".join(features.pairs[pair]) for pair in np.flatnonzero(self.predictor.trained[code])]
            ranges = zip(("m", "k", "n"), self.predictor.low[code], self.predictor.high[code], strict=False)
            spans = ", ".join(f"{name} {low:.0f} to {high:.0f}" for name, low, high in ranges)
            lines.append(f"{kind}: {', '.join(own)}; {spans}")
        return lines

    def _coded(self, cells: Cells) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.intp]]:
        """Kinds, (layers,), sizes of one call, (layers, 5), and pairs, (layers, columns); _NONE for what is new."""
        kinds = {name: code for code, name in enumerate(self.predictor.features.kinds)}
        pairs = {pair: code for code, pair in enumerate(self.predictor.features.pairs)}
        work = cells.work
        per_call = np.maximum(work.m / np.maximum(work.calls, 1), 1)
        sizes = np.column_stack([per_call, work.k, work.n, work.repeats, work.taps])
        kind = np.array([kinds.get(name, _NONE) for name in cells.kinds], dtype=np.intp)
        known = [[pairs[own] for own in names if own in pairs] for names in format_pairs(cells)]
        pair = np.array([own[0] if own else _NONE for own in known], dtype=np.intp)
        return kind, sizes, np.tile(pair, (cells.shape[0], 1))

    def _notes(self, kind: NDArray[np.intp], sizes: NDArray[np.float64], priced: NDArray[np.bool_]) -> dict[str, str]:
        beyond = int(np.count_nonzero(self.predictor.is_extrapolated(kind[priced], sizes[priced])))
        if not beyond:
            return {}
        return {"latency": f"{beyond} of {len(kind)} layers are extrapolated: larger or smaller than what was measured"}


def _reasons(cells: Cells, refused: NDArray[np.bool_]) -> Reasons | None:
    if not refused.any():
        return None
    pairs = ["{} weights and {} inputs".format(*names[0]) for names in format_pairs(cells)]
    phrases = np.full(cells.shape, "", dtype=object)
    for layer, column in np.argwhere(refused):
        phrases[layer, column] = f"was not trained on {pairs[column]} in a {cells.kinds[layer]}"
    return phrases


def _read(tables: DeviceTables) -> Learned | None:
    if not tables["predictor"]:
        return None
    entry = tables["predictor"][0]
    return Learned(Predictor.load(entry["file"]), entry, next(iter(tables["memory.dram"]), None))


def _check(tables: DeviceTables) -> Iterable[tuple[str, str, int, str]]:
    for entry in tables["predictor"]:
        try:
            good = Predictor.load(entry["file"]).held_out
        except ValueError as error:
            yield f"file: {error}", "predictor", 0, "file"
            continue
        for key, value in (("samples", good.samples), ("mape", good.mape), ("kendall_tau", good.kendall_tau)):
            if abs(entry[key] - value) > 1e-3 * abs(value):
                yield f"{key} says {entry[key]:g}, the file {value:g}", "predictor", 0, key


FAMILY = Family("predictor", SCHEMA, _read, _check)
