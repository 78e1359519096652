"""Loom: activations and weights enter bit by bit; a convolution takes cycles by the product of both widths.

    convolution:      cycles = ceil(m / windows) * ceil(n / columns) * ceil(k / rows) * b_a * b_w
    fully connected:  cycles = m * ceil(n / columns) * ceil(k / rows) * b_w

Sharify et al. (2018), "Loom: exploiting weight and activation precisions to accelerate convolutional neural networks",
arXiv 1706.07853. The abstract says that convolutions speed up with both widths and fully connected layers with the
weights' alone, for 128 multiply-adds of 16 bits a cycle at full width. The tiling (16 inputs, 128 outputs, 16
positions, 1 bit of each a cycle) is derived: it makes the laws b_a * b_w / 256 and b_w / 16 of that 16-bit design. A
layer takes the better line, so a linear layer with many positions a sample counts as a convolution. Trimming of
activations at run time is left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def loom_cycles(
    matmul: tuple[ArrayLike, ArrayLike, ArrayLike],
    bits: tuple[ArrayLike, ArrayLike],
    *,
    rows: int = 16,
    columns: int = 128,
    windows: int = 16,
) -> Floats:
    """Cycles of one sample's product.

    Args:
        matmul: m, k and n of one sample, arrays that broadcast.
        bits: of a weight and of an input.
        rows: inputs of a product that are worked on together.
        columns: outputs that are.
        windows: positions that are.

    Example:
        >>> loom_cycles((64, 64, 128), ([16, 4], [16, 8])), loom_cycles((1, 64, 128), ([16, 4], [16, 8]))
        (array([4096.,  512.]), array([64., 16.]))
    """
    m, k, n = (np.asarray(size, dtype=np.float64) for size in matmul)
    weight_bits, activation_bits = (np.asarray(width, dtype=np.float64) for width in bits)
    tiles = np.ceil(n / columns) * np.ceil(k / rows)
    return tiles * weight_bits * np.minimum(np.ceil(m / windows) * activation_bits, m)
