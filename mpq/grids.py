"""`on_grid`: the nearest levels of a number format, a function a family.

Each takes its format, values of shape ``(groups, n)``, and the range of each group, ``(groups, 1)``, or of the whole
tensor, ``(1, 1)``; it returns the levels in the dtype of the values, which it leaves as they were.
"""

from functools import singledispatch

import torch
from torch import Tensor

from mpq.binary_coding import binary_coded
from mpq.formats import (
    GGUF,
    MX,
    NF4,
    NVFP4,
    BinaryCoded,
    FixedPoint,
    Float,
    Integer,
    Minifloat,
    NumberFormat,
    PowerOfTwo,
    UnsignedInteger,
    UnsignedLog,
)
from mpq.gguf_blocks import gguf_rounded
from mpq.rounding import (
    amax_of_groups,
    divide,
    float_cast,
    nearest,
    nearest_power,
    power_below,
    power_of_two,
    stored_scale,
)

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of Dettmers et al. (2023), arXiv:2305.14314."""


@singledispatch
def on_grid(fmt: NumberFormat, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest levels of `fmt` with the scale that the range from `low` to `high` gives.

    Example:
        >>> from mpq.formats import parse
        >>> on_grid(parse("int4"), torch.tensor([[7.0, -3.2, 0.4]]), torch.tensor([[-3.2]]), torch.tensor([[7.0]]))
        tensor([[ 7., -3.,  0.]])
    """
    raise TypeError(f"fmt must be of a family that on_grid knows, got {type(fmt).__name__}")


@on_grid.register
def _integer(fmt: Integer, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    largest = 2 ** (fmt.bits - 1) - 1
    scale = stored_scale(torch.maximum(-low, high) / largest, fmt.scale or "")
    return divide(x, scale).round_().clamp_(-largest - 1, largest).mul_(scale)


@on_grid.register
def _unsigned_integer(fmt: UnsignedInteger, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    largest = 2**fmt.bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored_scale((high - low) / largest, fmt.scale or "")
    zero = divide(-low, scale).round_().clamp_(0, largest)
    return divide(x, scale).round_().add_(zero).clamp_(0, largest).sub_(zero).mul_(scale)


@on_grid.register
def _minifloat(fmt: Minifloat, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = stored_scale(torch.maximum(-low, high) / fmt.largest, fmt.scale or "")
    return unscaled_minifloat(divide(x, scale), fmt).mul_(scale)


def unscaled_minifloat(x: Tensor, fmt: Minifloat) -> Tensor:
    """The nearest minifloat, saturating: steps of 2^(e − mantissa bits), e the exponent of x, at least 1 − bias."""
    step = power_below(x).clamp_(min=2.0 ** (1 - fmt.bias)).mul_(2.0**-fmt.mantissa_bits)
    return (x / step).round_().mul_(step).clamp_(-fmt.largest, fmt.largest)


@on_grid.register
def _float(fmt: Float, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return float_cast(x, fmt.name)


@on_grid.register
def _fixed_point(fmt: FixedPoint, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    step, codes = 2.0**-fmt.fraction_bits, 2 ** (fmt.bits - 1)
    return (x / step).round_().clamp_(-codes, codes - 1).mul_(step)


@on_grid.register
def _microscaled(fmt: MX, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    largest_exponent = torch.frexp(torch.tensor(fmt.element.largest)).exponent - 1
    scale = power_of_two(torch.frexp(torch.maximum(-low, high)).exponent - 1 - largest_exponent, low)
    scaled = x / scale
    if isinstance(fmt.element, FixedPoint):
        return _fixed_point(fmt.element, scaled, low, high).mul_(scale)
    return unscaled_minifloat(scaled, fmt.element).mul_(scale)


@on_grid.register
def _nvfp4(fmt: NVFP4, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    tensor_scale = float_cast(torch.maximum(-low, high) / (fmt.scales.largest * fmt.element.largest), "fp32")
    group_scale = divide(amax_of_groups(x) / fmt.element.largest, tensor_scale)
    scale = unscaled_minifloat(group_scale, fmt.scales).mul_(tensor_scale)
    return unscaled_minifloat(divide(x, scale), fmt.element).mul_(scale)


@on_grid.register
def _normal_float(fmt: NF4, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = stored_scale(torch.maximum(-low, high), fmt.scale or "")
    return nearest(divide(x, scale), NF4_LEVELS).mul_(scale)


@on_grid.register
def _power_of_two(fmt: PowerOfTwo, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    smallest = 2.0 ** (2 - 2 ** (fmt.bits - 1))
    scale = nearest_power(torch.maximum(-low, high)).clamp_(2.0**-127, 2.0**127)
    scaled = x / scale
    magnitude = nearest_power(scaled).clamp_(smallest, 1).masked_fill_(scaled.abs() < smallest / 2, 0)
    return magnitude.copysign_(scaled).mul_(scale)


@on_grid.register
def _unsigned_log(fmt: UnsignedLog, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = stored_scale(high.clamp(min=0), fmt.scale or "")
    return nearest(divide(x, scale).clamp_(0, 1), fmt.levels).mul_(scale)


@on_grid.register
def _binary_coded(fmt: BinaryCoded, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return binary_coded(x, fmt.bits, fmt.scale or "")


@on_grid.register
def _gguf(fmt: GGUF, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return gguf_rounded(x, fmt.name)
