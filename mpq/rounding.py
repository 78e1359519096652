"""What the grids of the number formats are made of: stored scales, division by them, nearest levels.

Every function leaves its inputs as they were and returns the dtype of its first.
"""

import torch
from torch import Tensor

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def float_cast(x: Tensor, kind: str) -> Tensor:
    """Values in fp16, bf16, fp32 or fp64; beyond the largest finite value they saturate.

    Example:
        >>> float_cast(torch.tensor([1.0, 2049.0, 1e30]), "fp16")
        tensor([1.0000e+00, 2.0480e+03, 6.5504e+04])
    """
    limit = min(torch.finfo(_DTYPES[kind]).max, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit).to(_DTYPES[kind]).to(x.dtype)


def stored_scale(scale: Tensor, kind: str) -> Tensor:
    """Scales as their format stores them: nearest, saturating; e8m0 is the next power of two, so that nothing clips."""
    if kind != "e8m0":
        return float_cast(scale, kind)
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    return power_of_two(exponent - (mantissa == 0.5).int(), scale)


def power_of_two(exponent: Tensor, like: Tensor) -> Tensor:
    """2^exponent as e8m0 stores it: exponents from −127 to 127."""
    return torch.ldexp(torch.ones_like(like), exponent.clamp(-127, 127))


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """The quotient x / scale, and x itself where the scale is 0: its levels are all 0 whatever the code."""
    return x / torch.where(scale == 0, 1, scale)


def amax_of_groups(x: Tensor) -> Tensor:
    """The largest magnitude of every group, (groups, 1)."""
    return torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))


def nearest(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The nearest of ascending levels; halfway the lower one."""
    table = torch.tensor(levels, dtype=x.dtype, device=x.device)
    index = torch.bucketize(x, (table[1:] + table[:-1]) / 2, out_int32=True)
    return table.index_select(0, index.flatten()).view(x.shape)


def power_below(x: Tensor) -> Tensor:
    """The power of two at or below every magnitude: the float without sign and mantissa; 0 below the normal range."""
    if x.dtype == torch.float64:
        return x.view(torch.int64).bitwise_and(0x7FF0_0000_0000_0000).view(torch.float64)
    return x.view(torch.int32).bitwise_and(0x7F80_0000).view(torch.float32)


def nearest_power(x: Tensor) -> Tensor:
    """The power of two nearest to every magnitude, halves upwards: a mantissa from 1.5 carries into the exponent.

    Example:
        >>> nearest_power(torch.tensor([1.0, -1.49, 1.5, 3.1]))
        tensor([1., 1., 2., 4.])
    """
    if x.dtype == torch.float64:
        return power_below((x.view(torch.int64) + 0x0008_0000_0000_0000).view(torch.float64))
    return power_below((x.view(torch.int32) + 0x0040_0000).view(torch.float32))
