"""Sums over units: from a value a weight, or a value a row, to a value a unit."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mpq.layers import block_size


def sum_over_units(matrix: Tensor, granularity: str) -> Tensor:
    """Sums of a (rows, columns) matrix over each unit of a layer, in the order of `Units`.

    Example:
        >>> import torch
        >>> sum_over_units(torch.ones(3, 5), "rows:2").tolist()
        [10.0, 5.0]
        >>> sum_over_units(torch.ones(2, 5), "groups:4").tolist()
        [4.0, 1.0, 4.0, 1.0]
    """
    kind, size = block_size(granularity)
    if kind == "layer":
        return matrix.sum().reshape(1)
    if kind == "rows":
        return sum_over_row_blocks(matrix.sum(1), granularity)
    columns = matrix.shape[1]
    padded = functional.pad(matrix, (0, -columns % size))
    return padded.reshape(matrix.shape[0], -1, size).sum(2).reshape(-1)


def sum_over_row_blocks(per_row: Tensor, granularity: str) -> Tensor:
    """Sums of (..., rows) over each row unit of a layer: (..., units).

    Raises:
        ValueError: if the granularity cuts columns, which a value a row knows nothing about.
    """
    kind, size = block_size(granularity)
    if kind == "layer":
        return per_row.sum(-1, keepdim=True)
    if kind != "rows":
        raise ValueError(
            f"granularity must be 'layer' or 'rows' for a score of layer outputs, got {granularity!r}: use weight_error"
        )
    padded = functional.pad(per_row, (0, -per_row.shape[-1] % size))
    return padded.reshape(*padded.shape[:-1], -1, size).sum(-1)
