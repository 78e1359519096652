"""`Measurement`: everything an estimator needs, checked once, and the shape of what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpq.attention_formats import quantised_operators
from mpq.batches import Batch
from mpq.cache import ADDRESS, Pieces, description, fingerprint_of
from mpq.fake_quantize import FLOATS
from mpq.formats import parse
from mpq.layers import Layer, Network, Units
from mpq.options import Option
from mpq.quantizer import Quantizer
from mpq.ranks import Ranks
from mpq.surgery import layer_parameters
from mpq.tasks import Task

ScoreArray = NDArray[np.float64]  # (units, options)


@dataclass(frozen=True)
class Measurement:
    """What is measured, on what.

    `candidates` has the options each layer may take; `units` the units of all layers in order; `pieces` holds finished
    work of an earlier, interrupted run; `ranks` share out the work. `operators` of attention are scored after the
    layers, by the methods that take them (`takes_operators`).
    """

    model: nn.Module
    batches: Sequence[Batch]
    network: Network
    options: tuple[Option, ...]
    candidates: dict[str, tuple[Option, ...]]
    granularity: str
    task: Task
    quantizer: Quantizer
    seed: int
    pieces: Pieces
    progress: bool
    ranks: Ranks = field(default_factory=Ranks)
    operators: tuple[Layer, ...] = ()

    @property
    def units(self) -> Units:
        """The units of all layers."""
        return self.network.units(self.granularity)

    def is_candidate(self, layer: Layer, option: Option) -> bool:
        """Whether the layer may take the option."""
        return option in self.candidates[layer.name]

    def empty(self) -> ScoreArray:
        """(units, options) of NaN: nothing known yet."""
        return np.full((len(self.units), len(self.options)), np.nan)


def check_weights(model: nn.Module, network: Network) -> None:
    """Check that a model has values, and that those of its layers are finite.

    Raises:
        ValueError: if not; it names the first parameter or layer.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device and has no values: load the weights first, or score their file with "
                "mpq.sensitivity.score_checkpoint"
            )
    for layer in network.layers:
        weight = layer_parameters(model, layer)[0]
        if weight.dtype in FLOATS and not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(f"the weight of {layer.name!r} must be finite, it holds NaN or infinity")


def check_operators(measurement: Measurement, estimator: object) -> None:
    """Check that a method can score the operators of attention, and that they run where they can be quantised.

    Raises:
        ValueError: if not; it names the method and the way out, or the module.
    """
    if not measurement.operators:
        return
    if not getattr(estimator, "takes_operators", False):
        first = measurement.operators[0].name
        raise ValueError(
            f"{type(estimator).__name__} scores weights, and {first!r} has none: measure it, with sensitivity='kl' "
            "('loss' or 'output_mse'), or leave operators of attention out of options and pins"
        )
    coarse = dict.fromkeys(measurement.operators, parse("bf16").bind("activation"))
    with torch.no_grad(), quantised_operators(measurement.model, coarse):
        measurement.task.run(measurement.model, measurement.batches[0])


def check_ranks(measurement: Measurement, *settings: object) -> None:
    """Check that all ranks measure the same: the whole model, data and settings, every number of them.

    Raises:
        ValueError: on every rank, if one has something else.
    """
    if measurement.ranks.world == 1:
        return
    given = (measurement.seed, measurement.granularity, measurement.network.layers, measurement.options)
    told = ADDRESS.sub("", repr((*given, measurement.quantizer, *settings)))
    for what, part in (("model", measurement.model), ("data", measurement.batches), ("settings", told)):
        measurement.ranks.agree(what, fingerprint_of([], description(part)))


@dataclass(frozen=True)
class Scores:
    """Means and standard errors, (units, options) each, NaN where the option is no candidate; and their measure.

    `pairs` has (options, options) terms to add for two units, by their positions; 0 where an option is no candidate.
    """

    mean: ScoreArray
    standard_error: ScoreArray
    measure: str
    pairs: Mapping[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)


class Estimator(Protocol):
    """A sensitivity method: a small frozen object whose fields are its settings."""

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit; lower is better, 0 for full precision."""
