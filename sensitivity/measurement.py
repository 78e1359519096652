"""`Measurement`: everything an estimator needs, checked once, and the shape of what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpq.batches import Batch
from mpq.cache import Pieces
from mpq.layers import Layer, Network, Units
from mpq.options import Option
from mpq.quantizer import Quantizer
from mpq.ranks import Ranks
from mpq.tasks import Task

ScoreArray = NDArray[np.float64]  # (units, options)


@dataclass(frozen=True)
class Measurement:
    """What is measured, on what.

    `candidates` has the options each layer may take; `units` the units of all layers in order; `pieces` holds finished
    work of an earlier, interrupted run; `ranks` share out the work.
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
