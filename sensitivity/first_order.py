"""First-order scores: gradient times weight change, in absolute values or as an inner product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mpq.formats import NumberFormat
from mpq.layers import Layer
from mpq.options import Option
from mpq.quantizer import Quantizer, quantised_rows
from mpq.surgery import layer_parameters
from mpq.weight_view import as_rows

from .gradient_pass import Labels
from .layer_runs import FULL, LayerRuns, base_option
from .measurement import Measurement, Scores
from .one_pass import OnePassEstimator, SeenLayer
from .products import Product
from .unit_sums import sum_over_cells

Mode = Literal["absolute", "llm-mq"]


@dataclass(frozen=True, kw_only=True)
class FirstOrder(OnePassEstimator):
    """The loss's change to first order: Σ |g ⊙ ΔW| ("absolute") or |g · ΔW| ("llm-mq").

        absolute    score(u, o) = 1/N Σ_j 1/T_j ( Σ_{i in u} |G_ji ΔW_i| + Σ_t,i |(∂L_j/∂x)_ti Δx_ti| )
        llm-mq      score(u, o) = | 1/N Σ_j 1/T_j G_j · ΔW_u |

    G_j is the gradient of sample j's loss **summed** over its T_j positions, x the layer's input where the option
    quantises it; ∂L/∂x is what reaches the loss through this layer.

    "absolute" is the delta loss of AutoRound's AutoScheme (SignRoundV2; read in its source, `auto_scheme/
    delta_loss.py`), with two differences. AutoRound takes the gradient in the quantised model, one pass a scheme with
    every layer wrapped, so that scores of different schemes belong to different points; here it is taken once, with all
    weights at `base`, in full precision by default: with the option that is scored as the base, it is AutoRound's.
    AutoRound takes absolute values a batch, here a sample, so that the score does not depend on how the data is cut
    into batches. AutoRound counts weights only where some scheme is weight-only; here both parts always count.

    "llm-mq" is LLM-MQ's score (from memory and its abstract), with the inner product over the unit. Where it cancels, a
    layer looks free; use it with fine units only, or not at all. Its input part is Σ_t,r g_tr (W Δx)_tr.

    When to use: as a baseline, or where the loss's gradient is far from zero, as on text the model was not made for.
    When not: on data the model has learnt, where the first order vanishes and the second decides.

    Args:
        mode: "absolute" or "llm-mq".
        labels: "data", "model" or "auto" (the data's where it has labels). An inner product needs the data's: with
            labels drawn from the model its mean is zero.
        base: where the gradient is taken: "full" precision, or all weights in an option of weights alone, such as
            "int4". ΔW is the option's distance from full precision either way. A pass of its own: `estimate_together`
            shares none with it.
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.

    The measure is "score": neither is the expected increase of the loss. For a loss that is linear in the weight,
    "llm-mq" is the exact change's size, and "absolute" at least that, equal where all terms have one sign.

    Cost: that of `Fisher`; with a base, the quantised weights are in memory as well. Standard errors are over samples.

    Raises:
        ValueError: if there is no such mode, its labels cannot be the model's, or the base quantises inputs, which have
            no gradient.

    Example:
        >>> FirstOrder(mode="llm-mq")
        FirstOrder(labels='data', keep_bytes=4294967296, mode='llm-mq', base='full')
    """

    labels: Labels = "data"
    mode: Mode = "absolute"
    base: str | Option = FULL

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.mode == "llm-mq" and self.labels != "data":
            raise ValueError(
                f"labels must be 'data' for mode 'llm-mq', got {self.labels!r}: with labels drawn from the model the "
                "inner product is zero in the mean; use mode 'absolute'"
            )

        base = base_option(self.base)
        if base is not None and base.activation is not None:
            raise ValueError(
                f"base must quantise weights alone, got {str(base)!r}: rounded inputs have no gradient; use "
                f"{base.label.split('/')[0]!r}"
            )

    @property
    def shares_pass(self) -> bool:
        """Whether its gradients are those at full precision."""
        return base_option(self.base) is None

    def __call__(self, measurement: Measurement) -> Scores:
        """Score every candidate option of every unit.

        Raises:
            ValueError: as `OnePassEstimator` does.
        """
        base = base_option(self.base)
        if base is None:
            return super().__call__(measurement)
        layers = measurement.network.layers
        exact = {layer.name: layer_parameters(measurement.model, layer)[0].data for layer in layers}
        displaced = replace(measurement, quantizer=_Displaced(measurement.quantizer, exact))
        with LayerRuns(measurement, base, keep_bytes=0).at_base():
            return super().__call__(displaced)

    @property
    def asks_for(self) -> frozenset[Product]:
        """The products it needs."""
        absolute: frozenset[Product] = frozenset({"absolute", "input_absolute"})
        return absolute if self.mode == "absolute" else frozenset({"signed", "input_signed"})

    def sample_scores(self, seen: SeenLayer) -> Tensor:
        """(samples, units of the layer, options); with a sign for "llm-mq"."""
        if self.mode == "absolute":
            cells = seen.added("absolute", "input_absolute")
        else:
            cells = seen.added("signed", "input_signed")
        return sum_over_cells(cells, seen.granularity) / seen.positions

    def finished(self, scores: Scores) -> Scores:
        """Absolute values of the means; the standard error is the inner product's."""
        return replace(scores, mean=np.abs(scores.mean), measure="score")


@dataclass(frozen=True)
class _Displaced:
    """Quantised weights moved to where a base is: they are Q(W) - W away from it, W being in full precision."""

    quantizer: Quantizer
    exact: Mapping[str, Tensor]

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        """For whole layers."""
        return self.units(rows, fmt, layer, "layer")

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        """In single precision at least, as the sum is none that half precision holds."""
        exact = as_rows(self.exact[layer.name], layer)
        quantised = quantised_rows(exact, fmt, layer, granularity, self.quantizer)
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(wide) + (quantised.to(wide) - exact.to(wide))
