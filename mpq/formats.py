"""Number formats, a class a family, and `parse`, which reads ``name[@granularity][@range][@scale=<float>]``.

A format says how a tensor is stored and what that costs; `mpq.fake_quantize` computes what becomes of its values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import ClassVar

from mpq.granularity import CHANNEL, MSE, TENSOR, TOKEN, Granularity, MinMax, Percentile, Range, parse_suffix
from mpq.number_format import SCALE_BITS, Layout, NumberFormat

__all__ = [
    "CHANNEL", "GGUF", "MSE", "MX", "NF4", "NVFP4", "SCALE_BITS", "TENSOR", "TOKEN", "BinaryCoded", "FixedPoint",
    "Float", "Granularity", "Integer", "MinMax", "Minifloat", "NumberFormat", "Percentile", "PowerOfTwo", "Range",
    "UnsignedInteger", "UnsignedLog", "parse",
]  # fmt: skip

FAMILIES = (
    "int2…int16, uint2…uint16 (with zero point), minifloats fp{b}_e{E}m{M} of 3 to 8 bits (fp4_e2m1, fp6_e2m3, "
    "fp6_e3m2, fp8_e4m3, fp8_e5m2, ...), fp16, bf16, fp32, fp64, mxint8, mxfp8_e4m3, mxfp8_e5m2, mxfp6_e2m3, "
    "mxfp6_e3m2, mxfp4, nvfp4, nf4, bcq1…bcq4, log2…log8, ulog2…ulog8, ulogsqrt2…ulogsqrt8, fixed{i}.{f}, "
    "and the GGUF types (q4_0, q4_k, q6_k, ...)"
)
_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, repr=False)
class Integer(NumberFormat):
    """``int{b}``, 2 to 16 bits: symmetric, scale = amax / (2^(b−1) − 1), codes −2^(b−1) … 2^(b−1) − 1, ties to even.

    The scale is rounded to nearest, so the largest value may clip. Up to 11 bits (8 with bf16 scales), for a scale in
    the normal range of its format, that is less than half a step; name ``@scale=fp32`` for more bits or tiny weights.
    There, with the min-max range, quantising twice equals quantising once (with fp32 to the scale's last bit).

    Example:
        >>> Integer(4).bind("weight")
        int4@channel
    """

    width: int

    def _layout(self) -> Layout:
        _check_bits("int", self.width, 2, 16)
        return Layout(f"int{self.width}", self.width)


@dataclass(frozen=True, repr=False)
class UnsignedInteger(NumberFormat):
    """``uint{b}``, 2 to 16 bits: codes 0 … 2^b − 1, scale = (max − min) / (2^b − 1), value = (code − zero) · scale.

    The range is widened to contain 0, and the zero point round(−min / scale) is a code itself, so that 0 is exact.
    Each scale comes with one zero point of b bits. Quantising twice may differ from quantising once: where the ends of
    the range round inwards, the second range is narrower.
    """

    width: int

    def _layout(self) -> Layout:
        _check_bits("uint", self.width, 2, 16)
        return Layout(f"uint{self.width}", self.width, header=self.width)


@dataclass(frozen=True, repr=False)
class Minifloat(NumberFormat):
    """``fp{b}_e{E}m{M}``: sign, E exponent bits, M mantissa bits, subnormals, scaled so that amax is the largest value.

    No infinity and no NaN: largest (2 − 2^−M) · 2^(2^E − 1 − bias) with bias 2^(E−1) − 1, and 2^(E+M+1) − 1 values;
    except fp8_e4m3 (largest 448, 253 values) and fp8_e5m2 (57344, 247), which reserve codes as the OCP 8-bit floating
    point specification says. Ties go to the even mantissa, without mantissa bits to the larger value (IEEE 754-2019).
    From five exponent bits scales are bf16 unless named: amax / 57344 leaves the range of fp16.
    Quantising twice equals quantising once while the scale is a normal number (with fp32 to the scale's last bit).

    Example:
        >>> Minifloat(2, 1), Minifloat(2, 1).largest, Minifloat(4, 3).largest
        (fp4_e2m1, 6.0, 448.0)
    """

    exponent_bits: int
    mantissa_bits: int

    def _layout(self) -> Layout:
        bits = 1 + self.exponent_bits + self.mantissa_bits
        name = f"fp{bits}_e{self.exponent_bits}m{self.mantissa_bits}"
        if not 3 <= bits <= 8 or self.exponent_bits < 1 or self.mantissa_bits < 0:
            raise ValueError(f"minifloat must have 3 to 8 bits with at least one of exponent, got {name}")
        return Layout(name, bits, scale="bf16" if self.exponent_bits >= 5 else "fp16")

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def largest(self) -> float:
        """The largest finite value."""
        if (self.exponent_bits, self.mantissa_bits) == (4, 3):
            return 448.0
        if (self.exponent_bits, self.mantissa_bits) == (5, 2):
            return 57344.0
        return float((2 - 2.0**-self.mantissa_bits) * 2.0 ** (2**self.exponent_bits - 1 - self.bias))


FLOAT_BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


@dataclass(frozen=True, repr=False)
class Float(NumberFormat):
    """``fp16``, ``bf16``, ``fp32``, ``fp64``: a cast without scale; what would overflow is the largest finite value."""

    takes: ClassVar[frozenset[str]] = _NOTHING
    kind: str

    def _layout(self) -> Layout:
        if self.kind not in FLOAT_BITS:
            raise ValueError(f"float must be one of {', '.join(FLOAT_BITS)}, got {self.kind!r}")
        return Layout(self.kind, FLOAT_BITS[self.kind], scale=None)


@dataclass(frozen=True, repr=False)
class FixedPoint(NumberFormat):
    """``fixed{i}.{f}``: two's complement, i integer bits with the sign, f fraction bits, no scale; up to 32 bits.

    Values −2^(i−1) … 2^(i−1) − 2^−f in steps of 2^−f, ties to even, saturating. Quantising twice equals once.
    """

    takes: ClassVar[frozenset[str]] = _NOTHING
    integer_bits: int
    fraction_bits: int

    def _layout(self) -> Layout:
        name = f"fixed{self.integer_bits}.{self.fraction_bits}"
        bits = self.integer_bits + self.fraction_bits
        if self.integer_bits < 1 or self.fraction_bits < 0 or not 2 <= bits <= 32:
            raise ValueError(
                f"fixed point must have at least 1 integer bit (the sign) and 2 to 32 bits in all, got {name}"
            )
        return Layout(name, bits, scale=None)

    @property
    def largest(self) -> float:
        """The largest value."""
        return 2.0 ** (self.integer_bits - 1) - 2.0**-self.fraction_bits


MX_ELEMENTS: dict[str, Minifloat | FixedPoint] = {
    "mxint8": FixedPoint(2, 6),
    "mxfp8_e4m3": Minifloat(4, 3),
    "mxfp8_e5m2": Minifloat(5, 2),
    "mxfp6_e2m3": Minifloat(2, 3),
    "mxfp6_e3m2": Minifloat(3, 2),
    "mxfp4": Minifloat(2, 1),
}


@dataclass(frozen=True, repr=False)
class MX(NumberFormat):
    """OCP microscaling: blocks of 32 along the columns with a scale 2^(floor(log2 amax) − emax), stored as e8m0.

    emax is the exponent of the element's largest value, so values above it saturate (OCP Microscaling Formats
    Specification 1.0, section 6.3). Elements: minifloats, or 8-bit two's complement with 6 fraction bits (mxint8).
    Quantising twice equals quantising once, except for an mxint8 block with a value that rounds to −2 · scale.
    """

    takes: ClassVar[frozenset[str]] = _NOTHING
    kind: str

    def _layout(self) -> Layout:
        if self.kind not in MX_ELEMENTS:
            raise ValueError(f"MX format must be one of {', '.join(MX_ELEMENTS)}, got {self.kind!r}")
        return Layout(self.kind, self.element.bits, granularity=Granularity("group", 32), scale="e8m0")

    @property
    def element(self) -> Minifloat | FixedPoint:
        """The format of a value divided by its block's scale."""
        return MX_ELEMENTS[self.kind]


@dataclass(frozen=True, repr=False)
class NVFP4(NumberFormat):
    """``nvfp4``: fp4_e2m1 in blocks of 16 with fp8_e4m3 scales, and one fp32 scale a tensor, amax / (448 · 6).

    Quantising twice equals quantising once, to the last bit of the tensor's scale, while the block scales are normal.
    """

    takes: ClassVar[frozenset[str]] = _NOTHING
    element: ClassVar[Minifloat] = Minifloat(2, 1)
    scales: ClassVar[Minifloat] = Minifloat(4, 3)

    def _layout(self) -> Layout:
        return Layout("nvfp4", 4, granularity=Granularity("group", 16), scale="fp8_e4m3", header=8, tensor_bits=32)


@dataclass(frozen=True, repr=False)
class NF4(NumberFormat):
    """``nf4``: amax times the 16 normal quantiles of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E).

    Quantising twice equals quantising once while the scale is a normal number.
    """

    def _layout(self) -> Layout:
        return Layout("nf4", 4)


@dataclass(frozen=True, repr=False)
class BinaryCoded(NumberFormat):
    """``bcq{b}``, 1 to 4 bits: w ≈ Σ αₖ bₖ, a sum of b scales with signs bₖ = ±1 (Xu et al. 2018, arXiv:1802.00150).

    A group stores b scales. They are fitted by least squares, so there is no range to choose; 0 is no value in general.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"granularity", "scale"})
    width: int

    def _layout(self) -> Layout:
        _check_bits("bcq", self.width, 1, 4)
        return Layout(f"bcq{self.width}", self.width, scales=self.width)


@dataclass(frozen=True, repr=False)
class PowerOfTwo(NumberFormat):
    """``log{b}``, 2 to 8 bits: 0 and ±scale · 2^−k for k = 0 … 2^(b−1) − 2; the scale is a power of two, as e8m0.

    The scale is the power of two nearest to amax; halves round away from 0. Quantising twice equals quantising once.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"granularity", "range"})
    width: int

    def _layout(self) -> Layout:
        _check_bits("log", self.width, 2, 8)
        return Layout(f"log{self.width}", self.width, scale="e8m0")


