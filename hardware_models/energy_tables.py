"""Named tables of what one multiply-add costs, by the widths of its operands, in pJ.

    horowitz-45nm  integer: 0.2 w a / 64 + 0.03 acc / 8;  float of p significant bits: 1.1 (p / 11)^1.55 + add(acc)
    aladdin-40nm   integer: 12.68 w a / 1024 + 0.21 acc / 32;  float: 35.3 (p / 24)^1.55 + 16.7
    bitfusion-45nm-fixed   an element of 2, 4, 8, 16 bits, adder included; between them log-log in sqrt(w a)
    bitfusion-45nm-fusion  the 8-bit element that splits: 0.56 / (int(8 / max(w, 2)) int(8 / max(a, 2)))
    qkeras         QKeras' polynomials (energy_qkeras)

Sources: Horowitz, ISSCC 2014 (45 nm, 0.9 V: 8-bit add 0.03, multiply 0.2; 32-bit 0.1 and 3.1; fp16 0.4 and 1.1; fp32
0.9 and 3.7), read in stillwater-sc/esim; Accelergy's Aladdin plug-in (32-bit points alone; its multiplier's file says
45 nm); BitFusion, results/systolic_array_synth.csv (dynamic power of one element at 500 MHz). The same operation
differs by a factor of four between tables (32-bit multiply: 3.1 and 12.68 pJ), so every result names its table.

The law of Horowitz' table meets his 8-bit points and misses those of 32 bits (multiply 3 % high, add 20 %). A
multiplier grows with w a, an adder with its width; synthesised elements grow with about the power 1.34 of their width,
which is why BitFusion's are a table. What lies between the points of a source is `derived`; what lies outside is an
`estimate`, or has no energy at all: nothing is extrapolated silently. A format narrower than a float beside it is
unpacked to that float, and multiplied there; what unpacking costs is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.formats import MX, NVFP4, FixedPoint, Float, Integer, Minifloat, NumberFormat, UnsignedInteger

from . import energy_qkeras
from .device_numbers import Source

Floats = NDArray[np.float64]

MANTISSA_EXPONENT = 1.55
_READ = "2026-11"


@dataclass(frozen=True)
class MacEnergy:
    """Energy of a multiply-add and how it is known: "secondary", "code", "derived" or "estimate"."""

    pJ: float
    kind: str


class OperationTable(Protocol):
    """A named table; either method returns None for what the table does not cover."""

    @property
    def source(self) -> Source:
        """Where the table comes from; its id is the table's name."""

    @property
    def process_nm(self) -> float:
        """The node it was made for."""

    @property
    def voltage_V(self) -> float | None:
        """The supply voltage it was made for, None where the source names none."""

    @property
    def has_own_adder(self) -> bool:
        """Whether its energies include an accumulator of a width of their own."""

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """A product of integers, added to an integer."""

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """A product of floats of that many significant bits (the hidden one included), added to a float."""


def horowitz_integer_pJ(weight_bits: ArrayLike, activation_bits: ArrayLike, accumulator_bits: ArrayLike = 32) -> Floats:
    """Integer multiply-adds at 45 nm and 0.9 V: `0.2 w a / 64 + 0.03 acc / 8`, any shapes that broadcast.

    Example:
        >>> horowitz_integer_pJ([8, 4, 2], [8, 8, 2])
        array([0.32  , 0.22  , 0.1325])
    """
    products = np.asarray(weight_bits, dtype=np.float64) * np.asarray(activation_bits, dtype=np.float64)
    return 0.2 * products / 64 + 0.03 * np.asarray(accumulator_bits, dtype=np.float64) / 8


def float_multiply_pJ(significant_bits: ArrayLike, known_pJ: float = 1.1, known_bits: int = 11) -> Floats:
    """Float products by significant bits p, `known (p / known bits)^1.55`: the power between Horowitz' fp16 and fp32.

    Example:
        >>> float_multiply_pJ([24, 11, 8, 4]).round(2)  # fp32 (3.7 published), fp16, bf16, fp8_e4m3
        array([3.69, 1.1 , 0.67, 0.23])
    """
    return known_pJ * (np.asarray(significant_bits, dtype=np.float64) / known_bits) ** MANTISSA_EXPONENT


