"""Measured squared error of the model's outputs with one layer quantised at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpq.tasks import CustomLoss, Outputs, Task

from .single_layer import SingleLayer


@dataclass(frozen=True, kw_only=True)
class OutputMSE(SingleLayer):
    """Mean over samples, positions and outputs of the squared change of the model's outputs (logits, if it has them).

        score(l, o) = 1/N Σ_j mean_i ( z_ji(layer l takes o) - z_ji )²

    This is the distortion of RD-PRUNE (its published code, there for pruning rates), which adds up over layers to first
    order, cross terms having zero mean. Its other reading, the largest error of any sample, has no standard error and
    is left out. Padding does not count. The unit is that of the outputs squared: scores of two models do not compare.

    When to use: outputs that are no distribution, or logits used as features. When not: classification, where a shift
    of all logits counts here and changes nothing.

    Cost: as `SingleLayer`: layers x options passes over the data, each from its layer on.

    Args:
        base: precision of all other layers: "full", or an option such as "int8".
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.
    """

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) mean squared differences.

        Raises:
            ValueError: if the task is a loss of the user's own, which has no outputs.
        """
        if isinstance(task, CustomLoss):
            raise ValueError("output_mse compares outputs, a loss function has none: use loss or kl")
        per_position = (outputs.values.double() - exact.values.double()).square().mean(-1)
        table = per_position.reshape(exact.values.shape[0], -1)
        if exact.mask is not None:
            table = table.masked_fill(~exact.mask.reshape(table.shape), 0)
        return table.sum(1) / exact.positions()

    def measured_in(self, task: Task) -> str:
        """A score: no loss."""
        return "score"
