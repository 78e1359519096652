"""The diagonal of the Fisher information times the squared change of every weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .gradient_pass import Labels
from .one_pass import OnePassEstimator, SeenLayer
from .products import Product
from .unit_sums import sum_over_cells


@dataclass(frozen=True, kw_only=True)
class Fisher(OnePassEstimator):
    """½ the mean over samples of Σ (G ⊙ ΔW)²: a second-order estimate from the diagonal of the Fisher matrix.

        score(u, o) = 1/(2N) Σ_j 1/T_j Σ_{i in u} G_ji² ΔW_i²

    G_j is the gradient of sample j's loss **summed** over its T_j positions, each sample's on its own: a batch's mean
    gradient squared is too small by about the batch. With labels drawn from the model's own distribution, each position
    on its own, this is the diagonal of the true Fisher matrix, which is the Gauss-Newton matrix of the cross entropy;
    with the data's labels it is the "empirical" Fisher matrix, as cheap, and wrong in scale where the model is not
    calibrated. The diagonal in place of the Hessian's is common to many papers; the form is from memory, and checked
    against the exact Gauss-Newton quadratic of a softmax regression.

    Where an option quantises the layer's input as well, the diagonal form of the output's change by it is added,
    1/(2N) Σ_j 1/T_j Σ_t,r (g_jtr Δy_jtr)², Δy = W Δx, without the cross term of weight and input; groups of columns
    share it as `mpq.sensitivity.products` says.

    When to use: language models, where single measured differences drown in noise, and units down to groups of weights:
    on one of 135 million weights at 4 bits, groups of 64 that take their own width halved the divergence of whole
    untied layers that do (measured: .140 against .276 nats; sensitivity/README.md). When not: on small nets, where
    measuring is affordable.

    Args:
        labels: "model" (true Fisher), "data" (empirical), or "auto", the data's where it has labels.
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.

    Cost: one forward and one backward, and one product the size of a forward for the samples' weight gradients; every
    option quantised once. Standard errors are over samples. Memory: every layer's input until its gradient has come.

    Example:
        >>> import torch
        >>> from mpq import trace
        >>> from mpq.options import SearchSpace
        >>> from mpq.sensitivity import estimate
        >>> model, data = torch.nn.Linear(4, 3).eval(), torch.randn(8, 4)
        >>> frame = estimate(model, data, trace(model, data), SearchSpace(["int2", "int8"]), "fisher")
        >>> bool((frame["sensitivity"].to_numpy()[0] > frame["sensitivity"].to_numpy()[1]))
        True
    """

    labels: Labels = "model"

    @property
    def asks_for(self) -> frozenset[Product]:
        """The products it needs."""
        return frozenset({"squared", "input_squared"})

    def sample_scores(self, seen: SeenLayer) -> Tensor:
        """(samples, units of the layer, options)."""
        cells = seen.added("squared", "input_squared")
        return sum_over_cells(cells, seen.granularity) / (2 * seen.positions)
