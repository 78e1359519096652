"""`with quantized(model, plan):` simulates a plan on a model and gives the model back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpq.attention_operators import is_operator
from mpq.fake_quantize import Limits, fake_quantize
from mpq.formats import NumberFormat
from mpq.input_range import InputRange
from mpq.layers import Layer
from mpq.plan import Entry, Plan
from mpq.quantizer import Quantizer, RoundToNearest, quantised_weight
from mpq.tracing import fingerprint
from mpq.weight_view import as_rows


@contextmanager
def quantized(model: nn.Module, plan: Plan, *, quantizer: Quantizer | None = None) -> Iterator[nn.Module]:
    """The model with the plan's weights, layer inputs and operators of attention quantised and dequantised.

    Weights are swapped, not written to: what comes back is what was there, also after an error. Ranges of layer inputs
    are those of the plan where they were calibrated (`mpq.activation_ranges`), else dynamic: each batch has its own.
    Attention runs with quantised operands where the plan has operators of it (`mpq.attention_formats`).

    Args:
        model: any model with the layers of the plan.
        plan: what every layer takes.
        quantizer: how weights are quantised; rounds to nearest by default.

    Raises:
        ValueError: if the plan is for another model, a weight holds NaN or infinity, an input is to be quantised that
            no module receives, or on the way out, if attention ran that could not be quantised as planned.
    """
    quantizer = quantizer or RoundToNearest()
    check_model(model, plan)
    with ExitStack() as stack:
        entries = plan.of_layers
        weights = [(layer_parameters(model, entry.layer), _swapped(model, entry, quantizer)) for entry in entries]
        for parameters, data in weights:
            stack.enter_context(swapped_data(parameters, data))
        for entry in entries:
            stack.enter_context(quantised_input(model, entry.layer, entry.activation, entry.input_range))
        if len(entries) < len(plan.entries):
            from mpq.attention_formats import quantised_operators

            operators = {entry.layer: entry.activation for entry in plan.entries if is_operator(entry.layer)}
            stack.enter_context(quantised_operators(model, operators))
        yield model


def check_model(model: nn.Module, plan: Plan) -> None:
    """Check that a plan is for a model: every planned layer is there, and parameter names and shapes are the same.

    Raises:
        ValueError: if not; it names what is missing, has another shape, or is new.
    """
    planned = {name for entry in plan.of_layers for name in (entry.layer.weight_name, *entry.layer.aliases)}
    for entry in plan.of_layers:
        layer_parameters(model, entry.layer)
    if plan.fingerprint and plan.fingerprint != fingerprint(model):
        extra = [name for name, value in model.named_parameters() if value.ndim > 1 and name not in planned]
        found = f"it has {', '.join(map(repr, extra[:3]))}, the plan does not" if extra else "in a norm or bias"
        raise ValueError(f"the plan is for another model: this one's parameter names and shapes differ ({found})")


@contextmanager
def swapped_data(parameters: list[nn.Parameter], data: Tensor) -> Iterator[None]:
    """Parameters (one and its aliases) that hold other data for a while."""
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = data
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


@contextmanager
def quantised_input(
    model: nn.Module, layer: Layer, fmt: NumberFormat | None, given: InputRange | None = None
) -> Iterator[None]:
    """A layer whose input is quantised on the way in, in a given range if there is one; embeddings are left alone.

    Raises:
        ValueError: if the layer's weight is used by a function rather than by a module.
    """
    if fmt is None or (layer.kind == "embedding" and not layer.aliases):
        yield
        return

    limits = limits_of(given) if given else None

    def quantise_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (quantise_activation(args[0], fmt, layer, limits), *args[1:]), kwargs
        name = "input" if "input" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: quantise_activation(kwargs[name], fmt, layer, limits)}

    with ExitStack() as stack:
        for module in input_modules(model, layer):
            handle = module.register_forward_pre_hook(quantise_first, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def limits_of(given: InputRange) -> Limits:
    """Both ends of a range as tensors (scales,) in float64."""
    return torch.tensor(given.low, dtype=torch.float64), torch.tensor(given.high, dtype=torch.float64)


def quantise_activation(activation: Tensor, fmt: NumberFormat, layer: Layer, limits: Limits | None = None) -> Tensor:
    """A layer's input in a format. Channels are the last axis of a linear's input, the second of a convolution's.

    A scale a token is one a vector of a linear's input, one a sample of a convolution's; groups and blocks run along
    the channels. The range is dynamic unless limits are given, one of each or one a channel. Gradients pass straight
    through (Bengio et al. 2013).
    """
    levels = _levels(activation.detach(), fmt, layer, limits)
    return _StraightThrough.apply(activation, levels) if activation.requires_grad else levels  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """Rounded values, with the gradient of those before rounding."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, levels: Tensor) -> Tensor:
        return levels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _levels(activation: Tensor, fmt: NumberFormat, layer: Layer, limits: Limits | None) -> Tensor:
    convolution = layer.kind.startswith("conv")
    granularity = fmt.granularity.kind if fmt.granularity is not None else "block"
    if granularity == "tensor":
        return fake_quantize(activation, fmt, name=f"{layer.name} (input)", limits=limits)
    if granularity == "token":
        rows = activation.flatten(1) if convolution else activation
        return fake_quantize(rows, fmt, name=f"{layer.name} (input)").reshape(activation.shape)
    last = activation.movedim(1, -1) if convolution else activation
    axis = 1 if granularity == "channel" else 0
    rows = fake_quantize(last.reshape(-1, last.shape[-1]), fmt, axis, name=f"{layer.name} (input)", limits=limits)
    rows = rows.reshape(last.shape)
    return rows.movedim(-1, 1) if convolution else rows