@dataclass(frozen=True, repr=False)
class UnsignedLog(NumberFormat):
    """``ulog{b}`` and ``ulogsqrt{b}``, 2 to 8 bits: 0 and scale · 2^(−k/root), k = 0 … 2^b − 2, root 1 and 2.

    For what is never negative, as softmax outputs are; negative values become 0. The scale is the largest value.
    Sources: log2 as in FQ-ViT (Lin et al. 2022, arXiv:2111.13824), log √2 as in RepQ-ViT (Li et al. 2023,
    arXiv:2212.08254). Their programs round the logarithm and have 2^b + 1 values, 0 among them; here the nearest value
    is taken, the lower one halfway, and 0 is one of 2^b codes.

    Example:
        >>> UnsignedLog(4, 2), UnsignedLog(4, 2).levels[-3:]
        (ulogsqrt4, (0.5, 0.7071067811865476, 1.0))
    """

    width: int
    root: int = 1

    def _layout(self) -> Layout:
        name = {1: "ulog", 2: "ulogsqrt"}.get(self.root, "")
        if not name:
            raise ValueError(f"root must be 1 (ulog: powers of two) or 2 (ulogsqrt: of its root), got {self.root}")
        _check_bits(name, self.width, 2, 8)
        return Layout(f"{name}{self.width}", self.width)

    @property
    def levels(self) -> tuple[float, ...]:
        """Values at scale 1, ascending."""
        return (0.0, *(2.0 ** (-k / self.root) for k in range(2**self.width - 2, -1, -1)))


