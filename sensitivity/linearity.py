"""How fast the divergence grows with a layer's relative weight error, fitted on Gaussian noise (HIGGS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.batches import Batch, samples_in
from mpq.expert_units import granularity_in
from mpq.layers import Layer
from mpq.plan import weight_format
from mpq.progress import track
from mpq.quantizer import quantised_rows
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

from .kl import KL
from .layer_runs import KEEP_BYTES, BatchRuns, LayerRuns
from .loss import Loss
from .measurement import Measurement, ScoreArray, Scores
from .random_inputs import random_batch
from .unit_sums import sum_over_units

Objective = Literal["divergence", "loss"]
Points = NDArray[np.float64]  # (2, levels · draws): squared relative errors, mean increases

LEVELS = tuple(round(0.01 * level, 2) for level in range(1, 16))


@dataclass(frozen=True, kw_only=True)
class Linearity:
    """α_l t²: a layer's slope times the squared relative error of the option's weight.

        score(l, o) = α_l t²_{l,o},      t²_{l,o} = ‖Q_o(W_l) - W_l‖² / ‖W_l‖²
        α_l = Σ_k t_k² D(W_l + noise of relative error t_k) / Σ_k t_k⁴      least squares through 0

    D is the mean divergence from full precision, or the increase of the loss. The linearity theorem of HIGGS
    (Malinovskii et al. 2024; from memory and a third party's summary) says that the perplexity of a model grows by the
    sum of α_l t_l² for small errors of zero mean. On a quadratic loss α_l = ½ Tr(H_l)/n_l ‖W_l‖², so that the score is
    that of a Hessian trace; for the divergence H is the Gauss-Newton matrix. The noise levels of the paper are not
    established: 1 to 15 % in 15 steps are ours.

    A unit that is a part of a layer has its own error over the whole layer's ‖W_l‖²: all weights of it count alike.

    When to use: medium widths (3 to 5 bits), and quantisers whose error looks like noise (rotated weights); a new
    quantiser needs no new runs. When not: below 3 bits; formats of layer inputs, which are refused.

    Args:
        levels: relative errors t of the noise, above 0.
        draws: noise drawn anew at each level, so many times.
        objective: "divergence" or "loss" (needs labels).
        data_free: measure on random inputs instead of the data (`random_batch`), by divergence.
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.

    Cost: layers x levels x draws runs of the data, whatever the number of options, each from its layer on. The standard
    error is of α: over samples, and over draws (residuals of the fit, whatever their variance at each level), added as
    if independent, which errs on the safe side.
    """

    levels: tuple[float, ...] = LEVELS
    draws: int = 1
    objective: Objective = "divergence"
    data_free: bool = False
    keep_bytes: int = field(default=KEEP_BYTES, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(0 < level < np.inf for level in self.levels):
            raise ValueError(f"levels must be relative errors above 0, got {self.levels}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}")
        if self.data_free and self.objective == "loss":
            raise ValueError("data_free needs objective='divergence': random inputs have no labels")

    def __call__(self, measurement: Measurement) -> Scores:
        """Fit every layer's slope and score every option of every unit.

        Raises:
            ValueError: if an option quantises layer inputs, or the loss is asked for and there are no labels.
        """
        if with_inputs := [option for option in measurement.options if option.activation is not None]:
            raise ValueError(f"linearity scores weights alone, {with_inputs[0]} quantises inputs as well: use kl")
        slope, error = self.slopes(measurement)
        with torch.no_grad():
            relative = np.concatenate([_relative_errors(measurement, layer) for layer in measurement.network.layers])
        of_unit = measurement.units.layer_index
        measured_in = self._measure.measured_in(measurement.task)
        return Scores(slope[of_unit, None] * relative, error[of_unit, None] * relative, measured_in)

    def slopes(self, measurement: Measurement) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(layers,) slopes α, and their standard errors."""
        layers = measurement.network.layers
        runs = LayerRuns(measurement, None, self.keep_bytes)
        points = np.zeros((len(layers), 2, len(self.levels) * self.draws))
        of_samples = np.zeros((len(layers), 2))
        steps = [(batch, layer) for batch in range(len(measurement.batches)) for layer in range(len(layers))]
        samples = samples_in(measurement.batches)
        on_batch = lru_cache(maxsize=1)(lambda batch: BatchRuns(runs, self._batch(measurement, batch)))

        def sums_of(step: tuple[int, int]) -> NDArray[np.float64]:
            batch, index = step
            piece = partial(self._layer, on_batch(batch), index)
            return measurement.pieces.get(f"batch {batch}: {layers[index].name}", piece)

        with torch.no_grad():
            shown = track(steps, "linearity", shown=measurement.progress)
            for (_, index), sums in zip(shown, measurement.ranks.shared(steps, sums_of), strict=True):
                points[index, 0] = sums[0, :-2]
                points[index, 1] += sums[1, :-2] / samples
                of_samples[index] += sums[0, -2:]
        slope, error = fit_through_zero(points[:, 0], points[:, 1])
        variance = np.maximum(of_samples[:, 1] / samples - (of_samples[:, 0] / samples) ** 2, 0) / max(samples - 1, 1)
        return slope, np.sqrt(error**2 + variance)

    def _batch(self, measurement: Measurement, index: int) -> Batch:
        if not self.data_free:
            return measurement.batches[index]
        generator = torch.Generator().manual_seed(measurement.seed + index)
        return random_batch(measurement.batches[index], measurement.network, generator)

    @property
    def _measure(self) -> KL | Loss:
        return KL() if self.objective == "divergence" else Loss()

    def _layer(self, on_batch: BatchRuns, index: int) -> NDArray[np.float64]:
        """(2, points + 2): t² and summed increases; then the sums of the samples' slopes and of their squares."""
        measurement, runs = on_batch.runs.measurement, on_batch.runs
        layer, recorded = measurement.network.layers[index], on_batch.recorded
        weight = layer_parameters(measurement.model, layer)[0].detach()
        generator = torch.Generator().manual_seed(hash((measurement.seed, index)))
        recorded.verify(layer)
        squares, added = [], []
        for level in np.repeat(self.levels, self.draws).tolist():
            noisy = with_noise(weight, level, generator)
            squares.append(_relative(noisy, weight))
            with runs.changed(layer, noisy, None):
                added.append(on_batch.increase(self._measure, recorded.outputs(layer)).cpu())
        table = torch.stack(added).numpy()  # (points, samples)
        slopes = fit_through_zero(np.array(squares), table.T)[0]
        return np.array([[*squares, slopes.sum(), (slopes**2).sum()], [*table.sum(1), 0, 0]])


def with_noise(weight: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """A weight with Gaussian noise whose norm is `level` times the weight's own."""
    exact = weight if weight.dtype == torch.float64 else weight.float()
    noise = torch.randn(weight.shape, generator=generator).to(exact)
    noisy: Tensor = (exact + noise * (level * exact.norm() / noise.norm())).to(weight.dtype)
    return noisy


def fit_through_zero(squares: Any, increases: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slopes of least squares through 0, and their standard errors from the residuals, whatever their variances.

    Args:
        squares: (..., points) squared relative errors.
        increases: (..., points) of the divergence.

    Returns:
        (...,) slopes and standard errors; 0 where all squares are 0, which says that the layer is all zero.

    Example:
        >>> slope, error = fit_through_zero(np.array([1.0, 2.0]), np.array([3.0, 6.0]))
        >>> float(slope), float(error)
        (3.0, 0.0)
    """
    total = (squares**2).sum(-1)
    safe = np.where(total == 0, 1.0, total)
    slope = (squares * increases).sum(-1) / safe
    residual = increases - slope[..., None] * squares
    points = np.shape(increases)[-1]
    error = np.sqrt((squares**2 * residual**2).sum(-1) * points / max(points - 1, 1)) / safe
    return slope, error


def _relative(changed: Tensor, weight: Tensor) -> float:
    """‖changed - weight‖² / ‖weight‖², 0 for a weight of zeros."""
    energy = float(weight.double().square().sum())
    return float((changed.double() - weight.double()).square().sum()) / energy if energy else 0.0


def _relative_errors(measurement: Measurement, layer: Layer) -> ScoreArray:
    """(units of the layer, options): squared error of each unit over the squared norm of the whole weight."""
    rows = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer)
    energy = float(rows.double().square().sum()) or 1.0
    columns = []
    for option in measurement.options:
        if measurement.is_candidate(layer, option):
            fmt = weight_format(option)
            quantised = quantised_rows(rows, fmt, layer, measurement.granularity, measurement.quantizer)
            error = (quantised.double() - rows.double()).square().reshape(layer.weight_shape[0], -1)
            columns.append(sum_over_units(error, granularity_in(layer, measurement.granularity)).cpu().numpy() / energy)
        else:
            columns.append(np.array([np.nan]))
    return np.stack(np.broadcast_arrays(*columns), axis=1) if len(columns) > 1 else columns[0][:, None]
