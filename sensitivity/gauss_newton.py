"""Gauss-Newton traces of every layer from one forward and one backward a draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.batches import Batch, samples_in
from mpq.progress import track
from mpq.tasks import CustomLoss, Distribution, Outputs

from .gradient_grams import squared_norms
from .gradient_pass import Capture, captures
from .layer_probes import LayerTrace
from .measurement import Measurement
from .trace_estimators import FEWEST_PROBES, StoppingRule, seed_of, standard_error_factor
from .weight_gradients import by_sample, is_dense

Probe = Literal["signs", "labels"]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GaussNewtonDraws:
    """Squared gradient norms of random probes of the outputs, whose mean is the Gauss-Newton trace.

    Attributes:
        weights: (draws, layers, samples): ||G_j||_F² / T_j of the layer's weight.
        inputs: (draws, layers, samples): ||dL_j/dx||² / T_j of the layer's inputs x, over the elements of x_j.
    """

    weights: Array
    inputs: Array

    def traces(self) -> list[LayerTrace]:
        """Trace of each layer with its standard error over probes, the data fixed."""
        means, errors = self.weights.mean((0, 2)).tolist(), probe_errors(self.weights).tolist()
        return [LayerTrace(mean, error, len(self.weights), "gram") for mean, error in zip(means, errors, strict=True)]


def gauss_newton_draws(
    measurement: Measurement, rule: StoppingRule, *, probe: Probe = "signs", inputs: Sequence[int] = ()
) -> GaussNewtonDraws:
    """Draw probes of the outputs until the trace of every layer's weight meets the rule.

        Tr(GGN_l) = mean_j 1/T_j E || Σ_t J_l,jtᵀ v_jt ||²,    E v vᵀ = H_out for each position t, independently
        labels   v = p - e_y, y drawn from p                  signs   v = √p ⊙ z - p (√p . z), z random signs

    Both have the covariance H_out = diag(p) - p pᵀ of the cross entropy. Signs are the better choice where the model is
    sure of its answers: drawn labels are then rarely any but the likeliest, and seldom great. Outputs that are no
    distribution take the task's own probes (random signs), whatever `probe` says. The sum over positions is
    back-propagated, and its square divided by T_j once.

    At least two draws; a sample's values differ between draws by the probe alone, and that spread over samples and
    draws is the standard error. `rule.probes` is the number of draws.

    Args:
        measurement: model, data and task.
        rule: when to stop.
        probe: see above.
        inputs: positions of the layers whose inputs are wanted as well; 0 for the others.

    Cost: one forward and one backward a draw, and for every layer the smaller of its per-sample gradients and their
    Grams (`mpq.sensitivity.gradient_grams`).

    Raises:
        ValueError: if the task is a loss function, whose outputs have no known distribution; or a gradient cannot be
            had (`mpq.sensitivity.gradient_pass.captures`).
    """
    if isinstance(measurement.task, CustomLoss):
        raise ValueError(
            "a Gauss-Newton trace needs outputs whose distribution is known, the task is a loss function: use the "
            "Hessian (hessian_trace, curvature='hessian') or a task such as 'classification'"
        )
    if probe == "signs" and isinstance(measurement.task, Distribution):
        measurement = replace(measurement, task=SignProbes(measurement.task))
    samples = samples_in(measurement.batches)
    wanted = min(rule.probes, max(2, 1 + math.ceil((FEWEST_PROBES - 1) / samples)))
    drawn: list[Array] = []
    while True:
        for number in track(range(len(drawn), wanted), "Gauss-Newton", shown=measurement.progress):
            drawn.append(_draw(measurement, number, tuple(inputs)))
        values = np.stack(drawn)
        traces, errors = values[:, 0].mean((0, 2)), probe_errors(values[:, 0])
        if wanted == rule.probes or all(map(rule.met, traces.tolist(), errors.tolist())):
            return GaussNewtonDraws(weights=values[:, 0], inputs=values[:, 1])
        wanted = min(
            rule.probes, max(wanted + 1, min(2 * wanted, math.ceil(wanted * _shortfall(traces, errors, rule))))
        )


def probe_errors(values: Array) -> Array:
    """(layers,): standard errors of the means of (draws, layers, samples) over draws, the samples fixed."""
    draws, _, samples = values.shape
    variance = values.var(axis=0, ddof=1).sum(axis=1) / (draws * samples**2)
    errors: Array = np.sqrt(variance) * standard_error_factor(samples * (draws - 1))
    return errors


def _shortfall(traces: Array, errors: Array, rule: StoppingRule) -> float:
    """By what factor draws fall short, at most 2."""
    targets = np.array([rule.target(trace) for trace in traces.tolist()])
    known = targets > 0
    return 2.0 if not known.all() else float(min(2.0, 1.1 * ((errors / targets) ** 2).max()))


def _draw(measurement: Measurement, number: int, inputs: tuple[int, ...]) -> Array:
    """(weights or inputs, layers, samples) of one draw over all batches."""
    measurement = replace(measurement, seed=seed_of(measurement.seed, number))

    def norms_of(index: int) -> Array:
        make = partial(_norms, measurement, index, inputs)
        return measurement.pieces.get(f"draw {number} batch {index} inputs {inputs}", make)

    return np.concatenate(list(measurement.ranks.shared(range(len(measurement.batches)), norms_of)), axis=2)


def _norms(measurement: Measurement, index: int, inputs: tuple[int, ...]) -> Array:
    """(weights or inputs, layers, samples) of one draw on one batch."""
    layers = measurement.network.layers
    found: list[list[list[Tensor]]] = [[[] for _ in layers] for _ in range(2)]

    def receive(capture: Capture) -> None:
        positions = capture.positions.double().cpu()
        found[0][capture.position].append(squared_norms(capture).cpu() / positions)
        of_input = input_norms(capture) if capture.position in inputs else torch.zeros(capture.samples).double()
        found[1][capture.position].append(of_input.cpu() / positions)

    captures(measurement, index, "model", receive, functional=True)
    return np.array([[torch.cat(samples).numpy() for samples in row] for row in found])


def input_norms(capture: Capture) -> Tensor:
    """(samples,): squared norm of the gradient at a layer's inputs, over all its calls, a mean over the elements."""
    total = torch.zeros(capture.samples, dtype=torch.float64, device=capture.parameter.device)
    elements = 0
    for call in capture.calls:
        if isinstance(call.module, nn.Embedding):
            continue
        if is_dense(call.module, call.parameter):
            weight = call.parameter if isinstance(call.module, nn.Linear) else call.parameter.T
            gradient = call.gradient @ weight.to(call.gradient.dtype)
        else:
            largest = call.gradient.abs().max().clamp_min(torch.finfo(call.gradient.dtype).tiny)
            with torch.enable_grad():  # scaled: half precision would lose small gradients
                leaf = call.inputs.detach().clone().requires_grad_()
                output = call.apply(leaf)
                (gradient,) = torch.autograd.grad(output, leaf, (call.gradient / largest).to(output.dtype))
            gradient = gradient.to(call.gradient.dtype) * largest
        total += by_sample(gradient, capture.samples).flatten(1).square().sum(1, dtype=torch.float64)
        elements += gradient.numel() // capture.samples
    return total / max(elements, 1)


