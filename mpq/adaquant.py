"""AdaQuant: weights, clipping ranges and biases calibrated layer by layer so that the layer's outputs stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpq.activation_ranges import watched_inputs
from mpq.adjustment import Adjustment, modules_with_bias
from mpq.batches import Batch, batches_of, call, model_inputs
from mpq.fake_quantize import Limits, group_limits
from mpq.formats import GGUF, NVFP4, BinaryCoded, Float, NumberFormat, UnsignedInteger
from mpq.grids import on_grid
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, weight_format
from mpq.quantizer import Quantizer, RoundToNearest
from mpq.surgery import (
    check_model,
    evaluating,
    frozen_parameters,
    layer_parameters,
    limits_of,
    owners,
    quantise_activation,
)
from mpq.tasks import cloned
from mpq.weight_view import as_rows, from_rows

NAME = "AdaQuant"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How long and in what steps a layer is calibrated.

    Args:
        steps: of Adam, the rate falling to 0 by a cosine.
        weight_rate: of the weights, in steps of their grid.
        range_rate: of the factor on every range.
        samples: of a convolution's input in a step; rows of a linear's are sixteen times as many.
        seed: of the samples drawn.
    """

    steps: int = 300
    weight_rate: float = 0.02
    range_rate: float = 0.002
    samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise ValueError(f"steps and samples must be at least 1, got {self.steps} and {self.samples}")


def adaquant(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    quantizer: Quantizer | None = None,
    calibration: Calibration | None = None,
) -> Adjustment:
    """Quantised weights and biases with which every layer's output is nearest to its output in full precision.

        min over V, c, b of   mean ‖ W x + b₀ − (Q_c(W + V) Q(x) + b) ‖²

    V changes the weights before they are rounded, c is a factor on the range of every scale, b the bias; x is what the
    layer reads in full precision, so layers do not depend on each other. Gradients pass rounding straight through;
    that of c is the one of learned step sizes (LSQ, Esser et al. 2020): (q − w) / c inside the range, q / c beyond. The
    bias is not stepped to but found: the mean of what is left, a channel. What loses least of the layer's output on all
    the data is kept, plain quantisation (with its best bias) included, so that no layer gets worse.

    Source: Hubara et al. 2021, arXiv:2006.10518, section 3 (from memory; rates are ours). There the range of the input
    is learned too; here it is the plan's, or dynamic.

    Left as they are: layers of a split, lookups, weights that a function uses, and formats whose levels do not follow
    from a range (binary-coded, GGUF, NVFP4) or that are casts. Such layers are quantised as `mpq.quantized` does.

    Args:
        model: in full precision; comes back bit for bit.
        data: batches, as for `mpq.search`; the more the better, a few hundred samples are few.
        plan: what every layer takes.
        quantizer: what the result is compared with and what V starts from: nothing if that is best.
        calibration: steps, rates, samples, seed.

    Returns:
        Weights and biases, to be used inside `mpq.quantized` (`Adjustment.applied`).

    Cost: for every layer a pass over the data, whose inputs of that layer are kept, and `steps` runs of the layer
    forward and backward.

    Raises:
        ValueError: if plan and model do not fit.

    Example:
        >>> import mpq
        >>> model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
        >>> plan = Plan((Entry(mpq.trace(model, x).layers[0], Option("int3")),), "")
        >>> calibrated = adaquant(model, x, plan, calibration=Calibration(steps=20))
        >>> calibrated.name, sorted(calibrated.tensors)
        ('AdaQuant', ['0.bias', '0.weight'])
        >>> with mpq.quantized(model, plan), calibrated.applied(model):
        ...     torch.equal(model[0].weight, calibrated.tensors["0.weight"])
        True
    """
    check_model(model, plan)
    batches = batches_of(data)
    tensors: dict[str, Tensor] = {}
    with evaluating(model), frozen_parameters(model):
        for entry in plan.entries:
            if _is_calibrated(model, entry):
                seen = _seen(model, batches, entry)
                if seen:
                    layer = _LayerCalibration(model, entry, seen, calibration or Calibration())
                    tensors |= layer.result(quantizer or RoundToNearest())
    return Adjustment(NAME, tensors)


