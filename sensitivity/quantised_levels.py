"""Which level of its format every quantised value is on, told from the values alone, and the entropy of the levels."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from mpq.formats import (
    GGUF,
    MX,
    NVFP4,
    BinaryCoded,
    FixedPoint,
    Integer,
    Minifloat,
    NumberFormat,
    UnsignedInteger,
)
from mpq.layers import Layer, block_size
from mpq.rounding import power_below

_MANTISSA = 2**11  # levels of scaled formats differ by more than one part in this; rounding errors by much less


def entropy_of_levels(codes: Tensor, owner: Tensor | None = None) -> Tensor:
    """H = -Σ p_k log2 p_k of the levels of each owner, in bits, (owners,).

    Args:
        codes: (n,) integers, equal for equal levels.
        owner: (n,) integers from 0: whose level it is; all of one owner by default.

    Example:
        >>> entropy_of_levels(torch.tensor([0, 0, 1, 1, 5, 5, 5, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).tolist()
        [1.0, 0.0]
    """
    owner = torch.zeros_like(codes) if owner is None else owner
    owners, low = int(owner.max()) + 1, codes.min()
    levels = int(codes.max() - low) + 1
    if levels * owners <= 4 * len(codes) + 2**16:
        counts = torch.bincount(owner * levels + codes - low, minlength=owners * levels)
        whose = torch.arange(owners).repeat_interleave(levels)[counts > 0]
        counts = counts[counts > 0]
    else:
        found, place = torch.unique(codes, return_inverse=True)
        pairs, counts = torch.unique(owner * len(found) + place, return_counts=True)
        whose = pairs // len(found)
    total = torch.zeros(owners, dtype=torch.float64).index_add_(0, whose, counts.double())
    share = counts.double() / total[whose]
    return torch.zeros_like(total).index_add_(0, whose, -share * share.log2()).abs()  # no -0


def codes_of_rows(rows: Tensor, fmt: NumberFormat) -> Tensor:
    """The level of every value of a quantised (rows, columns) matrix; equal for equal levels, whatever their scales.

    Raises:
        ValueError: if levels of the format differ from group to group.

    Example:
        >>> from mpq.formats import parse
        >>> codes_of_rows(torch.tensor([[7.0, -3.0, 0.0], [14.0, 6.0, 0.0]]), parse("int4").bind("weight")).tolist()
        [[7, -3, 0], [7, 3, 0]]
    """
    if isinstance(fmt, GGUF | BinaryCoded):
        raise ValueError(f"entropy needs levels that all groups share, those of {fmt} differ: score it by weight_error")
    kind = fmt.granularity.kind if fmt.granularity is not None else "tensor"
    if kind == "tensor":
        return _codes(fmt, rows.reshape(1, -1)).reshape(rows.shape)
    size = (fmt.granularity.size if fmt.granularity is not None else 0) or rows.shape[1]
    whole = rows.shape[1] // size * size
    parts = [(rows[:, :whole], size), (rows[:, whole:], rows.shape[1] - whole)]
    return torch.cat([_codes(fmt, part.reshape(-1, n)).reshape(part.shape) for part, n in parts if part.numel()], 1)


def codes_of_weight(quantised: Tensor, fmt: NumberFormat, granularity: str) -> Tensor:
    """The levels of a quantised (rows, columns) weight each unit of which was quantised as a tensor of its own."""
    kind, size = block_size(granularity)
    if kind != "groups":
        return codes_of_rows(quantised, fmt)
    whole = quantised.shape[1] // size * size
    parts = [(quantised[:, :whole], size), (quantised[:, whole:], quantised.shape[1] - whole)]
    return torch.cat(
        [codes_of_rows(part.reshape(-1, n), fmt).reshape(part.shape) for part, n in parts if part.numel()], 1
    )


def codes_of_activation(quantised: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
    """The levels of a quantised layer input, samples first, in the layout of `mpq.surgery.quantise_activation`."""
    convolution = layer.kind.startswith("conv")
    kind = fmt.granularity.kind if fmt.granularity is not None else "block"
    if kind == "tensor" or fmt.layout.scale is None:
        return codes_of_rows(quantised.reshape(1, -1), fmt).reshape(quantised.shape)
    if kind == "token":
        rows = quantised.flatten(1) if convolution else quantised.reshape(-1, quantised.shape[-1])
        return codes_of_rows(rows, fmt).reshape(quantised.shape)
    last = quantised.movedim(1, -1) if convolution else quantised
    rows = last.reshape(-1, last.shape[-1])
    codes = codes_of_rows(rows.T, fmt).T if kind == "channel" else codes_of_rows(rows, fmt)
    return codes.reshape(last.shape)


@singledispatch
def _codes(fmt: NumberFormat, scales: Tensor) -> Tensor:
    """Codes of (scales, n) values; formats whose largest level is that of the largest value."""
    return _rounded_mantissa(_relative(scales, 1.0))


@_codes.register
def _(fmt: Integer, scales: Tensor) -> Tensor:
    return _relative(scales, 2 ** (fmt.bits - 1) - 1).round().long()


@_codes.register
def _(fmt: UnsignedInteger, scales: Tensor) -> Tensor:
    low = scales.amin(1, keepdim=True).clamp_max(0)
    return _relative(scales.double() - low, 2**fmt.bits - 1).round().long()


@_codes.register
def _(fmt: FixedPoint, scales: Tensor) -> Tensor:
    return (scales.double() * 2.0**fmt.fraction_bits).round().long()


@_codes.register
def _(fmt: Minifloat, scales: Tensor) -> Tensor:
    return _rounded_mantissa(_relative(scales, fmt.largest))


@_codes.register
def _(fmt: NVFP4, scales: Tensor) -> Tensor:
    return _rounded_mantissa(_relative(scales, fmt.element.largest))


@_codes.register
def _(fmt: MX, scales: Tensor) -> Tensor:
    power = power_below(scales.double().abs().amax(1, keepdim=True))
    return _rounded_mantissa(scales.double() / power.masked_fill(power == 0, 1))


def _relative(scales: Tensor, largest: float) -> Tensor:
    """Values times what makes the largest magnitude of each scale the largest level."""
    amax = scales.double().abs().amax(1, keepdim=True)
    return scales.double() * (largest / amax.masked_fill(amax == 0, 1))


def _rounded_mantissa(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return (torch.ldexp((mantissa * _MANTISSA).round() / _MANTISSA, exponent) + 0.0).view(torch.int64)
