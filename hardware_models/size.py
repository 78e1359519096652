"""Size: exact bytes of every layer's weight in every format.

A weight of shape (out, in...) takes `storage_bits(shape) / 8` bytes: values, scales and zero points, but no padding of
a short last group, no header and no alignment of the file or kernel that holds it. Sizes may therefore end in a
fraction of a byte. Size does not depend on batch or target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat
from mpq.layers import Layer

FloatTable = NDArray[np.float64]  # (layers, options)


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
    bits = np.array(
        [[0 if fmt is None else fmt.storage_bits(shape) for fmt in formats] for shape in shapes], dtype=np.float64
    ).reshape(len(shapes), len(formats))
    return _with_stored(layers, formats, bits[index] / 8)


def value_bytes(layers: Sequence[Layer], formats: Sequence[NumberFormat | None]) -> FloatTable:
    """Bytes of the values alone, scales left out: `parameters * bits / 8`. Shapes as in `size_bytes`."""
    parameters = np.array([layer.parameters for layer in layers], dtype=np.float64)
    bits = np.array([0 if fmt is None else fmt.bits for fmt in formats], dtype=np.float64)
    return _with_stored(layers, formats, np.outer(parameters, bits) / 8)


def _with_stored(layers: Sequence[Layer], formats: Sequence[NumberFormat | None], table: FloatTable) -> FloatTable:
    stored = np.array([layer.weight_bytes for layer in layers], dtype=np.float64)
    unchanged = np.array([fmt is None for fmt in formats], dtype=bool)
    return np.where(unchanged, stored[:, None], table)
