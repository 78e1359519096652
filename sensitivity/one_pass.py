"""Several estimators on one forward and one backward: layers are captured, quantised and multiplied once for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.batches import batch_size, samples_in
from mpq.expert_units import granularity_in
from mpq.progress import track

from .gradient_pass import Capture, Labels, captures_together, check_labels
from .measurement import Measurement, Scores
from .products import Product, products_of
from .quantised_weights import QuantisedWeights


@dataclass(frozen=True)
class SeenLayer:
    """What an estimator scores: one layer in one batch.

    Attributes:
        granularity: of the units.
        positions: T_j, (samples, 1, 1).
        products: what the estimator asked for, (samples, cells, options) each, see `mpq.sensitivity.products`; those of
            the input only where an option quantises it.
    """

    granularity: str
    positions: Tensor
    products: dict[Product, Tensor]

    def added(self, of_weight: Product, of_input: Product) -> Tensor:
        """(samples, cells, options): what the weight does and what the quantised input does."""
        found = self.products[of_weight]
        return found + self.products[of_input] if of_input in self.products else found


@dataclass(frozen=True, kw_only=True)
class OnePassEstimator(ABC):
    """An estimator whose score of a sample comes from products of gradients and changes, so that several share a pass.

    Args:
        labels: where the gradient's labels come from: "data", "model" (drawn from the model's own distribution, each
            position on its own), or "auto", the data's where it has labels.
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.
    """

    labels: Labels = "auto"
    keep_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        check_labels(self.labels)

    @property
    @abstractmethod
    def asks_for(self) -> frozenset[Product]:
        """The products it needs."""

    @abstractmethod
    def sample_scores(self, seen: SeenLayer) -> Tensor:
        """(samples, units of the layer, options)."""

    @property
    def shares_pass(self) -> bool:
        """Whether it takes its gradients where the others do, so that they can be taken together."""
        return True

    def check(self, measurement: Measurement) -> None:  # noqa: B027 - most have nothing to check
        """Check that it can score this model in these units.

        Raises:
            ValueError: if not.
        """

    def finished(self, scores: Scores) -> Scores:
        """The scores from means over samples and their standard errors: as they are unless a method says more."""
        return scores

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit.

        Raises:
            ValueError: if gradients cannot be had (`mpq.sensitivity.gradient_pass.captures`), or the method does not
                fit the units or the layers.
        """
        return run_together([self], measurement)[0]


def run_together(estimators: Sequence[OnePassEstimator], measurement: Measurement) -> list[Scores]:
    """Scores of several estimators from one forward a batch and one backward a kind of labels.

    A weight is quantised when its layer's gradient arrives, used for all estimators and dropped; with several batches,
    or samples that are run one at a time, it is kept as far as the largest `keep_bytes` allows.

    Raises:
        ValueError: as the estimators do.
    """
    for estimator in estimators:
        estimator.check(measurement)
    batches = range(len(measurement.batches))
    total = torch.zeros(len(estimators), 2, len(measurement.units), len(measurement.options), dtype=torch.float64)
    keep_bytes = max(estimator.keep_bytes for estimator in estimators)
    weights = QuantisedWeights(measurement, keep_bytes if len(batches) > 1 else 0)

    def moments_of(index: int) -> NDArray[np.float64]:
        return measurement.pieces.get(f"batch {index}", partial(_moments, estimators, measurement, weights, index))

    moments = measurement.ranks.shared(batches, moments_of)
    for _, of_batch in zip(track(batches, "gradients", shown=measurement.progress), moments, strict=True):
        total += torch.from_numpy(of_batch)
    return [
        estimator.finished(_scores(moments.numpy(), measurement))
        for estimator, moments in zip(estimators, total, strict=True)
    ]


def _moments(
    estimators: Sequence[OnePassEstimator], measurement: Measurement, weights: QuantisedWeights, index: int
) -> NDArray[np.float64]:
    """(estimators, 2, units, options): sums over one batch of the samples' scores and of their squares."""
    first_unit = np.concatenate([[0], np.cumsum(np.bincount(measurement.units.layer_index))])
    total = torch.zeros(len(estimators), 2, len(measurement.units), len(measurement.options), dtype=torch.float64)
    wanted: dict[Labels, frozenset[Product]] = {}
    for estimator in estimators:
        wanted[estimator.labels] = wanted.get(estimator.labels, frozenset()) | estimator.asks_for

    def receive(captures: dict[Labels, Capture]) -> None:
        if next(iter(captures.values())).samples < batch_size(measurement.batches[index]):
            weights.keep(max(estimator.keep_bytes for estimator in estimators))
        products = products_of([(captures[labels], wanted[labels]) for labels in wanted], measurement, weights)
        by_labels = dict(zip(wanted, products, strict=True))
        for row, estimator in enumerate(estimators):
            capture = captures[estimator.labels]
            positions = capture.positions.reshape(-1, 1, 1).float()
            layer = measurement.network.layers[capture.position]
            seen = SeenLayer(granularity_in(layer, measurement.granularity), positions, by_labels[estimator.labels])
            scores = estimator.sample_scores(seen).double().cpu()
            units = slice(first_unit[capture.position], first_unit[capture.position + 1])
            total[row, 0, units] += scores.sum(0)
            total[row, 1, units] += scores.square_().sum(0)

    captures_together(measurement, index, tuple(wanted), receive, functional=True)
    return total.numpy()


def _scores(total: NDArray[np.float64], measurement: Measurement) -> Scores:
    """Means and standard errors over samples, NaN where the option is no candidate."""
    samples = samples_in(measurement.batches)
    mean = total[0] / samples
    variance = np.maximum(total[1] / samples - mean**2, 0) * samples / max(samples - 1, 1)
    missing = [
        [not measurement.is_candidate(layer, option) for option in measurement.options]
        for layer in measurement.network.layers
    ]
    absent = np.array(missing)[measurement.units.layer_index]
    mean[absent] = np.nan
    return Scores(mean, np.sqrt(variance / samples) + 0 * mean, measurement.task.measured_in)
