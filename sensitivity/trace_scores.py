"""Scores from average traces: ½ · trace over elements · squared quantisation error, of weights and of layer inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.batches import samples_in
from mpq.formats import NumberFormat
from mpq.surgery import input_modules, quantise_activation

from .measurement import Measurement, Scores
from .weight_error import WeightError

Array = NDArray[np.float64]
Place = tuple[int, NumberFormat]  # a layer's position and a format of its input


@dataclass(frozen=True, kw_only=True)
class AverageTraces:
    """Average diagonal of each layer's curvature.

    Attributes:
        mean: (layers, 2): of the weight, and of the inputs (0 where no input is quantised); may be negative.
        covariance: (layers, 2, 2): of the errors of the two.
    """

    mean: Array
    covariance: Array


def trace_scores(measurement: Measurement, traces: AverageTraces) -> Scores:
    """Score every candidate option of every unit.

        score(u, o) = ½ [ Tr(H_l)/n_l · ||ΔW_u||² + n_u/n_l · Tr(H_x)/n_x · mean_j ||Δx_j||² ]

    n counts elements: of the layer's weight, of its unit u, of the input x of one sample. Negative average traces count
    as zero. All units of a layer read the same input: each takes its share by weights.
    """
    layer_of = measurement.units.layer_index
    average = np.maximum(traces.mean, 0)[layer_of]
    share = measurement.units.parameters / np.bincount(layer_of, measurement.units.parameters)[layer_of]
    of_weights = 0.5 * WeightError()(replace(measurement, progress=False)).mean
    of_inputs = 0.5 * share[:, None] * input_errors(measurement)[layer_of]
    mean = average[:, :1] * of_weights + average[:, 1:] * of_inputs
    covariance = traces.covariance[layer_of][..., None]
    variance = of_weights**2 * covariance[:, 0, 0] + of_inputs**2 * covariance[:, 1, 1]
    variance += 2 * of_weights * of_inputs * covariance[:, 0, 1]
    return Scores(mean, np.sqrt(np.maximum(variance, 0)), measurement.task.measured_in)


def quantised_inputs(measurement: Measurement) -> dict[int, tuple[NumberFormat, ...]]:
    """The formats that each layer's input may take, by the layer's position; layers whose input takes none are absent.

    Raises:
        ValueError: if a function, not a module, reads the input.
    """
    found = {}
    for position, layer in enumerate(measurement.network.layers):
        formats = [o.activation for o in measurement.options if measurement.is_candidate(layer, o) and o.activation]
        if formats and input_modules(measurement.model, layer):
            found[position] = tuple(dict.fromkeys(formats))
    return found


def input_errors(measurement: Measurement) -> Array:
    """(layers, options): mean over samples of ||Q(x) - x||² of a layer's inputs, all calls; 0 where left alone."""
    wanted = quantised_inputs(measurement)
    places: list[Place] = [(position, fmt) for position, formats in wanted.items() for fmt in formats]
    columns = {place: column for column, place in enumerate(places)}
    if not columns:
        return np.zeros((len(measurement.network.layers), len(measurement.options)))
    batches = range(len(measurement.batches))
    per_batch = measurement.ranks.shared(batches, partial(_input_errors_of_batch, measurement, columns))
    errors = sum(per_batch, np.zeros(len(columns))) / samples_in(measurement.batches)
    table = np.zeros((len(measurement.network.layers), len(measurement.options)))
    for (position, fmt), column in columns.items():
        table[position, [option.activation == fmt for option in measurement.options]] = errors[column]
    return table


def _input_errors_of_batch(measurement: Measurement, columns: Mapping[Place, int], index: int) -> Array:
    """(columns,): sums over one batch."""
    layers, errors = measurement.network.layers, np.zeros(len(columns))

    def note(place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input" if "input" in kwargs else next(iter(kwargs))]
        change = quantise_activation(given, place[1], layers[place[0]]).double() - given.double()
        errors[columns[place]] += float(change.square().sum())

    with ExitStack() as stack, torch.no_grad():
        for place in columns:
            for module in input_modules(measurement.model, layers[place[0]]):
                stack.callback(module.register_forward_pre_hook(partial(note, place), with_kwargs=True).remove)
        measurement.task.run(measurement.model, measurement.batches[index])
    return errors
