"""Batch-norm tuning: running statistics found again in the quantised model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpq.adjustment import Adjustment
from mpq.batches import batches_of, call, model_inputs
from mpq.plan import Plan
from mpq.quantizer import Quantizer
from mpq.surgery import evaluating, quantized
from mpq.tasks import cloned

NAME = "batch-norm tuning"


def tune_batch_norms(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    quantizer: Quantizer | None = None,
    adjustment: Adjustment | None = None,
) -> Adjustment:
    """Running means and variances of every batch norm on the data, in the model quantised by a plan.

    The norms run as in training, each on its batch's own statistics; the mean and the variance of what each of them
    reads are pooled over all batches (biased: that of the data, as training divides by).

    It helps where quantisation shifts statistics by much (2 and 3 bits). Where it does not, statistics of a few hundred
    samples are worse than those of training: measure both.

    Source: Hubara et al. 2021, AdaQuant / CalibTIP, arXiv:2006.10518 ("batch-norm tuning"): there by moving averages,
    here exact for the first norm and, for the later ones, with one batch.

    Args:
        model: in full precision; comes back bit for bit, its statistics included.
        data: batches of many samples, as for `mpq.search`.
        plan: what every layer takes.
        quantizer: how weights are quantised; the one that is deployed.
        adjustment: what else is done to the quantised model, such as AdaQuant's weights. Not bias correction of a
            layer before a norm: the norm takes means out by itself.

    Cost: one pass over the data.

    Raises:
        ValueError: if the model has no batch norm with running statistics, or plan and model do not fit.

    Example:
        >>> import mpq
        >>> model, x = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)), torch.tensor([[1.0], [3.0]])
        >>> model[0].weight.data.fill_(7.0)
        tensor([[7.]])
        >>> plan = Plan((mpq.plan.Entry(mpq.trace(model.eval(), x).layers[0], mpq.options.Option("int4")),), "")
        >>> tune_batch_norms(model, x, plan).tensors
        {'1.running_mean': tensor([14.]), '1.running_var': tensor([49.])}
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to tune")
    moments = {name: _Moments() for name in norms}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(quantized(model, plan, quantizer=quantizer))
        if adjustment is not None:
            stack.enter_context(adjustment.applied(model))
        for name, norm in norms.items():
            stack.enter_context(_by_batch(norm, moments[name]))
        for batch in batches_of(data):
            call(model, cloned(model_inputs(model, batch)))
    tensors = {}
    for name, norm in norms.items():
        if moments[name].count:
            tensors[f"{name}.running_mean"] = moments[name].mean.to(norm.running_mean)
            tensors[f"{name}.running_var"] = moments[name].variance.to(norm.running_var)
    return Adjustment(NAME, tensors)


class _Moments:
    """Mean and variance a channel of everything added, in float64, by Chan's update."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # about the mean

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count

    def add(self, x: Tensor) -> None:
        rows = x.detach().double().movedim(1, -1).reshape(-1, x.shape[1])
        count, mean = len(rows), rows.mean(0)
        change, total = mean - self.mean, self.count + count
        self._squares = self._squares + (rows - mean).square().sum(0) + change.square() * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total


@contextmanager
def _by_batch(norm: _BatchNorm, moments: _Moments) -> Iterator[None]:
    """A norm that uses each batch's statistics and keeps its own as they are."""

    def show(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])

    handle, tracking = norm.register_forward_pre_hook(show), norm.track_running_stats
    norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        handle.remove()
        norm.training, norm.track_running_stats = False, tracking  # `evaluating` knows what training was
