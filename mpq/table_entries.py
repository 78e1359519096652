"""From option indices a unit to the entries of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.options import Option
from mpq.plan import Entry, Split

if TYPE_CHECKING:
    from mpq.tables import CostTable


def entries_of(table: CostTable, choices: NDArray[np.int64]) -> tuple[Entry, ...]:
    """One entry a layer of a table, from an option index a unit; layers cut into units become a `Split`."""
    options = tuple(Option.parse(label) for label in table.options)
    entries = []
    order = np.argsort(table.layer_index, kind="stable")
    starts = np.searchsorted(table.layer_index[order], np.arange(len(table.layers) + 1))
    for position, layer in enumerate(table.layers):
        mine = order[starts[position] : starts[position + 1]]
        if table.granularity == "layer" or (table.granularity == "experts" and layer.experts == 1):
            entries.append(Entry(layer, options[choices[mine[0]]]))
        else:
            columns = np.flatnonzero(table.allowed[mine].any(axis=0))
            codes = np.searchsorted(columns, choices[mine]).astype(np.uint8)
            entries.append(Entry(layer, Split(table.granularity, tuple(options[c] for c in columns), codes)))
    return tuple(entries)