GGUF_BLOCKS = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34), "q2_k": (256, 84),
    "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210), "iq4_nl": (32, 18),
    "iq4_xs": (256, 136), "tq1_0": (256, 54), "tq2_0": (256, 66), "iq1_s": (256, 50), "iq1_m": (256, 56),
    "iq2_xxs": (256, 66), "iq2_xs": (256, 74), "iq2_s": (256, 82), "iq3_xxs": (256, 98), "iq3_s": (256, 110),
}  # fmt: skip
"""Values and bytes of a block of every GGUF type, as in ggml."""


@dataclass(frozen=True, repr=False)
class GGUF(NumberFormat):
    """A block type of the GGUF file format by its lower-case name; `bits` is the digit in the name.

    What a block stores besides that many bits a value is its header: scales, and for ``tq1_0``, ``iq1_*``, ``iq2_*``
    and ``iq3_*`` part of the codes too. A short last block has a whole header. The types with codebook grids, iq1, iq2
    and iq3, are priced but cannot be simulated.

    Example:
        >>> GGUF("q6_k").bits, GGUF("q6_k").bits_per_value((1, 256))
        (6, 6.5625)
    """

    takes: ClassVar[frozenset[str]] = _NOTHING
    kind: str

    def _layout(self) -> Layout:
        if self.kind not in GGUF_BLOCKS:
            raise ValueError(f"GGUF type must be one of {', '.join(GGUF_BLOCKS)}, got {self.kind!r}")
        block, size_bytes = GGUF_BLOCKS[self.kind]
        bits = int(re.sub("[^0-9]", "", self.kind)[0])
        return Layout(self.kind, bits, Granularity("group", block), scales=0, header=8 * size_bytes - block * bits)


