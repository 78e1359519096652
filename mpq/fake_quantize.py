"""Quantise and dequantise: the values that a tensor has after a round trip through a number format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor

from mpq.formats import (
    CHANNEL,
    GGUF,
    MSE,
    NVFP4,
    TENSOR,
    BinaryCoded,
    NumberFormat,
    Percentile,
    UnsignedInteger,
    parse,
)
from mpq.grids import on_grid
from mpq.rounding import divide

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHRINK_FACTORS = tuple(10 ** (-step / 39) for step in range(40))
"""Tried by the MSE range: from 1 down to 1/10, each 6 % below the last."""

_CHUNK = 2**18  # values at a time: temporaries of them stay in a CPU's cache
_CHUNK_ON_DEVICE = 2**26


Limits = tuple[Tensor, Tensor]
"""Lower and upper ends of ranges that scales cover."""


@torch.no_grad()
def fake_quantize(
    tensor: Tensor, fmt: NumberFormat | str, axis: int = 0, *, name: str = "", limits: Limits | None = None
) -> Tensor:
    """The tensor as it is after being stored in a format, in its own shape and dtype.

    The tensor is seen as (rows, columns): `axis` gives the rows, the other axes in order the columns; a 1-D tensor is
    one row. Groups and blocks run along the columns within a row. With ``@token`` every vector of the last axis is a
    row, whatever `axis` is. The work is done in float32 (float64 for float64), a bounded number of rows at a time.

    Args:
        tensor: any shape; float16, bfloat16, float32 or float64. It is not changed.
        fmt: the format; one without granularity is bound as a weight's, ``@channel``.
        axis: the axis of the output channels.
        name: what an error calls the tensor.
        limits: static range, lower and upper ends, one of each or with ``@channel`` one a row; by default the range is
            dynamic, found in the tensor as the format says.

    Raises:
        ValueError: if a value is NaN or infinite, the axis does not exist, the format can be priced but not simulated,
            or limits are given that do not fit it.
        TypeError: if the tensor is not of one of those dtypes.

    Example:
        >>> fake_quantize(torch.tensor([[7.0, -3.2, 0.4], [14.0, 5.1, 1.0]]), "int4")  # steps of 1 and 2, ties to even
        tensor([[ 7., -3.,  0.],
                [14.,  6.,  0.]])
    """
    fmt = (parse(fmt) if isinstance(fmt, str) else fmt).bind("weight")
    _check(tensor, axis, name)
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.clone()
    found = _finite_range(tensor, name)
    source, columns = _as_rows(tensor, fmt, axis)
    static = None if limits is None else _static_limits(limits, fmt, len(source))
    if static is None and fmt.granularity == TENSOR and isinstance(fmt.range, MSE | Percentile):
        found = _tensor_range(source, columns, fmt, found)
    result = torch.empty_like(source)
    saturation = torch.finfo(tensor.dtype).max
    first = 0
    for part, rows in zip(_parts(result), _chunks(source, columns), strict=True):
        if static is None:
            rounded = _rounded(rows, fmt, found)
        else:
            chosen = slice(first, first + len(rows)) if len(static[0]) > 1 else slice(None)
            rounded = on_grid(fmt, rows, *(ends[chosen].to(rows) for ends in static))
        part.copy_(rounded.clamp_(-saturation, saturation).reshape(part.shape))
        first += len(rows)
    return result.reshape(tensor.shape) if _is_flattened(tensor, fmt) else result.movedim(0, axis)


def group_limits(rows: Tensor, fmt: NumberFormat) -> Limits:
    """The range that the scale of every value covers, (rows, columns) each: what `fake_quantize` finds in a matrix.

    With it `on_grid` quantises single columns as part of the whole: scales stay, values may change.

    Args:
        rows: (rows, columns), a weight or a run of whole groups of its columns; float32 or float64.
        fmt: a format with a grid that its range determines.

    Raises:
        ValueError: if the format's levels do not follow from a range (binary-coded, GGUF, NVFP4).

    Example:
        >>> group_limits(torch.tensor([[1.0, -2.0, 4.0, 0.0]]), parse("int4@group2"))[1]
        tensor([[1., 1., 4., 4.]])
    """
    if isinstance(fmt, BinaryCoded | GGUF | NVFP4):
        raise ValueError(f"format {fmt} must have levels that follow from a range, such as int4, nf4 or mxfp4")
    if fmt.granularity is None or fmt.granularity == TENSOR:
        found = _finite_range(rows, "")
        if fmt.granularity == TENSOR and isinstance(fmt.range, MSE | Percentile):
            found = _tensor_range(rows, rows.shape[1], fmt, found)
        return found[0].expand(rows.shape), found[1].expand(rows.shape)
    size = fmt.granularity.size or rows.shape[1]
    low, high = (
        _per_group(rows, size, lambda x, end=end: _group_range(x, fmt)[end].expand(x.shape))  # type: ignore[misc]
        for end in (0, 1)
    )
    return low, high


def _static_limits(limits: Limits, fmt: NumberFormat, rows: int) -> Limits:
    """Limits as columns (scales, 1)."""
    low, high = limits[0].reshape(-1, 1), limits[1].reshape(-1, 1)
    allowed = {TENSOR: 1, CHANNEL: rows}.get(fmt.granularity, 0) if fmt.granularity and "range" in fmt.takes else 0
    if len(low) != allowed or len(high) != allowed:
        raise ValueError(
            f"limits of {fmt} must be {allowed} on either side, got {len(low)} and {len(high)}"
            if allowed
            else f"limits must come with a format that has a scale a tensor or a channel and a range, got {fmt}"
        )
    return low, high


def _check(tensor: Tensor, axis: int, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name or 'tensor'} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not -max(tensor.ndim, 1) <= axis < max(tensor.ndim, 1):
        raise ValueError(f"axis of {name or 'tensor'} must be one of its {tensor.ndim} axes, got {axis}")


def _finite_range(tensor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, (1, 1) each, in the dtype of the computation."""
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name or 'tensor'} must be finite to be quantised, got {count} NaN or infinite of {tensor.numel()} values"
        )
    return low.to(_compute_dtype(tensor)).reshape(1, 1), high.to(_compute_dtype(tensor)).reshape(1, 1)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _is_flattened(tensor: Tensor, fmt: NumberFormat) -> bool:
    return tensor.ndim < 2 or fmt.granularity is None or fmt.granularity.kind in ("tensor", "token")


