"""FINN's choice of folding: the fewest lanes and elements with which every unit keeps up with a rate of frames.

    matrix: Q grows over the divisors of MW until cycles < target or Q W > 36, which takes one step back;
            then P grows over the divisors of MH until cycles < target
    depthwise: P grows over the divisors of the channels; if they are all used up, Q over those of the taps

Source: FINN's `SetFolding`, read, with its limit of 36 bits on the weights of one element. A pipeline is as fast as its
slowest unit: where one cannot meet the target, FINN folds a second time for what it reached. A table of costs is no one
plan, so the second target here is the slowest layer in its fastest format: no plan is faster, and none loses by it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .finn_resources import Folding

Floats = NDArray[np.float64]

STREAM_BITS = 36.0


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors in increasing order.

    Example:
        >>> divisors(12)
        (1, 2, 3, 4, 6, 12)
    """
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return tuple(sorted({*small, *(number // i for i in small)}))


def divisor_table(numbers: Floats) -> Floats:
    """The divisors of each number in increasing order, its last one repeated: (layers, most divisors).

    Example:
        >>> divisor_table(np.array([4.0, 3.0]))
        array([[1., 2., 4.],
               [1., 3., 3.]])
    """
    distinct, index = np.unique(numbers, return_inverse=True)
    rows = [divisors(int(number)) for number in distinct]
    longest = max((len(row) for row in rows), default=1)
    table = np.array([[*row, *[row[-1]] * (longest - len(row))] for row in rows], dtype=np.float64)
    return table.reshape(-1, longest)[index]


def matrix_folding(mw: Floats, mh: Floats, vectors: Floats, weight_bits: Floats, target: float) -> Folding:
    """Lanes and elements of a dense layer's unit for weights of each width, (layers, columns).

    Args:
        mw: columns of the matrices, (layers,).
        mh: rows of the matrices, (layers,).
        vectors: input vectors a frame, (layers,).
        weight_bits: (columns,).
        target: cycles a frame.

    Example:
        64 outputs of 576 inputs on 196 positions in less than 100,000 cycles: 9 lanes of 4 bits fill the stream, 12 are
        too many; 8 elements of them take 100,352 cycles.

        >>> folding = matrix_folding(*(np.array([x]) for x in (576.0, 64.0, 196.0, 4.0)), 1e5)
        >>> folding.simd, folding.pe
        (array([[9.]]), array([[16.]]))
    """
    widths, column = np.unique(weight_bits, return_inverse=True)
    steps = divisor_table(mw)[:, :, None]  # (layers, steps, 1)
    cycles = (mw * mh * vectors)[:, None, None] / steps
    meets, too_wide = cycles < target, steps * widths > STREAM_BITS
    place, stops = _first(meets | too_wide)
    back = stops & ~np.take_along_axis(np.broadcast_to(meets, too_wide.shape), place[:, None, :], 1)[:, 0]
    simd = np.take_along_axis(steps[..., 0], np.maximum(place - back, 0), 1)
    pe = _smallest(mh, (mw * mh * vectors)[:, None] / simd, target)
    return Folding(mw[:, None], mh[:, None], simd[:, column], pe[:, column])


def depthwise_folding(taps: Floats, channels: Floats, vectors: Floats, target: float) -> Folding:
    """Lanes and elements of a depthwise layer's unit, (layers, 1).

    Example:
        >>> folding = depthwise_folding(*(np.array([x]) for x in (9.0, 8.0, 100.0)), 500.0)
        >>> folding.simd, folding.pe
        (array([[3.]]), array([[8.]]))
    """
    work = (taps * channels * vectors)[:, None]
    pe = _smallest(channels, work, target)
    is_short = (pe == channels[:, None]) & (work / pe > target)
    simd = np.where(is_short, _smallest(taps, work / pe, target), 1.0)
    return Folding(taps[:, None], channels[:, None], simd, pe)


def _smallest(numbers: Floats, cycles: Floats, target: float) -> Floats:
    """The smallest divisor of each number that brings cycles below the target, else the number: (layers, columns)."""
    steps = divisor_table(numbers)
    place, _ = _first(cycles[:, None, :] / steps[:, :, None] < target)
    return np.take_along_axis(steps, place, 1)


def _first(holds: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Of (layers, steps, columns): the first step at which it holds, else the last; and whether it ever does."""
    ever: NDArray[np.bool_] = np.any(holds, axis=1)
    return np.where(ever, holds.argmax(axis=1), holds.shape[1] - 1), ever
