"""Roofline: a layer takes as long as its arithmetic or its traffic, whichever is longer, and its overheads.

    t = max(2 macs (K'/K) (N'/N) / (e_c * peak), bytes / (e_m * bandwidth)) + weights * dequant + calls * launch
    bytes = reads * weight bits / 8 + (inputs + outputs) * b_a / 8

after Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model"; e_c and e_m are the
shares of the peaks that kernels reach. The pair of formats picks the line of the target's table: which unit multiplies
them, natively or as a fallback. K' and N' are K and N rounded up to the unit's tiles; grouped and depthwise layers are
not lowered to tiles. A weight is unpacked once a call. Outputs are written in the option's activation format, as the
next layer's requantised input.

Good for the order and the ratio of options on layers that fill the chip; wrong for caches that hold a layer's data
between layers, partly filled waves, and units whose efficiency depends on the shape. Latency need not fall with bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .workload import Work

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Rates:
    """The target's table, one entry a row; all (rows,). Efficiencies are in the rates already."""

    ops_per_s: Floats
    align_k: Floats
    align_n: Floats
    launch_s: Floats
    dequant_s_per_weight: Floats
    joules_per_mac: Floats
    bytes_per_s: float
    joules_per_byte: float


@dataclass(frozen=True)
class Roofline:
    """Seconds, joules and bytes moved; all (layers, options), NaN where there is no row."""

    latency: Floats
    energy: Floats
    traffic: Floats


def roofline(work: Work, rates: Rates, row: Rows, weight_bytes: Floats, activation_bits: Floats) -> Roofline:
    """Price every layer in every option.

    Args:
        work: vectors (layers,).
        rates: vectors (rows,).
        row: the row of `rates` for each layer and option, (layers, options); -1 where the target has none.
        weight_bytes: bytes of the stored weight, (layers, options).
        activation_bits: bits of one input or output, (options,).

    Returns:
        A `Roofline` of (layers, options) tables.

    Example:
        >>> one = np.ones(1)
        >>> work = Work(64 * one, 4 * one, 2 * one, 8 * one, one > 0, one, 48 * one, one)
        >>> rates = Rates(64 * one, one, one, 0.5 * one, 0 * one, 0 * one, bytes_per_s=14.0, joules_per_byte=0.0)
        >>> row, weights = np.array([[0, -1]]), np.array([[8.0, 4.0]])
        >>> roofline(work, rates, row, weights, np.array([8.0, 8.0])).latency  # max(128 / 64, 56 / 14) + 0.5
        array([[4.5, nan]])
    """
    known = row >= 0

    def pick(values: Floats) -> Floats:
        return np.where(known, values[row], np.nan)

    macs, calls = work.macs[:, None], work.calls[:, None]
    padding = _padding(work.k, work, pick(rates.align_k)) * _padding(work.n, work, pick(rates.align_n))
    compute = 2 * macs * padding / pick(rates.ops_per_s)
    traffic = weight_bytes * work.weight_reads[:, None] + np.outer(work.elements, activation_bits) / 8
    dequant = work.weights[:, None] * calls * pick(rates.dequant_s_per_weight)
    latency = np.maximum(compute, traffic / rates.bytes_per_s) + dequant + calls * pick(rates.launch_s)
    energy = macs * pick(rates.joules_per_mac) + traffic * rates.joules_per_byte
    return Roofline(latency, energy, np.where(known, traffic, np.nan))


def _padding(size: Floats, work: Work, tile: Floats) -> Floats:
    padded = np.ceil(size[:, None] / tile) * tile / size[:, None]
    return np.where(work.has_tiles[:, None], padded, 1.0)
