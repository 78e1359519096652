"""Size: exact bytes of every layer's weight in every format.

A weight of shape (out, in...) takes `storage_bits(shape) / 8` bytes: values, scales and zero points, but no padding of
a short last group, no header and no alignment of the file or kernel that holds it. Sizes may therefore end in a
fraction of a byte. Size does not depend on batch or target.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat
from mpq.granularity import Granularity
from mpq.layers import Layer

FloatTable = NDArray[np.float64]  # (layers, options)
Integers = NDArray[np.int64]  # (shapes,)


def size_bytes(layers: Sequence[Layer], formats: Sequence[NumberFormat | None]) -> FloatTable:
    """Bytes of each weight in each format, scales included; in the format None it stays as it is stored.

    Each (shape, format) is counted once, however many layers share it.

    Args:
        layers: length n.
        formats: length m.

    Returns:
        Float64, (n, m).

    Example:
        >>> from mpq.formats import parse
        >>> fc = Layer("fc", "linear", (10, 64), 640, 640, (1, 64), (1, 10), weight_bytes=2560)
        >>> size_bytes([fc], [parse("int4"), None])  # 640 values of 4 bits and 10 scales of 16, or as stored
        array([[ 340., 2560.]])
    """
    shapes: dict[tuple[int, ...], int] = {}
    index = [shapes.setdefault(tuple(layer.weight_shape), len(shapes)) for layer in layers]
    values, rows, last = _dimensions(list(shapes))
    bits = np.zeros((len(shapes), len(formats)))
    for column, fmt in enumerate(formats):
        if fmt is not None:
            scales = _groups(fmt.bind("weight").granularity, values, rows, last) * fmt.group_bits
            bits[:, column] = values * fmt.bits + np.where(values > 0, scales + fmt.tensor_bits, 0)
    return _with_stored(layers, formats, bits[index] / 8)


def _dimensions(shapes: Sequence[tuple[int, ...]]) -> tuple[Integers, Integers, Integers]:
    """Values, rows and the size of the last axis, each (shapes,) and the latter two at least 1."""
    values = np.array([prod(shape) for shape in shapes], dtype=np.int64)
    rows = np.array([shape[0] if len(shape) > 1 else 1 for shape in shapes], dtype=np.int64)
    last = np.array([shape[-1] if shape else 1 for shape in shapes], dtype=np.int64)
    return values, np.maximum(rows, 1), np.maximum(last, 1)


def _groups(granularity: Granularity | None, values: Integers, rows: Integers, last: Integers) -> Integers:
    """`granularity.groups` of many shapes with values in them, (shapes,)."""
    if granularity is None:
        return np.zeros_like(values)
    if granularity.kind == "group":
        return rows * -(-(values // rows) // granularity.size)
    return {"tensor": np.ones_like(values), "token": values // last, "channel": rows}[granularity.kind]


def value_bytes(layers: Sequence[Layer], formats: Sequence[NumberFormat | None]) -> FloatTable:
    """Bytes of the values alone, scales left out: `parameters * bits / 8`. Shapes as in `size_bytes`."""
    parameters = np.array([layer.parameters for layer in layers], dtype=np.float64)
    bits = np.array([0 if fmt is None else fmt.bits for fmt in formats], dtype=np.float64)
    return _with_stored(layers, formats, np.outer(parameters, bits) / 8)


def _with_stored(layers: Sequence[Layer], formats: Sequence[NumberFormat | None], table: FloatTable) -> FloatTable:
    stored = np.array([layer.weight_bytes for layer in layers], dtype=np.float64)
    unchanged = np.array([fmt is None for fmt in formats], dtype=bool)
    return np.where(unchanged, stored[:, None], table)
