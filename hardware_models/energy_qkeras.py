"""QKeras' energies: polynomials through Horowitz' points, and memory by words of 64 bits.

    multiply(b) = 0.002994791667 b^2 + 0.001041666667 b,   b the wider operand;   add(b) = 0.003125 b
    sram(bits) = ceil(bits / 64) s(log2 max(bits, smallest)),   dram(bits) = 20.3125 bits,   all in pJ
    s(x) = 0.000902427321 x^3 - 0.0268847858 x^2 + 0.208900804 x

Source: google/qkeras, qtools (settings, config_public, qenergy), "horowitz"; energies below 0 count as 0. Each tensor
is read or written once. A 4-bit weight beside an 8-bit input costs as much as an 8-bit one: the wider operand decides.
Good for comparing with what QKeras reports; below 8 bits its polynomials extrapolate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_SRAM = (0.000902427321, -0.0268847858, 0.208900804, 0.0)
DRAM_pJ_PER_BIT = 20.3125
FLOAT_MULTIPLY_pJ = {16: 1.1, 32: 3.7}
FLOAT_ADD_pJ = {16: 0.4, 32: 0.9}


def multiply_pJ(weight_bits: ArrayLike, activation_bits: ArrayLike) -> Floats:
    """Energy of an integer product, any shapes that broadcast.

    Example:
        >>> multiply_pJ([8, 4, 4], [8, 8, 4]).round(4)
        array([0.2   , 0.2   , 0.0521])
    """
    bits = np.maximum(np.asarray(weight_bits, dtype=np.float64), activation_bits)
    return 0.002994791667 * bits**2 + 0.001041666667 * bits


def add_pJ(accumulator_bits: ArrayLike) -> Floats:
    """Energy of an integer addition.

    Example:
        >>> float(add_pJ(32))
        0.1
    """
    return 0.003125 * np.asarray(accumulator_bits, dtype=np.float64)


def sram_pJ(bits: ArrayLike, smallest_bits: float = 0.0) -> Floats:
    """Energy to read or write tensors of that many bits once, each in an SRAM of its own size or `smallest_bits`.

    Example:
        >>> sram_pJ([784 * 8], smallest_bits=2**27).round(2)
        array([372.77])
    """
    total = np.asarray(bits, dtype=np.float64)
    size = np.log2(np.maximum(np.maximum(total, smallest_bits), 1.0))
    energy: Floats = np.ceil(total / 64) * np.maximum(np.polyval(_SRAM, size), 0.0)
    return energy


def dram_pJ(bits: ArrayLike) -> Floats:
    """Energy to read or write tensors of that many bits once.

    Example:
        >>> float(dram_pJ(32))
        650.0
    """
    return DRAM_pJ_PER_BIT * np.asarray(bits, dtype=np.float64)
