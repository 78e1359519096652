"""What happens to relevance at each operation: attention, softmax, normalisation, gates, nonlinearities (AttnLRP).

Relevance R of a value a flows as the coefficient c with R = a c. Where an operation has no rule of its own its gradient
is the rule, which for sums, views, poolings and ReLUs is the exact split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from .relevance_graph import STRUCTURE, RelevanceGraph, operands, operation
from .relevance_rules import at_least_float

Gradients = Sequence[Tensor | None]
Hook = Callable[[Gradients, Gradients], tuple[Tensor | None, ...] | None]

# The gradient splits these exactly, whatever they add that is no data keeps its share; softmax by its Taylor expansion.
EXACT = STRUCTURE | {
    *("Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Cumsum", "Relu", "LeakyRelu", "PreluKernel", "Threshold"),
    *("Abs", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Max", "Min", "Amax", "Amin", "Topk"),
    *("Sort", "Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "Index", "IndexSelect", "IndexAdd", "IndexPut"),
    *("IndexCopy", "Gather", "Scatter", "ScatterAdd", "Take", "Cat", "Stack", "ConstantPadNd", "Tril", "Triu", "Trace"),
    *("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MaxPool2DWithIndices", "AdaptiveMaxPool2D"),
    *("MaxPool3DWithIndices", "AdaptiveMaxPool3D", "PixelShuffle", "PixelUnshuffle", "Im2Col", "Col2Im"),
    *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleBilinear2D", "UpsampleBicubic2D"),
    *("UpsampleLinear1D", "UpsampleTrilinear3D", "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad2D"),
    *("Softmax", "SafeSoftmax", "NativeBatchNorm", "Embedding"),
}
_NORMALISERS = ("Rsqrt", "Reciprocal")
_GATES = ("Sigmoid", "Hardsigmoid")
_HALVED = {"Mm": 0, "Bmm": 0, "Mv": 0, "Dot": 0, "Addmm": 1, "Baddbmm": 1, "Addmv": 1, "Convolution": 0}


def step_rule(graph: RelevanceGraph, node: Node) -> Hook | None:
    """The hook that replaces an operation's gradient by its rule; None where the gradient is the rule."""
    name = operation(node)
    if name in _HALVED:
        return _halves(_HALVED[name])
    if name in _NORMS:
        running = name == "NativeBatchNorm" and not node._saved_training  # type: ignore[attr-defined]
        return None if running else _detached_norm(node)
    if name in ("Mul", "Div"):
        return _product(graph, node) if name == "Mul" else _quotient(graph, node)
    if name == "Glu":
        return _gated_linear_unit(node)
    return _identity(node) if name in _NONLINEAR else None


def has_rule(node: Node) -> bool:
    """Whether relevance at this operation is split by a rule and not merely by gradient times input."""
    name = operation(node)
    return name in EXACT or name in _HALVED or name in _NONLINEAR or name in _NORMS or name in ("Mul", "Div", "Glu")


def _halves(first: int) -> Hook:
    """Products of two activations, as query times key: half to each factor."""
    return lambda given, _: tuple(
        None if part is None else part / 2 if first <= position <= first + 1 else part
        for position, part in enumerate(given)
    )


def _product(graph: RelevanceGraph, node: Node) -> Hook | None:
    """Half to each factor; all to the signal where the other is a constant, a gate or what normalises it."""
    if [graph.role(node, position) for position in (0, 1)] != ["data", "data"]:
        return None
    scales = [position for position in (0, 1) if _is_scale(graph, node, position)]
    if len(scales) == 1:
        return _without(scales[0])
    return _halves(0)


def _quotient(graph: RelevanceGraph, node: Node) -> Hook | None:
    """All to the numerator: the denominator normalises it."""
    return _without(1) if graph.role(node, 1) == "data" else None


def _is_scale(graph: RelevanceGraph, node: Node, position: int) -> bool:
    """Whether a factor is a gate, a normaliser, or, times a constant apart, a function of the other factor alone."""
    own, other = operands(node)[position], operands(node)[1 - position]
    maker = graph.behind_structure(own)
    if maker is not None and (operation(maker) in (*_NORMALISERS, *_GATES) or _exponent(maker) < 0):
        return True
    sources, linear = graph.elementwise_sources(own)
    others, other_linear = graph.elementwise_sources(other)
    return not linear and other_linear and sources == others and len(sources) == 1


def _exponent(node: Node) -> float:
    exponent = getattr(node, "_saved_exponent", 1)
    return float(exponent) if isinstance(exponent, int | float) else 1.0


