"""Squared norms of per-sample weight gradients from Gram matrices, without the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gradient_pass import Call, Capture
from .watched_convolution import Convolution
from .weight_gradients import by_sample, convolution_gradients, is_dense, is_stock, row_blocks_are_cheap

BLOCK = 2**21  # values of a temporary: samples, or rows, are taken as many at a time as that allows


@dataclass(frozen=True)
class Factors:
    """A gradient as Σ_t left_t ⊗ right_t, t over positions, for each sample and group of a convolution.

    Attributes:
        left: (samples, groups, positions, rows), or the indices (samples, positions) of the ones of one-hot rows.
        right: (samples, groups, positions, columns).
    """

    left: Tensor
    right: Tensor

    @property
    def is_lookup(self) -> bool:
        """Whether the left factor is one-hot."""
        return not self.left.is_floating_point()


def squared_norms(capture: Capture) -> Tensor:
    """(samples,): ||G_j||_F² of each sample's weight gradient, summed over positions and calls, in float64.

        || Σ_t g_t x_tᵀ ||² = Σ_{s,t} (g_s . g_t) (x_s . x_t)

    t runs over positions and over all calls of the module, so that cross-call terms are in it. Convolutions have
    patches as x, and two Grams a group; in an embedding x is one-hot and its Gram says which tokens are equal. Where
    the gradient itself is less work than its Grams (`gradient_is_cheaper`), and for modules of other kinds, it is
    formed, a block at a time.

    Cost: for S positions, G groups and a weight of (out, in) the smaller of S · out · in and S² · (out + G · in)
    multiply-adds a sample.
    """
    if capture.whole_gradient is not None or not all(_has_factors(call, capture) for call in capture.calls):
        return _formed(capture)
    total = torch.zeros(capture.samples, dtype=torch.float64, device=capture.parameter.device)
    norms = (
        _norms_of_gradients if all(gradient_is_cheaper(call, capture) for call in capture.calls) else _norms_of_grams
    )
    step = max(1, BLOCK // max([1, *(_values_a_sample(call, capture) for call in capture.calls)]))
    for start in range(0, capture.samples if capture.calls else 0, step):
        part = slice(start, min(start + step, capture.samples))
        total[part] = norms(capture, part)
    return total


def gradient_is_cheaper(call: Call, capture: Capture) -> bool:
    """Whether the gradient itself is fewer multiply-adds than its two Grams, in every sample and group.

        positions · rows · columns <= positions² · (rows + columns)

    Where it is not, 2 positions² is below rows · columns as well: Grams never take more memory than the gradient.
    """
    if isinstance(call.module, nn.Embedding):
        return False
    rows, columns, positions = _sizes(call, capture)
    return rows * columns <= positions * (rows + columns)


def _sizes(call: Call, capture: Capture) -> tuple[int, int, int]:
    """Rows and columns of the weight of one group, positions of one sample."""
    rows, columns = capture.layer.weight_shape[0], prod(capture.layer.weight_shape[1:])
    if isinstance(call.module, nn.Embedding):
        return rows, columns, call.inputs.numel() // capture.samples
    groups = 1 if call.convolution is None else call.convolution.groups
    return rows // groups, columns, call.gradient.numel() // (capture.samples * rows)


def _values_a_sample(call: Call, capture: Capture) -> int:
    """Of the largest temporary."""
    rows, columns, positions = _sizes(call, capture)
    groups = 1 if call.convolution is None else call.convolution.groups
    if gradient_is_cheaper(call, capture):
        return groups * rows * columns
    patches = positions * columns if call.convolution is not None else 0
    return groups * max(patches, positions**2)


def _norms_of_gradients(capture: Capture, part: slice) -> Tensor:
    gradient = _gradient(capture.calls[0], capture, part)
    for call in capture.calls[1:]:
        gradient += _gradient(call, capture, part)
    rows = gradient.reshape(part.stop - part.start, capture.layer.weight_shape[0], -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms.double().square().sum(1)


def _gradient(call: Call, capture: Capture, part: slice) -> Tensor:
    """(samples of the part, ...): the weight's gradients."""
    if call.convolution is None:
        factors = _factors(call, capture, part)
        return factors.left.mT @ factors.right
    gradient = call.gradient[part]
    return convolution_gradients(call.convolution.part(part), gradient, call.parameter.detach(), len(gradient))


