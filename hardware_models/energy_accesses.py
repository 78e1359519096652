"""How often a matrix product moves its operands between a memory and a buffer, for a fixed order of loops.

    elements moved = size x product of the trip counts of irrelevant loops above the innermost relevant one

A product of (m, k) by (k, n) is cut into tiles, and three loops walk over them, the outermost named first. A tensor's
relevant loops are those that index it: m and k the inputs, k and n the weights, m and n the outputs. Its tile stays in
the buffer until a relevant loop moves on, so an irrelevant loop further in costs nothing, and one further out moves the
whole tensor again. A loop of a single trip moves nothing. Partial sums are written on every visit and read back on all
but the first.

This is how Timeloop and Accelergy count (Parashar et al., 2019), for one buffer that holds one tile of each tensor and
a given order: no search for mappings. Tiles at the edge may be smaller; the counts stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RELEVANT = {"inputs": "mk", "weights": "kn", "outputs": "mn"}


@dataclass(frozen=True)
class Moves:
    """Elements moved between memory and buffer, each (layers,): reads from the memory, and writes to it."""

    input_reads: Floats
    weight_reads: Floats
    output_reads: Floats
    output_writes: Floats


def refetches(trips: ArrayLike, relevant: ArrayLike) -> Floats:
    """How often a whole tensor passes into the buffer.

    Args:
        trips: trip counts of the loops, outermost first, (layers, loops).
        relevant: which loops index the tensor, (loops,).

    Returns:
        Float64, (layers,).

    Example:
        >>> refetches([[4, 3, 5], [4, 3, 1], [4, 1, 1]], [False, True, False])  # a row a layer
        array([4., 4., 1.])
    """
    counts = np.asarray(trips, dtype=np.float64)
    indexes = np.asarray(relevant, dtype=bool)
    moving = indexes & (counts > 1)
    above = np.logical_or.accumulate(moving[:, ::-1], axis=1)[:, ::-1]  # at or above the innermost moving loop
    passes: Floats = np.prod(np.where(above & ~indexes, counts, 1.0), axis=1)
    return passes


def matmul_moves(sizes: ArrayLike, tiles: ArrayLike, order: str = "mnk") -> Moves:
    """What products move, with one tile of each tensor in the buffer.

    Args:
        sizes: (m, k, n) of each product, (layers, 3).
        tiles: sizes of the tiles, (3,) or (layers, 3).
        order: the loops, outermost first: "mnk" keeps outputs, "knm" weights, "mkn" inputs.

    Raises:
        ValueError: if the order is no permutation of "mkn", or a size or tile is below 1.

    Example:
        >>> moves = matmul_moves([[64, 128, 32]], [16, 128, 8], "mnk")  # a tile spans k: inputs stay while n moves on
        >>> moves.input_reads, moves.weight_reads, moves.output_reads, moves.output_writes
        (array([8192.]), array([16384.]), array([0.]), array([2048.]))
    """
    whole = np.asarray(sizes, dtype=np.float64)
    tile = np.broadcast_to(np.asarray(tiles, dtype=np.float64), whole.shape)
    if sorted(order) != ["k", "m", "n"]:
        raise ValueError(f"order must name the loops m, k and n once each, outermost first, got {order!r}")
    if np.any(whole < 1) or np.any(tile < 1):
        raise ValueError(f"sizes and tiles must be at least 1, got {whole.min():g} and {tile.min():g}")
    columns = ["mkn".index(loop) for loop in order]
    trips = np.ceil(whole / tile)[:, columns]
    passes = {name: refetches(trips, [loop in loops for loop in order]) for name, loops in RELEVANT.items()}
    m, k, n = whole.T
    written = m * n * passes["outputs"]
    return Moves(m * k * passes["inputs"], k * n * passes["weights"], written - m * n, written)
