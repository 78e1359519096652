"""Matrix products and convolutions of an autograd graph as weighted sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .relevance_graph import RelevanceGraph, operands, operation
from .relevance_rules import WeightedSum

# Names of the two factors that an operation saves, and the position of the first among its operands.
FACTORS: dict[str, tuple[str, str, int]] = {
    "Mm": ("self", "mat2", 0),
    "Bmm": ("self", "mat2", 0),
    "Mv": ("self", "vec", 0),
    "Addmm": ("mat1", "mat2", 1),
    "Addmv": ("mat", "vec", 1),
    "Baddbmm": ("batch1", "batch2", 1),
    "Convolution": ("input", "weight", 0),
    "GroupedMm": ("self", "mat2", 0),
}


@dataclass(frozen=True)
class GraphSum:
    """A weighted sum where it stands in the graph.

    Attributes:
        step: the sum.
        position: of the data among the operation's operands.
        weight: the node that its weight comes from.
        channel_axis: of inputs and outputs.
        norm_scale: what the coefficient was multiplied with on its way back through a batch norm that was folded in.
    """

    step: WeightedSum
    position: int
    weight: Node | None
    channel_axis: int
    norm_scale: Tensor | None = None


def data_factors(graph: RelevanceGraph, node: Node) -> list[int]:
    """Positions of the factors of a product that depend on the data."""
    first = FACTORS[operation(node)][2]
    return [position for position in (first, first + 1) if graph.role(node, position) == "data"]


def weighted_sum(graph: RelevanceGraph, node: Node, absorbing: bool) -> GraphSum | None:
    """An operation between the data and a weight; None where its weight asks for no gradient, so that nothing is kept.

    Raises:
        ValueError: if its bias is computed from other parameters.
    """
    name = operation(node)
    first_name, second_name, first = FACTORS[name]
    (data,) = data_factors(graph, node)
    other = 2 * first + 1 - data
    if graph.role(node, other) != "weight":
        return None
    saved = [getattr(node, f"_saved_{factor}") for factor in (first_name, second_name)]
    swapped = data != first
    inputs, weight = (part.detach() for part in (reversed(saved) if swapped else saved))
    if name == "Convolution":
        product, transposed = _convolution(node)
    else:
        product, transposed = _matrix_product(node, swapped, weight)
    bias = _bias(graph, node, first, weight)
    step = WeightedSum(
        inputs=inputs, weight=weight, bias=bias, product=product, transposed=transposed, absorbing=absorbing
    )
    channel_axis = 1 if name == "Convolution" else -2 if swapped and weight.ndim > 1 and inputs.ndim > 1 else -1
    return GraphSum(step, data, operands(node)[other], channel_axis)


def with_norm(graph: RelevanceGraph, found: GraphSum, norm: Node) -> GraphSum | None:
    """The sum with the batch norm behind it folded in; None for a transposed convolution in groups."""
    saved: Any = norm
    scale = (saved._saved_running_var + saved._saved_eps).rsqrt()
    if saved._saved_weight is not None:
        scale = scale * saved._saved_weight.detach()
    shift = -saved._saved_running_mean * scale
    beta = graph.parameter_value(norm, 2, tuple(scale.shape)) if len(norm.next_functions) > 2 else None
    shift = shift if beta is None else shift + beta
    step = found.step
    axis = _output_axis_of_weight(found)
    if axis is None:
        return None
    shape = [1] * step.weight.ndim
    shape[axis] = -1
    spread = _along_channels(found, scale)
    bias = _along_channels(found, shift) + (0 if step.bias is None else step.bias * spread)
    return replace(found, step=replace(step, weight=step.weight * scale.reshape(shape), bias=bias), norm_scale=spread)


def _along_channels(found: GraphSum, values: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (found.step.inputs.ndim - 2)) if found.channel_axis == 1 else values


def _output_axis_of_weight(found: GraphSum) -> int | None:
    if found.channel_axis != 1:
        return found.step.weight.ndim - 1 if found.channel_axis == -1 else None
    transposed, groups = getattr(found.step.product, "layout", (False, 1))
    if transposed:
        return 1 if groups == 1 else None
    return 0


def _bias(graph: RelevanceGraph, node: Node, first: int, weight: Tensor) -> Tensor | None:
    """What is added, broadcast over the output; None where it is data itself and takes its own share."""
    convolution = operation(node) == "Convolution"
    position = 2 if convolution else 0
    if (first == 0 and not convolution) or graph.role(node, position) != "weight":
        return None
    transposed = convolution and node._saved_transposed  # type: ignore[attr-defined]
    outputs = weight.shape[1] * node._saved_groups if transposed else weight.shape[0]  # type: ignore[attr-defined]
    bias = graph.parameter_value(node, position, (outputs if convolution else weight.shape[-1],))
    if bias is None:
        shapes = sorted({tuple(parameter.shape) for parameter in graph.parameters_behind(operands(node)[position])})
        raise ValueError(
            "relevance needs the bias of every weighted sum as a parameter or cut from one, found one that is computed "
            f"from parameters of shapes {shapes}"
        )
    if convolution:
        return bias.reshape(-1, *[1] * (node._saved_input.ndim - 2))  # type: ignore[attr-defined]
    return bias * node._saved_beta  # type: ignore[attr-defined, no-any-return]


def _matrix_product(node: Node, swapped: bool, weight: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    alpha = getattr(node, "_saved_alpha", 1)
    if operation(node) == "GroupedMm":
        offsets: Any = node._saved_offs  # type: ignore[attr-defined]
        return (
            lambda x, w: torch._grouped_mm(x, w, offs=offsets),
            lambda s, w: torch._grouped_mm(s, w.transpose(-2, -1), offs=offsets),
        )
    if not swapped and weight.ndim == 1:  # a matrix of data times a vector
        return lambda x, w: alpha * (x @ w), lambda s, w: alpha * s[..., None] * w
    if swapped:
        return lambda x, w: alpha * (w @ x), lambda s, w: alpha * (w.transpose(-2, -1) @ s)
    return lambda x, w: alpha * (x @ w), lambda s, w: alpha * (s @ w.transpose(-2, -1))


@dataclass(frozen=True)
class _Convolution:
    settings: tuple[Any, ...]  # stride, padding, dilation, transposed, output_padding, groups

    @property
    def layout(self) -> tuple[bool, int]:
        return self.settings[3], self.settings[5]

    def __call__(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution(inputs, weight, None, *self.settings)  # type: ignore[no-any-return]


def _convolution(node: Node) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    forward = _Convolution(tuple(getattr(node, f"_saved_{name}") for name in names))
    shape = node._saved_input.shape  # type: ignore[attr-defined]

    def transposed(ratio: Tensor, weight: Tensor) -> Tensor:
        inputs = ratio.new_empty(()).expand(shape)
        mask = [True, False, False]
        back = torch.ops.aten.convolution_backward(ratio, inputs, weight, None, *forward.settings, mask)
        return back[0]  # type: ignore[no-any-return]

    return forward, transposed
