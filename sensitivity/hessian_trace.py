"""HAWQ-V2: the average trace of a layer's Hessian times its squared quantisation error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from .gradient_pass import Labels, check_labels
from .measurement import Measurement, Scores
from .trace_estimators import StoppingRule
from .trace_scores import AverageTraces, quantised_inputs, trace_scores
from .traces import Algorithm, Blocks


@dataclass(frozen=True, kw_only=True)
class HessianTrace:
    """½ · average trace of the Hessian · squared quantisation error, of weights and of layer inputs.

        score(l, o) = ½ Tr(H_l)/n_l · ||ΔW||² + ½ Tr(H_x)/n_x · mean_j ||Δx_j||²

    The second-order term of the loss where the error has no preferred direction (Z. Dong et al., HAWQ-V2, from memory;
    ½ is ours, so that a score is an increase of the mean loss). H_l is the diagonal block of the mean loss over all
    samples, n_l the layer's weights. H_x is block diagonal over samples and never formed: x is a layer's input, n_x its
    elements a sample, and zᵀ d/dx (g_x . z) for random signs z gives the trace of a sample's own loss. Rows and groups
    take the layer's average trace times their own error. The gradient term and terms between layers are left out.

    The Hessian is indefinite, and a layer's trace may be negative: it counts as zero here (`layer_traces` shows it as
    it is; `ggn_trace` has none). Where the outputs are piecewise linear in a layer's weight, as in ReLU networks
    without shared weights, its block is the Gauss-Newton block, and a negative estimate is the noise of joint probes;
    curved activations, attention and modules that are called twice make real ones. Standard errors are those of the
    traces over probes, the data fixed; the spread over samples is not in them.

    When to use: to reproduce HAWQ, or where the loss is a function of your own. When not: `ggn_trace` costs a tenth and
    is positive; both know one number a layer, and methods that see which weights matter do better.

    Args:
        probes: products with the Hessian a layer at most.
        tolerance: relative standard error at which a layer's trace is done; 0 takes all probes.
        absolute_tolerance: added to it, in units of the trace.
        algorithm: "auto", "joint", "block", "hutch++" or "xtrace", see `mpq.sensitivity.layer_traces`.
        labels: "data", "model", or "auto", the data's where it has labels and the task measures a loss.

    Cost: a product with the Hessian is about four to eight forwards; a product a probe for all layers, or a layer.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> from mpq.options import SearchSpace
        >>> from mpq.sensitivity import estimate
        >>> model, data = torch.nn.Linear(4, 3).eval(), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
        >>> frame = estimate(model, data, trace(model, data[0]), SearchSpace(["int4", "fp32"]), "hessian_trace")
        >>> frame.attrs["measure"], float(frame["sensitivity"].iloc[1])
        ('loss', 0.0)
    """

    probes: int = 256
    tolerance: float = 0.05
    absolute_tolerance: float = 0.0
    algorithm: Algorithm = "auto"
    labels: Labels = "auto"

    def __post_init__(self) -> None:
        check_labels(self.labels)
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {self.algorithm!r}")
        self._rule()

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit.

        Raises:
            ValueError: if the model cannot be differentiated twice, curvature is not finite, or an input is to be
                quantised that no module receives.
        """
        labels = "model" if self.labels == "auto" and measurement.task.measured_in != "loss" else self.labels
        blocks = Blocks(rule=self._rule(), algorithm=self.algorithm, labels=labels)
        layers = measurement.network.layers
        mean, covariance = np.zeros((len(layers), 2)), np.zeros((len(layers), 2, 2))
        inputs = quantised_inputs(measurement)
        for position, found in blocks.weight_traces(measurement).items():
            count = layers[position].parameters
            mean[position, 0], covariance[position, 0, 0] = found.trace / count, (found.standard_error / count) ** 2
        for position, found in blocks.input_traces(measurement, tuple(inputs)).items():
            mean[position, 1], covariance[position, 1, 1] = found.trace, found.standard_error**2
        return trace_scores(measurement, AverageTraces(mean=mean, covariance=covariance))

    def _rule(self) -> StoppingRule:
        return StoppingRule(probes=self.probes, tolerance=self.tolerance, absolute_tolerance=self.absolute_tolerance)
