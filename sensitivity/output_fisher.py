"""Expected increase of the loss from each layer's output error and the gradient there, in one pass for all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpq.layers import block_size

from .measurement import Measurement
from .one_pass import OnePassEstimator, SeenLayer
from .products import Product
from .unit_sums import sum_over_cells


@dataclass(frozen=True, kw_only=True)
class OutputFisher(OnePassEstimator):
    """½ the mean over samples of Σ (dL/dY ⊙ (Y_option - Y))²: a second-order estimate in each layer's output.

        score(l, o) = 1/(2N) Σ_j 1/T_j Σ_i ( g_ji ΔY_ji )²

    g_j is the gradient of sample j's loss **summed** over its T_j positions, labels drawn independently for each
    position, so that E g gᵀ is the Gauss-Newton matrix of the outputs; ΔY the change of the layer's output when its
    weight, and its input where the option says so, are quantised. Only the diagonal of g gᵀ is used. Model Optimizer's
    gradient score is the same sum with the data's labels and without ½ (its source, `auto_quantize`).

    When to use: any model whose layers are modules; the cost does not grow with the number of layers times options.
    When not: below 3 bits, where a quadratic is a poor picture of the loss.

    Args:
        labels: where the gradient's labels come from: "data", "model" (drawn from the model's own distribution), or
            "auto", the data's where it has labels.
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.

    Cost: one forward and one backward to the layers' outputs, and one more forward of every layer an option. Standard
    errors are over samples. Memory: every layer's input until its gradient has come.

    Example:
        >>> OutputFisher(labels="model")
        OutputFisher(labels='model', keep_bytes=4294967296)
    """

    @property
    def asks_for(self) -> frozenset[Product]:
        """The products it needs."""
        return frozenset({"output"})

    def check(self, measurement: Measurement) -> None:
        """Check that the layers have outputs to watch, a unit each.

        Raises:
            ValueError: if not.
        """
        for layer in measurement.network.layers:
            if layer.module is None:
                raise ValueError(
                    f"output_fisher watches modules, the weight of {layer.name!r} is used by a function: "
                    "use kl or fisher"
                )
        if block_size(measurement.granularity)[0] == "groups":
            raise ValueError(
                f"granularity must be 'layer' or 'rows' for a score of layer outputs, got {measurement.granularity!r}: "
                "use fisher or weight_error"
            )

    def sample_scores(self, seen: SeenLayer) -> Tensor:
        """(samples, units of the layer, options)."""
        return sum_over_cells(seen.products["output"], seen.granularity) / (2 * seen.positions)