def _without(dropped: int) -> Hook:
    return lambda given, _: tuple(
        None if part is None else torch.zeros_like(part) if position == dropped else part
        for position, part in enumerate(given)
    )


_NONLINEAR: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "Silu": lambda node: (node._saved_self, functional.silu(node._saved_self)),
    "Gelu": lambda node: (
        node._saved_self,
        functional.gelu(node._saved_self, approximate=node._saved_approximate),
    ),
    "Hardswish": lambda node: (node._saved_self, functional.hardswish(node._saved_self)),
    "Mish": lambda node: (node._saved_self, functional.mish(node._saved_self)),
    "Elu": lambda node: (
        node._saved_self,
        torch.ops.aten.elu(node._saved_self, node._saved_alpha, node._saved_scale, node._saved_input_scale),
    ),
    "Pow": lambda node: (node._saved_self, node._saved_self.pow(node._saved_exponent)),
    "Tanh": lambda node: (_inverse_of_tanh(node._saved_result), node._saved_result),
}


def _inverse_of_tanh(result: Tensor) -> Tensor:
    largest = 1 - torch.finfo(result.dtype).eps
    return result.clamp(-largest, largest).atanh()


def _identity(node: Node) -> Hook | None:
    """Elementwise functions with f(0) = 0 hand relevance on unchanged: c_in = c f(x) / x, f'(0) c at 0."""
    if operation(node) == "Pow" and not _exponent(node) >= 1:
        return None
    if operation(node) == "Elu" and not hasattr(node, "_saved_self"):  # in place: only its result is kept
        return None

    def hook(given: Gradients, coming: Gradients) -> tuple[Tensor | None, ...] | None:
        if given[0] is None or coming[0] is None:
            return None
        x, y = (at_least_float(part.detach()) for part in _NONLINEAR[operation(node)](node))
        ratio = y / x.masked_fill(x == 0, 1)
        passed = (coming[0] * ratio).to(given[0].dtype)
        return torch.where(x == 0, given[0], passed), *given[1:]

    return hook


def _gated_linear_unit(node: Any) -> Hook:
    """Of a ⊙ σ(b) all to a."""

    def hook(given: Gradients, coming: Gradients) -> tuple[Tensor | None, ...] | None:
        if given[0] is None:
            return None
        axis = node._saved_dim - (2**64 if node._saved_dim >= 2**63 else 0)  # autograd keeps -1 unsigned
        signal, gate = given[0].chunk(2, axis)
        return (torch.cat([signal, torch.zeros_like(gate)], axis),)

    return hook


def _over_features(node: Any, scaled: Tensor) -> Any:
    axes = tuple(range(-len(node._saved_normalized_shape), 0))
    return (scaled - scaled.mean(axes, keepdim=True)) * node._saved_result2.to(scaled.dtype)


def _over_groups(node: Any, scaled: Tensor) -> Any:
    grouped = scaled.reshape(node._saved_N, node._saved_group, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    return (centred * node._saved_result2.to(scaled.dtype).reshape(node._saved_N, -1, 1)).reshape(scaled.shape)


def _over_batch(node: Any, scaled: Tensor) -> Any:
    axes = [axis for axis in range(scaled.ndim) if axis != 1]
    inverse = node._saved_result2.to(scaled.dtype).reshape(_channel_shape(scaled))
    return (scaled - scaled.mean(axes, keepdim=True)) * inverse


def _root_mean_square(node: Any, scaled: Tensor) -> Any:
    return scaled * node._saved_result1.to(scaled.dtype)


def _channel_shape(values: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (values.ndim - 2))


_NORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "NativeLayerNorm": _over_features,
    "NativeGroupNorm": _over_groups,
    "NativeBatchNorm": _over_batch,
    "FusedRmsNorm": _root_mean_square,
}


def _detached_norm(node: Any) -> Hook:
    """Normalisation with its deviation as a constant: linear in what it centres, so that only the shift keeps some."""
    name = operation(node)

    def hook(given: Gradients, coming: Gradients) -> tuple[Tensor | None, ...] | None:
        if given[0] is None or coming[0] is None:
            return None
        weight = node._saved_weight
        scaled = at_least_float(coming[0])
        if weight is not None:
            per_channel = name in ("NativeGroupNorm", "NativeBatchNorm")
            weight = at_least_float(weight.detach())
            scaled = scaled * (weight.reshape(_channel_shape(scaled)) if per_channel else weight)
        return _NORMS[name](node, scaled).to(given[0].dtype), *given[1:]

    return hook
