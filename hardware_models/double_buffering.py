"""Folds of a systolic array behind a memory: one fold computes while the next one's operands arrive.

    cycles = first load + sum over folds of max(cycles of a fold, bits moved in it / bits a cycle)

Folds are nested in two loops, and what a fold moves follows from what stays in the buffers:

    os: for tiles of m: for tiles of n.  A tile's inputs stay through the inner loop if they fit, else they come again;
        all weights stay if they fit, else they come again for every tile of m. Outputs leave once.
    ws: for chunks of m: for tiles of n: for tiles of k.  Chunks are as few as let the partial sums of a chunk and a
        tile of n fit. Weights stay through all chunks if all fit, else they come once a chunk. A chunk's inputs stay if
        they fit, else they come again for every tile of n. Outputs leave once.
    is: for chunks of n: for tiles of m: for tiles of k.  As ws with inputs and weights exchanged.

There are few kinds of folds (first, middle and last of each loop), so the sum has eighteen terms. The first load is
counted before the loop and overlapped once more: an upper bound that is close where there is more than one fold.

A design of our own in the manner of SCALE-Sim's double buffers (Samajdar et al., 2018); its traces fetch every
repetition of an input that im2col makes, here one comes once a pass. Good for what bits do to stalls; it searches no
tilings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Operands:
    """Bits of one product in the memory, arrays that broadcast, and whether they stay on chip.

    Attributes:
        inputs, weights, outputs: bits of the whole product.
        inputs_stay, weights_stay: whether they fit as the loops of the dataflow ask for.
        chunks: of what ws and is stream; 1 under os.
    """

    inputs: Floats
    weights: Floats
    outputs: Floats
    inputs_stay: Mask
    weights_stay: Mask
    chunks: Floats


@dataclass(frozen=True)
class Span:
    """One kind of step of a loop: how many there are, the share of the axis each takes, whether first or last."""

    count: Floats
    share: Floats
    first: bool
    last: Mask


def spans(size: Floats, tile: int) -> tuple[Span, Span, Span]:
    """First, middle and last step of a loop over an axis; of a single step the first is the last.

    Example:
        >>> [(float(s.count), float(s.share)) for s in spans(np.array(128.0), 40)]
        [(1.0, 0.3125), (2.0, 0.3125), (1.0, 0.0625)]
    """
    steps = np.ceil(size / tile)
    single, several = steps == 1, steps > 1
    first = Span(np.ones_like(size), np.asarray(np.minimum(tile / size, 1.0)), True, single)
    middle = Span(np.maximum(steps - 2, 0.0), tile / size, False, np.zeros_like(single))
    last = Span(np.where(several, 1.0, 0.0), np.asarray(1 - (steps - 1) * tile / size), False, several)
    return first, middle, last


def fold_traffic(
    dataflow: str, operands: Operands, outer: Span, inner: Span, first_chunk: bool
) -> tuple[Floats, Floats, Floats]:
    """Bits of inputs, weights and outputs that folds of one kind move, each."""
    if dataflow == "os":
        inputs = operands.inputs * outer.share * (inner.first | ~operands.inputs_stay)
        weights = operands.weights * inner.share * (outer.first | ~operands.weights_stay)
        return inputs, weights, operands.outputs * outer.share * inner.share
    still = operands.weights, operands.weights_stay
    streamed = operands.inputs, operands.inputs_stay
    if dataflow == "is":
        still, streamed = streamed, still
    loaded = still[0] * outer.share * inner.share * (first_chunk | ~still[1])
    passed = streamed[0] / operands.chunks * inner.share * (outer.first | ~streamed[1])
    left = operands.outputs / operands.chunks * outer.share * inner.last
    return (passed, loaded, left) if dataflow == "ws" else (loaded, passed, left)


def stalled_cycles(
    dataflow: str, operands: Operands, axes: tuple[tuple[Floats, int], tuple[Floats, int]], fold: Floats, rate: float
) -> tuple[Floats, Floats, dict[str, Floats]]:
    """Cycles of a product, cycles of its first load, and the bits that it moves of every operand.

    Args:
        dataflow: "os", "ws" or "is".
        operands: what is moved.
        axes: size and tile of the outer and of the inner loop.
        fold: cycles that a fold (of one chunk) computes.
        rate: bits a cycle.

    Example:
        Weights come once, inputs for both tiles of n, outputs leave once; 1000 bits a fold take longer than to compute:

        >>> fits, no = np.array(True), np.array(False)
        >>> of = Operands(*map(np.array, (400.0, 800.0, 400.0)), no, fits, np.array(1.0))
        >>> axes = (np.array(64.0), 32), (np.array(8.0), 32)
        >>> cycles, first, moved = stalled_cycles("ws", of, axes, np.array(50.0), 10)
        >>> float(cycles), float(first), {name: float(bits) for name, bits in moved.items()}
        (200.0, 80.0, {'inputs': 800.0, 'weights': 800.0, 'outputs': 400.0})
    """
    outer, inner = (spans(size, tile) for size, tile in axes)
    kinds = [(np.ones(()), True), (operands.chunks - 1, False)][: 1 if dataflow == "os" else 2]
    cycles, bits = np.zeros(()), [np.zeros(()), np.zeros(()), np.zeros(())]
    for (chunks, first), o, i in product(kinds, outer, inner):
        count, moved = chunks * o.count * i.count, fold_traffic(dataflow, operands, o, i, first)
        cycles = cycles + count * np.maximum(fold, sum(moved) / rate)
        bits = [total + count * part for total, part in zip(bits, moved, strict=True)]
    inputs, weights, _ = fold_traffic(dataflow, operands, outer[0], inner[0], True)
    return cycles, (inputs + weights) / rate, dict(zip(("inputs", "weights", "outputs"), bits, strict=True))
