"""Squared quantisation error of the weight: no data, no loss; a baseline that ranks layers badly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.error_database import ErrorDatabase
from mpq.expert_units import granularity_in
from mpq.formats import Float, NumberFormat
from mpq.layers import Layer, Network
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import RoundToNearest, quantised_rows
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

from .measurement import Measurement, ScoreArray, Scores
from .unit_sums import sum_over_units

Errors = NDArray[np.float64]  # (units of a layer,)


@dataclass(frozen=True)
class WeightError:
    """||Q(W) - W||² of every unit.

    When to use: there is no data at all, or as a control: a score that knows nothing about the loss loses to uniform
    precision at low bits. Formats of layer inputs do not enter. Errors that were measured elsewhere are taken from an
    `mpq.error_database.ErrorDatabase` as the quantizer.

    Cost: quantises every layer once a weight format; no forward pass. Standard error 0.
    """

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option; the measure is "score", not loss."""
        layers = measurement.network.layers
        with torch.no_grad():
            rows = [
                _errors(measurement, index)
                for index in track(range(len(layers)), "weight error", shown=measurement.progress)
            ]
        mean = np.concatenate(rows)
        return Scores(mean, np.where(np.isnan(mean), np.nan, 0.0), "score")


def _errors(measurement: Measurement, index: int) -> ScoreArray:
    layer = measurement.network.layers[index]
    rows = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
    known: dict[NumberFormat, Errors] = {}
    columns: list[Errors | None] = []
    for option in measurement.options:
        if not measurement.is_candidate(layer, option):
            columns.append(None)
            continue
        fmt = weight_format(option)
        if fmt not in known:
            known[fmt] = _of_format(measurement, layer, rows, fmt)
        columns.append(known[fmt])
    count = len(next(iter(known.values())))
    return np.stack([np.full(count, np.nan) if column is None else column for column in columns], axis=1)


def _of_format(measurement: Measurement, layer: Layer, rows: Tensor, fmt: NumberFormat) -> Errors:
    """(units of the layer,)."""
    quantizer, granularity = measurement.quantizer, measurement.granularity
    if isinstance(quantizer, ErrorDatabase):
        if not isinstance(fmt, Float):
            return quantizer.squared_errors(Network((layer,)).units(granularity).labels, fmt)
        quantizer = RoundToNearest()
    quantised = quantised_rows(rows, fmt, layer, granularity, quantizer)
    error = (quantised - rows).double().square().reshape(layer.weight_shape[0], -1)
    errors: Errors = sum_over_units(error, granularity_in(layer, granularity)).cpu().numpy()
    return errors
