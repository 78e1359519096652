"""Per-sample gradients of a layer's weight from its inputs and the gradient at its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.layers import Layer
from mpq.weight_view import as_rows

Apply = Callable[[Tensor], Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


def weight_gradients(call: Call, layer: Layer, samples: int, rows: slice) -> Tensor:
    """(samples, rows, in...): gradients of each sample's loss with respect to some rows of the (out, in...) view.

        dense          G_j = Σ_t g_jt x_jtᵀ            one batched product over tokens t
        convolution    the same sum over places         the convolution's own backward, sample by sample
        embedding      G_j[id_jt] += g_jt
        anything else  autograd through `apply`         a backward of the whole batch a sample

    Modules count as one of these only where their forward is torch's own (or transformers' Conv1D): a subclass may do
    anything with its weight.
    """
    if is_dense(call.module, call.parameter):
        return _dense(call, layer, samples, rows)
    if is_stock(call.module, (nn.Embedding,), call.parameter) and call.module.max_norm is None:
        return _embedding(call, layer, samples, rows)
    if is_stock(call.module, (*_CONVOLUTIONS, *_TRANSPOSED), call.parameter):
        return _convolution(call, layer, samples, rows)
    return _by_autograd(call, layer, samples)[:, rows]


def row_blocks_are_cheap(call: Call) -> bool:
    """Whether the gradients of some rows cost only their share."""
    module: Any = call.module
    if is_dense(module, call.parameter) or is_stock(module, (nn.Embedding,), call.parameter):
        return True
    return is_stock(module, _CONVOLUTIONS, call.parameter) and bool(module.groups == 1)


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


def _convolution(call: Call, layer: Layer, samples: int, rows: slice) -> Tensor:
    module: Any = call.module
    transposed = isinstance(module, _TRANSPOSED)
    inputs, gradient = call.inputs.to(call.gradient.dtype), call.gradient
    weight = call.parameter.detach().to(gradient.dtype)
    padding = _explicit_padding(module)
    if padding is None:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    sliced = not transposed and module.groups == 1
    if sliced:
        gradient, weight = gradient.narrow(1, rows.start, rows.stop - rows.start), weight[rows]
    stored = [
        torch.ops.aten.convolution_backward(
            part.contiguous(), given, weight, None, module.stride, padding, module.dilation,
            transposed, module.output_padding, module.groups, (False, True, False),
        )[1]
        for part, given in zip(gradient.tensor_split(samples), inputs.tensor_split(samples), strict=True)
    ]  # fmt: skip
    if sliced:
        return torch.stack(stored)
    return torch.stack([as_rows(part, layer)[rows] for part in stored])


def _explicit_padding(module: Any) -> tuple[int, ...] | None:
    """The padding that the convolution itself does; None where the module pads its input first."""
    symmetric = module._reversed_padding_repeated_twice[0::2] == module._reversed_padding_repeated_twice[1::2]
    if module.padding_mode != "zeros" or not symmetric:
        return None
    return tuple(reversed(module._reversed_padding_repeated_twice[0::2]))


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
