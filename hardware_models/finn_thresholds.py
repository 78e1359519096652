"""What FINN's thresholds take: an output of B bits counts how many of its channel's 2^B - 1 thresholds a sum reaches.

An element, whose MH/P channels take turns, takes

    in parallel (HLS): LUT = (2^B - 1) acc (ceil(MH/P / 64) + 1)
    by binary search (RTL): B comparators of acc bits; stage x = 0 ... B-1 keeps MH/P 2^x thresholds of acc bits

Source: FINN-R and the MVAU's `lut_estimation` for the first, with thresholds in lookup tables; the geometries of the
second are those of `Thresholding_rtl.get_pe_mem_geometries`, read. Where FINN picks the memory that wastes least, we
put up to 512 words in lookup tables and more in block memories; a comparator of acc bits counts as acc lookup tables.
Eight bits take 17 times the thresholds of four: 255 comparators an element in parallel, 8 with the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LUT_WORDS = 512.0
BLOCK_SHAPES = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))
MOST_BITS = 16


@dataclass(frozen=True)
class Thresholds:
    """Lookup tables and block memories of 18 kbit of the thresholds of one processing element."""

    luts: Floats
    block_rams: Floats


def parallel_thresholds(output_bits: Floats, accumulator_bits: Floats, channels: Floats) -> Thresholds:
    """All comparisons at once; `channels` share the element.

    Example:
        >>> parallel_thresholds(np.array([2.0, 4.0]), np.array([16.0, 18.0]), np.array([16.0, 65.0])).luts
        array([ 96., 810.])
    """
    steps: Floats = 2.0**output_bits - 1
    luts = steps * accumulator_bits * (np.ceil(channels / 64) + 1)
    return Thresholds(luts, np.zeros_like(luts))


def searched_thresholds(output_bits: Floats, accumulator_bits: Floats, channels: Floats) -> Thresholds:
    """A comparison a stage; `channels` share the element. Outputs of more than 16 bits count as 16.

    Example:
        Two stages for 16 channels hold 16 and 32 words of 16 bits, 2 x 16 tables, and compare 16 bits each; of eight
        stages for 64 channels the last four hold 1024 to 8192 words of 18 bits, in 1, 2, 4 and 8 blocks.

        >>> found = searched_thresholds(np.array([2.0, 8.0]), np.array([16.0, 18.0]), np.array([16.0, 64.0]))
        >>> found.luts, found.block_rams
        (array([ 64., 414.]), array([ 0., 15.]))
    """
    stages = np.minimum(output_bits, MOST_BITS)
    shape = np.broadcast_shapes(stages.shape, accumulator_bits.shape, channels.shape)
    luts, blocks = np.zeros(shape) + stages * accumulator_bits, np.zeros(shape)
    for stage in range(int(stages.max(initial=0.0))):
        words, exists = channels * 2.0**stage, stage < stages
        in_luts = words <= LUT_WORDS
        luts += exists * in_luts * accumulator_bits * np.ceil(words / 64)
        each = [np.ceil(words / deep) * np.ceil(accumulator_bits / wide) for deep, wide in BLOCK_SHAPES]
        blocks += exists * ~in_luts * np.minimum.reduce(each)
    return Thresholds(luts, blocks)
