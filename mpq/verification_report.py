"""What `verify` found: measured next to predicted and to baselines, and whether the plan earned its complexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.budgets import format_quantity
from mpq.confidence import LEVEL, Estimate, mean_estimate
from mpq.rank_correlation import spearman

if TYPE_CHECKING:
    import pandas as pd

    from mpq.plan import Plan

FULL_PRECISION = "full precision"
UNADJUSTED = "plan, not adjusted"
_OWN = ("plan", UNADJUSTED, FULL_PRECISION)  # rows of no rival
_EQUAL = "it and {} are equal within the noise of this data"
_NEAREST = "RoundToNearest()"
_FEWEST_PLANS = 10  # for a rank correlation to mean anything


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """One model on the data. Of a baseline that is drawn several times this is the plan with the median divergence.

    Attributes:
        name: "plan", "plan, not adjusted", "full precision", "uniform int4", or a baseline's.
        size_bytes: counted, not measured.
        average_bits: a planned weight, scales counted.
        estimates: figures with 95 % intervals, by name (`mpq.output_figures.estimates`).
        costs: what the table predicts, a quantity in base units; empty where it has no prediction.
        fits: whether the plan's budgets are kept; None where that is not known.
        per_sample: (samples,) divergences.
        tries: predicted sensitivity (None if not known) and measured divergence of every plan that was drawn.
        plan: what was measured; None for full precision.
    """

    name: str
    size_bytes: float
    average_bits: float
    estimates: Mapping[str, Estimate]
    costs: Mapping[str, float] = field(default_factory=dict)
    fits: bool | None = None
    per_sample: NDArray[np.float64] = field(repr=False)
    tries: tuple[tuple[float | None, float], ...] = ()
    plan: Plan | None = field(default=None, repr=False)

    @property
    def divergence(self) -> float:
        """Mean KL divergence from full precision in nats, or relative squared error, or loss added."""
        return self.estimates["divergence"].value

    @property
    def divergence_se(self) -> float:
        """Its standard error; 0 for a single sample."""
        count = len(self.per_sample)
        return float(self.per_sample.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0

    @property
    def predicted(self) -> float | None:
        """The sensitivity that the table predicts."""
        return self.costs.get("sensitivity")

    @property
    def loss(self) -> float | None:
        """Mean loss, where there are labels."""
        return self._value("loss")

    @property
    def agreement(self) -> float | None:
        """Share of decisions that are full precision's."""
        return self._value("agreement")

    def _value(self, name: str) -> float | None:
        return self.estimates[name].value if name in self.estimates else None


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantityCheck:
    """One quantity of the plan: its budget, what was predicted, and what it was found to be.

    `how` says where `found` comes from: "counted", "measured", or "not measured" (None).
    """

    quantity: str
    measure: str
    limit: float | None
    predicted: float | None
    found: float | None
    how: str

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Quantity, budget, predicted and found, with units."""
        figures = (self.limit, self.predicted, self.found)
        budget, predicted, found = ("" if f is None else format_quantity(f, self.measure) for f in figures)
        return self.quantity, budget, predicted, f"{found} {self.how}".strip()


@dataclass(frozen=True, eq=False, kw_only=True)
class Verification:
    """The plan, full precision and baselines at the plan's budgets, on the same data.

    Attributes:
        rows: one a model.
        divergence_name: "KL", "rel. error" or "loss added".
        samples: how many were measured.
        metric_name: of the figure in `estimates` that the task is judged by, if it has one.
        quantities: budgeted quantities and the sensitivity, predicted next to found.
        skipped: baselines that were not measured, with the reason.
        quantizer: how weights were quantised.
        adjustments: what was done after quantising, to the plan and to every baseline.
    """

    rows: tuple[Measured, ...]
    divergence_name: str
    samples: int
    metric_name: str | None = None
    quantities: tuple[QuantityCheck, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    quantizer: str = _NEAREST
    adjustments: tuple[str, ...] = ()

    @property
    def plan(self) -> Measured:
        """The plan's own row."""
        return next(row for row in self.rows if row.name == "plan")

    @property
    def baselines(self) -> tuple[Measured, ...]:
        """The rows the plan is compared with: those that keep its budgets."""
        return tuple(row for row in self.rows if row.name not in _OWN and row.fits)

    @property
    def uniform(self) -> Measured | None:
        """The best uniform precision that keeps the plan's budgets, or None if none does."""
        fitting = [row for row in self.baselines if row.name.startswith("uniform")]
        return min(fitting, key=lambda row: np.nan_to_num(row.divergence, nan=np.inf), default=None)

    @property
    def measured(self) -> dict[str, float]:
        """The plan's measured figures by name."""
        row, name = self.plan, self.divergence_name
        figures: dict[str, float] = {name: row.divergence, f"{name}_se": row.divergence_se}
        figures[f"{name}_p99"] = row.estimates["divergence p99"].value
        names = ("loss", "agreement", *([self.metric_name] if self.metric_name else ()))
        return figures | {name: row.estimates[name].value for name in names if name in row.estimates}

    @property
    def rank_correlation(self) -> tuple[float, int] | None:
        """Spearman's ρ of predicted and measured over all plans that keep the budgets, and how many; None below 10."""
        pairs = {pair for row in (self.plan, *self.baselines) for pair in row.tries if pair[0] is not None}
        if len(pairs) < _FEWEST_PLANS:
            return None
        predicted, measured = np.array(sorted(pairs), dtype=np.float64).T
        return spearman(predicted, measured), len(pairs)

    def difference(self, row: Measured, *, level: float = LEVEL) -> Estimate:
        """The plan's divergence less a row's, sample by sample, with a Student-t interval; below 0 the plan is better.

        The samples are the same, so that what they have in common cancels: tighter than two intervals side by side.
        """
        return mean_estimate(self.plan.per_sample - row.per_sample, level=level)

    @property
    def verdict(self) -> str:
        """One sentence: whether the plan earned its complexity.

        Better means better than every baseline, each paired 95 % interval of the difference below 0: no correction for
        their number is needed. Worse means worse than one of them, at 95 % over all of them (Bonferroni).
        """
        if (reason := self._not_finite or self._not_comparable) is not None:
            return reason
        rivals = tuple(row for row in self.baselines if math.isfinite(row.divergence))
        if not rivals:
            return "The plan is better than every baseline at the same budget: their outputs are not finite."
        measured = " that were measured" if self.skipped else ""
        strict = {row.name: self.difference(row, level=1 - (1 - LEVEL) / len(rivals)) for row in rivals}
        worse = max(rivals, key=lambda row: strict[row.name].low)
        if strict[worse.name].low > 0:
            figures = self._figures(worse, strict[worse.name], len(rivals))
            return f"The plan is WORSE than {worse.name} at the same budget{figures}."
        usual = {row.name: self.difference(row) for row in rivals}
        unbeaten = [row for row in rivals if usual[row.name].high >= 0]
        if not unbeaten:
            best = min(rivals, key=lambda row: row.divergence)
            rank = f", the best of {len(rivals)} baselines{measured}," if len(rivals) > 1 else ""
            figures = self._figures(best, usual[best.name])
            return f"The plan is better than {best.name}{rank} at the same budget{figures}."
        nearest = min(unbeaten, key=lambda row: row.divergence)
        alike = "it does what {} does" if np.array_equal(nearest.per_sample, self.plan.per_sample) else _EQUAL
        figures = self._figures(nearest, strict[nearest.name], len(rivals))
        return f"The plan did not earn its complexity: {alike.format(nearest.name)}{figures}."

    @property
    def _not_finite(self) -> str | None:
        full = next(row for row in self.rows if row.name == FULL_PRECISION)
        if not math.isfinite(full.divergence):
            return "Full precision's own outputs are not finite on this data: nothing can be compared with them."
        if not math.isfinite(self.plan.divergence):
            return "The plan is of NO USE: the model's outputs under it are not finite on this data."
        return None

    @property
    def _not_comparable(self) -> str | None:
        others = [row for row in self.rows if row.name not in _OWN]
        if self.plan.fits is False:
            return "The plan does not keep its budgets: it cannot be compared at them."
        if not others:
            return "The plan was not compared with any baseline."
        if not self.baselines and any(row.fits is None for row in others):
            return "Which uniform precision keeps these budgets is not known without the table of the search."
        if not self.baselines:
            return "No uniform precision keeps these budgets; the plan does."
        if self.samples == 1:
            return f"One sample cannot tell the plan from {self.baselines[0].name}: measure on more data."
        return None

    def _figures(self, row: Measured, difference: Estimate, rivals: int = 1) -> str:
        """What a sentence rests on; with several rivals the interval holds for all of them together."""
        figures = f"{self.divergence_name} {self.plan.divergence:.3g} against {row.divergence:.3g}"
        ends = f"{difference.low:.2g} to {difference.high:.2g}"
        over = f" over all {rivals}" if rivals > 1 else ""
        return f" ({figures}; paired difference {difference.value:.2g}, {LEVEL:.0%} interval{over} {ends})"

    @property
    def plan_lines(self) -> list[str]:
        """The plan's figures with their intervals, one a line."""
        lines, names = (
            [],
            {"divergence": self.divergence_name, "divergence p99": f"{self.divergence_name}, 99th percentile"},
        )
        full = next(row for row in self.rows if row.name == FULL_PRECISION)
        for name, estimate in self.plan.estimates.items():
            before = ""
            if name in ("loss", "accuracy", "perplexity", self.metric_name):
                before = f", full precision {figure_text(name, full.estimates[name].value)}"
            lines.append(f"{names.get(name, name)} {interval_text(name, estimate)}{before}")
        return lines

    @property
    def notes(self) -> list[str]:
        """What else to know: quantiser, adjustments, how well the table ranked plans, what was skipped."""
        lines = [] if self.quantizer == _NEAREST else [f"weights quantised by {self.quantizer}"]
        if self.adjustments:
            own = "made for the formats of each"
            lines.append(f"after quantising, plan and baselines alike: {', '.join(self.adjustments)}, {own}")
            bare = next((row for row in self.rows if row.name == UNADJUSTED), None)
            if bare is not None and self.difference(bare).low > 0:
                worse = self._figures(bare, self.difference(bare))
                lines.append(f"the plan is WORSE with that than without it{worse}: leave it out")
        if (found := self.rank_correlation) is not None:
            lines.append(f"predicted and measured rank {found[1]} plans alike with Spearman's ρ = {found[0]:.2f}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        return lines + [f"skipped: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]

    def to_frame(self) -> pd.DataFrame:
        """One row a model: costs, figures, their intervals (`KL low`, `KL high`) and paired differences."""
        import pandas as pd

        return pd.DataFrame([self._record(row) for row in self.rows]).set_index("name")

    def _record(self, row: Measured) -> dict[str, Any]:
        record: dict[str, Any] = {"name": row.name, "size_bytes": row.size_bytes, "average_bits": row.average_bits}
        for name, estimate in row.estimates.items():
            shown = name.replace("divergence", self.divergence_name)
            record |= {shown: estimate.value, f"{shown} low": estimate.low, f"{shown} high": estimate.high}
        difference = self.difference(row)
        paired = {"difference": difference.value, "difference low": difference.low, "difference high": difference.high}
        return (
            record
            | {f"{self.divergence_name}_se": row.divergence_se, "predicted": row.predicted, "fits": row.fits}
            | paired
        )

    def __str__(self) -> str:
        name, wide = self.divergence_name, max(len(row.name) for row in self.rows) + 2
        titles = {
            "size [MB]": 10,
            "bits": 8,
            name: 12,
            "+-": 10,
            "predicted": 11,
            "loss": 9,
            self.metric_name or "": 12,
        }
        lines = [" " * wide + "".join(f"{title:>{width}}" for title, width in titles.items())]
        for row in self.rows:
            text = f"{row.size_bytes / 1e6:10.4f}{row.average_bits:8.3f}{row.divergence:12.3g}"
            text += f"{row.estimates['divergence'].margin:10.2g}{_text(row.predicted, 11)}{_text(row.loss, 9)}"
            metric = row.estimates.get(self.metric_name or "")
            text += _text(None if metric is None else metric.value, 12)
            lines.append(f"{row.name:{wide}}{text}" + ("  over budget" if row.fits is False else ""))
        source = "sizes are counted, predictions come from the table"
        lines.append(f"measured on {self.samples} samples, +- at {LEVEL:.0%}; {source}")
        return "\n".join([*lines, *self.notes, self.verdict])


def _text(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.4g}"


def figure_text(name: str, value: float) -> str:
    """A figure as people write it: shares in percent.

    Example:
        >>> figure_text("accuracy", 0.98765), figure_text("loss", 0.0353)
        ('98.8%', '0.0353')
    """
    shares = ("accuracy", "agreement", "correct to wrong", "wrong to correct")
    return f"{value:.1%}" if name in shares else f"{value:.3g}"


def interval_text(name: str, estimate: Estimate) -> str:
    """A figure and its interval in words.

    Example:
        >>> interval_text("KL", Estimate(0.5, 0.25, float("inf")))
        '0.5 (0.25 or more)'
    """
    low, high = figure_text(name, estimate.low), figure_text(name, estimate.high)
    if not math.isfinite(estimate.low):
        return figure_text(name, estimate.value)
    return (
        f"{figure_text(name, estimate.value)} ({f'{low} or more' if math.isinf(estimate.high) else f'{low} to {high}'})"
    )
