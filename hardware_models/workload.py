"""What one pass over a network asks of each of its layers: products, reads, writes and kernel calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.layers import Layer, Network

Floats = NDArray[np.float64]

PHASES = (None, "prefill", "decode")


@dataclass(frozen=True)
class Work:
    """Vectors over the layers, float64, all (layers,).

    Attributes:
        macs: multiply-adds.
        k, n: reduction and outputs of the layer's product (`Layer.matmul`).
        weights: number of weights.
        has_tiles: whether the layer is one dense product; grouped and depthwise convolutions are not.
        weight_reads: how often the stored weight is read; a lookup reads the rows it needs.
        elements: inputs read and outputs written.
        calls: kernels launched.
    """

    macs: Floats
    k: Floats
    n: Floats
    weights: Floats
    has_tiles: NDArray[np.bool_]
    weight_reads: Floats
    elements: Floats
    calls: Floats


def work_of(network: Network, batch: int = 1, phase: str | None = None) -> Work:
    """The work of one pass with `batch` samples.

    None and "prefill" take the positions of the example inputs, all of a layer's calls added up. "decode" takes one
    position a sample in every call. A lookup reads one row of the table for each index; its output counts as the next
    layer's input, and it is part of no kernel of its own. A table that is multiplied as well (a tied output head) is a
    product; its lookup adds elements, but no call.

    Raises:
        ValueError: if batch is below 1, the phase is unknown, or a layer has no decode phase.

    Example:
        >>> fc = Layer("fc", "linear", (32, 8), 256, 6144, (2, 12, 8), (2, 12, 32), batch=2)
        >>> work = work_of(Network((fc,), batch=2), batch=4)
        >>> work.macs[0], work.elements[0]  # 48 positions: 48 x 8 x 32 and 48 x (8 + 32)
        (np.float64(12288.0), np.float64(1920.0))
        >>> work_of(Network((fc,), batch=2), batch=4, phase="decode").macs[0]
        np.float64(1024.0)
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be None, 'prefill' or 'decode', got {phase!r}")
    rows = [_decode(layer, batch) if phase == "decode" else _traced(layer, batch) for layer in network.layers]
    shapes = np.array([layer.matmul()[1:3] for layer in network.layers], dtype=np.float64).reshape(-1, 2)
    macs, weight_reads, elements, calls = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Work(
        macs=macs,
        k=shapes[:, 0],
        n=shapes[:, 1],
        weights=np.array([layer.parameters for layer in network.layers], dtype=np.float64),
        has_tiles=np.array([layer.groups == 1 for layer in network.layers], dtype=bool),
        weight_reads=weight_reads,
        elements=elements,
        calls=calls,
    )


def is_lookup(layer: Layer) -> bool:
    """Whether the layer's rows are looked up and never multiplied."""
    return layer.kind == "embedding" and layer.macs == 0


def _traced(layer: Layer, batch: int) -> tuple[float, float, float, float]:
    scale = batch / layer.batch
    if is_lookup(layer):
        return 0.0, layer.input_elements * scale / layer.weight_shape[0], 0.0, 0.0
    elements = (layer.input_elements + layer.output_elements) * scale
    return layer.macs * scale, _products(layer), elements, _products(layer)


def _decode(layer: Layer, batch: int) -> tuple[float, float, float, float]:
    if layer.kind not in ("linear", "embedding"):
        raise ValueError(
            f"phase 'decode' prices linear and embedding layers, layer {layer.name!r} is of kind {layer.kind}: "
            "leave phase out, and trace with the positions of one step"
        )
    if is_lookup(layer):
        return 0.0, layer.calls * batch / layer.weight_shape[0], 0.0, 0.0
    positions, products = batch * _products(layer), _products(layer)
    _, k, n, _ = layer.matmul()
    return positions * layer.parameters, products, positions * (k + n), products


def _products(layer: Layer) -> float:
    return max(layer.calls - (layer.kind == "embedding"), 1)
