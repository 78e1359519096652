"""Peak activation memory: what a run holds at the same time, skips included.

    peak = max over steps t of the sum over buffers alive at t of elements * b_a(owner) / 8

A buffer is stored in the input format of the layer that owns it, the first that reads it (`mpq.buffers`): its producer
requantises on writing, and later readers in another format convert on reading. Operators in place share a buffer;
no allocator's fragmentation and no kernel's scratch is counted. In one format everywhere this is what allocators
report as the arena's lower bound; TFLite Micro and TinyEngine add their scratch.
"""

from __future__ import annotations

import numpy as np

from .cells import Cells
from .prices import Prices


def activation_peak(cells: Cells) -> Prices:
    """`activation_peak` [B] of the whole batch: a peak over steps; nothing in "decode" or for an untraced network.

    A layer's entry is the largest buffer it owns, in bytes; what it holds in a step is that times a factor.

    Example:
        >>> from mpq.buffers import Buffer
        >>> from mpq.layers import Layer, Network
        >>> from mpq.options import Option
        >>> layers = [Layer(name, "linear", (8, 8), 64, 64, (1, 8), (1, 8)) for name in ("a", "b")]
        >>> buffers = (Buffer("a", 8, 0, 0), Buffer("b", 16, 0, 1), Buffer("b", 4, 1, 1))
        >>> cells = Cells.of(Network(tuple(layers), buffers=buffers), [Option("int8", "int8")], batch=2)
        >>> prices = activation_peak(cells)
        >>> prices.tables["activation_peak"][:, 0], prices.alive["activation_peak"].tolist()
        (array([16., 32.]), [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.25]])
    """
    network = cells.network
    position = {layer.name: index for index, layer in enumerate(network.layers)}
    owned = [(position[buffer.owner], buffer) for buffer in network.buffers if buffer.owner in position]
    if not owned or cells.phase == "decode":
        return Prices()
    largest = np.zeros(len(network.layers))
    for index, buffer in owned:
        largest[index] = max(largest[index], buffer.elements)
    alive = [
        (step, index, buffer.elements / largest[index])
        for index, buffer in owned
        for step in range(buffer.first, buffer.last + 1)
    ]
    samples = cells.batch / network.batch
    return Prices(
        tables={"activation_peak": samples * np.outer(largest, cells.activation_bits) / 8},
        measures={"activation_peak": "B"},
        aggregates={"activation_peak": "peak"},
        alive={"activation_peak": np.array(alive, dtype=np.float64)},
    )
