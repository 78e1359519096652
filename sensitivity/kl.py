"""Measured divergence from full precision with one layer quantised at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mpq.layers import Layer
from mpq.options import Option
from mpq.progress import track
from mpq.quantizer import quantised_weight
from mpq.surgery import layer_parameters, quantised_input, swapped_data
from mpq.tasks import Outputs, mean_and_error

from .measurement import Measurement, Scores


@dataclass(frozen=True)
class KL:
    """Mean over samples and positions of KL(p || q), q with only that layer quantised, all else in full precision.

        score(l, o) = 1/N Σ_j KL( softmax(z_j) || softmax(z_j; layer l takes o) )

    Full precision comes first in the divergence, as is standard. Outputs that are no distribution are compared by
    relative squared error, a loss of the user's own by its increase.

    When to use: small models, where it is cheaper and truer than any estimate. When not: language models on little
    data, where single differences drown in the interaction of layers.

    Cost: layers x options passes over the data. The standard error is over samples.
    """

    def __call__(self, measurement: Measurement) -> Scores:
        """Measure every candidate option of every layer.

        Raises:
            ValueError: if units are finer than layers: a pass each would take for ever.
        """
        if measurement.granularity != "layer":
            raise ValueError(
                f"kl measures whole layers, got granularity {measurement.granularity!r}: "
                "use output_fisher (rows) or weight_error"
            )
        mean, error = measurement.empty(), measurement.empty()
        with torch.no_grad():
            reference = [measurement.task.run(measurement.model, batch) for batch in measurement.batches]
            layers = measurement.network.layers
            for index in track(range(len(layers)), "measured KL", shown=measurement.progress):
                piece = measurement.pieces.get(layers[index].name, partial(_row, measurement, layers[index], reference))
                mean[index], error[index] = piece
        return Scores(mean, error, measurement.task.measured_in)


def _row(measurement: Measurement, layer: Layer, reference: list[Outputs]) -> np.ndarray:
    """(2, options): means and standard errors of one layer."""
    row = np.full((2, len(measurement.options)), np.nan)
    for column, option in enumerate(measurement.options):
        if measurement.is_candidate(layer, option):
            row[:, column] = mean_and_error(_divergence(measurement, layer, option, reference))
    return row


def _divergence(measurement: Measurement, layer: Layer, option: Option, reference: list[Outputs]) -> torch.Tensor:
    model, task = measurement.model, measurement.task
    parameters = layer_parameters(model, layer)
    weight = quantised_weight(parameters[0].data, option, layer, measurement.quantizer)
    with swapped_data(parameters, weight), quantised_input(model, layer, option.activation):
        parts = [
            task.divergence(ref, task.run(model, batch))
            for ref, batch in zip(reference, measurement.batches, strict=True)
        ]
    return torch.cat([part.cpu() for part in parts])
