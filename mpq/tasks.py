"""How a model is run on a batch, what its loss is, and how far its outputs are from another model's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.batches import Batch, batch_size, call, model_inputs, split_batch, tensors_of

LossFunction = Callable[[nn.Module, Batch], Tensor]
_ONE_A_BATCH = (
    "a loss or metric returns one number a batch, which counts for each of its samples: intervals and tests will be "
    "too sure of themselves; let it return one a sample (reduction='none'), or where that is offered let batches count "
    "(independent='batches')"
)
IGNORED = -100  # the label that cross entropy leaves out
_AT_ONCE = 2**17  # probabilities: what is made of them stays in a CPU's cache


@dataclass(frozen=True)
class Outputs:
    """What a model said about one batch.

    `values` has the samples first and, where it is a distribution, the logits last: (samples, ..., classes). `mask` is
    False at the positions (samples, ...) that are padding. `labels` has the shape of the positions, or is None.
    """

    values: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None

    def positions(self) -> Tensor:
        """(samples,): how many positions of each sample count; 1 where a sample has one output."""
        samples = self.values.shape[0]
        if self.mask is not None:
            return self.mask.reshape(samples, -1).sum(1).clamp_min(1)
        per_sample = max(1, self.values[0, ..., 0].numel()) if self.values.ndim > 1 else 1
        return torch.full((samples,), per_sample, device=self.values.device)


@runtime_checkable
class Task(Protocol):
    """How to run a batch, what its loss is, how to compare two outputs. Losses are per sample, means over positions."""

    @property
    def measured_in(self) -> str:
        """`"loss"` where `divergence` is in nats (a Kullback-Leibler divergence or a loss), else `"score"`."""

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """The model's outputs on a batch."""

    def losses(self, outputs: Outputs) -> Tensor | None:
        """(samples,) losses against the data's labels, or None where the data has none."""

    def sampled_losses(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """(samples,) losses **summed** over positions, their gradients having the Fisher information as covariance."""

    def divergence(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) how far outputs are from the reference; 0 for equal outputs."""

    def agreement(self, reference: Outputs, outputs: Outputs) -> Tensor | None:
        """(samples,) share of positions with the same decision, or None where there is no decision."""


@dataclass(frozen=True)
class Distribution:
    """Outputs are logits: cross entropy as loss, Kullback-Leibler divergence from full precision as distance.

    `causal` shifts labels by one (language models): position t predicts token t + 1. Classes are the last axis where
    the labels have the shape of the others, else the second, as torch's own losses take them; without labels they are
    the last of up to three axes and the second of more.
    """

    causal: bool = False
    measured_in: str = "loss"

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits with classes last, and the labels aligned with them."""
        inputs, labels = split_batch(batch)
        values = output_tensor(call(model, cloned(model_inputs(model, batch))), ("logits",))
        mask = _padding(inputs, values)
        if not self.causal and _classes_come_second(values, labels):
            values = values.movedim(1, -1)
        if self.causal:
            values = values[:, :-1]
            labels = None if labels is None else labels[:, 1:]
            mask = None if mask is None else mask[:, 1:]
        if labels is not None:
            _check_labels(labels, values.shape[-1])
        if labels is not None and values.ndim > 2:
            labelled = labels != IGNORED
            mask = labelled if mask is None else mask & labelled
        return Outputs(values, mask, labels)

    def losses(self, outputs: Outputs) -> Tensor | None:
        """Mean cross entropy over the positions of each sample."""
        if outputs.labels is None:
            return None
        labels = outputs.labels.reshape(-1)
        loss = functional.cross_entropy(_single(_flat(outputs.values)), labels, ignore_index=IGNORED, reduction="none")
        return _mean_over_positions(loss, outputs)

    def sampled_losses(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """Cross entropy against labels drawn from the model's own distribution, each position on its own."""
        logits = _single(_flat(outputs.values))
        loss = functional.cross_entropy(logits, drawn_labels(logits.detach(), generator), reduction="none")
        return _mean_over_positions(loss, outputs) * outputs.positions()

    def divergence(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """KL(reference || outputs) in nats, mean over the positions of each sample."""
        return _mean_over_positions(self.position_divergences(reference, outputs), outputs)

    def position_divergences(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """(all positions,) of KL(reference || outputs) in nats, masked ones included."""
        exact, other = _flat(reference.values), _flat(outputs.values)
        rows = max(1, _AT_ONCE // exact.shape[-1])
        parts = zip(torch.split(exact, rows), torch.split(other, rows), strict=True)
        return torch.cat([_divergence(p, q) for p, q in parts])

    def correct(self, outputs: Outputs) -> Tensor | None:
        """(all positions,) where the most likely class is the label, or None where the data has none."""
        return None if outputs.labels is None else _flat(outputs.values).argmax(-1) == outputs.labels.reshape(-1)

    def agreement(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Share of positions whose most likely class is the same."""
        same = _flat(reference.values).argmax(-1) == _flat(outputs.values).argmax(-1)
        return _mean_over_positions(same.double(), outputs)


@dataclass(frozen=True)
class Features:
    """Outputs are no distribution (embeddings, regression, features): relative squared error as distance.

    With float targets the loss is the mean squared error; gradients for curvature come from random output probes,
    scaled so that the score is the expected relative squared error.
    """

    measured_in: str = "score"

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """Features with the samples first; padding of token features is masked."""
        inputs, targets = split_batch(batch)
        values = output_tensor(call(model, cloned(model_inputs(model, batch))), ("last_hidden_state", "logits"))
        return Outputs(values, _padding(inputs, values), targets)

    def losses(self, outputs: Outputs) -> Tensor | None:
        """Mean squared error against float targets."""
        if outputs.labels is None or not outputs.labels.is_floating_point():
            return None
        labels = outputs.labels.reshape(outputs.values.shape)
        error: Tensor = functional.mse_loss(_single(outputs.values), _single(labels), reduction="none")
        return error.flatten(1).mean(1)

    def sampled_losses(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """Random signs z . y √(2T) / ||y||: ½ E (gradient . change)² / T is then the relative squared error."""
        values = _single(_masked(outputs.values, outputs.mask))
        signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
        scale: Tensor = (2 * outputs.positions() / _energy(values.detach())).sqrt()
        return scale * (values * signs).flatten(1).sum(1)

    def divergence(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """||y - y_reference||² / ||y_reference||² of each sample."""
        exact = _masked(reference.values, reference.mask).double().flatten(1)
        error = _masked(outputs.values, reference.mask).double().flatten(1) - exact
        return error.square().sum(1) / _energy(exact)

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """None: features decide nothing."""
        return


@dataclass(frozen=True)
class CustomLoss:
    """The user's own `loss(model, batch)`: one number, or one a sample. Its increase is the distance."""

    loss: LossFunction
    measured_in: str = "loss"

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """The losses themselves, shaped (samples, 1); one number counts for every sample of the batch.

        Raises:
            ValueError: if the function returns anything else.
        """
        value, samples = self.loss(model, cloned(batch)), batch_size(batch)
        if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (1,), (samples,), (samples, 1)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"a loss must be a tensor of one number, or of one a sample ({samples},), got {shape}")
        if value.numel() == 1:
            if samples > 1:
                warnings.warn(_ONE_A_BATCH, stacklevel=1)  # of this line: said once
            value = value.reshape(()).expand(samples)
        return Outputs(value.reshape(-1, 1))

    def losses(self, outputs: Outputs) -> Tensor:
        """The user's losses."""
        return outputs.values[:, 0]

    def sampled_losses(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """The user's losses: there is nothing to sample from."""
        return outputs.values[:, 0]

    def divergence(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Increase of the loss; negative where the change helped."""
        return (outputs.values - reference.values)[:, 0].double()

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """None: a loss decides nothing."""
        return


def cloned(value: Any) -> Any:
    """A nest of mappings, tuples and lists with copies of its tensors, for a model that may write to its input.

    Mappings become dicts; what is neither a collection nor a tensor stays itself.

    Example:
        >>> data = {"x": (torch.ones(2), 3)}
        >>> cloned(data)["x"][0].zero_(), data["x"][0]
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: cloned(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cloned, value))
    return type(value)(map(cloned, value)) if type(value) in (tuple, list) else value


def drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(positions,): a class a position from the softmax of (positions, classes) logits.

        label = the first k with Σ_{i ≤ k} p_i > u Σ_i p_i,    u uniform in [0, 1)

    in float64, some rows at a time: a tenth of the time of `torch.multinomial`, which takes a logarithm a class.

    Args:
        logits: of the positions.
        generator: on the CPU; it gives one number a position, in order.

    Example:
        >>> sure = torch.tensor([[0.0, 99.0, 0.0], [99.0, 0.0, 0.0]])
        >>> drawn_labels(sure, torch.Generator().manual_seed(0)).tolist()
        [1, 0]
    """
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    labels = torch.empty(len(logits), dtype=torch.long)
    rows = max(1, _AT_ONCE // logits.shape[-1])
    for part, below, found in zip(*(torch.split(part, rows) for part in (logits, uniform, labels)), strict=True):
        reached = part.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        found.copy_(torch.searchsorted(reached, below * reached[:, -1:], right=True).squeeze(1))
    return labels.clamp_(max=logits.shape[-1] - 1).to(logits.device)  # logits that are NaN reach nothing


def output_fields(output: Any) -> Sequence[str]:
    """Names of the fields of an output that is a mapping, else none."""
    return tuple(output) if isinstance(output, Mapping) else ()


def output_tensor(output: Any, preferred: tuple[str, ...]) -> Tensor:
    """The first preferred field that is there, else the first floating-point tensor, samples first and at least 2-D.

    Raises:
        ValueError: if there is none.
    """
    for name in preferred:
        if name in output_fields(output):
            return output[name]  # type: ignore[no-any-return]
    for tensor in tensors_of(output):
        if tensor.is_floating_point():
            return tensor if tensor.ndim > 1 else tensor.unsqueeze(1)
    raise ValueError(f"the model must return a floating-point tensor, got {type(output).__name__}: pass a task")


def _padding(inputs: Any, values: Tensor) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.ndim != 2 or values.ndim < 3 or mask.shape != values.shape[:2]:
        return None
    return mask.bool()  # type: ignore[no-any-return]


def _check_labels(labels: Tensor, classes: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, the model has {classes} classes, got {int(wrong[0])}"
        )


def _classes_come_second(values: Tensor, labels: Tensor | None) -> bool:
    if labels is None:
        return values.ndim > 3
    return labels.shape != values.shape[:-1] and labels.shape[1:] == values.shape[2:]


def _energy(values: Tensor) -> Tensor:
    """(samples,): squared norms, at least a millionth of their mean: a sample of zeros must not count for all."""
    energy = values.flatten(1).square().sum(1)
    return energy.clamp_min(max(1e-6 * float(energy.mean()), 1e-30))


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _single(values: Tensor) -> Tensor:
    """Float32 at least: a loss in half precision has three digits, and a sum of squares overflows."""
    return values if values.dtype == torch.float64 else values.float()


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)


def _divergence(exact: Tensor, other: Tensor) -> Tensor:
    """(positions,) of KL(softmax(exact) || softmax(other)) in float64."""
    log_p, log_q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    kl: Tensor = terms.masked_fill_(log_p.isneginf(), 0).sum(-1)  # 0 log 0 = 0: classes the model rules out
    return kl.clamp_min(0)


def _mean_over_positions(per_position: Tensor, outputs: Outputs) -> Tensor:
    table = per_position.reshape(outputs.values.shape[0], -1)
    if outputs.mask is not None:
        table = table.masked_fill(~outputs.mask.reshape(table.shape), 0)
    return table.sum(1) / outputs.positions()


def mean_and_error(per_sample: Tensor) -> tuple[float, float]:
    """Mean over samples and its standard error (0 for a single sample)."""
    values = per_sample.double()
    count = values.numel()
    error = values.std().item() / math.sqrt(count) if count > 1 else 0.0
    return values.mean().item(), error
