"""`sorted_blocks`: units of a layer that are about as sensitive share a format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpq.tables import CostTable


def sorted_blocks(table: CostTable, units: int = 64) -> CostTable:
    """The table with ties: the units of every layer, in the order of their scores, so many at a time.

    A kernel that reads a format a row is rare; one that reads a format a block of 64 rows is a matrix product a block
    (MixLLM, Zheng et al. 2024, arXiv:2412.14590, the number from memory, does so globally). Rows in the order
    they come are mixed in every block; sorted ones are alike, and the blocks cost little against rows of their own. The
    permutation is a permutation of a layer's outputs, which is undone after its product, or carried into what follows.

    A unit's score is the mean over the options it may take of its score there, each relative to the mean of the option
    over the layer's units that may. The last block of a layer has what is left.

    Args:
        table: of rows or groups, with "sensitivity", without ties.
        units: that share a format.

    Raises:
        ValueError: if the table has no score, is of whole layers or of tied units, or `units` is not positive.

    Example:
        Of four rows the first and the third are sensitive:

        >>> costs = {"sensitivity": [[9, 3], [1, 0.3], [8, 2], [1, 0.2]], "size": [[2, 4]] * 4}
        >>> table = CostTable(units=[f"fc[{row}]" for row in range(4)], options=["int2", "int4"], quantities=costs,
        ...                   layer_index=[0] * 4, granularity="rows:1")
        >>> sorted_blocks(table, 2).ties
        ((3, 1), (2, 0))
    """
    if units < 1:
        raise ValueError(f"units must be at least 1, got {units}")
    if table.granularity == "layer":
        raise ValueError(
            'the table must be of rows or groups, this one is of layers: measure with granularity="rows:1"'
        )
    if table.ties:
        raise ValueError(f"the table's units must be free to be sorted, {len(table.ties)} groups of them are tied")
    index = np.asarray(table.layer_index)
    order = np.lexsort((_relative_scores(table, index), index))
    ends = np.flatnonzero(np.diff(index[order])) + 1
    layers = np.split(order, ends)
    return replace(table, ties=[block for layer in layers for block in _blocks(layer, units)])


def _blocks(order: NDArray[np.int64], units: int) -> list[list[int]]:
    return [order[first : first + units].tolist() for first in range(0, len(order), units)]


def _relative_scores(table: CostTable, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """(units,): mean over a unit's options of the score relative to that of the layer's units."""
    scores, allowed = table.quantity("sensitivity"), table.allowed
    total: NDArray[np.float64] = np.zeros(len(scores))
    for column, may in zip(scores.T, allowed.T, strict=True):
        size = np.bincount(index[may], np.abs(column[may]), minlength=index.max() + 1)
        mean = size / np.maximum(1, np.bincount(index[may], minlength=index.max() + 1))
        known = may & (mean[index] > 0)
        total[known] += column[known] / mean[index[known]]
    total /= np.maximum(1, allowed.sum(1))
    return total
