"""Stripes: activations enter bit by bit, weights are 16 bits wide; a convolution takes cycles by its activations' bits.

    convolution:     cycles = ceil(m / windows) * ceil(n / columns) * ceil(k / rows) * b_a
    any layer:       cycles <= m * ceil(n / columns) * ceil(k / rows)

Judd et al. (2016), "Stripes: bit-serial deep neural network computing". From memory, unsure: the law cycles = (cycles
of the 16-bit design) * b_a / 16 for convolutions, no effect of weight bits, no gain for fully connected layers. With 16
windows of one sample side by side both lines say just that; a layer with one position a sample keeps the second. A
layer takes the better of the two, so a linear layer with many positions (tokens) counts as a convolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def stripes_cycles(
    matmul: tuple[ArrayLike, ArrayLike, ArrayLike],
    activation_bits: ArrayLike,
    *,
    rows: int = 16,
    columns: int = 16,
    windows: int = 16,
) -> Floats:
    """Cycles of one sample's product.

    Args:
        matmul: m, k and n of one sample, arrays that broadcast.
        activation_bits: bits of an input.
        rows: inputs of a product that are worked on together.
        columns: outputs that are.
        windows: positions that are.

    Example:
        >>> stripes_cycles((64, 64, 64), [16, 8, 4]), stripes_cycles((1, 64, 64), [16, 8, 4])
        (array([1024.,  512.,  256.]), array([16., 16., 16.]))
    """
    m, k, n = (np.asarray(size, dtype=np.float64) for size in matmul)
    tiles = np.ceil(n / columns) * np.ceil(k / rows)
    return np.asarray(tiles * np.minimum(np.ceil(m / windows) * np.asarray(activation_bits, dtype=np.float64), m))
