"""Eyeriss' energy of moving one value through its hierarchy, from how often each level reuses it.

    input or weight:  a DRAM + a b buffer + a b c array + a b c d register
    partial sum:      (2 a - 1) DRAM + 2 a (b - 1) buffer + a b (c - 1) array + 2 a b c (d - 1) register

a, b, c, d: how often the value is read from DRAM, from the buffer each of those times, handed between processing
elements each of those, and used from the register file each of those; a b c d is all its uses. A partial sum takes two
accesses each time it is kept and fetched again, and one for every hop between elements.

Source: Chen, Emer and Sze (ISCA 2016), equations 3 and 4, read in a secondary page. Costs relative to a 16-bit
multiply-add at 65 nm (1): DRAM 200, buffer 6, array 2, register 1, from memory: unsure. Good for comparing dataflows of
one machine; the relative costs belong to 16 bits and that process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AccessCosts:
    """Energy of one access at each level; by default in multiply-adds of 16 bits, an estimate."""

    dram: float = 200.0
    buffer: float = 6.0
    array: float = 2.0
    register: float = 1.0


def operand_energy(reuse: ArrayLike, costs: AccessCosts | None = None) -> Floats:
    """Energy to bring one input or weight to all its uses.

    Args:
        reuse: (a, b, c, d), (..., 4).
        costs: of one access.

    Example:
        >>> operand_energy([[1, 1, 1, 1], [1, 2, 3, 4]])
        array([209., 248.])
    """
    cost = costs or AccessCosts()
    uses = np.cumprod(np.asarray(reuse, dtype=np.float64), axis=-1)
    energy: Floats = uses @ np.array([cost.dram, cost.buffer, cost.array, cost.register])
    return energy


def partial_sum_energy(reuse: ArrayLike, costs: AccessCosts | None = None) -> Floats:
    """Energy to add up one output over a b c d products.

    Example:
        >>> partial_sum_energy([[1, 1, 1, 1], [1, 2, 3, 4]])
        array([200., 256.])
    """
    cost = costs or AccessCosts()
    a, b, c, d = np.moveaxis(np.asarray(reuse, dtype=np.float64), -1, 0)
    buffer, array, register = 2 * a * (b - 1), a * b * (c - 1), 2 * a * b * c * (d - 1)
    on_chip = buffer * cost.buffer + array * cost.array + register * cost.register
    energy: Floats = (2 * a - 1) * cost.dram + on_chip
    return energy
