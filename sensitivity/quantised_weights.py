"""Quantised weights that are asked for again and again, kept up to a number of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.formats import NumberFormat
from mpq.layers import Layer
from mpq.quantizer import quantised_rows
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows, from_rows

from .measurement import Measurement


class QuantisedWeights:
    """Weights by (layer, format), each unit quantised as a tensor of its own."""

    def __init__(self, measurement: Measurement, keep_bytes: int) -> None:
        self._measurement = measurement
        self._left = keep_bytes
        self._kept: dict[tuple[str, NumberFormat], Tensor] = {}

    def keep(self, keep_bytes: int) -> None:
        """Keep up to this many bytes from now on, where nothing was to be kept: weights will be asked for again."""
        if not self._kept and self._left == 0:
            self._left = keep_bytes

    @torch.no_grad()
    def get(self, layer: Layer, fmt: NumberFormat) -> Tensor:
        """The quantised weight as the layer stores it."""
        return from_rows(self.rows(layer, fmt), layer).contiguous()

    @torch.no_grad()
    def rows(self, layer: Layer, fmt: NumberFormat) -> Tensor:
        """The quantised weight in the (out, in...) view."""
        key = (layer.name, fmt)
        if key in self._kept:
            return self._kept[key]
        measurement = self._measurement
        exact = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
        quantised = quantised_rows(exact, fmt, layer, measurement.granularity, measurement.quantizer)
        size = quantised.numel() * quantised.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[key] = quantised
        return quantised