def straight_through(weight: Tensor, fmt: NumberFormat, limits: Limits, clip: Tensor) -> Tensor:
    """Q_c(w): the nearest levels in a clipped range, with gradients for the weight and the clip factor.

    Args:
        weight: (rows, columns).
        fmt: a format whose levels follow from a range.
        limits: range of every value's scale, (rows, columns) each.
        clip: factor on the range of every value, (rows, columns).
    """
    low, high = limits[0] * clip.detach(), limits[1] * clip.detach()
    levels = on_grid(fmt, weight.detach().contiguous(), low.contiguous(), high.contiguous())
    if isinstance(fmt, UnsignedInteger):
        inside = (weight.detach() >= low.clamp(max=0)) & (weight.detach() <= high.clamp(min=0))
    else:
        inside = weight.detach().abs() <= torch.maximum(-low, high)
    through = (weight - weight.detach()) * inside
    scaled = (clip / clip.detach() - 1) * (levels - weight.detach() * inside)
    result: Tensor = levels + through + scaled
    return result


def _is_calibrated(model: nn.Module, entry: Entry) -> bool:
    if not isinstance(entry.choice, Option) or entry.layer.module is None:
        return False
    if isinstance(weight_format(entry.choice), Float | BinaryCoded | GGUF | NVFP4):
        return False
    return len(_appliers(model, entry.layer)) == 1


def _appliers(model: nn.Module, layer: Layer) -> list[nn.Module]:
    return [module for module, _ in owners(model, layer) if not isinstance(module, nn.Embedding)]


@dataclass(frozen=True)
class _Seen:
    """One call of a layer: its quantised input and its exact output, samples (of a linear: rows) first."""

    given: Tensor
    wanted: Tensor


