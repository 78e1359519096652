"""Number formats the slow way: list every level of a group's grid in plain Python, take the nearest."""

import math

import torch

from mpq.formats import (
    MX,
    NF4,
    NVFP4,
    FixedPoint,
    Integer,
    Minifloat,
    NumberFormat,
    PowerOfTwo,
    UnsignedInteger,
    UnsignedLog,
)
from mpq.grids import NF4_LEVELS

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def stored(scale: float, kind: str) -> float:
    if kind == "e8m0":
        return 2.0 ** min(max(math.ceil(math.log2(scale)), -127), 127)
    dtype = _DTYPES[kind]
    return float(torch.tensor(min(scale, torch.finfo(dtype).max), dtype=torch.float64).to(dtype))


def minifloat_levels(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Decode every code; e4m3 and e5m2 lose the codes that OCP gives to infinity and NaN."""
    bias = 2 ** (exponent_bits - 1) - 1
    levels = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                levels.append(fraction * 2.0 ** (1 - bias))
            else:
                levels.append((1 + fraction) * 2.0 ** (exponent - bias))
    reserved = {(4, 3): 1, (5, 2): 4}.get((exponent_bits, mantissa_bits), 0)
    positive = sorted(levels)[: len(levels) - reserved]
    return sorted({-level for level in positive} | set(positive))


def levels_of(fmt: NumberFormat, group: list[float], tensor_amax: float) -> list[float]:
    """All values that the group could be stored as, given its min-max range."""
    low, high = min(*group, 0.0), max(*group, 0.0)
    amax, kind = max(-low, high), fmt.scale or ""
    match fmt:
        case Integer():
            scale = stored(amax / (2 ** (fmt.bits - 1) - 1), kind)
            return [code * scale for code in range(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1))]
        case UnsignedInteger():
            scale = stored((high - low) / (2**fmt.bits - 1), kind)
            zero = min(max(round(-low / scale), 0), 2**fmt.bits - 1)
            return [(code - zero) * scale for code in range(2**fmt.bits)]
        case Minifloat():
            levels = minifloat_levels(fmt.exponent_bits, fmt.mantissa_bits)
            scale = stored(amax / levels[-1], kind)
            return [level * scale for level in levels]
        case NF4():
            return [level * stored(amax, kind) for level in NF4_LEVELS]
        case PowerOfTwo():
            below = 2.0 ** math.floor(math.log2(amax))
            scale = below if amax < 1.5 * below else 2 * below
            positive = [scale / 2**k for k in range(2 ** (fmt.bits - 1) - 1)]
            return sorted([-level for level in positive] + [0.0] + positive)
        case UnsignedLog():
            scale = stored(high, kind)
            return [0.0] + [scale * 2.0 ** (-k / fmt.root) for k in range(2**fmt.bits - 2, -1, -1)]
        case FixedPoint():
            step = 2.0**-fmt.fraction_bits
            return [code * step for code in range(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1))]
        case MX():
            if isinstance(fmt.element, FixedPoint):
                levels = [code / 64 for code in range(-128, 128)]
            else:
                levels = minifloat_levels(fmt.element.exponent_bits, fmt.element.mantissa_bits)
            scale = 2.0 ** (math.floor(math.log2(amax)) - math.floor(math.log2(levels[-1])))
            return [level * scale for level in levels]
        case NVFP4():
            tensor_scale = stored(tensor_amax / (448 * 6), "fp32")
            scale = nearest(amax / 6 / tensor_scale, minifloat_levels(4, 3)) * tensor_scale
            return [level * scale for level in minifloat_levels(2, 1)]
    raise NotImplementedError(str(fmt))


def nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - value))


def slow_fake_quantize(rows: list[list[float]], fmt: NumberFormat) -> list[list[float]]:
    """(rows, columns) in a format whose granularity is tensor, channel or group."""
    amax = max(abs(value) for row in rows for value in row)
    if str(fmt.granularity) == "tensor":
        levels = levels_of(fmt, [value for row in rows for value in row], amax)
        return [[nearest(value, levels) for value in row] for row in rows]
    size = fmt.granularity.size if fmt.granularity and fmt.granularity.size else len(rows[0])
    result = []
    for row in rows:
        out: list[float] = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            levels = levels_of(fmt, group, amax)
            out += [nearest(value, levels) for value in group]
        result.append(out)
    return result
