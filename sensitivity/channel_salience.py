"""Global salience of output channels: first- and second-order change of the loss by each row of a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .measurement import Scores
from .one_pass import OnePassEstimator, SeenLayer
from .products import Product
from .unit_sums import sum_over_cells


@dataclass(frozen=True, kw_only=True)
class ChannelSalience(OnePassEstimator):
    """Mean over samples of |s + ½ s²|, s the inner product of one channel's gradient and weight change (MixLLM).

        s_jo = G_jo · ΔW_o / T_j         score(o) = 1/N Σ_j | s_jo + ½ s_jo² |

    G_jo is row o of the gradient of sample j's loss, summed over positions; divided by T_j it is that of the sample's
    mean loss, as MixLLM takes it (its source, `searcher.py`, which sums over samples: the ranking is the same). A unit
    of several rows, such as a layer, adds up its rows; a group of columns counts as a channel of its own. Where an
    option quantises the layer's input, s has its first-order effect Σ_t g_to (W Δx)_to as well.

    The second-order term comes from one rank-one Fisher matrix a sample, at the scale of the mean loss: for independent
    positions it is T_j times too small as an expected increase. For that use `FisherFull` with granularity "rows".

    When to use: to give some output channels of all layers a wider format, at granularity "rows" or "rows:16"; the
    solver then ranks channels globally, under a budget of bytes rather than a percentage of the channels.

    Args:
        first_order: keep s; without it the score is ½ s².
        diagonal: the second-order term from the diagonal only, s + ½ Σ_i (G_joi ΔW_oi)² / T_j². MixLLM has an
            element-wise version; that this is its form is our reading, unsure.
        labels: "auto" (the data's where it has labels; MixLLM's are the input's tokens), "data" or "model".
        keep_bytes: quantised weights up to this many bytes are kept between batches; the rest is quantised again.

    The measure is "score": a sum of absolute values is no expected increase.

    Cost: that of `Fisher`. Standard errors are over samples.

    Example:
        >>> ChannelSalience(first_order=False)
        ChannelSalience(labels='auto', keep_bytes=4294967296, first_order=False, diagonal=False)
    """

    first_order: bool = True
    diagonal: bool = False

    @property
    def asks_for(self) -> frozenset[Product]:
        """The products it needs."""
        needed: frozenset[Product] = frozenset({"signed", "input_signed"})
        return needed | {"squared", "input_squared"} if self.diagonal else needed

    def sample_scores(self, seen: SeenLayer) -> Tensor:
        """(samples, units of the layer, options)."""
        signed = seen.added("signed", "input_signed") / seen.positions
        if self.diagonal:
            second = seen.added("squared", "input_squared") / (2 * seen.positions.square())
        else:
            second = signed.square() / 2
        return sum_over_cells((signed + second).abs() if self.first_order else second, seen.granularity)

    def finished(self, scores: Scores) -> Scores:
        """The scores as they are, which are no expected increase."""
        return replace(scores, measure="score")
