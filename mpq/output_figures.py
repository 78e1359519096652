"""What a model's outputs are worth on data: figures sample by sample, and estimates of them with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpq.confidence import Estimate, mean_estimate, quantile_estimate, share_estimate
from mpq.tasks import IGNORED, Distribution, Outputs, Task

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleFigures:
    """One model on the data, sample by sample; None where the task has no such figure.

    Attributes:
        divergence: (samples,) from the reference, means over positions.
        loss: (samples,) means over positions.
        agreement: (samples,) share of positions that decide as the reference does.
        positions: (samples,) how many positions count.
        each: (positions of all samples,) divergences; those of the samples where a sample has one.
        owner: (positions of all samples,) the sample each belongs to.
        correct: (labelled positions of all samples,) where the decision is the label.
        labelled: (labelled positions of all samples,) the sample each belongs to.
        metric: (samples,) of the caller's own metric.
    """

    divergence: Floats
    loss: Floats | None
    agreement: Floats | None
    positions: Floats
    each: Floats
    owner: NDArray[np.int64]
    correct: NDArray[np.bool_] | None
    labelled: NDArray[np.int64] | None
    metric: Floats | None = None

    @property
    def is_single(self) -> bool:
        """Whether every sample has one position."""
        return len(self.each) == len(self.divergence)


def sample_figures(task: Task, reference: Sequence[Outputs], outputs: Iterable[Outputs]) -> SampleFigures:
    """The figures of a model's outputs next to the reference's, batch by batch.

    Cost: one comparison a batch; `outputs` may be a generator, of which one batch is held at a time.
    """
    parts: list[SampleFigures] = []
    samples = 0
    for exact, found in zip(reference, outputs, strict=True):
        part = _of_batch(task, exact, found)
        labelled = None if part.labelled is None else part.labelled + samples
        parts.append(replace(part, owner=part.owner + samples, labelled=labelled))
        samples += len(part.divergence)
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    joined: dict[str, Any] = {
        name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()
    }
    return SampleFigures(**joined)


def _joined(column: list[Any]) -> Any:
    return None if column[0] is None else np.concatenate(column)


def _of_batch(task: Task, exact: Outputs, found: Outputs) -> SampleFigures:
    count = found.values.shape[0]
    losses, agreement = task.losses(found), task.agreement(exact, found)
    if isinstance(task, Distribution):
        own = _of_positions(task, exact, found)
    else:
        own = {"each": _array(task.divergence(exact, found)), "owner": np.arange(count), "positions": np.ones(count)}
        own |= {"correct": None, "labelled": None}
    return SampleFigures(
        divergence=np.bincount(own["owner"], weights=own["each"], minlength=count) / own["positions"],
        loss=None if losses is None else _array(losses),
        agreement=None if agreement is None else _array(agreement),
        **own,
    )


def _of_positions(task: Distribution, exact: Outputs, found: Outputs) -> dict[str, Any]:
    """Divergences and decisions of the positions that count."""
    kl, hits, count = task.position_divergences(exact, found).cpu(), task.correct(found), found.values.shape[0]
    owner = torch.arange(count).repeat_interleave(len(kl) // count)
    counts = torch.ones_like(kl, dtype=torch.bool) if found.mask is None else found.mask.reshape(-1).cpu()
    own = {"each": _array(kl[counts]), "owner": owner[counts].numpy(), "positions": _array(found.positions())}
    if hits is None or found.labels is None:
        return own | {"correct": None, "labelled": None}
    with_label = counts & (found.labels.reshape(-1).cpu() != IGNORED)
    return own | {"correct": hits.cpu()[with_label].numpy(), "labelled": owner[with_label].numpy()}


def estimates(figures: SampleFigures, full: SampleFigures, task: Task, metric_name: str = "") -> dict[str, Estimate]:
    """Every figure with its 95 % interval, by name.

    Means have a Student-t interval over samples, shares of samples Wilson's, shares of positions and the perplexity the
    linearised ratio's, the 99th percentile Woodruff's; `mpq.confidence` says how each is computed.

        divergence, divergence p99, loss, agreement
        accuracy, or perplexity of a causal language model = exp(mean loss over all tokens)
        correct to wrong, wrong to correct: shares of all labelled decisions that differ from full precision's
        the caller's own metric, under its name

    Args:
        figures: of the model that is judged.
        full: of full precision on the same data.
        task: that made them.
        metric_name: of `figures.metric`, if there is one.
    """
    found = {
        "divergence": mean_estimate(figures.divergence),
        "divergence p99": quantile_estimate(figures.each, figures.owner, quantile=0.99),
    }
    if figures.loss is not None:
        found["loss"] = mean_estimate(figures.loss)
    if figures.agreement is not None:
        whole = figures.is_single and bool(np.isin(figures.agreement, (0, 1)).all())
        found["agreement"] = (share_estimate if whole else mean_estimate)(figures.agreement)
    if isinstance(task, Distribution) and task.causal and figures.loss is not None:
        found["perplexity"] = _exponential(mean_estimate(figures.loss, figures.positions))
    if figures.correct is not None and full.correct is not None and len(figures.correct):
        flips = {
            "correct to wrong": full.correct & ~figures.correct,
            "wrong to correct": ~full.correct & figures.correct,
        }
        shares = ({} if found.get("perplexity") else {"accuracy": figures.correct}) | flips
        found |= {name: _share(hits, figures) for name, hits in shares.items()}
    if figures.metric is not None:
        found[metric_name] = mean_estimate(figures.metric)
    return found


def metric_of(found: Mapping[str, Estimate]) -> str | None:
    """The name of the task's own metric among estimates: accuracy or perplexity."""
    return next((name for name in ("accuracy", "perplexity") if name in found), None)


def _share(hits: NDArray[np.bool_], figures: SampleFigures) -> Estimate:
    """The share of labelled positions, whose samples were drawn whole."""
    owner = np.asarray(figures.labelled)
    held = np.bincount(owner, minlength=len(figures.divergence))
    if held.max() == 1:
        return share_estimate(hits)
    found = mean_estimate(np.bincount(owner, weights=hits, minlength=len(held)) / held.clip(1), held)
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def _exponential(estimate: Estimate) -> Estimate:
    return Estimate(
        *(math.exp(end) if end < 700 else math.inf for end in (estimate.value, estimate.low, estimate.high))
    )


def _array(values: torch.Tensor) -> Floats:
    found: Floats = values.detach().cpu().double().numpy()
    return found
