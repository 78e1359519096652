"""Measured interactions: what two quantised layers do together beyond what each does alone (CLADO)."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mpq.batches import samples_in
from mpq.layers import Layer, Network
from mpq.options import Option
from mpq.progress import track
from mpq.tasks import Outputs

from .kl import KL
from .layer_runs import KEEP_BYTES, BatchRuns, LayerRuns
from .loss import Loss
from .measurement import Measurement, Scores
from .single_layer import mean_and_error_of_sums

Which = Literal["all", "block", "neighbours"]
Objective = Literal["divergence", "loss"]
Matrix = NDArray[np.float64]
Pairs = dict[tuple[int, int], Matrix]

_NUMBERED = re.compile(r"\d+|.*_\d+")  # "3" of layers.3, "encoder_layer_3"
_COMPLETION_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """Scores of single layers, and terms for pairs of them, so that a sum over both predicts what a plan does.

        Ω_i(b)     = D(layer i takes b)                                   the score
        Ω_ij(b, c) = D(layer i takes b and layer j takes c)
        pair(i, j)[b, c] = Ω_ij(b, c) - Ω_i(b) - Ω_j(c)
        D(plan) ≈ Σ_i Ω_i + Σ_{i<j} pair(i, j) = ½ xᵀ C x

    D is the divergence from full precision, or the increase of the loss; x the 0/1 choice, C the matrix with 2 Ω_i(b)
    on its diagonal and the pair terms elsewhere. Source: CLADO (Deng et al. 2023, its published code), which takes the
    loss and clips C to a positive semidefinite matrix. On an exact quadratic the prediction is exact.

    Clipping: C's negative eigenvalues are set to 0. Noise makes some pairs look as if their errors cancelled, and an
    allocation finds just these. It raises the scores of single layers as well. Two options of one layer never meet in a
    plan, so those entries of C are free, but they take part in the eigenvalues; they are filled (our choice) so that
    the clip changes as little as may be: by alternating projections between the semidefinite matrices and those that
    agree with what was measured. Where such a matrix exists, as on a convex quadratic, the clip changes nothing.

    When to use: at 2 or 3 bits, where sums of single layers mislead, for up to about 60 layers. When not: elsewhere; a
    few hundred of the best plans measured again are as good for less.

    Args:
        which: "all" pairs; those within a "block" (the innermost repeated module around both, `block_of`); or
            "neighbours", one after the other in execution or along an edge of the network. Others count as 0.
        objective: "divergence" or "loss" (needs labels).
        clip: whether to clip C; without it the pairs are as measured.
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.

    Cost: with K = layers x options, 1 + K + K (K - options) / 2 runs of the data for all pairs, each from its later
    layer on. The standard errors are those of the single scores before clipping.
    """

    which: Which = "all"
    objective: Objective = "divergence"
    clip: bool = True
    keep_bytes: int = field(default=KEEP_BYTES, repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("which", Which), ("objective", Objective)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def __call__(self, measurement: Measurement) -> Scores:
        """Measure singles and pairs.

        Raises:
            ValueError: if units are finer than layers, or the loss is asked for and there are no labels.
        """
        if measurement.granularity != "layer":
            raise ValueError(
                f"interactions are measured between whole layers, got granularity {measurement.granularity!r}: "
                "use output_fisher (rows) or weight_error"
            )
        network, options = measurement.network, measurement.options
        partners = partners_of(network, self.which)
        count = (len(network.layers), len(options))
        singles, together = np.zeros((count[0], 2, count[1])), np.zeros((*count, *count))
        runs = LayerRuns(measurement, None, self.keep_bytes, revisits=True)
        on_batch = lru_cache(maxsize=1)(lambda batch: BatchRuns(runs, measurement.batches[batch]))
        with torch.no_grad():
            allowed, changing = _kinds(runs)
            rows = [
                (batch, *row) for batch in range(len(measurement.batches)) for row in np.argwhere(changing).tolist()
            ]
            shown = track(rows, "pairs", shown=measurement.progress)
            sums_of = partial(self._row_piece, on_batch, changing, partners)
            for (_, first, option), sums in zip(shown, measurement.ranks.shared(rows, sums_of), strict=True):
                singles[first, :, option] += sums[:, first, option]
                together[first, option] += sums[0]
        samples = samples_in(measurement.batches)
        mean, error = mean_and_error_of_sums(singles, samples)
        pairs = _pairs(mean, together / samples, partners, changing)
        if self.clip:
            mean, pairs = clipped(mean, pairs, allowed)
        mean, error = (np.where(allowed, values, np.nan) for values in (mean, error))
        return Scores(mean, error, self._measure.measured_in(measurement.task), pairs)

    @property
    def _measure(self) -> KL | Loss:
        return KL() if self.objective == "divergence" else Loss()

    def _row_piece(
        self,
        on_batch: Callable[[int], BatchRuns],
        changing: NDArray[np.bool_],
        partners: NDArray[np.bool_],
        row: tuple[int, int, int],
    ) -> Matrix:
        """`_row` of one batch, layer and option, kept as a piece."""
        batch, first, option = row
        runs = on_batch(batch)
        measurement = runs.runs.measurement
        name = f"batch {batch}: {measurement.network.layers[first].name} takes {measurement.options[option]}"
        make = partial(self._row, runs, (first, option), changing * partners[first][:, None])
        return measurement.pieces.get(name, make)

    def _row(self, on_batch: BatchRuns, chosen: tuple[int, int], others: NDArray[np.bool_]) -> Matrix:
        """(2, layers, options) sums over samples, and of squares: a layer's option alone, and with each of `others`."""
        first, option = chosen
        measurement, runs = on_batch.runs.measurement, on_batch.runs
        layers, options = measurement.network.layers, measurement.options
        sums = np.zeros((2, len(layers), len(options)))

        def increase(outputs: Outputs) -> tuple[float, float]:
            added = on_batch.increase(self._measure, outputs)
            return float(added.sum()), float(added.square().sum())

        on_batch.recorded.verify(layers[first])
        with _taking(runs, layers[first], options[option]):
            if not others.any():
                sums[:, first, option] = increase(on_batch.recorded.outputs(layers[first]))
                return sums
            alone = on_batch.record()
            sums[:, first, option] = increase(alone.reference)
            for second, other in np.argwhere(others).tolist():
                alone.verify(layers[second])
                with _taking(runs, layers[second], options[other]):
                    sums[:, second, other] = increase(alone.outputs(layers[second]))
        return sums


