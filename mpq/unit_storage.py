"""Bits that units take: each is stored as a tensor of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat
from mpq.layers import Units


def unit_storage_bits(units: Units, fmt: NumberFormat) -> NDArray[np.float64]:
    """(units,): bits of every unit in a format, scales and zero points included.

    Units of one shape cost the same, so the format is asked once a shape.

    Example:
        >>> from mpq.formats import parse
        >>> from mpq.layers import Layer, Network
        >>> units = Network((Layer("fc", "linear", (5, 8), 40, 40, (1, 8), (1, 5)),)).units("rows:4")
        >>> unit_storage_bits(units, parse("int4")).tolist()  # 4 rows: 32 values of 4 bits, 4 scales of 16
        [192.0, 48.0]
    """
    rows, columns = units.row_stop - units.row_start, units.column_stop - units.column_start
    widest = int(columns.max(initial=0)) + 1
    shapes, inverse = np.unique(rows * widest + columns, return_inverse=True)  # a shape as one number: fast to sort
    bits = np.array([fmt.storage_bits(divmod(shape, widest)) for shape in shapes.tolist()], dtype=float)
    return bits[inverse]
