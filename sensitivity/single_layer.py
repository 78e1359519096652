"""The loop that measured methods share: one layer at a time takes an option, and the outputs are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.batches import samples_in
from mpq.layers import Layer
from mpq.options import Option
from mpq.progress import track
from mpq.tasks import Outputs, Task

from .layer_runs import KEEP_BYTES, BatchRuns, LayerRuns, base_option
from .measurement import Measurement, Scores


@dataclass(frozen=True, kw_only=True)
class SingleLayer:
    """What measured methods have in common; `distance` says what is measured.

        score(l, o) = 1/N Σ_j [ d_j(layer l takes o, the others base) - d_j(all base) ]

    d_j is the distance of sample j's outputs from those in full precision. The differences are paired: the standard
    error is that of their mean over samples. They may be negative, and are left so.

    Args:
        base: what all other layers have: "full" precision, or an option such as "int8" or "int8/int8". An option equal
            to the base then scores exactly 0. A low base takes a layer where it will be used, among quantised ones.
        keep_bytes: of module outputs kept for a batch, so that what comes before the changed layer is not run again;
            and of quantised weights, where there are several batches. 0: full runs.

    Cost: layers x options runs of the data, each only from its layer on: half of that in a deep chain, and one run a
    batch to begin with. See `PrefixReuse` for when a run is a full one.
    """

    base: str | Option = "full"
    keep_bytes: int = field(default=KEEP_BYTES, repr=False)

    def __post_init__(self) -> None:
        base_option(self.base)
        if self.keep_bytes < 0:
            raise ValueError(f"keep_bytes must be at least 0, got {self.keep_bytes}")

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) how far outputs are from those in full precision."""
        raise NotImplementedError

    def measured_in(self, task: Task) -> str:
        """The measure of the scores."""
        return task.measured_in

    def __call__(self, measurement: Measurement) -> Scores:
        """Measure every candidate option of every layer.

        Raises:
            ValueError: if units are finer than layers: a pass each would take for ever.
        """
        name = type(self).__name__
        if measurement.granularity != "layer":
            raise ValueError(
                f"{name} measures whole layers, got granularity {measurement.granularity!r}: "
                "use output_fisher (rows) or weight_error"
            )
        layers = measurement.network.layers
        runs = LayerRuns(measurement, base_option(self.base), self.keep_bytes)
        total = np.zeros((len(layers), 2, len(measurement.options)))
        steps = [(batch, layer) for batch in range(len(measurement.batches)) for layer in range(len(layers))]
        on_batch = lru_cache(maxsize=1)(lambda batch: BatchRuns(runs, measurement.batches[batch]))

        def sums_of(step: tuple[int, int]) -> NDArray[np.float64]:
            batch, layer = step[0], layers[step[1]]
            piece = partial(self._sums, on_batch(batch), layer)
            return measurement.pieces.get(f"batch {batch}: {layer.name}", piece)

        with torch.no_grad():
            shown = track(steps, f"measured {name}", shown=measurement.progress)
            for (_, index), sums in zip(shown, measurement.ranks.shared(steps, sums_of), strict=True):
                total[index] += sums
        mean, error = mean_and_error_of_sums(total, samples_in(measurement.batches))
        return Scores(mean, error, self.measured_in(measurement.task))

    def _sums(self, on_batch: BatchRuns, layer: Layer) -> NDArray[np.float64]:
        """(2, options): sums over the batch's samples of the differences and of their squares."""
        runs, task = on_batch.runs, on_batch.runs.measurement.task
        sums = np.full((2, len(runs.measurement.options)), np.nan)
        distance = partial(self.distance, task)
        exact = on_batch.exact
        with runs.at_base():
            at_base = on_batch.distance_at_base(distance)
            on_batch.recorded.verify(layer)
            for column, option in enumerate(runs.measurement.options):
                if not runs.measurement.is_candidate(layer, option):
                    continue
                weight = runs.weight(layer, option)
                if runs.is_unchanged(layer, option, weight):
                    sums[:, column] = 0
                    continue
                with runs.changed(layer, weight, option.activation):
                    outputs = on_batch.recorded.outputs(layer)
                difference = distance(exact, outputs).double() - at_base
                sums[:, column] = float(difference.sum()), float(difference.square().sum())
        return sums


def mean_and_error_of_sums(sums: NDArray[np.float64], samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(..., options) means and standard errors from (..., 2, options) sums of values and of their squares."""
    mean = sums[..., 0, :] / samples
    variance = np.maximum(sums[..., 1, :] / samples - mean**2, 0) / max(samples - 1, 1)
    return mean, np.sqrt(variance)
