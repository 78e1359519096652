"""Squared norms of per-sample weight gradients from Gram matrices, without the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gradient_pass import Call, Capture
from .weight_gradients import by_sample, is_dense, is_stock, row_blocks_are_cheap

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

    @property
    def explicit_is_cheaper(self) -> bool:
        """Whether rows · columns, the gradient itself, is less work than positions · (rows + columns), two Grams.

        Then 2 positions² is below rows · columns as well: Grams never take more memory than the gradient.
        """
        if self.is_lookup:
            return False
        rows, columns, positions = self.left.shape[-1], self.right.shape[-1], self.left.shape[-2]
        return rows * columns <= positions * (rows + columns)

    def product(self) -> Tensor:
        """(samples, groups, rows, columns): the gradient."""
        return self.left.mT @ self.right


def squared_norms(capture: Capture) -> Tensor:
    """(samples,): ||G_j||_F² of each sample's weight gradient, summed over positions and calls, in float64.

        || Σ_t g_t x_tᵀ ||² = Σ_{s,t} (g_s . g_t) (x_s . x_t)

    t runs over positions and over all calls of the module, so that cross-call terms are in it. Convolutions have
    patches as x, and two Grams a group; in an embedding x is one-hot and its Gram says which tokens are equal. Where
    the gradient itself is less work than its Grams, and for modules of other kinds, it is formed, a block at a time.

    Cost: for S positions and a weight of (out, in) the smaller of S · out · in and S² · (out + in) a sample.
    """
    if capture.whole_gradient is not None or not all(_has_factors(call, capture) for call in capture.calls):
        return _formed(capture)
    total = torch.zeros(capture.samples, dtype=torch.float64, device=capture.parameter.device)
    if not capture.calls:
        return total
    step = _samples_at_a_time(capture)
    for start in range(0, capture.samples, step):
        part = slice(start, min(start + step, capture.samples))
        total[part] = _norms([_factors(call, capture, part) for call in capture.calls])
    return total


def _norms(factors: list[Factors]) -> Tensor:
    if all(factor.explicit_is_cheaper for factor in factors):
        gradient = factors[0].product()
        for factor in factors[1:]:
            gradient += factor.product()
        return gradient.square_().flatten(1).sum(1, dtype=torch.float64)
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
    return is_stock(call.module, (nn.Conv1d, nn.Conv2d), call.parameter) and call.inputs.shape[0] == capture.samples


def _factors(call: Call, capture: Capture, part: slice) -> Factors:
    samples, module = capture.samples, call.module
    if isinstance(module, nn.Embedding):
        return Factors(call.inputs.reshape(samples, -1)[part].long(), by_sample(call.gradient, samples)[part, None])
    if is_dense(module, call.parameter):
        inputs = by_sample(call.inputs, samples)[part, None].to(call.gradient.dtype)
        return Factors(by_sample(call.gradient, samples)[part, None], inputs)
    return _convolution_factors(call, part)


def _convolution_factors(call: Call, part: slice) -> Factors:
    """Patches of the padded input, and output gradients, of every group."""
    module: Any = call.module
    gradient = call.gradient[part].flatten(2)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = call.inputs[part].to(gradient.dtype)
    inputs = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    settings = [module.kernel_size, module.dilation, module.stride]
    if inputs.ndim == 3:  # one axis: a picture of height one
        inputs, settings = inputs[:, :, None], [(1, *setting) for setting in settings]
    if prod(settings[0]) * prod(settings[2]) == 1:
        patches = inputs.flatten(2)
    else:
        patches = functional.unfold(inputs, settings[0], dilation=settings[1], stride=settings[2])
    count, groups = len(gradient), module.groups
    left = gradient.reshape(count, groups, -1, gradient.shape[-1]).mT
    return Factors(left, patches.reshape(count, groups, -1, patches.shape[-1]).mT)


def _samples_at_a_time(capture: Capture) -> int:
    rows, columns = capture.layer.weight_shape[0], prod(capture.layer.weight_shape[1:])
    largest = 1
    for call in capture.calls:
        width = call.gradient.shape[1] if is_stock(call.module, (nn.Conv1d, nn.Conv2d), call.parameter) else 0
        positions = call.gradient.numel() // (width or call.gradient.shape[-1]) // capture.samples
        grams = positions**2 * capture.layer.groups
        patches = positions * columns * capture.layer.groups if width else 0
        largest = max(largest, patches, min(grams, rows * columns))
    return max(1, BLOCK // largest)


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
