"""Cycles and accesses of a systolic array that multiplies an (m, k) by a (k, n) matrix, as SCALE-Sim counts them.

    output stationary (os): rows take m, columns n, a fold streams k;      cycles = folds * (k + rows + columns - 2)
    weight stationary (ws): rows take k, columns n, a fold streams m;      cycles = folds * (m + 2 rows + columns - 2)
    input stationary (is):  rows take k, columns m, a fold streams n;      cycles = folds * (n + 2 rows + columns - 2)
    folds = ceil(on rows / rows) * ceil(on columns / columns)

Samajdar et al. (2018), "SCALE-Sim: systolic CNN accelerator simulator", and the code of scalesim 3.0.0, whose compute
classes give these cycles exactly; its report says one cycle less. Reads of inputs and weights, and writes of outputs
for ws and is, are its counts too. For os the code counts m * n + folds * (rows + columns) writes of outputs where m * n
are made: that is not followed.

SCALE-Sim knows no bits. Here `lanes` operands share a multiplier (`lanes`, by the policy of packing), and k shrinks to
ceil(k / lanes) steps.

Exact for one dense product without stalls. Folds follow each other without overlap, which real arrays avoid in part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bitfusion import fused_units

Floats = NDArray[np.float64]

DATAFLOWS = ("os", "ws", "is")
PACKINGS = ("none", "weights", "bitfusion", "ideal")


def mapped(dataflow: str, m: ArrayLike, k: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """What lies on the rows, what on the columns, and what is streamed.

    Raises:
        ValueError: if the dataflow is none of `DATAFLOWS`.

    Example:
        >>> mapped("ws", 100, 27, 64)
        (array(27.), array(64.), array(100.))
    """
    sizes = {"m": m, "k": k, "n": n}
    order = {"os": "mnk", "ws": "knm", "is": "kmn"}
    if dataflow not in order:
        raise ValueError(f"dataflow must be one of {', '.join(DATAFLOWS)}, got {dataflow!r}")
    rows, columns, streamed = (np.asarray(sizes[letter], dtype=np.float64) for letter in order[dataflow])
    return rows, columns, streamed


def fold_cycles(dataflow: str, streamed: ArrayLike, rows: int, columns: int) -> Floats:
    """Cycles of one fold; ws and is spend `rows` of them to load what stays.

    Example:
        >>> fold_cycles("os", 100, 32, 16), fold_cycles("ws", 100, 32, 16)
        (np.float64(146.0), np.float64(178.0))
    """
    load = 0 if dataflow == "os" else rows
    return np.asarray(streamed, dtype=np.float64) + load + rows + columns - 2


def compute_cycles(dataflow: str, matmul: tuple[ArrayLike, ArrayLike, ArrayLike], rows: int, columns: int) -> Floats:
    """Cycles of a product without stalls.

    Args:
        dataflow: "os", "ws" or "is".
        matmul: m, k and n, arrays that broadcast.
        rows: of the array.
        columns: of the array.

    Example:
        AlexNet's first layer on 32 x 32, weights stationary; SCALE-Sim's report says 112283:

        >>> compute_cycles("ws", (55 * 55, 11 * 11 * 3, 96), 32, 32)
        np.float64(112284.0)
    """
    on_rows, on_columns, streamed = mapped(dataflow, *matmul)
    folds = np.ceil(on_rows / rows) * np.ceil(on_columns / columns)
    return folds * fold_cycles(dataflow, streamed, rows, columns)


def buffer_accesses(
    dataflow: str, matmul: tuple[ArrayLike, ArrayLike, ArrayLike], rows: int, columns: int
) -> tuple[Floats, Floats, Floats]:
    """Elements that pass between the buffers and the array: inputs read, weights read, (partial) outputs written.

    Under ws and is an output is written once a fold along k; all but the first visit read it back, which SCALE-Sim does
    not count, and this does not either.

    Example:
        >>> buffer_accesses("ws", (100, 64, 48), 32, 32)
        (np.float64(12800.0), np.float64(3072.0), np.float64(9600.0))
    """
    m, k, n = (np.asarray(size, dtype=np.float64) for size in matmul)
    on_rows, on_columns, _ = mapped(dataflow, m, k, n)
    row_folds, column_folds = np.ceil(on_rows / rows), np.ceil(on_columns / columns)
    if dataflow == "os":
        return m * k * column_folds, k * n * row_folds, m * n
    if dataflow == "ws":
        return m * k * column_folds, k * n, m * n * row_folds
    return m * k, k * n * column_folds, m * n * row_folds


def mapping_efficiency(
    dataflow: str, matmul: tuple[ArrayLike, ArrayLike, ArrayLike], rows: int, columns: int
) -> Floats:
    """Share of the array that a fold uses, mean over the folds.

    Example:
        >>> mapping_efficiency("ws", (100, 48, 32), 32, 32)
        array(0.75)
    """
    on_rows, on_columns, _ = mapped(dataflow, *matmul)
    row_folds, column_folds = np.ceil(on_rows / rows), np.ceil(on_columns / columns)
    return np.asarray(on_rows * on_columns / (row_folds * column_folds * rows * columns))


def utilisation(dataflow: str, matmul: tuple[ArrayLike, ArrayLike, ArrayLike], rows: int, columns: int) -> Floats:
    """Multiply-adds over those that the array could have done in its cycles.

    Example:
        >>> utilisation("os", (32, 1000, 32), 32, 32).round(3)
        np.float64(0.942)
    """
    macs = np.prod(np.broadcast_arrays(*(np.asarray(size, dtype=np.float64) for size in matmul)), axis=0)
    return np.asarray(macs / (rows * columns * compute_cycles(dataflow, matmul, rows, columns)))


def lanes(packing: str, weight_bits: ArrayLike, activation_bits: ArrayLike, multiplier_bits: int) -> Floats:
    """Multiply-adds that one multiplier does in a cycle.

    "none": 1. "weights": floor(multiplier bits / weight bits), weights side by side in one operand. "bitfusion": the
    multiplier falls apart into 2-bit bricks, `bitfusion.fused_units`. "ideal": multiplier bits^2 / (weight bits x
    activation bits), what no multiplier reaches for odd widths; an upper bound.

    Raises:
        ValueError: if the packing is none of `PACKINGS`.

    Example:
        >>> [lanes(packing, [8, 4, 3, 2], [8, 8, 8, 2], 8).tolist() for packing in PACKINGS[1:]]
        [[1.0, 2.0, 2.0, 4.0], [1.0, 2.0, 2.0, 16.0], [1.0, 2.0, 2.6666666666666665, 16.0]]
    """
    w, a = np.broadcast_arrays(np.asarray(weight_bits, np.float64), np.asarray(activation_bits, np.float64))
    if packing == "none":
        return np.ones_like(w)
    if packing == "weights":
        return np.floor(multiplier_bits / w)
    if packing == "bitfusion":
        return fused_units(a, w, max_bits=multiplier_bits, min_bits=min(2, multiplier_bits))
    if packing == "ideal":
        return np.asarray(multiplier_bits**2 / (w * a))
    raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