@dataclass(frozen=True, kw_only=True)
class Horowitz:
    """The table "horowitz-45nm"."""

    source: Source
    process_nm: float = 45.0
    voltage_V: float | None = 0.9
    has_own_adder: bool = False

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers every width; below 8 and above 32 bits as an estimate."""
        inside = all(8 <= bits <= 32 for bits in (weight_bits, activation_bits, accumulator_bits))
        energy = horowitz_integer_pJ(weight_bits, activation_bits, accumulator_bits)
        return MacEnergy(float(energy), "derived" if inside else "estimate")

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers accumulators of 16 and 32 bits; below fp16's significant bits as an estimate."""
        if accumulator_bits not in (16, 32):
            return None
        add = 0.4 if accumulator_bits == 16 else 0.9
        if significant_bits in (11, 24):
            return MacEnergy((1.1 if significant_bits == 11 else 3.7) + add, "secondary")
        kind = "derived" if 11 < significant_bits < 24 else "estimate"
        return MacEnergy(float(float_multiply_pJ(significant_bits)) + add, kind)


@dataclass(frozen=True, kw_only=True)
class Aladdin:
    """The table "aladdin-40nm"; everything but 32-bit operations is an estimate."""

    source: Source
    process_nm: float = 40.0
    voltage_V: float | None = None
    has_own_adder: bool = False

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers every width: the multiplier by w a, the adder by its width."""
        energy = 12.68 * weight_bits * activation_bits / 1024 + 0.21 * accumulator_bits / 32
        published = weight_bits == activation_bits == accumulator_bits == 32
        return MacEnergy(energy, "code" if published else "estimate")

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers accumulators of 32 bits."""
        if accumulator_bits != 32:
            return None
        energy = float(float_multiply_pJ(significant_bits, 35.3, 24)) + 16.7
        return MacEnergy(energy, "code" if significant_bits == 24 else "estimate")


@dataclass(frozen=True, kw_only=True)
class FixedElements:
    """The table "bitfusion-45nm-fixed": one synthesised element of each width, its own accumulator included."""

    source: Source
    process_nm: float = 45.0
    voltage_V: float | None = None
    has_own_adder: bool = True
    bits: tuple[int, ...] = (2, 4, 8, 16)
    pJ: tuple[float, ...] = (0.057484, 0.1202034, 0.29769, 0.947376)
    areas_um2: tuple[float, ...] = (124.8912, 282.24, 687.6072, 2203.236)
    leakage_W: tuple[float, ...] = (2.8327e-6, 7.7807e-6, 22.952e-6, 68.98e-6)

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers 2 to 16 bits; unequal widths as an element of sqrt(w a) bits."""
        width = float(np.sqrt(weight_bits * activation_bits))
        if not all(self.bits[0] <= bits <= self.bits[-1] for bits in (weight_bits, activation_bits)):
            return None
        energy = float(np.exp(np.interp(np.log(width), np.log(self.bits), np.log(self.pJ))))
        return MacEnergy(energy, "code" if weight_bits == activation_bits in self.bits else "derived")

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers none."""
        return None


@dataclass(frozen=True, kw_only=True)
class FusionElement:
    """The table "bitfusion-45nm-fusion": an 8-bit element that works as 4 of 4 x 4 or 16 of 2 x 2 bits.

    Energy a multiply-add is that of the element by the number it makes at once; 3 bits run as 4, 5 to 7 as 8.
    """

    source: Source
    process_nm: float = 45.0
    voltage_V: float | None = None
    has_own_adder: bool = True
    pJ: float = 0.55992
    area_um2: float = 1733.13
    leakage_W: float = 64.314e-6

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers up to 8 bits."""
        if max(weight_bits, activation_bits) > 8:
            return None
        at_once = (8 // max(weight_bits, 2)) * (8 // max(activation_bits, 2))
        return MacEnergy(self.pJ / at_once, "derived" if at_once > 1 else "code")

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers none."""
        return None


