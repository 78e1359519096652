"""Lookup tables of minifloat multipliers on an FPGA, with exact sums in fixed point: our proposal, no published law.

    product = sign + (s_w + r_w) + (s_a + r_a) bits,  r = 2^e - 2 (0 for integers)
    multiplier LUT = (2 ceil((s_w+s_a)/6) - 1) (s_w+s_a)
    alignment LUT  = e_w + e_a + c * product * ceil(log2(r_w + r_a + 1))
    accumulator    = product + ceil(log2 K)

with s bits of significand (the hidden one included), e of exponent, K products. Significands multiply as integers do in
FINN, exponents add, and each product is shifted into a fixed-point number wide enough for every sum (a Kulisch
accumulator): nothing is rounded. c is what a bit of one stage of the shifter takes: a number of the device file, an
estimate (half a table: one 6-input table selects among four). An integer operand is a minifloat without exponent.

Aggarwal et al. (2023), arXiv 2311.12359, built such operators of 3 to 8 bits; their lookup tables were not seen. What
is to be trusted is the order: fp4_e2m1 takes about what int4 takes; every bit of exponent more widens shifter, adder
tree and accumulator, so that fp8_e4m3 takes nearly twice what int8 takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.formats import Integer, Minifloat, NumberFormat, UnsignedInteger

from .finn_resources import Arithmetic, multiplier_luts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Operand:
    """One side of the multiplications, (columns,).

    Attributes:
        significand_bits: of the magnitude, the hidden bit included; NaN for formats that are neither integer nor
            minifloat.
        exponent_bits: 0 for integers.

    Example:
        >>> from mpq.formats import parse
        >>> operand = Operand.of([parse(name) for name in ("int8", "uint8", "fp8_e4m3", "fp4_e2m1")])
        >>> operand.significand_bits, operand.fixed_bits
        (array([7., 8., 4., 2.]), array([ 7.,  8., 18.,  4.]))
    """

    significand_bits: Floats
    exponent_bits: Floats

    @classmethod
    def of(cls, formats: Sequence[NumberFormat | None]) -> Operand:
        """The operand of each column."""
        pairs = [_significand_and_exponent(fmt) for fmt in formats]
        significand, exponent = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return cls(significand, exponent)

    @property
    def shifts(self) -> Floats:
        """By how much exponents shift at most."""
        return np.where(self.exponent_bits > 0, 2.0**self.exponent_bits - 2, 0.0)

    @property
    def fixed_bits(self) -> Floats:
        """Bits of the magnitude in fixed point."""
        return self.significand_bits + self.shifts


def minifloat_arithmetic(weight: Operand, activation: Operand, mw: Floats, shifter_luts: Floats) -> Arithmetic:
    """What one lane multiplies and adds with.

    Args:
        weight: (columns,).
        activation: (columns,).
        mw: products that are added, broadcasts with them.
        shifter_luts: lookup tables a bit and stage of the shifter.

    Example:
        >>> from mpq.formats import parse
        >>> side = Operand.of([parse("fp4_e2m1")])
        >>> found = minifloat_arithmetic(side, side, np.array([576.0]), np.array([0.5]))
        >>> found.multiplier_luts, found.alignment_luts, found.product_bits, found.accumulator_bits
        (array([4.]), array([17.5]), array([9.]), array([19.]))
    """
    product = 1 + weight.fixed_bits + activation.fixed_bits
    stages = np.ceil(np.log2(weight.shifts + activation.shifts + 1))
    multiplier = multiplier_luts(weight.significand_bits + activation.significand_bits)
    return Arithmetic(
        multiplier_luts=multiplier,
        alignment_luts=weight.exponent_bits + activation.exponent_bits + shifter_luts * product * stages,
        product_bits=product,
        accumulator_bits=product + np.ceil(np.log2(mw)),
    )


def _significand_and_exponent(fmt: NumberFormat | None) -> tuple[float, float]:
    match fmt:
        case Minifloat(exponent_bits=exponent, mantissa_bits=mantissa):
            return mantissa + 1.0, float(exponent)
        case Integer(width=width):
            return width - 1.0, 0.0
        case UnsignedInteger(width=width):
            return float(width), 0.0
    return np.nan, 0.0
