"""Per-sample gradients of a layer's weight from its inputs and the gradient at its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mpq.layers import Layer
from mpq.weight_view import as_rows

from .watched_convolution import Convolution, watched_convolution

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a layer's module.

    Attributes:
        inputs: what the module was given, as it was then; detached, samples first, alone or flattened with tokens.
        gradient: of the loss summed over samples and positions, at the module's output; float32 or float64.
        apply: the module's forward, without hooks, on another input in that place.
        module: the module.
        parameter: its own parameter that is the layer's weight.
    """

    inputs: Tensor
    gradient: Tensor
    apply: Apply
    module: nn.Module
    parameter: nn.Parameter

    @cached_property
    def convolution(self) -> Convolution | None:
        """What the module's forward comes to, where that is one convolution by the layer's weight."""
        return None if self.parameter.ndim < 3 else watched_convolution(self.apply, self.inputs, self.parameter)


def weight_gradients(call: Call, layer: Layer, samples: int, rows: slice) -> Tensor:
    """(samples, rows, in...): gradients of each sample's loss with respect to some rows of the (out, in...) view.

        dense          G_j = Σ_t g_jt x_jtᵀ            one batched product over tokens t
        convolution    the same sum over places         see `convolution_gradients`
        embedding      G_j[id_jt] += g_jt
        anything else  autograd through `apply`         a backward of the whole batch a sample

    Modules count as dense or as embeddings only where their forward is torch's own (or transformers' Conv1D): a
    subclass may do anything with its weight. Convolutions are told by what they do (`watched_convolution`), so that
    subclasses which only pad their input in their own way count.
    """
    if is_dense(call.module, call.parameter):
        return _dense(call, layer, samples, rows)
    if is_stock(call.module, (nn.Embedding,), call.parameter) and call.module.max_norm is None:
        return _embedding(call, layer, samples, rows)
    if call.convolution is not None:
        return _convolution(call, call.convolution, layer, samples, rows)
    return _by_autograd(call, layer, samples)[:, rows]


def row_blocks_are_cheap(call: Call) -> bool:
    """Whether the gradients of some rows cost only their share."""
    if is_dense(call.module, call.parameter) or is_stock(call.module, (nn.Embedding,), call.parameter):
        return True
    convolution = call.convolution
    return convolution is not None and not convolution.transposed and convolution.groups == 1


def is_dense(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a module computes x Wᵀ + b and nothing else, in either layout of W."""
    if is_stock(module, (nn.Linear,), parameter):
        return True
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_stock(module: nn.Module, kinds: tuple[type[nn.Module], ...], parameter: nn.Parameter) -> bool:
    """Whether a module is of these kinds, runs their own forward, and has the parameter as its weight."""
    stock = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    return stock and getattr(module, "weight", None) is parameter and "forward" not in vars(module)


def by_sample(tensor: Tensor, samples: int) -> Tensor:
    """(samples, tokens, width): tokens that were flattened into the first axis go back to their sample."""
    return tensor.reshape(samples, -1, tensor.shape[-1])


def _dense(call: Call, layer: Layer, samples: int, rows: slice) -> Tensor:
    gradient = by_sample(call.gradient, samples)[..., rows]
    inputs = by_sample(call.inputs, samples).to(gradient.dtype)
    return torch.bmm(gradient.mT, inputs)


def _embedding(call: Call, layer: Layer, samples: int, rows: slice) -> Tensor:
    ids = call.inputs.reshape(samples, -1)
    count, width = rows.stop - rows.start, layer.weight_shape[1]
    sample = torch.arange(samples, device=ids.device)[:, None].expand_as(ids)
    wanted = (ids >= rows.start) & (ids < rows.stop)
    place = (sample * count + ids - rows.start)[wanted]
    total = torch.zeros(samples * count, width, dtype=call.gradient.dtype, device=ids.device)
    return total.index_add_(0, place, by_sample(call.gradient, samples)[wanted]).reshape(samples, count, width)


def _convolution(call: Call, convolution: Convolution, layer: Layer, samples: int, rows: slice) -> Tensor:
    gradient, weight = call.gradient, call.parameter.detach()
    if convolution.groups == 1 and not convolution.transposed:
        return convolution_gradients(convolution, gradient[:, rows], weight[rows], samples)
    stored = convolution_gradients(convolution, gradient, weight, samples)
    return torch.stack([as_rows(part, layer)[rows] for part in stored])


def convolution_gradients(convolution: Convolution, gradient: Tensor, weight: Tensor, samples: int) -> Tensor:
    """(samples, weight's shape): gradients of each sample's loss with respect to the weight of a convolution.

        depthwise        G_c[k] = Σ_t g_c[t] x_c[stride t + dilation k], a convolution of x_c by g_c
        anything else    the convolution's own backward, sample by sample

    The inputs of all samples and channels are convolved at once, as groups. At the shapes of EfficientNet-Lite0 (5 x 5)
    that was measured 5 times as fast as the backward on 28 x 28 places and 9 times on 14 x 14; with strides it can be
    slower, by up to 2.5 (one thread, AVX2; oneDNN).

    Args:
        convolution: and what it was given.
        gradient: at its outputs, (entries, rows, places...).
        weight: for its shape.
        samples: entries are as many, or a multiple, whose gradients are added up.
    """
    inputs, weight = convolution.inputs.to(gradient.dtype), weight.to(gradient.dtype)
    if convolution.is_depthwise:
        return _depthwise(convolution, inputs, gradient, weight.shape).reshape(samples, -1, *weight.shape).sum(1)
    stored = [
        torch.ops.aten.convolution_backward(
            part.contiguous(), given, weight, None, convolution.stride, convolution.padding, convolution.dilation,
            convolution.transposed, convolution.output_padding, convolution.groups, (False, True, False),
        )[1]
        for part, given in zip(gradient.tensor_split(samples), inputs.tensor_split(samples), strict=True)
    ]  # fmt: skip
    return torch.stack(stored)


def _depthwise(convolution: Convolution, inputs: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """(entries, weight's shape)."""
    channels = inputs.shape[0] * inputs.shape[1]
    pictures = inputs.reshape(1, channels, *inputs.shape[2:])
    kernels = gradient.reshape(-1, 1, *gradient.shape[2:])
    moves = (convolution.dilation, convolution.padding, convolution.stride)  # as stride, padding, dilation
    moved = torch.convolution(pictures, kernels, None, *moves, False, convolution.output_padding, channels)
    for axis, size in enumerate(shape[2:], start=2):
        moved = moved.narrow(axis, 0, size)  # with a stride, places at the end that no kernel reached
    return moved.reshape(len(inputs), *shape)


def _by_autograd(call: Call, layer: Layer, samples: int) -> Tensor:
    asked = call.parameter.requires_grad
    with torch.enable_grad():
        try:
            call.parameter.requires_grad_(True)
            output = call.apply(call.inputs)
            gradient = call.gradient.to(output.dtype)
            each = []
            for number in range(samples):
                only = torch.zeros_like(gradient)
                share = gradient.shape[0] // samples
                only[number * share : (number + 1) * share] = gradient[number * share : (number + 1) * share]
                (found,) = torch.autograd.grad(output, call.parameter, only, retain_graph=True, allow_unused=True)
                found = torch.zeros_like(call.parameter) if found is None else found
                each.append(as_rows(found, layer).to(call.gradient.dtype))
        finally:
            call.parameter.requires_grad_(asked)
    return torch.stack(each)