def _norms_of_grams(capture: Capture, part: slice) -> Tensor:
    factors = [_factors(call, capture, part) for call in capture.calls]
    norms = sum((_inner(factor, factor) for factor in factors), start=torch.zeros(()))
    return norms + sum((2 * _inner(*pair) for pair in combinations(factors, 2)), start=torch.zeros(()))


def _inner(a: Factors, b: Factors) -> Tensor:
    """(samples,): Σ_{s,t} (left_as . left_bt) (right_as . right_bt)."""
    if b.is_lookup and not a.is_lookup:
        a, b = b, a
    gram = a.right @ b.right.mT
    if b.is_lookup:
        left = (a.left[:, None, :, None] == b.left[:, None, None, :]).to(gram.dtype)
    elif a.is_lookup:
        chosen = a.left[:, None, None, :].expand(*b.left.shape[:3], a.left.shape[1])
        left = b.left.gather(3, chosen).mT
    else:
        left = a.left @ b.left.mT
    return gram.mul_(left).flatten(1).sum(1, dtype=torch.float64)


def _has_factors(call: Call, capture: Capture) -> bool:
    if is_dense(call.module, call.parameter):
        return True
    if is_stock(call.module, (nn.Embedding,), call.parameter):
        return call.module.max_norm is None
    convolution = call.convolution
    if convolution is None or convolution.transposed or len(convolution.inputs) != capture.samples:
        return False
    return convolution.inputs.ndim <= 4  # patches of volumes are not to be had


def _factors(call: Call, capture: Capture, part: slice) -> Factors:
    samples, module = capture.samples, call.module
    if isinstance(module, nn.Embedding):
        return Factors(call.inputs.reshape(samples, -1)[part].long(), by_sample(call.gradient, samples)[part, None])
    if call.convolution is not None:
        return _convolution_factors(call.convolution.part(part), call.gradient[part].flatten(2), call.parameter)
    inputs = by_sample(call.inputs, samples)[part, None].to(call.gradient.dtype)
    return Factors(by_sample(call.gradient, samples)[part, None], inputs)


def _convolution_factors(convolution: Convolution, gradient: Tensor, parameter: Tensor) -> Factors:
    """Patches of the input, and output gradients (samples, rows, positions), of every group."""
    inputs = convolution.inputs.to(gradient.dtype)
    settings = [tuple(parameter.shape[2:]), convolution.dilation, convolution.padding, convolution.stride]
    if inputs.ndim == 3:  # one axis: a picture of height one
        inputs, neutral = inputs[:, :, None], (1, 1, 0, 1)
        settings = [(value, *setting) for value, setting in zip(neutral, settings, strict=True)]
    kernel, dilation, padding, stride = settings
    if prod(kernel) * prod(stride) == 1 and not any(padding):
        patches = inputs.flatten(2)
    else:
        patches = functional.unfold(inputs, kernel, dilation=dilation, padding=padding, stride=stride)
    count, groups = len(gradient), convolution.groups
    left = gradient.reshape(count, groups, -1, gradient.shape[-1]).mT
    return Factors(left, patches.reshape(count, groups, -1, patches.shape[-1]).mT)


def _formed(capture: Capture) -> Tensor:
    """Norms of gradients that are formed, as many rows at a time as memory allows."""
    rows, columns = capture.layer.weight_shape[0], prod(capture.layer.weight_shape[1:])
    cheap = bool(capture.calls) and all(row_blocks_are_cheap(call) for call in capture.calls)
    step = max(1, BLOCK // max(1, capture.samples * columns)) if cheap else rows
    total = torch.zeros(capture.samples, dtype=torch.float64, device=capture.parameter.device)
    for start in range(0, rows, step):
        block = capture.sample_gradients(slice(start, min(start + step, rows)))
        total += block.flatten(1).square().sum(1, dtype=torch.float64)
    return total
