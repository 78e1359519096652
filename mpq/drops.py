"""What a plan costs a sample: divergence from full precision, or the drop of a figure of the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mpq.tasks import Outputs, Task

Score = Callable[["Outputs"], "Tensor"]
Metric = str | Score
Drop = Callable[["Outputs", "Outputs"], "Tensor"]

METRICS = ("divergence", "accuracy", "agreement", "loss")


def drop_of(metric: Metric, task: Task) -> Drop:
    """A function (full precision's outputs, the plan's outputs) -> (samples,) of what is lost; 0 for equal outputs.

    "divergence" is the task's; "accuracy" is 1 where full precision is right and the plan wrong, -1 the other way
    round, a mean over the labelled positions of a sample; "agreement" is the share of positions with another decision,
    "loss" the increase of the loss. A function of outputs (samples,), higher is better, is subtracted.

    Raises:
        ValueError: if the name is unknown; while measuring, if the data or the task has no such figure.

    Example:
        >>> import torch
        >>> from mpq.tasks import Distribution, Outputs
        >>> exact = Outputs(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), labels=torch.tensor([0, 1]))
        >>> found = Outputs(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), labels=torch.tensor([0, 1]))
        >>> drop_of("accuracy", Distribution())(exact, found).tolist()
        [1.0, -1.0]
    """
    if callable(metric):
        return lambda exact, found: _per_sample(metric, exact) - _per_sample(metric, found)
    if metric == "divergence":
        return task.divergence
    if metric == "accuracy":
        return lambda exact, found: accuracy(exact) - accuracy(found)
    if metric == "loss":
        return lambda exact, found: _there(task.losses(found), metric) - _there(task.losses(exact), metric)
    if metric == "agreement":
        return lambda exact, found: 1 - _there(task.agreement(exact, found), metric)
    raise ValueError(f"metric must be one of {', '.join(METRICS)}, or a function of outputs, got {metric!r}")


def drop_name(metric: Metric) -> str:
    """What a drop is called where its figures are shown.

    Example:
        >>> drop_name("divergence"), drop_name("accuracy"), drop_name("loss")
        ('divergence', 'accuracy drop', 'loss rise')
    """
    if metric in ("divergence", "loss"):
        return "divergence" if metric == "divergence" else "loss rise"
    return f"{metric_name(metric)} drop"


def metric_name(metric: Metric) -> str:
    """The metric's own name."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def accuracy(outputs: Outputs) -> Tensor:
    """(samples,): share of a sample's labelled positions where the most likely class is the label.

    Raises:
        ValueError: if the data has no labels of classes.
    """
    from mpq.tasks import IGNORED

    labels = outputs.labels
    if labels is None or labels.is_floating_point() or labels.shape != outputs.values.shape[:-1]:
        raise ValueError("metric 'accuracy' needs labels of classes in the data: give them, or take 'agreement'")
    counted = labels != IGNORED
    if outputs.mask is not None:
        counted = counted & outputs.mask
    right = (outputs.values.argmax(-1) == labels) & counted
    samples = len(labels)
    counts = counted.reshape(samples, -1).sum(1).clamp_min(1)
    return right.reshape(samples, -1).sum(1).double() / counts


def _per_sample(metric: Score, outputs: Outputs) -> Tensor:
    values, samples = metric(outputs), len(outputs.values)
    if tuple(values.shape) != (samples,):
        raise ValueError(f"a metric must give one number a sample, ({samples},), got {tuple(values.shape)}")
    return values.double()


def _there(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"metric {name!r} is not defined for this task and data: take 'divergence'")
    return values.double()