def _seen(model: nn.Module, batches: list[Batch], entry: Entry) -> list[_Seen]:
    """Every call of a layer on the data."""
    layer, fmt, found = entry.layer, entry.activation, list[_Seen]()
    (module,) = _appliers(model, layer)
    limits = limits_of(entry.input_range) if entry.input_range else None

    def keep(x: Tensor) -> None:
        wanted = module.forward(x)
        given = x.clone() if fmt is None else quantise_activation(x, fmt, layer, limits)
        if not layer.kind.startswith("conv"):
            given, wanted = given.reshape(-1, given.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        if len(given):
            found.append(_Seen(given, wanted))

    with torch.no_grad(), watched_inputs(model, layer, keep):
        for batch in batches:
            call(model, cloned(model_inputs(model, batch)))
    return found


@dataclass
class _LayerCalibration:
    """One layer: what it saw, and the search for its weights."""

    model: nn.Module
    entry: Entry
    seen: list[_Seen]
    calibration: Calibration
    best: tuple[float, Tensor, Tensor] | None = field(default=None, init=False)  # error, rows, mean of what is left

    def result(self, quantizer: Quantizer) -> dict[str, Tensor]:
        """The best weight found and the bias that goes with it, by name."""
        layer, fmt = self.entry.layer, self._format
        (parameter, *_) = layer_parameters(self.model, layer)
        exact = as_rows(parameter.detach(), layer)
        self._keep_if_better(quantizer(exact, fmt, layer).reshape(len(exact), -1).float())
        weight = exact.reshape(len(exact), -1).float().clone()
        limits = group_limits(weight, fmt)
        size = fmt.granularity.size if fmt.granularity and fmt.granularity.size else weight.shape[1]
        steps = self._grid_step(limits)
        change = torch.zeros_like(weight, requires_grad=True)  # in grid steps
        factor = torch.ones(len(weight), -(-weight.shape[1] // size), requires_grad=True)
        optimiser = torch.optim.Adam(
            [
                {"params": [change], "lr": self.calibration.weight_rate},
                {"params": [factor], "lr": self.calibration.range_rate},
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.calibration.steps)

        def quantised() -> Tensor:
            clip = factor.clamp(0.1, 1.5).repeat_interleave(size, 1)[:, : weight.shape[1]]
            return straight_through(weight + change * steps, fmt, limits, clip)

        for number, sample in enumerate(self._samples(), 1):
            with torch.enable_grad():
                loss = self._residual(quantised(), sample)[0]
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if number % 50 == 0 or number == self.calibration.steps:
                self._keep_if_better(quantised().detach())
        return self._tensors(parameter)

    @property
    def _format(self) -> NumberFormat:
        if not isinstance(self.entry.choice, Option):
            raise TypeError("a split layer has no one format")
        return weight_format(self.entry.choice).bind("weight")

    def _grid_step(self, limits: Limits) -> Tensor:
        """A step of a grid of as many levels, evenly spread over the range."""
        step: Tensor = ((limits[1] - limits[0]) / (2**self._format.bits - 1)).clamp_min(1e-12)
        return step

    def _samples(self) -> Iterator[_Seen]:
        """A few samples of one call after the other, calls in turn."""
        generator = torch.Generator().manual_seed(self.calibration.seed)
        count = self.calibration.samples * (1 if self.entry.layer.kind.startswith("conv") else 16)
        for step in range(self.calibration.steps):
            seen = self.seen[step % len(self.seen)]
            chosen = torch.randperm(len(seen.given), generator=generator)[:count].to(seen.given.device)
            yield _Seen(seen.given[chosen], seen.wanted[chosen])

    def _residual(self, rows: Tensor, sample: _Seen) -> tuple[Tensor, Tensor, int]:
        """Mean square of what is left besides the channels' means, these means, and how many outputs a channel."""
        layer = self.entry.layer
        (module,) = _appliers(self.model, layer)
        parameter = layer_parameters(self.model, layer)[0]
        weight = from_rows(rows.reshape(layer.weight_shape), layer).to(parameter.dtype)
        attribute = layer.weight_name.rpartition(".")[2]
        output = functional_call(module, {attribute: weight}, (sample.given,))
        axis = 1 if layer.kind.startswith("conv") else -1
        left = (output - sample.wanted).movedim(axis, -1).flatten(0, -2).float()
        mean = left.mean(0) if self._has_bias else torch.zeros_like(left[0])
        return (left - mean).square().mean(), mean, len(left)

    @property
    def _has_bias(self) -> bool:
        return bool(modules_with_bias(self.model, self.entry.layer))

    @torch.no_grad()
    def _keep_if_better(self, rows: Tensor) -> None:
        parts = [self._residual(rows, seen) for seen in self.seen]
        counts = torch.tensor([float(count) for _, _, count in parts])
        means = torch.stack([mean for _, mean, _ in parts])
        weights = (counts / counts.sum()).to(means)
        mean = (weights[:, None] * means).sum(0)
        within = float((weights * torch.stack([error for error, _, _ in parts])).sum())
        error = within + float((weights[:, None] * (means - mean).square()).sum(0).mean())
        if self.best is None or error < self.best[0]:
            self.best = error, rows.clone(), mean

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.best is None:
            return {}
        layer, (_, rows, mean) = self.entry.layer, self.best
        weight = from_rows(rows.reshape(layer.weight_shape), layer).to(parameter.dtype).contiguous()
        tensors = {layer.weight_name: weight}
        for name, module in modules_with_bias(self.model, layer):
            old = module.bias.detach() if isinstance(module.bias, Tensor) else torch.zeros_like(mean)
            tensors[name] = (old.float() - mean).to(parameter.dtype)
        return tensors
