"""Bit Fusion: a systolic array of 8-bit units that fall apart into 2-bit bricks for narrow operands.

    f = floor(p_max / max(b_a, p_min)) * floor(p_max / max(b_w, p_min))
    convolution, channel-wise:  cycles = positions * ceil(n / columns) * taps * ceil(channels / (rows * f))
    product (lowered, linear):  cycles = positions * ceil(n / columns) * ceil(k / (rows * f))

Sharma et al. (2018), "Bit Fusion: bit-level dynamically composable architecture for accelerating deep neural networks";
the laws are those of the authors' simulator (hsharma35/bitfusion, src/simulator/accelerator.py) and give its published
compute cycles exactly. Widths round up to the next that divides p_max: 3 bits run at the rate of 4, and 5 to 7 bits at
the rate of 8. The simulator lowers the network's first convolution and runs the others channel-wise; here a convolution
is lowered where its input channels are fewer than the rows, which is the same for its networks.

Its "memory wait" is what the interface (192 bits a cycle) takes longer than this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def fused_units(activation_bits: ArrayLike, weight_bits: ArrayLike, *, max_bits: int = 8, min_bits: int = 2) -> Floats:
    """Multiply-adds a cycle that one fusion unit does at these widths.

    Raises:
        ValueError: if a width is above `max_bits`: one pass does not multiply such operands.

    Example:
        >>> fused_units([8, 8, 4, 3, 2, 1], [8, 4, 4, 3, 2, 1])
        array([ 1.,  2.,  4.,  4., 16., 16.])
    """
    a = np.maximum(np.asarray(activation_bits, dtype=np.float64), min_bits)
    w = np.maximum(np.asarray(weight_bits, dtype=np.float64), min_bits)
    if (widest := max(a.max(initial=0), w.max(initial=0))) > max_bits:
        raise ValueError(f"operands must have at most {max_bits} bits, got {widest:g}")
    return np.asarray(np.floor(max_bits / a) * np.floor(max_bits / w))


def bitfusion_cycles(
    matmul: tuple[ArrayLike, ArrayLike, ArrayLike],
    taps: ArrayLike,
    units: ArrayLike,
    *,
    rows: int = 16,
    columns: int = 32,
) -> Floats:
    """Cycles of a product or convolution without waiting for memory.

    Args:
        matmul: m (output positions), k (input channels x taps) and n (output channels), arrays that broadcast.
        taps: kernel positions of a convolution, 1 elsewhere.
        units: of `fused_units`.
        rows: inputs that the array takes a cycle.
        columns: outputs that it takes.

    Example:
        Two layers of AlexNet, batch 16: 11 x 11 x 3 to 96 channels at 8 bits, then 5 x 5 x 96 to 256 at 4 bits:

        >>> bitfusion_cycles((16 * 55 * 55, 363, 96), 121, 1), bitfusion_cycles((16 * 27 * 27, 2400, 256), 25, 4)
        (np.float64(3339600.0), np.float64(4665600.0))
    """
    m, k, n = (np.asarray(size, dtype=np.float64) for size in matmul)
    taps, inner = np.asarray(taps, dtype=np.float64), rows * np.asarray(units, dtype=np.float64)
    channels = k / taps
    steps = np.where(channels < rows, np.ceil(k / inner), taps * np.ceil(channels / inner))
    return m * np.ceil(n / columns) * steps