def _as_rows(tensor: Tensor, fmt: NumberFormat, axis: int) -> tuple[Tensor, int]:
    """The tensor with an axis in front that can be cut into chunks, and the number of columns of a row."""
    if not _is_flattened(tensor, fmt):
        moved = tensor.movedim(axis, 0)
        return moved, prod(moved.shape[1:])
    if fmt.granularity is None or (fmt.granularity == TENSOR and not isinstance(fmt, BinaryCoded)):
        return tensor.reshape(-1), 1
    columns = tensor.shape[-1] if fmt.granularity.kind == "token" and tensor.ndim else tensor.numel()
    return tensor.reshape(-1, columns), columns


def _parts(source: Tensor) -> tuple[Tensor, ...]:
    chunk = _CHUNK if source.device.type == "cpu" else _CHUNK_ON_DEVICE
    return torch.split(source, max(1, chunk // source[0].numel()))


def _chunks(source: Tensor, columns: int) -> Iterator[Tensor]:
    """(rows, columns) after (rows, columns) in the dtype of the computation."""
    return (part.reshape(-1, columns).to(_compute_dtype(part)).contiguous() for part in _parts(source))


def _rounded(rows: Tensor, fmt: NumberFormat, limits: tuple[Tensor, Tensor]) -> Tensor:
    if fmt.granularity is None or fmt.granularity == TENSOR:
        return on_grid(fmt, rows, *limits)
    size = fmt.granularity.size or rows.shape[1]
    if isinstance(fmt, BinaryCoded | GGUF | NVFP4):
        return _per_group(rows, size, lambda x: on_grid(fmt, x, *limits))
    return _per_group(rows, size, lambda x: on_grid(fmt, x, *_group_range(x, fmt)))


def _per_group(rows: Tensor, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply to the groups (groups, size) of all rows, and to the short last groups (rows, rest)."""
    count, columns = rows.shape
    whole = columns // size * size
    if whole == columns:
        return rounded(rows.reshape(-1, size)).reshape(rows.shape)
    short = rounded(rows[:, whole:].contiguous())
    if whole == 0:
        return short
    return torch.cat([rounded(rows[:, :whole].reshape(-1, size)).reshape(count, whole), short], dim=1)


def _group_range(x: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """The range that the scale of every group covers, (groups, 1) each."""
    if isinstance(fmt.range, Percentile):
        return _percentiles(x, fmt, fmt.range.p)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if isinstance(fmt.range, MSE):
        factor = least_error_factor(lambda: [x], fmt, low, high)
        return low * factor, high * factor
    return low, high


def _tensor_range(
    source: Tensor, columns: int, fmt: NumberFormat, limits: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    if isinstance(fmt.range, Percentile):
        return _percentiles(source.reshape(1, -1).to(_compute_dtype(source)), fmt, fmt.range.p)
    factor = least_error_factor(lambda: (rows.reshape(1, -1) for rows in _chunks(source, columns)), fmt, *limits)
    return limits[0] * factor, limits[1] * factor


def least_error_factor(chunks: Callable[[], Iterable[Tensor]], fmt: NumberFormat, low: Tensor, high: Tensor) -> Tensor:
    """Of `SHRINK_FACTORS` the one with the least squared error over all chunks, for every group, (groups, 1)."""
    amax = torch.maximum(-low, high)
    best, best_error = torch.ones_like(amax), torch.full_like(amax, torch.inf, dtype=torch.float64)
    for factor in SHRINK_FACTORS:
        error = torch.zeros_like(best_error)
        for x in chunks():
            difference = divide(on_grid(fmt, x, low * factor, high * factor).sub_(x), amax)
            error += difference.square_().sum(1, keepdim=True)
        better = error < best_error
        best, best_error = best.masked_fill(better, factor), torch.where(better, error, best_error)
    return best


def _percentiles(x: Tensor, fmt: NumberFormat, p: float) -> tuple[Tensor, Tensor]:
    if isinstance(fmt, UnsignedInteger):
        return _percentile(x, 100 - p), _percentile(x, p)
    high = _percentile(x.abs(), p)
    return -high, high


def _percentile(x: Tensor, p: float) -> Tensor:
    """Interpolated between order statistics, (groups, 1); `torch.quantile` stops at 2^24 values."""
    position = p / 100 * (x.shape[1] - 1)
    below = x.kthvalue(int(position) + 1, dim=1, keepdim=True).values
    above = x.kthvalue(min(int(position) + 2, x.shape[1]), dim=1, keepdim=True).values
    return below.lerp(above, position - int(position))
