"""BOPs: bit operations a sample, multiply-adds times the bits of both factors.

The convention of HAWQ-V3 (its ILP.ipynb) and of qonnx's `compute_bops_and_macs`: a multiply-add of a `b_w`-bit weight
and a `b_a`-bit input is `b_w * b_a` bit operations; additions, scales and zero points are not counted. An input that
stays as it is has the bits of the model's dtype: W4 with fp32 inputs is 128 a multiply-add. BOPs rank plans, they do
not predict time: on a T4 int8 takes 1.3 to 2.0 times as long as int4 (ResNet-18), where BOPs say 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bit_operations(macs: ArrayLike, weight_bits: ArrayLike, activation_bits: ArrayLike) -> NDArray[np.float64]:
    """`macs * weight_bits * activation_bits` for every layer and option.

    Args:
        macs: multiply-adds a sample, (layers,).
        weight_bits: bits of one weight, (options,).
        activation_bits: bits of one input, (options,).

    Returns:
        Float64, (layers, options).

    Example:
        >>> bit_operations([294912], [4, 8], [8, 8])  # 3x3 convolution, 16 to 32 channels, 8x8 pixels
        array([[ 9437184., 18874368.]])
    """
    bits = np.asarray(weight_bits, dtype=np.float64) * np.asarray(activation_bits, dtype=np.float64)
    return np.outer(np.asarray(macs, dtype=np.float64), bits)