def partners_of(network: Network, which: Which) -> NDArray[np.bool_]:
    """(layers, layers): for each layer the later ones that it makes a pair with."""
    names = [layer.name for layer in network.layers]
    joined = np.ones((len(names), len(names)), dtype=bool)
    if which == "block":
        blocks = np.array([block_of(name) for name in names])
        joined = blocks[:, None] == blocks[None, :]
    elif which == "neighbours":
        joined = np.eye(len(names), k=1, dtype=bool)
        place = {name: position for position, name in enumerate(names)}
        for one, other in network.edges:
            joined[place[one], place[other]] = joined[place[other], place[one]] = True
    return np.triu(joined, k=1)


def block_of(name: str) -> str:
    """The block that a layer belongs to: its path up to the first numbered module, else the module it is in.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj"), block_of("layer1.0.downsample.0"), block_of("stem.conv")
        ('model.layers.3', 'layer1.0', 'stem')
    """
    *parents, _ = name.split(".")
    numbered = [place for place, part in enumerate(parents) if _NUMBERED.fullmatch(part)]
    return ".".join(parents[: numbered[0] + 1] if numbered else parents)


def clipped(single: Matrix, pairs: Pairs, allowed: NDArray[np.bool_]) -> tuple[Matrix, Pairs]:
    """Scores and pairs whose matrix C is the measured one with its negative eigenvalues set to 0.

    Args:
        single: (layers, options) scores.
        pairs: (options, options) terms by layer positions.
        allowed: (layers, options): what takes part.

    Example:
        Two layers whose errors seem to cancel more than they can:

        >>> single, pairs = clipped(np.array([[1.0], [1.0]]), {(0, 1): np.array([[-6.0]])}, np.ones((2, 1), dtype=bool))
        >>> single.ravel().round(9), round(pairs[0, 1].item(), 9)
        (array([2., 2.]), -4.0)
    """
    layers, options = single.shape
    whole = np.zeros((layers, options, layers, options))
    for (i, j), block in pairs.items():
        whole[i, :, j], whole[j, :, i] = block, block.T
    measured = np.ones((layers, options, layers, options), dtype=bool)
    for i in range(layers):
        whole[i, :, i] = np.diag(2 * single[i])
        measured[i, :, i] = np.eye(options, dtype=bool)
    used = np.flatnonzero(allowed)
    size = layers * options
    matrix = whole.reshape(size, size)[np.ix_(used, used)]
    fixed = measured.reshape(size, size)[np.ix_(used, used)]
    result = np.zeros((size, size))
    result[np.ix_(used, used)] = _completed_and_clipped(matrix, fixed)
    blocks = result.reshape(layers, options, layers, options)
    return np.diag(result).reshape(layers, options) / 2, {(i, j): blocks[i, :, j].copy() for i, j in pairs}


def _completed_and_clipped(matrix: Matrix, fixed: NDArray[np.bool_]) -> Matrix:
    """Clip, put the fixed entries back, and again, until the free ones settle; the last clip stays."""
    scale = np.abs(matrix).max(initial=0.0)
    filled, result = matrix, matrix
    for _ in range(_COMPLETION_STEPS):
        values, vectors = np.linalg.eigh(filled)
        result = (vectors * np.maximum(values, 0)) @ vectors.T
        if values.min(initial=0.0) >= -1e-14 * scale:
            return filled
        before, filled = filled, np.where(fixed, matrix, result)
        if np.abs(filled - before).max() <= 1e-9 * scale:
            break
    return (result + result.T) / 2


def _pairs(single: Matrix, together: Matrix, partners: NDArray[np.bool_], changing: NDArray[np.bool_]) -> Pairs:
    pairs = {}
    for i, j in np.argwhere(partners).tolist():
        excess = together[i, :, j] - single[i][:, None] - single[j][None, :]
        pairs[i, j] = np.where(np.outer(changing[i], changing[j]), excess, 0.0)
    return pairs


def _kinds(runs: LayerRuns) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(layers, options): what may be chosen, and what of it changes the model."""
    measurement = runs.measurement
    layers, options = measurement.network.layers, measurement.options
    allowed = np.array([[measurement.is_candidate(layer, option) for option in options] for layer in layers])
    changing = allowed.copy()
    for row, column in np.argwhere(allowed).tolist():
        weight = runs.weight(layers[row], options[column])
        changing[row, column] = not runs.is_unchanged(layers[row], options[column], weight)
    return allowed, changing


def _taking(runs: LayerRuns, layer: Layer, option: Option) -> AbstractContextManager[None]:
    return runs.changed(layer, runs.weight(layer, option), option.activation)
