"""The average Gauss-Newton trace of a layer, from Gram matrices, times its squared quantisation error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from .gauss_newton import Probe, gauss_newton_draws
from .measurement import Measurement, Scores
from .trace_estimators import StoppingRule
from .trace_scores import AverageTraces, quantised_inputs, trace_scores


@dataclass(frozen=True, kw_only=True)
class GGNTrace:
    """½ · average trace of the Gauss-Newton matrix · squared quantisation error, of weights and of layer inputs.

        score(l, o) = ½ Tr(G_l)/n_l · ||ΔW||² + ½ Tr(G_x)/n_x · mean_j ||Δx_j||²,    G = JᵀH_out J

    `hessian_trace` with the positive part of the Hessian, which for cross entropy is the Fisher information: the
    curvature of the divergence from full precision. Every layer's trace comes from one forward and one backward a draw
    (`mpq.sensitivity.gauss_newton`, own derivation); labels of the data are not used. Rows and groups take the layer's
    average trace times their own error.

    Standard errors are over samples and hold the noise of the probes as well.

    When to use: in place of `hessian_trace`, at a tenth of its cost and less. When not: the task is a loss function of
    your own, whose outputs have no known distribution.

    Args:
        draws: probes of every sample's outputs at most; at least two are drawn.
        tolerance: relative standard error of every layer's trace over probes, the data fixed, at which drawing ends; 0
            takes all draws.
        probe: "signs", or "labels" drawn from the model's distribution, see `mpq.sensitivity.gauss_newton`.

    Cost: one forward and one backward a draw, and the Grams. With inputs to be quantised another backward a layer.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> from mpq.options import SearchSpace
        >>> from mpq.sensitivity import estimate
        >>> model, data = torch.nn.Linear(4, 3).eval(), torch.randn(8, 4)
        >>> frame = estimate(model, data, trace(model, data), SearchSpace(["int2", "int8"]), "ggn_trace")
        >>> bool(frame["sensitivity"].iloc[0] > frame["sensitivity"].iloc[1] > 0)
        True
    """

    draws: int = 16
    tolerance: float = 0.05
    probe: Probe = "signs"

    def __post_init__(self) -> None:
        if self.probe not in get_args(Probe):
            raise ValueError(f"probe must be one of {', '.join(get_args(Probe))}, got {self.probe!r}")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 2:
            raise ValueError(f"draws must be a whole number of at least 2, one has no spread, got {self.draws!r}")
        StoppingRule(tolerance=self.tolerance)

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit.

        Raises:
            ValueError: if the task is a loss function, a gradient cannot be had or is not finite, or an input is to be
                quantised that no module receives.
        """
        rule = StoppingRule(probes=self.draws, tolerance=self.tolerance)
        inputs = tuple(quantised_inputs(measurement))
        found = gauss_newton_draws(measurement, rule, probe=self.probe, inputs=inputs)
        counts = np.array([layer.parameters for layer in measurement.network.layers])
        per_sample = np.stack([found.weights.mean(0) / counts[:, None], found.inputs.mean(0)], axis=1)
        samples = per_sample.shape[2]
        centred = per_sample - per_sample.mean(2, keepdims=True)
        covariance = centred @ centred.transpose(0, 2, 1) / (samples * max(samples - 1, 1))
        return trace_scores(measurement, AverageTraces(mean=per_sample.mean(2), covariance=covariance))
