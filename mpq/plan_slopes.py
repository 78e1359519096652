"""`plan_slopes`: how a plan's divergence changes, to first order, with every option of every unit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.attention_operators import is_operator
from mpq.expert_units import granularity_in
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import weight_format
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

if TYPE_CHECKING:
    from mpq.evaluator import Evaluator


def plan_slopes(
    evaluator: Evaluator, choices: NDArray[np.int64], pieces: range
) -> tuple[NDArray[np.float64], float] | None:
    """(units, options): the slope of the mean divergence towards every option of every unit at a plan, and that mean.

        slope(u, o) = 1/N Σ_j  ∂D_j/∂W_u · (Q_o(W_u) - Q_c(W_u)),        c the plan's option of the unit

    with D_j the task's divergence of sample j, W at the plan's quantised values. The first-order part of a Taylor
    series, as in `first_order`, but with its sign and around the plan rather than full precision: what other layers'
    errors make of a change is in it, which no table of single layers knows. The second order is not: where slope(u, o)
    is as large as the divergence itself it says little.

    Gradients pass straight through the rounding of inputs (Bengio et al. 2013); what an option does to a layer's input,
    or an operator of attention, is not in its slope. On float16 models the divergence is scaled up before the backward.

    Args:
        evaluator: has the model, the table, the quantiser and the data.
        choices: (units,) the plan.
        pieces: of the evaluator's data.

    Returns:
        None if the divergence has no gradient, or one that is not finite; with a warning if autograd fails, or memory.

    Cost: a forward and a backward over the data, and memory for two gradients of all weights of the table.
    """
    try:
        return _slopes(evaluator, choices, pieces)
    except RuntimeError as error:
        warnings.warn(f"the search goes on without gradients: {error}", stacklevel=2)
        return None


def _slopes(
    evaluator: Evaluator, choices: NDArray[np.int64], pieces: range
) -> tuple[NDArray[np.float64], float] | None:
    layers = [layer for layer in evaluator.table.layers if not is_operator(layer)]
    # aliases are one parameter, or several that share their data
    parameters = [list(dict.fromkeys(layer_parameters(evaluator.model, layer))) for layer in layers]
    with _only_asking(evaluator.model, [one for each in parameters for one in each]):
        found = _gradients(evaluator, choices, pieces, parameters)
    if found is None:
        return None
    gradients, divergence = found
    slopes = np.zeros((len(choices), len(evaluator.table.options)))
    index = np.asarray(evaluator.table.layer_index)
    for position, layer in enumerate(evaluator.table.layers):
        if not is_operator(layer):
            mine = np.flatnonzero(index == position)
            gradient = as_rows(gradients.pop(0), layer)
            each = _towards(evaluator, layer, gradient, evaluator.table.allowed[mine])
            slopes[mine] = each - each[np.arange(len(mine)), choices[mine]][:, None]
    return (slopes, divergence) if np.isfinite(slopes).all() else None


def _gradients(
    evaluator: Evaluator, choices: NDArray[np.int64], pieces: range, parameters: list[list[nn.Parameter]]
) -> tuple[list[Tensor], float] | None:
    """Gradients of the mean divergence with respect to every layer's weight, and that mean; None without gradients."""
    totals = [torch.zeros_like(each[0], dtype=torch.promote_types(each[0].dtype, torch.float32)) for each in parameters]
    flat = [(total, one) for total, each in zip(totals, parameters, strict=True) for one in each]
    samples, added = 0, 0.0
    with torch.enable_grad(), closing(evaluator.outputs(choices, pieces)) as pairs:
        for reference, outputs in pairs:
            divergence = evaluator.task.divergence(reference, outputs)
            if not divergence.requires_grad:
                return None
            samples += len(divergence)
            added += float(divergence.detach().sum())
            for (total, _), gradient in zip(flat, _scaled(divergence.sum(), [one for _, one in flat]), strict=True):
                total.add_(gradient)
    return [total.div_(samples) for total in totals], added / samples


def _scaled(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a loss, in single precision at least; with float16, of as large a multiple as stays finite."""
    half = any(parameter.dtype == torch.float16 for parameter in parameters)
    scales = import_module("mpq.sensitivity.gradient_pass").LOSS_SCALES if half else (1.0,)
    for scale in scales:
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True, retain_graph=half)
        if all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            break
    pairs = zip(found, parameters, strict=True)
    return [
        (torch.zeros_like(one) if gradient is None else gradient).to(torch.promote_types(one.dtype, torch.float32))
        / scale
        for gradient, one in pairs
    ]


def _towards(evaluator: Evaluator, layer: Layer, gradient: Tensor, allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(units of the layer, options): gradient times what each option changes in the exact weight."""
    granularity = evaluator.table.granularity
    exact = as_rows(layer_parameters(evaluator.model, layer)[0].detach(), layer)
    sum_over_units = import_module("mpq.sensitivity.unit_sums").sum_over_units
    found = np.zeros(allowed.shape)
    for option in np.flatnonzero(allowed.any(0)).tolist():
        fmt = weight_format(Option.parse(evaluator.table.options[option]))
        change = evaluator.weights.units(exact, fmt, layer, granularity) - exact
        each = (gradient * change).reshape(len(exact), -1).double()
        found[:, option] = sum_over_units(each, granularity_in(layer, granularity)).cpu().numpy()
    return found


@contextmanager
def _only_asking(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """A model of which these parameters alone ask for gradients for a while."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    asking = set(parameters)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in asking)
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
