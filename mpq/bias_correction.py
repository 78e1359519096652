"""Bias correction: what quantisation adds to the mean of every output channel is taken off the bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpq.adjustment import Adjustment, modules_with_bias
from mpq.batches import Batch, batches_of, call, model_inputs
from mpq.layers import Layer
from mpq.plan import Entry, Plan
from mpq.quantizer import Quantizer, RoundToNearest, quantised_weight
from mpq.surgery import (
    check_model,
    evaluating,
    layer_parameters,
    limits_of,
    quantise_activation,
    quantized,
    swapped_data,
)
from mpq.tasks import cloned

NAME = "bias correction"


def correct_biases(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    quantizer: Quantizer | None = None,
    method: Literal["expected", "observed"] = "observed",
) -> Adjustment:
    """Biases with which the plan's layers have the mean outputs of full precision, channel by channel.

        expected   b ← b − (E[ỹ(x)] − E[y(x)]),   x the layer's inputs in full precision; with weights alone
                   quantised that is b − ε E[x], ε the error of the weight
        observed   b ← b − (E[ỹ(x̃)] − E[y(x)]),   x̃ the inputs in the quantised network, layers before corrected first

    E is the mean over samples and positions of the data, padding included. The error of a quantised input counts as
    well. Layers whose weight a function uses and lookups have no bias and are left; where a module has None in its
    bias's place it gets one.

    Source: Nagel et al. 2019, Data-Free Quantization, arXiv:1906.04721, section 4.2 (expected, with E[x] from data
    in place of batch-norm statistics) and appendix D (observed).

    Args:
        model: in full precision; comes back bit for bit.
        data: batches, as for `mpq.search`.
        plan: what every layer takes.
        quantizer: how weights are quantised; the one that is deployed.
        method: expected takes one pass of twice the work, observed a pass a layer. Where errors are large, at 2 or 3
            bits, the means of full precision are not those a layer meets, and expected can do harm.

    Raises:
        ValueError: if plan and model do not fit, or the method is unknown.

    Example:
        >>> import mpq
        >>> model, x = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> model[0].weight.data = torch.tensor([[7.0, 1.25]])
        >>> plan = Plan((Entry(mpq.trace(model, x).layers[0], mpq.options.Option("int4")),), "")
        >>> correct_biases(model, x, plan).tensors["0.bias"]  # 1.25 becomes 1, and E[x] is 1
        tensor([0.2500])
    """
    if method not in ("expected", "observed"):
        raise ValueError(f"method must be 'expected' or 'observed', got {method!r}")
    check_model(model, plan)
    batches, quantizer = batches_of(data), quantizer or RoundToNearest()
    with evaluating(model), torch.no_grad():
        found = (_expected if method == "expected" else _observed)(model, batches, plan, quantizer)
    return Adjustment(NAME, found)


class _Mean:
    """Mean of a layer's outputs a channel, over everything shown to it, in float64."""

    def __init__(self, layer: Layer) -> None:
        self._axis = 1 if layer.kind.startswith("conv") else -1
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, output: Tensor) -> None:
        rows = output.detach().double().movedim(self._axis, -1).reshape(-1, output.shape[self._axis])
        self._sum = rows.sum(0) + (0 if self._sum is None else self._sum)
        self._count += len(rows)

    @property
    def value(self) -> Tensor | None:
        return None if self._sum is None else self._sum / max(self._count, 1)


Show = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]


@contextmanager
def _watched(module: nn.Module, show: Show) -> Iterator[None]:
    handle = module.register_forward_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _run(model: nn.Module, batches: list[Batch]) -> None:
    for batch in batches:
        call(model, cloned(model_inputs(model, batch)))


def _expected(model: nn.Module, batches: list[Batch], plan: Plan, quantizer: Quantizer) -> dict[str, Tensor]:
    shifts: dict[str, tuple[nn.Module, _Mean]] = {}
    with ExitStack() as stack:
        for entry in plan.of_layers:
            parameters = layer_parameters(model, entry.layer)
            for name, module in modules_with_bias(model, entry.layer):
                weight = quantised_weight(parameters[0].data, entry.choice, entry.layer, quantizer)
                shifts[name] = module, _Mean(entry.layer)
                show = _both_ways(entry, parameters, weight, shifts[name][1])
                stack.enter_context(_watched(module, show))
        _run(model, batches)
    return {
        name: _bias(module) - mean.value.to(_bias(module))
        for name, (module, mean) in shifts.items()
        if mean.value is not None
    }


def _both_ways(entry: Entry, parameters: list[nn.Parameter], weight: Tensor, mean: _Mean) -> Show:
    """Runs a module that ran in full precision once more, quantised, and adds the difference to a mean."""
    fmt, given = entry.activation, entry.input_range
    limits = limits_of(given) if given else None

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        first = None if args else ("input" if "input" in kwargs else next(iter(kwargs)))
        x = kwargs[first] if first else args[0]
        x = x if fmt is None else quantise_activation(x, fmt, entry.layer, limits)
        with swapped_data(parameters, weight):
            changed = module.forward(**kwargs | {first: x}) if first else module.forward(x, *args[1:], **kwargs)
        mean.add(changed - output)

    return show


def _observed(model: nn.Module, batches: list[Batch], plan: Plan, quantizer: Quantizer) -> dict[str, Tensor]:
    layers = [(e.layer, name, module) for e in plan.of_layers for name, module in modules_with_bias(model, e.layer)]
    exact = {name: _Mean(layer) for layer, name, _ in layers}
    with ExitStack() as stack:
        for _, name, module in layers:
            stack.enter_context(_watched(module, lambda m, a, k, y, name=name: exact[name].add(y)))  # type: ignore[misc]
        _run(model, batches)
    found: dict[str, Tensor] = {}
    with quantized(model, plan, quantizer=quantizer):
        for layer, name, module in layers:
            mean, wanted = _Mean(layer), exact[name].value
            show = lambda m, a, k, y, mean=mean: mean.add(y)  # noqa: E731
            with _watched(module, show), Adjustment(NAME, found).applied(model):
                _run(model, batches)
            if wanted is not None and mean.value is not None:
                found[name] = _bias(module) - (mean.value - wanted).to(_bias(module))
    return found


def _bias(module: nn.Module) -> Tensor:
    """A module's bias, zeros where it has none."""
    weight = next(iter(module.parameters(recurse=False)))
    if isinstance(module.bias, Tensor):
        return module.bias.detach().clone()
    channels = getattr(module, "out_features", getattr(module, "out_channels", None))
    if channels is None:
        raise ValueError(f"a {type(module).__name__} without bias cannot be corrected: its output channels are unknown")
    return torch.zeros(channels, dtype=weight.dtype, device=weight.device)
