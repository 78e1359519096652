"""Optimal brain surgeon: what a changed weight costs after all the others have made up for it as well as they can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mpq.batches import samples_in
from mpq.expert_units import granularity_in
from mpq.plan import weight_format
from mpq.progress import track
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

from .gradient_pass import Capture, Labels, captures, check_labels
from .input_hessian import input_hessian
from .inverse_fisher import InverseFisher
from .measurement import Measurement, Scores
from .quantised_weights import QuantisedWeights
from .unit_sums import sum_over_units

Criterion = Literal["fisher", "slim-llm", "shiftaddllm"]
Captures = list[Capture]
BLOCK = 2**20  # weights whose gradients are held at once
PARTS = 4  # of the samples; the standard error comes from leaving one out at a time


@dataclass(frozen=True, kw_only=True)
class OBS:
    """Squared errors over the diagonal of an inverse curvature: the score of compensated quantisation.

        fisher        score = ½ Σ_i ΔW_i² / [F⁻¹]_ii         F = λI + mean of g gᵀ, a block of rows at a time (M-FAC)
        slim-llm      score = Σ_ij ΔW_ij² / U_jj²            U upper Cholesky factor of H⁻¹, H = 2/N Σ x xᵀ + damping
        shiftaddllm   score = || |W| / diag U ||_F · std( W / diag U )² · ||ΔW||² / ||W||²

    Sources. M-FAC: Frantar, Kurtic and Alistarh 2021, arXiv:2107.03356, their source code; OBS: Hassibi and Stork 1993,
    the loss after moving weight i by ΔW_i while all others move to where they hurt least, w_i² replaced by ΔW_i².
    SliM-LLM (arXiv:2405.14917) and ShiftAddLLM (arXiv:2406.05981), their source code: both rate the weights themselves,
    W² / U_jj² and the first two factors of the third line; putting the error of the option in their place is our own
    reading, for a rating without the error allocates nothing. Errors of different weights are added as if independent.

    When to use: where weights are quantised with compensation (GPTQ and its kin). When not: for plain rounding,
    nothing is compensated then and `fisher` says more. Options that quantise inputs are refused.

    Args:
        criterion: one of the three.
        damping: relative to the mean of the curvature's diagonal. M-FAC's own is 1e-5 absolute, GPTQ's 1e-2 relative.
        labels: of the Fisher matrix, see `Fisher`.

    Cost: one forward and backward; then O(m²) a weight for m samples ("fisher"), or one inverse a layer. Memory: the
    inputs and output gradients of all layers on all of the data: give it few samples (16 to 64). Standard errors: by
    leaving out a quarter of the samples at a time.
    """

    criterion: Criterion = "fisher"
    damping: float = 1e-2
    labels: Labels = "model"

    def __post_init__(self) -> None:
        check_labels(self.labels)
        if self.criterion not in get_args(Criterion):
            raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {self.criterion!r}")
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}")

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit.

        Raises:
            ValueError: if an option quantises inputs, gradients cannot be had, or (but for "fisher") a layer is neither
                dense nor an ordinary convolution.
        """
        for option in measurement.options:
            if option.activation is not None:
                raise ValueError(f"obs scores weights, option {option} quantises inputs as well: use fisher or kl")
        seen: list[Captures] = [[] for _ in measurement.network.layers]
        for index in range(len(measurement.batches)):
            captures(measurement, index, self.labels, lambda capture: seen[capture.position].append(capture))
        mean, error = measurement.empty(), measurement.empty()
        weights, first = QuantisedWeights(measurement, 0), 0
        positions = range(len(seen))

        def layer_scores(position: int) -> np.ndarray:
            captured, seen[position] = seen[position], []
            return np.stack(self._layer(measurement, captured, weights))

        shown = track(positions, "inverse curvature", shown=measurement.progress)
        for _, (whole, spread) in zip(shown, measurement.ranks.shared(positions, layer_scores), strict=True):
            units = slice(first, first + len(whole))
            mean[units], error[units] = whole, spread
            first = units.stop
        return Scores(mean, error, "score")

    @torch.no_grad()
    def _layer(
        self, measurement: Measurement, seen: Captures, weights: QuantisedWeights
    ) -> tuple[np.ndarray, np.ndarray]:
        """(units, options) scores and standard errors of one layer."""
        layer = seen[0].layer
        cut = granularity_in(layer, measurement.granularity)
        exact = as_rows(layer_parameters(measurement.model, layer)[0].detach(), layer).flatten(1).double()
        changes = {
            column: weights.rows(layer, weight_format(option)).flatten(1).double() - exact
            for column, option in enumerate(measurement.options)
            if measurement.is_candidate(layer, option)
        }
        price = self._fisher if self.criterion == "fisher" else self._of_inputs

        def scores(kept: np.ndarray) -> np.ndarray:
            total = np.full((0, len(measurement.options)), np.nan)
            per_weight = price(exact, seen, kept)
            for column, change in changes.items():
                units = sum_over_units(change.square() * per_weight, cut).numpy()
                total = np.full((len(units), len(measurement.options)), np.nan) if not len(total) else total
                total[:, column] = units
            return total

        samples = samples_in(measurement.batches)
        whole = scores(np.ones(samples, dtype=bool))
        parts = min(PARTS, samples)
        if parts < 2:
            return whole, 0 * whole
        left_out = np.stack([scores(np.arange(samples) % parts != part) for part in range(parts)])
        return whole, np.sqrt((parts - 1) / parts * ((left_out - left_out.mean(0)) ** 2).sum(0))

    def _fisher(self, weight: Tensor, seen: Captures, kept: np.ndarray) -> Tensor:
        """½ / [F⁻¹]_ii of every weight."""
        price = torch.empty_like(weight)
        for rows in _row_blocks(weight):
            gradients = torch.cat([_per_sample(capture, rows) for capture in seen])[torch.from_numpy(kept)]
            scale = float(gradients.square().mean()) * self.damping
            if scale == 0:  # no gradient at all: nothing is lost whatever the weights are
                price[rows] = 0
                continue
            price[rows] = 0.5 / InverseFisher(gradients, scale).diagonal().reshape(price[rows].shape)
        return price

    def _of_inputs(self, weight: Tensor, seen: Captures, kept: np.ndarray) -> Tensor:
        """What a squared error of every weight costs by the Hessian of the layer's own output."""
        hessian = input_hessian(seen, kept)
        size = float(hessian.diagonal().mean())
        if size == 0:
            return torch.zeros_like(weight)
        hessian.diagonal().add_(self.damping * size)
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
        if self.criterion == "slim-llm":
            inverse: Tensor = factor.square().reciprocal()
            return inverse.expand_as(weight)
        importance = (weight.abs() / factor).norm() * (weight / factor).std(correction=0).square()
        energy = weight.square().sum()
        price: Tensor = importance / energy if energy > 0 else energy
        return price.expand_as(weight)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK // weight.shape[1])
    return (slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows))


def _per_sample(capture: Capture, rows: slice) -> Tensor:
    """(samples, weights of the rows): gradients whose mean outer product is the Fisher matrix of the mean loss."""
    gradients = capture.sample_gradients(rows).flatten(1).double()
    return gradients / capture.positions.to(gradients)[:, None].sqrt()
