"""The loop that measured methods share: one layer at a time takes an option, and the outputs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar

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

    Operators of attention are scored like layers, their inputs quantised in all runs of their module; the base, which
    is one of weights, leaves them as they are.

    Cost: layers x options runs of the data, each only from its layer on: half of that in a deep chain, and one run a
    batch to begin with. See `PrefixReuse` for when a run is a full one.
    """

    takes_operators: ClassVar[bool] = True

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
        return measured_together([self], measurement)[0]


def measured_together(methods: Sequence[SingleLayer], measurement: Measurement) -> list[Scores]:
    """Scores of several methods from the same runs: outputs are compared in as many ways as there are methods.

    Args:
        methods: all with the same `base`; of `keep_bytes` the largest holds.
        measurement: of what.

    Raises:
        ValueError: if units are finer than layers, or bases differ.
    """
    if len({base_option(method.base) for method in methods}) > 1:
        raise ValueError(f"methods must have one base, got {', '.join(str(method.base) for method in methods)}")
    names = " ".join(type(method).__name__ for method in methods)
    if measurement.granularity != "layer":
        raise ValueError(
            f"{names} measures whole layers, got granularity {measurement.granularity!r}: "
            "use output_fisher (rows) or weight_error"
        )
    layers = (*measurement.network.layers, *measurement.operators)
    runs = LayerRuns(measurement, base_option(methods[0].base), max(method.keep_bytes for method in methods))
    total = np.zeros((len(layers), len(methods), 2, len(measurement.options)))
    steps = [(batch, layer) for batch in range(len(measurement.batches)) for layer in range(len(layers))]
    on_batch = lru_cache(maxsize=1)(lambda batch: BatchRuns(runs, measurement.batches[batch]))

    def sums_of(step: tuple[int, int]) -> NDArray[np.float64]:
        batch, layer = step[0], layers[step[1]]
        return measurement.pieces.get(f"batch {batch}: {layer.name}", partial(_sums, methods, on_batch(batch), layer))

    with torch.no_grad():
        shown = track(steps, f"measured {names}", shown=measurement.progress)
        for (_, index), sums in zip(shown, measurement.ranks.shared(steps, sums_of), strict=True):
            total[index] += sums
    mean, error = mean_and_error_of_sums(total, samples_in(measurement.batches))
    measures = [method.measured_in(measurement.task) for method in methods]
    return [Scores(mean[:, place], error[:, place], measure) for place, measure in enumerate(measures)]


def _sums(methods: Sequence[SingleLayer], on_batch: BatchRuns, layer: Layer) -> NDArray[np.float64]:
    """(methods, 2, options): sums over the batch's samples of the differences and of their squares."""
    runs = on_batch.runs
    sums = np.full((len(methods), 2, len(runs.measurement.options)), np.nan)
    on_batch.exact  # noqa: B018 - in full precision, so before the base
    with runs.at_base():
        runs_from = runs.first_changed(layer)
        on_batch.recorded.verify(runs_from)
        for column, option in enumerate(runs.measurement.options):
            if not runs.measurement.is_candidate(layer, option):
                continue
            changed = runs.taking(layer, option)
            if changed is None:
                sums[..., column] = 0
                continue
            with changed:
                outputs = on_batch.recorded.outputs(runs_from)
            for place, method in enumerate(methods):
                difference = on_batch.increase(method, outputs)
                sums[place, :, column] = float(difference.sum()), float(difference.square().sum())
    return sums


def mean_and_error_of_sums(sums: NDArray[np.float64], samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(..., options) means and standard errors from (..., 2, options) sums of values and of their squares."""
    mean = sums[..., 0, :] / samples
    variance = np.maximum(sums[..., 1, :] / samples - mean**2, 0) / max(samples - 1, 1)
    return mean, np.sqrt(variance)
