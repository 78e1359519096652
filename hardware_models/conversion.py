"""Conversion costs: what a tensor costs that one layer writes in a format and another reads in a different one.

    t(p, r) = elements * s_per_element + launch      where the input formats of producer p and reader r differ

A layer computes in its input format and writes its output in it; a reader that wants another one converts for itself.
A runtime that converts once for several readers is cheaper: this is an upper estimate there. `[[conversion]]` rows of
a device file say what converts from which formats to which; a pair without a row is free, as where the producer's
kernel requantises on writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .device_numbers import Entry
from .kernel_rows import is_format

Floats = NDArray[np.float64]
Blocks: TypeAlias = dict[tuple[int, int], Floats]  # by positions of two layers, (options, options)


def conversions(rows: Sequence[Entry], cells: Cells) -> dict[str, Blocks]:
    """Costs of converting between layers, a quantity: "latency" [s], and "energy" [J] where the rows have energies.

    They are not calibrated: what a calibration was fitted on has no conversions.

    Layers whose order in the network is (p, r) have the key (p, r); entry [i, j] belongs to option i of p and j of r.
    """
    if not rows or cells.phase == "decode":
        return {}
    elements = _elements(cells)
    once, each, energy = _tables(rows, cells)
    found: dict[str, Blocks] = {"latency": {pair: count * each + once for pair, count in elements.items()}}
    if energy.any():
        found["energy"] = {pair: count * energy for pair, count in elements.items()}
    return found


def _elements(cells: Cells) -> Mapping[tuple[int, int], float]:
    """Elements that go from one layer to another, for the whole batch."""
    position = {layer.name: index for index, layer in enumerate(cells.network.layers)}
    samples, found = cells.batch / cells.network.batch, dict[tuple[int, int], float]()
    for buffer in cells.network.buffers:
        for reader in buffer.readers:
            if buffer.producer in position and reader in position and buffer.producer != reader:
                pair = position[buffer.producer], position[reader]
                found[pair] = found.get(pair, 0.0) + samples * buffer.elements
    return found


def _tables(rows: Sequence[Entry], cells: Cells) -> tuple[Floats, Floats, Floats]:
    """Seconds a call, seconds an element and joules an element, each (options, options) by input format."""
    names = [cells.names(column)[1] for column in range(cells.shape[1] - 1)]
    once, each, energy = (np.zeros((len(names), len(names))) for _ in range(3))
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            row = None if source == target else _row(rows, source, target)
            if row is not None:
                once[i, j] = row.get("launch_overhead_s", 0.0)
                each[i, j] = row["s_per_element"]
                energy[i, j] = 1e-12 * row.get("energy_pJ_per_element", 0.0)
    return once, each, energy


def _row(rows: Sequence[Entry], source: str, target: str) -> Entry | None:
    for row in rows:
        if any(is_format(source, name) for name in row.texts("from")) and any(
            is_format(target, name) for name in row.texts("to")
        ):
            return row
    return None
