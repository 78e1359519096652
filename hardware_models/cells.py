"""What is priced: every layer of a network in every pair of formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat, parse

from .size import size_bytes
from .workload import Work, check_context, is_lookup, work_of

if TYPE_CHECKING:
    from mpq.layers import Layer, Network
    from mpq.options import Option

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """A network's layers against pairs of formats, one run of it in one phase.

    Each column is a pair: a weight format, None where it stays as it is stored, and an activation format, None where
    inputs stay in the model's dtype. The last column, (None, None), is the unquantised model.

    Attributes:
        network: the traced model.
        weights, activations: the pairs, (columns,).
        batch: samples a pass.
        phase: None or "prefill" as traced, "decode" one position a sample.
        context: positions in the cache that attention reads in "decode"; None: as many as in the trace.
        bops: the convention of bit operations (`bops.CONVENTIONS`).

    Example:
        >>> from mpq.layers import Layer, Network
        >>> from mpq.options import Option
        >>> fc = Layer("fc", "linear", (32, 8), 256, 6144, (2, 12, 8), (2, 12, 32), batch=2)
        >>> cells = Cells.of(Network((fc,), batch=2), [Option("int4", "int8"), Option("int4")])
        >>> cells.shape, cells.weight_bits, cells.activation_bits, cells.names(1)
        ((1, 3), array([ 4.,  4., 32.]), array([ 8., 32., 32.]), ('int4', 'fp32'))
    """

    network: Network
    weights: tuple[NumberFormat | None, ...]
    activations: tuple[NumberFormat | None, ...]
    batch: int = 1
    phase: str | None = None
    context: int | None = None
    bops: str = "hawq"

    @classmethod
    def of(
        cls,
        network: Network,
        options: Sequence[Option],
        *,
        batch: int = 1,
        phase: str | None = None,
        context: int | None = None,
        bops: str = "hawq",
    ) -> Cells:
        """The options in order, then the unquantised model as the last column.

        Raises:
            ValueError: if there is a context, and the phase is not "decode".
        """
        check_context(phase, context)
        weights = (*(option.weight for option in options), None)
        activations = (*(option.activation for option in options), None)
        return cls(network, weights, activations, batch, phase, context, bops)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, columns)."""
        return len(self.network.layers), len(self.weights)

    @cached_property
    def dtype(self) -> NumberFormat:
        """The model's own format."""
        return parse(self.network.dtype)

    @cached_property
    def work(self) -> Work:
        """What the run asks of each layer."""
        return work_of(self.network, self.batch, self.phase)

    @cached_property
    def weight_bits(self) -> Floats:
        """Bits of one weight, scales left out, (columns,)."""
        return np.array([(fmt or self.dtype).bits for fmt in self.weights], dtype=np.float64)

    @cached_property
    def activation_bits(self) -> Floats:
        """Bits of one input, (columns,)."""
        return np.array([(fmt or self.dtype).bits for fmt in self.activations], dtype=np.float64)

    @cached_property
    def weight_bytes(self) -> Floats:
        """Bytes of the stored weight, scales included, (layers, columns)."""
        return size_bytes(self.network.layers, self.weights)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What kernels run each layer, (layers,): its kind, "lookup", "depthwise_conv2d"."""
        return tuple(kernel_kind(layer) for layer in self.network.layers)

    def names(self, column: int) -> tuple[str, str]:
        """Canonical names of the two formats of a column."""
        return (self.weights[column] or self.dtype).name, (self.activations[column] or self.dtype).name


def kernel_kind(layer: Layer) -> str:
    """What runs a layer: its kind, "lookup" for embeddings that are never multiplied, "depthwise_..." convolutions.

    Example:
        >>> from mpq.layers import Layer
        >>> kernel_kind(Layer("dw", "conv2d", (8, 1, 3, 3), 72, 72, (1, 8, 3, 3), (1, 8, 1, 1), groups=8))
        'depthwise_conv2d'
    """
    if is_lookup(layer):
        return "lookup"
    if layer.kind == "embedding":
        return "linear"
    if layer.groups > 1 and layer.weight_shape[1] == 1 and not layer.kind.startswith("conv_transpose"):
        return f"depthwise_{layer.kind}"
    return layer.kind