@dataclass(frozen=True, kw_only=True)
class QKeras:
    """The table "qkeras"."""

    source: Source
    process_nm: float = 45.0
    voltage_V: float | None = 0.9
    has_own_adder: bool = False

    def integer(self, weight_bits: int, activation_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers every width, below 8 bits as an estimate."""
        multiply = energy_qkeras.multiply_pJ(weight_bits, activation_bits)
        inside = all(8 <= bits <= 32 for bits in (max(weight_bits, activation_bits), accumulator_bits))
        energy = float(multiply + energy_qkeras.add_pJ(accumulator_bits))
        return MacEnergy(energy, "code" if inside else "estimate")

    def floating(self, significant_bits: int, accumulator_bits: int) -> MacEnergy | None:
        """Covers fp16 and fp32."""
        multiply = {11: energy_qkeras.FLOAT_MULTIPLY_pJ[16], 24: energy_qkeras.FLOAT_MULTIPLY_pJ[32]}
        add = energy_qkeras.FLOAT_ADD_pJ.get(accumulator_bits)
        if significant_bits not in multiply or add is None:
            return None
        return MacEnergy(multiply[significant_bits] + add, "code")


OPERATIONS: Mapping[str, OperationTable] = {
    table.source.id: table
    for table in (
        Horowitz(source=Source("horowitz-45nm", "Horowitz, ISSCC 2014: 45 nm, 0.9 V", "secondary", _READ)),
        Aladdin(source=Source("aladdin-40nm", "Aladdin in Accelergy's plug-in: 40 nm, 1 ns", "code", _READ)),
        FixedElements(
            source=Source("bitfusion-45nm-fixed", "BitFusion's synthesis, fixed elements: 45 nm", "code", _READ)
        ),
        FusionElement(
            source=Source("bitfusion-45nm-fusion", "BitFusion's synthesis, 8/2-bit element: 45 nm", "code", _READ)
        ),
        QKeras(source=Source("qkeras", "QKeras, polynomials through Horowitz' points: 45 nm", "code", _READ)),
    )
}


def mac_energy(
    table: OperationTable, weight: NumberFormat, activation: NumberFormat, accumulator_bits: int = 32
) -> MacEnergy | None:
    """Energy of a multiply-add of two formats, None where the table has none.

    Beside a float everything is unpacked to that float, of two floats to the one with more significant bits. Two
    integers are multiplied as such. Codes (nf4, log4, bcq2, GGUF's) beside an integer have no energy.

    Example:
        >>> from mpq.formats import parse
        >>> mac_energy(OPERATIONS["horowitz-45nm"], parse("int8"), parse("int8"))
        MacEnergy(pJ=0.32, kind='derived')
        >>> mac_energy(OPERATIONS["bitfusion-45nm-fusion"], parse("int4"), parse("fp16")) is None
        True
    """
    widths = [bits for bits in map(significant_bits, (weight, activation)) if bits is not None]
    if widths:
        return table.floating(max(widths), accumulator_bits)
    if is_integer(weight) and is_integer(activation):
        return table.integer(weight.bits, activation.bits, accumulator_bits)
    return None


def significant_bits(fmt: NumberFormat) -> int | None:
    """Bits of a float's mantissa with the hidden one; None for what is no float.

    Example:
        >>> from mpq.formats import parse
        >>> [significant_bits(parse(name)) for name in ("fp32", "bf16", "fp8_e4m3", "mxfp4", "int8")]
        [24, 8, 4, 2, None]
    """
    if isinstance(fmt, Float):
        return {"fp32": 24, "fp16": 11, "bf16": 8}[fmt.kind]
    if isinstance(fmt, NVFP4):
        return 2
    element = fmt.element if isinstance(fmt, MX) else fmt
    return element.mantissa_bits + 1 if isinstance(element, Minifloat) else None


def is_integer(fmt: NumberFormat) -> bool:
    """Whether values are integers times a scale: int, uint, fixed point, mxint8."""
    element = fmt.element if isinstance(fmt, MX) else fmt
    return isinstance(element, Integer | UnsignedInteger | FixedPoint)