def layer_parameters(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """A layer's parameter and its aliases in a model.

    Raises:
        ValueError: if one is missing or has another shape.
    """
    found = []
    for name in (layer.weight_name, *layer.aliases):
        try:
            parameter = model.get_parameter(name)
        except AttributeError as error:
            raise ValueError(f"the model has no parameter {name!r}: the plan is for another model") from error
        if not _has_shape_of(parameter, layer):
            raise ValueError(
                f"layer {layer.name!r} must have the shape {layer.weight_shape} (out, in...), "
                f"the model's {name!r} is {tuple(parameter.shape)}: the plan is for another model"
            )
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device and has no values: load the weights first")
        found.append(parameter)
    return found


def _has_shape_of(parameter: Tensor, layer: Layer) -> bool:
    try:
        return tuple(as_rows(parameter.detach(), layer).shape) == layer.weight_shape
    except (IndexError, RuntimeError, ValueError):
        return False


def owners(model: nn.Module, layer: Layer) -> list[tuple[nn.Module, nn.Parameter]]:
    """The modules that apply a layer's weight, each with its own parameter; more than one where weights are tied."""
    names = [name.rpartition(".") for name in (layer.weight_name, *layer.aliases)]
    modules = {model.get_submodule(path): name for path, _, name in reversed(names)}
    return [(module, module.get_parameter(name)) for module, name in reversed(modules.items())]


def input_modules(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """The modules whose input this layer's weight multiplies; an embedding's input is not a number to quantise.

    Raises:
        ValueError: if a function, not a module, uses the weight.
    """
    if layer.module is None:
        raise ValueError(
            f"the input of {layer.name!r} cannot be quantised: its weight is used by a function, not by a module; "
            "give it an option without activation format"
        )
    return [module for module, _ in owners(model, layer) if not isinstance(module, nn.Embedding)]


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """A model none of whose parameters asks for a gradient for a while."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A model in evaluation mode for a while; every module's own flag comes back, as does the random state."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]):
            yield model
    finally:
        for module, training in flags.items():
            module.training = training


@torch.no_grad()
def _swapped(model: nn.Module, entry: Entry, quantizer: Quantizer) -> Tensor:
    parameter = layer_parameters(model, entry.layer)[0]
    return quantised_weight(parameter.data, entry.choice, entry.layer, quantizer)
