"""Measured noise-to-signal ratio of the model's outputs with one layer quantised at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpq.tasks import CustomLoss, Features, Outputs, Task

from .single_layer import SingleLayer


@dataclass(frozen=True, kw_only=True)
class SQNR(SingleLayer):
    """Mean over samples of the noise-to-signal ratio of the model's outputs: the inverse of their SQNR.

        score(l, o) = 1/N Σ_j ‖z_j(layer l takes o) - z_j‖² / ‖z_j‖²        SQNR in dB = -10 log10 score

    The ratio, not decibels: lower is better, full precision scores 0, and ratios of several layers add up to first
    order, which decibels do not. Ranking layers by it, one at a time, is phase 1 of the mixed-precision search in AIMET
    (Pandey et al. 2023, from memory), which keeps the others in full precision or, here with `base`, in a low one.
    Padding does not count; a sample whose outputs are all but zero counts as if it had a millionth of the mean signal.

    When to use: no labels, and outputs of any kind. When not: classification, where `KL` knows which changes matter.

    Cost: as `SingleLayer`: layers x options passes over the data, each from its layer on.

    Args:
        base: precision of all other layers: "full", or an option such as "int8".
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.
    """

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) noise over signal.

        Raises:
            ValueError: if the task is a loss of the user's own, which has no outputs.
        """
        if isinstance(task, CustomLoss):
            raise ValueError("sqnr compares outputs, a loss function has none: use loss or kl")
        return Features().divergence(exact, outputs)

    def measured_in(self, task: Task) -> str:
        """A score: no loss."""
        return "score"
