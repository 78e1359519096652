"""BOPs: bit operations a sample, in the three conventions that published figures use.

    hawq      macs b_w b_a                                 HAWQ-V3 (its ILP.ipynb) and qonnx's compute_bops_and_macs
    nncf      2 macs max(b_w, b_a)                         NNCF 1.x and 2.x: the "bit complexity" of HAWQ's precision
                                                           initialisation (compression_ratio.py; its FLOPs are 2 macs)
    additions macs (b_w b_a + b_w + b_a + log2 K)          Baskin et al. (2018), UNIQ, arXiv:1804.10969 (from memory,
                                                           unsure): K products are added up in an accumulator

for a multiply-add of a `b_w`-bit weight and a `b_a`-bit input. "hawq" is what `Target.costs` reports. Scales and zero
points are not counted. An input that stays as it is has the bits of the model's dtype: W4 with fp32 inputs is 128 a
multiply-add. BOPs rank plans, they do not predict time: on a T4 int8 takes 1.3 to 2.0 times as long as int4
(ResNet-18), where "hawq" says 4 and "nncf" says 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.suggestions import did_you_mean

Floats = NDArray[np.float64]


def _products(weight_bits: Floats, activation_bits: Floats, reduction: Floats) -> Floats:
    return weight_bits * activation_bits


def _widest(weight_bits: Floats, activation_bits: Floats, reduction: Floats) -> Floats:
    return 2 * np.maximum(weight_bits, activation_bits)


def _with_additions(weight_bits: Floats, activation_bits: Floats, reduction: Floats) -> Floats:
    return weight_bits * activation_bits + weight_bits + activation_bits + np.log2(reduction)


CONVENTIONS: Mapping[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "hawq": _products,
    "nncf": _widest,
    "additions": _with_additions,
}


def bit_operations(
    macs: ArrayLike,
    weight_bits: ArrayLike,
    activation_bits: ArrayLike,
    *,
    convention: str = "hawq",
    reduction: ArrayLike | None = None,
) -> Floats:
    """Bit operations of every layer and option.

    Args:
        macs: multiply-adds a sample, (layers,).
        weight_bits: bits of one weight, (options,).
        activation_bits: bits of one input, (options,).
        convention: "hawq", "nncf" or "additions", see above.
        reduction: products that are added up for one output, K, (layers,): "additions" needs it.

    Returns:
        Float64, (layers, options).

    Raises:
        ValueError: if the convention is unknown, or "additions" has no reduction.

    Example:
        >>> bit_operations([294912], [4, 8], [8, 8])  # 3x3 convolution, 16 to 32 channels, 8x8 pixels
        array([[ 9437184., 18874368.]])
        >>> bit_operations([1], [4, 8], [8, 8], convention="nncf")
        array([[16., 16.]])
        >>> bit_operations([1], [4, 8], [8, 8], convention="additions", reduction=[256])
        array([[52., 88.]])
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention of bit operations {convention!r}{did_you_mean(convention, CONVENTIONS)}")
    if reduction is None and convention == "additions":
        raise ValueError("convention 'additions' needs reduction, the products added up for one output of each layer")
    counts = np.asarray(macs, dtype=np.float64)
    products = np.ones_like(counts) if reduction is None else np.asarray(reduction, dtype=np.float64)
    weights, activations = (np.asarray(bits, dtype=np.float64)[None, :] for bits in (weight_bits, activation_bits))
    each = CONVENTIONS[convention](weights, activations, products[:, None])
    total: Floats = counts[:, None] * each
    return total
