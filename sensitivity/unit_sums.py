"""Sums over units: from a value a weight, a row or a cell, to a value a unit."""

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
    return in_groups(matrix[None], size).sum(2).reshape(-1)


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
            f"granularity must be 'layer' or 'rows' for a score of layer outputs, got {granularity!r}: "
            "use fisher or weight_error"
        )
    padded = functional.pad(per_row, (0, -per_row.shape[-1] % size))
    return padded.reshape(*padded.shape[:-1], -1, size).sum(-1)


def sum_over_cells(cells: Tensor, granularity: str) -> Tensor:
    """Sums of (samples, cells, options) over each unit of a layer: (samples, units, options).

    Cells are rows, or, for a granularity of groups, the groups of every row, which are the units.

    Example:
        >>> import torch
        >>> sum_over_cells(torch.ones(1, 3, 2), "rows:2").tolist()
        [[[2.0, 2.0], [1.0, 1.0]]]
    """
    kind, size = block_size(granularity)
    if kind == "groups" or (kind, size) == ("rows", 1):
        return cells
    if kind == "layer":
        return cells.sum(1, keepdim=True)
    return sum_over_row_blocks(cells.transpose(1, 2), granularity).transpose(1, 2)


def in_groups(matrices: Tensor, size: int) -> Tensor:
    """(n, rows, columns) as (n, rows * groups, size), a short last group padded with zeros; as it is for size 0."""
    if size == 0:
        return matrices
    padded = functional.pad(matrices, (0, -matrices.shape[-1] % size))
    return padded.reshape(matrices.shape[0], -1, size)


def spread_over_groups(per_row: Tensor, weight: Tensor, size: int) -> Tensor:
    """(samples, rows, options) as (samples, rows * groups, options): each group takes its share of the row's Σ W².

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> spread_over_groups(torch.full((1, 2, 1), 6.0), weight, 2).flatten().tolist()
        [2.0, 4.0, 3.0, 3.0]
    """
    rows = weight.shape[0]
    energy = in_groups(weight.to(per_row.dtype).square()[None], size).sum(2).reshape(rows, -1)
    total = energy.sum(1, keepdim=True)
    share = (energy / total).masked_fill(total == 0, 1 / energy.shape[1])
    return (per_row[:, :, None] * share[..., None]).reshape(per_row.shape[0], -1, per_row.shape[2])
