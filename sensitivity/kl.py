"""Measured divergence from full precision with one layer quantised at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpq.tasks import Outputs, Task

from .single_layer import SingleLayer


@dataclass(frozen=True, kw_only=True)
class KL(SingleLayer):
    """Mean over samples and positions of KL(p || q), q with only that layer quantised, all else in full precision.

        score(l, o) = 1/N Σ_j KL( softmax(z_j) || softmax(z_j; layer l takes o) )

    Full precision comes first in the divergence, as is standard. Outputs that are no distribution are compared by
    relative squared error, a loss of the user's own by its increase. On a low-precision `base` it is the growth of the
    divergence from full precision, negative for options finer than the base.

    When to use: small models, where it is cheaper and truer than any estimate. When not: language models on little
    data, where single differences drown in the interaction of layers.

    Cost: layers x options passes over the data, each from its layer on (`SingleLayer`). The standard error is over
    samples.

    Args:
        base: precision of all other layers: "full", or an option such as "int8".
        keep_bytes: of outputs kept so that what comes before a layer is not run again; 0: full runs.
    """

    def distance(self, task: Task, exact: Outputs, outputs: Outputs) -> Tensor:
        """(samples,) the task's divergence."""
        return task.divergence(exact, outputs)
