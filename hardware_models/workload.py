"""What one pass over a network asks of each of its layers: products, reads, writes and kernel calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from mpq.layers import Layer, Network

Floats = NDArray[np.float64]

PHASES = (None, "prefill", "decode")


@dataclass(frozen=True)
class Work:
    """Vectors over the layers, float64, all (layers,).

    A layer is `repeats` products of an (m, k) by a (k, n) matrix, all calls of the run together: m counts output
    positions, of all samples (`Layer.matmul`); repeats are the groups of a convolution, or the experts that are used.

    Attributes:
        macs: multiply-adds, `m * k * n * repeats`.
        m, k, n, repeats: see above; m is 0 for lookups.
        taps: kernel positions of a convolution, 1 elsewhere: k = input channels of a group x taps.
        weights: number of weights.
        weight_reads: how often the stored weight is read; a lookup reads the rows it needs, a call the experts it uses.
        inputs, outputs: elements read and written; a lookup is read and written by its neighbours.
        calls: kernels launched.
    """

    macs: Floats
    m: Floats
    k: Floats
    n: Floats
    repeats: Floats
    taps: Floats
    weights: Floats
    weight_reads: Floats
    inputs: Floats
    outputs: Floats
    calls: Floats


def work_of(network: Network, batch: int = 1, phase: str | None = None) -> Work:
    """The work of one pass with `batch` samples.

    None and "prefill" take the positions of the example inputs, all of a layer's calls added up. "decode" takes one
    position a sample in every call. A lookup reads one row of the table for each index; its output counts as the next
    layer's input, and it is part of no kernel of its own. A table that is multiplied as well (a tied output head) is a
    product; its lookup adds elements, but no call. A token takes as many of a stack of experts as on the example
    inputs, where the linear layer before it says how many tokens there were; `experts_used` says how many are read.

    Raises:
        ValueError: if batch is below 1, the phase is unknown, or a layer has no decode phase.

    Example:
        >>> fc = Layer("fc", "linear", (32, 8), 256, 6144, (2, 12, 8), (2, 12, 32), batch=2)
        >>> work = work_of(Network((fc,), batch=2), batch=4)
        >>> work.macs[0], work.m[0], work.inputs[0], work.outputs[0]
        (np.float64(12288.0), np.float64(48.0), np.float64(384.0), np.float64(1536.0))
        >>> work_of(Network((fc,), batch=2), batch=4, phase="decode").macs[0]
        np.float64(1024.0)
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be None, 'prefill' or 'decode', got {phase!r}")
    price, rows, tokens = _decode if phase == "decode" else _traced, [], 0.0
    for layer in network.layers:
        if layer.kind == "linear":
            tokens = layer.macs / (layer.parameters * layer.calls * layer.batch)
        rows.append(price(layer, batch, tokens))
    macs, weight_reads, inputs, outputs, calls, repeats = np.array(rows, dtype=np.float64).reshape(-1, 6).T
    shapes = np.array([layer.matmul()[1:3] for layer in network.layers], dtype=np.float64).reshape(-1, 2)
    k, n = shapes.T
    return Work(
        macs=macs,
        m=macs / (k * n * repeats),
        k=k,
        n=n,
        repeats=repeats,
        taps=np.array([prod(layer.kernel) for layer in network.layers], dtype=np.float64),
        weights=np.array([layer.parameters for layer in network.layers], dtype=np.float64),
        weight_reads=weight_reads,
        inputs=inputs,
        outputs=outputs,
        calls=calls,
    )


def is_lookup(layer: Layer) -> bool:
    """Whether the layer's rows are looked up and never multiplied."""
    return layer.kind == "embedding" and layer.macs == 0


def experts_used(experts: int, active: float, tokens: float) -> float:
    """Experts that at least one of the tokens takes: `E (1 - (1 - active / E)^tokens)`, expected.

    Exact where a router draws `active` of E for every token alike and on its own; real routers have favourites and
    use fewer. Never above `min(E, active * tokens)`.

    Example:
        >>> experts_used(8, 2, 1), experts_used(8, 2, 2), round(experts_used(8, 2, 64), 6)
        (2.0, 3.5, 8.0)
    """
    unused = math.pow(1 - min(active / experts, 1.0), tokens)
    return experts * (1 - unused)


def check_context(phase: str | None, context: int | None) -> None:
    """Refuse positions of a cache where no phase reads one.

    Raises:
        ValueError: if the context is no whole number of at least 1, or the phase is not "decode".
    """
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise ValueError(f"context must be a whole number of positions of at least 1, got {context!r}")
    if phase != "decode":
        raise ValueError(
            f"context (positions in the cache) belongs to phase 'decode', got context={context} with phase={phase!r}: "
            "add phase='decode', or leave context out and trace with as many positions as you want priced"
        )


def _traced(layer: Layer, batch: int, tokens: float) -> tuple[float, ...]:
    scale, calls = batch / layer.batch, _products(layer)
    if is_lookup(layer):
        return 0.0, layer.input_elements * scale / layer.weight_shape[0], 0.0, 0.0, 0.0, 1.0
    inputs, outputs = layer.input_elements * scale, layer.output_elements * scale
    if layer.experts == 1:
        return layer.macs * scale, calls, inputs, outputs, calls, float(layer.groups)
    rows = layer.macs * layer.experts / (layer.parameters * layer.batch * calls)  # a sample and call, over all experts
    used = experts_used(layer.experts, _active(layer, tokens), (tokens or rows) * batch)
    return layer.macs * scale, calls * used / layer.experts, inputs, outputs, calls, used


def _decode(layer: Layer, batch: int, tokens: float) -> tuple[float, ...]:
    if layer.kind not in ("linear", "embedding", "experts"):
        raise ValueError(
            f"phase 'decode' prices linear and embedding layers and experts, layer {layer.name!r} is of kind "
            f"{layer.kind}: leave phase out, and trace with the positions of one step"
        )
    if is_lookup(layer):
        return 0.0, layer.calls * batch / layer.weight_shape[0], 0.0, 0.0, 0.0, 1.0
    calls = _products(layer)
    _, k, n, _ = layer.matmul()
    if layer.experts == 1:
        positions = batch * calls
        return positions * layer.parameters, calls, positions * k, positions * n, calls, 1.0
    if not tokens:
        raise ValueError(
            f"phase 'decode' needs to know how many experts of {layer.name!r} a token takes, and no linear layer "
            "before it says how many tokens there were: leave phase out, and trace with the positions of one step"
        )
    active = _active(layer, tokens)
    rows, used = active * batch * calls, experts_used(layer.experts, active, batch)
    return rows * k * n, calls * used / layer.experts, rows * k, rows * n, calls, used


def _active(layer: Layer, tokens: float) -> float:
    """Experts that each token takes."""
    if not tokens:
        return 1.0
    return min(layer.macs * layer.experts / (layer.parameters * layer.calls * layer.batch * tokens), layer.experts)


def _products(layer: Layer) -> float:
    return max(layer.calls - (layer.kind == "embedding"), 1)