def _check_bits(family: str, bits: int, least: int, most: int) -> None:
    if not least <= bits <= most:
        raise ValueError(f"{family} must have {least} to {most} bits, got {family}{bits}")


def _minifloat(bits: int, exponent_bits: int, mantissa_bits: int) -> Minifloat:
    if bits != (total := 1 + exponent_bits + mantissa_bits):
        raise ValueError(
            f"minifloat must have 1 sign + E exponent + M mantissa bits, 3 to 8 in all, "
            f"got fp{bits}_e{exponent_bits}m{mantissa_bits}, which has {total}"
        )
    return Minifloat(exponent_bits, mantissa_bits)


_NUMBERED: tuple[tuple[str, Callable[..., NumberFormat]], ...] = (
    (r"int(\d+)", Integer),
    (r"uint(\d+)", UnsignedInteger),
    (r"fp(\d+)_e(\d+)m(\d+)", _minifloat),
    (r"bcq(\d+)", BinaryCoded),
    (r"log(\d+)", PowerOfTwo),
    (r"ulog(\d+)", UnsignedLog),
    (r"ulogsqrt(\d+)", partial(UnsignedLog, root=2)),
    (r"fixed(\d+)\.(\d+)", FixedPoint),
)
_NAMED: dict[str, NumberFormat] = {
    fmt.name: fmt for fmt in (*map(Float, FLOAT_BITS), *map(MX, MX_ELEMENTS), NVFP4(), NF4(), *map(GGUF, GGUF_BLOCKS))
}


@lru_cache(maxsize=4096)
def parse(text: str) -> NumberFormat:
    """The format that ``name[@granularity][@range][@scale=<float>]`` names; upper case and order do not matter.

    Granularity is tensor, channel, group<n> or token; range is minmax (default), mse or percentile<p>.

    Raises:
        ValueError: if the name is unknown, breaks its family's rule, or a suffix is unknown, repeated, or refused by
            the family.

    Example:
        >>> parse("int4@group128@mse"), parse("int4").bits_per_value((16, 64))  # 16 bits of scale to 64 values
        (int4@group128@mse, 4.25)
    """
    name, *suffixes = text.strip().lower().split("@")
    plain = _family(name)
    chosen: dict[str, Granularity | Range | str] = {}
    for suffix in suffixes:
        kind, value = _suffix(suffix, text)
        if kind in chosen:
            raise ValueError(f"format must name one {kind}, got two in {text!r}")
        chosen[kind] = value
    return replace(plain, **chosen)  # type: ignore[arg-type]


def _family(name: str) -> NumberFormat:
    if name in _NAMED:
        return _NAMED[name]
    for pattern, make in _NUMBERED:
        if match := re.fullmatch(pattern, name, re.ASCII):
            return make(*map(int, match.groups()))
    own = ("bcq2", "log4", "ulog4", "fixed4.4")
    known = ["int4", "int8", "uint4", "uint8", *map(str, MX_ELEMENTS.values()), *own, *_NAMED]
    close = [other for other in known if name and other.startswith(name)] or get_close_matches(name, known)
    hint = f": did you mean {', '.join(close[:3])}?" if close else "."
    raise ValueError(f"unknown format {name!r}{hint} Formats are {FAMILIES}")


def _suffix(suffix: str, text: str) -> tuple[str, Granularity | Range | str]:
    if suffix.startswith("scale="):
        return "scale", suffix.removeprefix("scale=")
    value = parse_suffix(suffix)
    if value is None:
        raise ValueError(
            "suffix must be a granularity (@tensor, @channel, @group<n>, @token), a range (@minmax, @mse, "
            f"@percentile<p>) or @scale=<float>, got '@{suffix}' in {text!r}"
        )
    return ("granularity" if isinstance(value, Granularity) else "range"), value