@dataclass(frozen=True)
class SignProbes:
    """A distribution's task whose output probes are random signs through a root of H_out rather than drawn labels."""

    task: Distribution

    @property
    def measured_in(self) -> str:
        """As the task."""
        return self.task.measured_in

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """As the task."""
        return self.task.run(model, batch)

    def losses(self, outputs: Outputs) -> Tensor | None:
        """As the task."""
        return self.task.losses(outputs)

    def sampled_losses(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """Logits times v = √p ⊙ z - p (√p . z), summed over positions: v is their gradient, its covariance H_out."""
        logits = outputs.values if outputs.values.dtype == torch.float64 else outputs.values.float()
        probabilities = logits.detach().softmax(-1)
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        rooted = probabilities.sqrt() * signs
        probes = rooted - probabilities * rooted.sum(-1, keepdim=True)
        terms = (logits.masked_fill(probabilities == 0, 0) * probes).sum(-1)  # classes ruled out have logits of -inf
        if outputs.mask is not None:
            terms = terms.masked_fill(~outputs.mask, 0)
        return terms.reshape(logits.shape[0], -1).sum(1)

    def divergence(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """As the task."""
        return self.task.divergence(reference, outputs)

    def agreement(self, reference: Outputs, outputs: Outputs) -> Tensor | None:
        """As the task."""
        return self.task.agreement(reference, outputs)
