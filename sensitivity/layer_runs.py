"""Runs of a model with one layer changed and all others in full precision, or in a base precision."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mpq.attention_formats import quantised_operators
from mpq.attention_operators import is_operator, keeps, runs_of
from mpq.formats import NumberFormat
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import weight_format
from mpq.surgery import layer_parameters, quantised_input, swapped_data
from mpq.tasks import Outputs, Task

from .measurement import Measurement
from .prefix_reuse import PrefixReuse, Recorded
from .quantised_weights import QuantisedWeights

FULL = "full"
KEEP_BYTES = 2 * 2**30


def base_option(base: str | Option) -> Option | None:
    """The option of a base precision, None for full precision.

    Raises:
        ValueError: if it is neither "full" nor an option of weights.
    """
    if base == FULL:
        return None
    option = Option.parse(base)
    if option.weight is None:
        raise ValueError(f"base must be 'full' or an option with a weight format, such as 'int8', got {str(option)!r}")
    return option


class Distance(Hashable, Protocol):
    """What is compared: a measured method."""

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) how far outputs are from those in full precision."""


class LayerRuns:
    """How the layers of a measurement are changed, one at a time or several, on top of a base precision.

    Args:
        measurement: whose layers.
        base: option of all layers that are not changed, None for full precision.
        keep_bytes: of module outputs kept for a batch, and of quantised weights where they are used again.
        revisits: whether a layer takes an option more than once a batch.
    """

    def __init__(
        self, measurement: Measurement, base: Option | None, keep_bytes: int, *, revisits: bool = False
    ) -> None:
        self.measurement, self.base = measurement, base
        self.reuse = PrefixReuse(measurement.model, measurement.network.layers, keep_bytes)
        self._weights = QuantisedWeights(measurement, keep_bytes if revisits or len(measurement.batches) > 1 else 0)
        self._inputs: dict[str, ExitStack] = {}
        layers = measurement.network.layers
        self._exact = {layer.name: layer_parameters(measurement.model, layer)[0].data for layer in layers}

    def weight(self, layer: Layer, option: Option) -> Tensor:
        """The layer's own weight, not that of the base, under an option."""
        with swapped_data(layer_parameters(self.measurement.model, layer), self._exact[layer.name]):
            return self._weights.get(layer, weight_format(option))

    @cached_property
    def _base_weights(self) -> dict[str, Tensor]:
        if self.base is None:
            return {}
        return {layer.name: self.weight(layer, self.base) for layer in self.measurement.network.layers}

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """All layers in the base precision."""
        if self.base is None:
            yield
            return
        with ExitStack() as stack:
            for layer in self.measurement.network.layers:
                parameters = layer_parameters(self.measurement.model, layer)
                stack.enter_context(swapped_data(parameters, self._base_weights[layer.name]))
                self._inputs[layer.name] = stack.enter_context(ExitStack())
                self._quantise_input(layer)
            yield
        self._inputs.clear()

    @contextmanager
    def changed(self, layer: Layer, weight: Tensor, activation: NumberFormat | None) -> Iterator[None]:
        """One layer with another weight and its input in another format (None: as it is)."""
        model = self.measurement.model
        if at_base := layer.name in self._inputs:
            self._inputs[layer.name].close()
        try:
            parameters = layer_parameters(model, layer)
            with swapped_data(parameters, weight), quantised_input(model, layer, activation):
                yield
        finally:
            if at_base:
                self._quantise_input(layer)

    def taking(self, layer: Layer, option: Option) -> AbstractContextManager[object] | None:
        """One layer, or operator of attention, under an option; None where that is what it has at base already."""
        model = self.measurement.model
        if is_operator(layer):
            kept = keeps(option, self.measurement.network.dtype)
            return None if kept else quantised_operators(model, {layer: option.activation})
        weight = self.weight(layer, option)
        return None if self.is_unchanged(layer, option, weight) else self.changed(layer, weight, option.activation)

    def first_changed(self, layer: Layer) -> Layer:
        """The layer from which on a run differs: itself; of an operator, a layer whose outputs reach it."""
        if not is_operator(layer):
            return layer
        network = self.measurement.network
        run = network.attention[runs_of(layer, network)[0]]
        feeding = [name for name in (*run.query_layers, *run.key_layers, *run.value_layers) if name in network]
        return network[feeding[0]] if feeding else layer

    def is_unchanged(self, layer: Layer, option: Option, weight: Tensor) -> bool:
        """Whether an option, with the weight it gives, is what the layer has at base already."""
        if self.base is None:
            return option.activation is None and torch.equal(weight, self._exact[layer.name])
        same_input = option.activation == self.base.activation
        return same_input and torch.equal(weight, self._base_weights[layer.name])

    def _quantise_input(self, layer: Layer) -> None:
        if self.base is not None:
            context = quantised_input(self.measurement.model, layer, self.base.activation)
            self._inputs[layer.name].enter_context(context)


class BatchRuns:
    """Runs on one batch, made when they are first asked for."""

    def __init__(self, runs: LayerRuns, batch: Any) -> None:
        self.runs = runs
        self._at_base: dict[Distance, Tensor] = {}
        self._run = partial(runs.measurement.task.run, runs.measurement.model, batch)

    @cached_property
    def exact(self) -> Outputs:
        """Outputs in full precision. To be asked for outside of `at_base`."""
        return self.recorded.reference if self.runs.base is None else self._run()

    @cached_property
    def recorded(self) -> Recorded:
        """The runs at base precision."""
        return self.record()

    def increase(self, method: Distance, outputs: Outputs) -> Tensor:
        """(samples,) by how much outputs are farther from full precision than those at base are."""
        task, exact = self.runs.measurement.task, self.exact
        if method not in self._at_base:
            self._at_base[method] = method.distance(task, exact, self.recorded.reference).double()
        return method.distance(task, exact, outputs).double() - self._at_base[method]

    def record(self) -> Recorded:
        """The runs of the model as it now stands."""
        return self.runs.reuse.recorded(self._run)
