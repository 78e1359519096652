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

    @torch.no_grad()
    def get(self, layer: Layer, fmt: NumberFormat) -> Tensor:
        """The quantised weight as the layer stores it."""
        key = (layer.name, fmt)
        if key in self._kept:
            return self._kept[key]
        measurement = self._measurement
        rows = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
        quantised = quantised_rows(rows, fmt, layer, measurement.granularity, measurement.quantizer)
        weight = from_rows(quantised, layer).contiguous()
        size = weight.numel() * weight.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[key] = weight
        return weight
