"""Measured increase of the loss with one layer quantised at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpq.tasks import Outputs, Task

from .single_layer import SingleLayer


@dataclass(frozen=True, kw_only=True)
class Loss(SingleLayer):
    """Mean over samples of the loss against the data's labels, minus that before the layer was quantised.

        score(l, o) = 1/N Σ_j [ L_j(layer l takes o, the others base) - L_j(all base) ]

    With `base="int8"` this is the table of CalibTIP's integer program (Hubara et al. 2021, its published code), but for
    one thing: there, differences are clamped at 1e-6 from below, which hides layers whose quantisation lowers the
    loss. Here the sign is kept, with the standard error of the paired differences beside it.

    When to use: there are labels and enough of them; the loss is what counts. When not: on few samples; the divergence
    (`KL`) has far less noise, being 0 wherever outputs do not move.

    Cost: as `SingleLayer`: layers x options passes over the data, each from its layer on.

    Args:
        base: precision of all other layers: "full", or an option such as "int8".
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.
    """

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) losses.

        Raises:
            ValueError: if the data has no labels.
        """
        losses = task.losses(outputs)
        if losses is None:
            raise ValueError("loss needs data with labels and a task whose loss they give: use kl")
        return losses

    def measured_in(self, task: Task) -> str:
        """Always the loss."""
        return "loss"
