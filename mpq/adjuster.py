"""`Adjuster`: what is done after quantising (AdaQuant, bias correction, batch-norm tuning), made anew for each plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpq.adjustment import Adjustment
    from mpq.formats import NumberFormat
    from mpq.layers import Layer
    from mpq.plan import Plan
    from mpq.quantizer import Quantizer

Adjust = Callable[["nn.Module", "Plan", "Quantizer | None"], "Adjustment"]

ADJUSTMENTS = {
    "adaquant": "AdaQuant",
    "bias-correction": "bias correction",
    "batch-norm-tuning": "batch-norm tuning",
}
"""What plans call them. They are made in this order, whatever was asked for: each needs what those before it change."""

STEP_MACS = 2e8
"""What a step of AdaQuant costs at least, in multiply-adds: of small layers Python is slow, not the arithmetic.

Measured on the demo, 9 layers of 300 steps: 20 CPU seconds a plan."""


@dataclass(frozen=True)
class Adjuster:
    """Makes the adjustment of a plan on calibration data, one method after the other.

    AdaQuant changes weights and biases, so it comes first; bias correction then takes off what is left of the means of
    the outputs; batch-norm tuning finds the statistics of what came of both. Each sees the model as those before leave
    it. Settings are the methods' own defaults: for others write a function `(model, plan, quantizer) -> Adjustment`,
    which `mpq.verify(..., adjust=...)` takes as well.

    Args:
        names: out of `ADJUSTMENTS`.
        data: calibration data, as for `mpq.search`; not the data that the result is judged on.

    Cost: that of each method (`mpq.adaquant`, `mpq.bias_correction`, `mpq.batch_norm_tuning`); `macs` counts it.

    Raises:
        ValueError: if a name is unknown or there is none, or the data is wrong.

    Example:
        >>> import mpq, torch
        >>> from mpq.plan import Entry, Plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> model[0].weight.data = torch.tensor([[7.0, 1.25]])
        >>> x = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> plan = Plan((Entry(mpq.trace(model, x).layers[0], mpq.options.Option("int4")),), "")
        >>> Adjuster(["bias-correction"], x)(model, plan, None).tensors["0.bias"]  # 1.25 becomes 1, and E[x] is 1
        tensor([0.2500])
    """

    names: tuple[str, ...]
    data: Any = field(repr=False)

    def __init__(self, names: Iterable[str], data: Any) -> None:
        from mpq.batches import batches_of

        asked = [names] if isinstance(names, str) else list(names)
        for name in asked:
            if name not in ADJUSTMENTS:
                raise ValueError(
                    f"an adjustment must be one of {', '.join(ADJUSTMENTS)}, got {name!r}"
                    f"{did_you_mean(name, ADJUSTMENTS)}"
                )
        if not asked:
            raise ValueError(f"an adjuster needs adjustments to make, got none of {', '.join(ADJUSTMENTS)}")
        object.__setattr__(self, "names", tuple(name for name in ADJUSTMENTS if name in asked))
        object.__setattr__(self, "data", batches_of(data, role="calibration data"))

    def __call__(self, model: nn.Module, plan: Plan, quantizer: Quantizer | None) -> Adjustment:
        """The adjustment of one plan: the tensors of all methods together.

        Raises:
            ValueError: if plan and model do not fit, or the model has nothing to adjust (no batch norm).
        """
        made: Adjustment | None = None
        for name in self.names:
            found = self._made(name, model, plan, (quantizer, made))
            made = found if made is None else made.then(found)
        if made is None:
            raise ValueError("an adjuster needs adjustments to make, got none")
        return made

    def _made(
        self, name: str, model: nn.Module, plan: Plan, before: tuple[Quantizer | None, Adjustment | None]
    ) -> Adjustment:
        quantizer, made = before
        if name == "adaquant":
            from mpq.adaquant import adaquant

            return adaquant(model, self.data, plan, quantizer=quantizer)
        if name == "bias-correction":
            from mpq.bias_correction import correct_biases

            known = quantizer if made is None else _WithWeights(made, quantizer)
            return correct_biases(model, self.data, plan, quantizer=known)
        from mpq.batch_norm_tuning import tune_batch_norms

        return tune_batch_norms(model, self.data, plan, quantizer=quantizer, adjustment=made)

    def macs(self, plan: Plan) -> float:
        """Multiply-adds that the adjustment of a plan takes, about: passes over the data, steps of AdaQuant."""
        from mpq.adaquant import Calibration
        from mpq.batches import samples_in

        layers, samples = [entry.layer for entry in plan.entries], samples_in(self.data)
        a_pass = samples * sum(layer.macs / layer.batch for layer in layers)
        found = 0.0
        if "adaquant" in self.names:
            how = Calibration()
            for layer in layers:
                one = layer.macs / layer.batch if layer.kind.startswith("conv") else 16 * layer.parameters
                found += a_pass + how.steps * max(STEP_MACS, 3 * how.samples * one)  # forward, and backward twice that
        if "bias-correction" in self.names:
            found += (len(layers) + 1) * a_pass
        return found + ("batch-norm-tuning" in self.names) * a_pass


@dataclass(frozen=True)
class _WithWeights:
    """A quantiser that takes the weights which an adjustment brings."""

    adjustment: Adjustment
    otherwise: Quantizer | None

    def __call__(self, rows: Tensor, fmt: NumberFormat, layer: Layer) -> Tensor:
        return self.units(rows, fmt, layer, "layer")

    def units(self, rows: Tensor, fmt: NumberFormat, layer: Layer, granularity: str) -> Tensor:
        from mpq.quantizer import RoundToNearest, quantised_rows
        from mpq.weight_view import as_rows

        known = self.adjustment.tensors.get(layer.weight_name)
        if known is None:
            return quantised_rows(rows, fmt, layer, granularity, self.otherwise or RoundToNearest())
        return as_rows(known, layer).to(rows)
