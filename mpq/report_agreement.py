"""How well predictions agree with measurements, in a report: plan by plan, and baseline by baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq.budgets import format_quantity
from mpq.report_axes import Axis
from mpq.report_subject import Subject
from mpq.verification_report import FULL_PRECISION, Verification, figure_text


@dataclass(frozen=True)
class Pair:
    """A plan with its predicted and its measured figure; `kind` is "plan" or "measured"."""

    kind: str
    name: str
    predicted: float
    measured: float


@dataclass(frozen=True, eq=False)
class AgreementPicture:
    """Predicted against measured; the diagonal says where both are the same, where they are the same quantity."""

    pairs: tuple[Pair, ...]
    x: Axis
    y: Axis
    has_diagonal: bool

    @property
    def diagonal(self) -> tuple[float, float, float, float] | None:
        """Places of the two ends of the line of equal figures within both axes."""
        low, high = max(self.x.low, self.y.low), min(self.x.high, self.y.high)
        if not self.has_diagonal or high <= low:
            return None
        return self.x.place(low), self.y.place(low), self.x.place(high), self.y.place(high)


def agreement_picture(subject: Subject) -> AgreementPicture | None:
    """Every measured plan that has a prediction; None below two of them."""
    pairs = _pairs(subject)
    if len(pairs) < 2:
        return None
    measure = subject.measures.get("sensitivity", "loss")
    predicted, measured = [pair.predicted for pair in pairs], [pair.measured for pair in pairs]
    name = subject.verification.divergence_name if subject.verification is not None else ""
    x, y = Axis.over(subject.loss_name, measure, predicted), Axis.over(f"measured {name}", "loss", measured)
    if subject.is_comparable:  # one scale for both, so that the diagonal is one
        both = Axis.over("", "loss", [*predicted, *measured])
        x = Axis(x.title, measure, both.low, both.high, both.logarithmic)
        y = Axis(y.title, "loss", both.low, both.high, both.logarithmic)
    return AgreementPicture(tuple(pairs), x, y, subject.is_comparable)


def _pairs(subject: Subject) -> list[Pair]:
    if subject.verification is None:
        return []
    found: dict[tuple[float, float], Pair] = {}
    for row in subject.verification.rows:
        for predicted, measured in row.tries:
            if predicted is not None and math.isfinite(predicted) and math.isfinite(measured):
                kind, name = ("plan", "this plan") if row.name == "plan" else ("measured", row.name)
                found.setdefault((predicted, measured), Pair(kind, name, predicted, measured))
    return list(found.values())


@dataclass(frozen=True)
class CheckLine:
    """One quantity of the plan: budget, predicted, found and how far both are apart, as texts."""

    quantity: str
    budget: str
    predicted: str
    found: str
    how: str
    error: str


def check_lines(subject: Subject) -> list[CheckLine]:
    """Predicted next to found, a quantity; what was not measured says so."""
    if subject.verification is not None:
        lines = []
        for check in subject.verification.quantities:
            quantity, budget, predicted, _ = check.texts
            found = "" if check.found is None else format_quantity(check.found, check.measure)
            lines.append(CheckLine(quantity, budget, predicted, found, check.how, _error(check.predicted, check.found)))
        return lines
    plan = subject.plan
    name = next((n for n in plan.measured if f"{n}_se" in plan.measured), "")
    if not name or "sensitivity" not in plan.predicted:
        return []
    score, value = plan.predicted["sensitivity"], plan.measured[name]
    error = _error(score, value) if subject.is_comparable else ""
    return [CheckLine("sensitivity", "", f"{score:.3g}", f"{value:.3g} {name}", "measured", error)]


def _error(predicted: float | None, found: float | None) -> str:
    if predicted is None or not found:
        return ""
    change = predicted / found - 1
    return "exact" if abs(change) < 5e-4 else f"{change:+.0%}"


@dataclass(frozen=True)
class RivalLine:
    """One model of the verification as texts; `kind` is "plan", "full" or "rival"."""

    kind: str
    name: str
    size: str
    divergence: str
    difference: str
    predicted: str
    metric: str
    agreement: str
    fits: str


def rival_lines(verification: Verification) -> list[RivalLine]:
    """Full precision, the plan and every baseline."""
    lines = []
    for row in verification.rows:
        kind = {"plan": "plan", FULL_PRECISION: "full"}.get(row.name, "rival")
        figures = {key: figure_text(key, value.value) for key, value in row.estimates.items()}
        estimate, paired = row.estimates["divergence"], verification.difference(row)
        margin = f" ± {estimate.margin:.1g}" if math.isfinite(estimate.margin) else ""
        ends = f" ± {paired.margin:.1g}" if math.isfinite(paired.margin) else ""
        lines.append(
            RivalLine(
                kind=kind,
                name="this plan" if kind == "plan" else row.name,
                size=format_quantity(row.size_bytes, "B"),
                divergence=f"{estimate.value:.3g}{margin}",
                difference=f"{paired.value:+.2g}{ends}" if kind == "rival" else "",
                predicted="" if row.predicted is None else f"{row.predicted:.3g}",
                metric=figures.get(verification.metric_name or "loss", ""),
                agreement=figures.get("agreement", ""),
                fits={True: "yes", False: "no", None: ""}[row.fits] if kind == "rival" else "",
            )
        )
    return lines
