"""BISMO: a matrix product as a weighted sum of binary products, one for every pair of bits.

    cycles = ceil(m / rows) * ceil(n / columns) * ceil(k / depth) * b_w * b_a + fill
    peak   = 2 * rows * columns * depth * frequency   binary operations a second

Umuroglu, Rasnayake and Själander (2018), "BISMO: a scalable bit-serial matrix multiplication overlay for reconfigurable
computing", and Umuroglu et al. (2019), "Optimizing bit-serial matrix multiplication for reconfigurable computing". The
peak gives the published 6.5 and 15.4 binary TOPS for the documented sizes; the cycles are from memory, unsure.
Fetching and writing back overlap with the array's work.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def bismo_cycles(
    matmul: tuple[ArrayLike, ArrayLike, ArrayLike],
    bits: tuple[ArrayLike, ArrayLike],
    *,
    rows: int,
    columns: int,
    depth: int,
) -> Floats:
    """Cycles of a product, without the fill.

    Args:
        matmul: m, k and n, arrays that broadcast.
        bits: of a weight and of an input.
        rows: positions that are worked on together.
        columns: outputs that are worked on together.
        depth: bits of k that a cycle takes.

    Example:
        >>> bismo_cycles((20, 1024, 30), ([1, 2, 8], [1, 2, 8]), rows=10, columns=10, depth=256)
        array([  24.,   96., 1536.])
    """
    m, k, n = (np.asarray(size, dtype=np.float64) for size in matmul)
    weight_bits, activation_bits = (np.asarray(width, dtype=np.float64) for width in bits)
    return np.ceil(m / rows) * np.ceil(n / columns) * np.ceil(k / depth) * weight_bits * activation_bits
