"""The Hessian of a layer's own squared output error, from its inputs: what GPTQ and its kin compensate by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .gradient_pass import Call, Capture
from .weight_gradients import by_sample, is_dense, is_stock


def input_hessian(seen: list[Capture], kept: np.ndarray) -> Tensor:
    """H = 2/N Σ x xᵀ over the inputs of the kept samples, (in, in) in float64; x are patches for a convolution.

    Source: GPTQ (Frantar et al. 2022, arXiv:2210.17323), its source code.

    Args:
        seen: the layer's captures, samples in order.
        kept: (samples,) which of them count.

    Raises:
        ValueError: if the layer is neither dense nor a two-dimensional convolution without groups.
    """
    total, count, first = torch.zeros(()), 0, 0
    for capture in seen:
        wanted = torch.from_numpy(kept[first : first + capture.samples])
        first += capture.samples
        for call in capture.calls:
            rows = _patches(call, capture)[wanted].flatten(0, 1)
            total, count = total + rows.T @ rows, count + len(rows)
    return 2 * total / max(count, 1)


def _patches(call: Call, capture: Capture) -> Tensor:
    """(samples, positions, in): what each output position is a product with."""
    module: Any = call.module
    if is_dense(module, call.parameter):
        return by_sample(call.inputs.double(), capture.samples)
    if is_stock(module, (nn.Conv2d,), call.parameter) and module.groups == 1:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = functional.pad(call.inputs.double(), module._reversed_padding_repeated_twice, mode=mode)
        how = {"dilation": module.dilation, "stride": module.stride}
        return functional.unfold(padded, module.kernel_size, **how).mT
    raise ValueError(
        f"this criterion needs dense layers or ordinary convolutions, {capture.layer.name!r} is "
        f"{capture.layer.kind}: use criterion='fisher'"
    )
