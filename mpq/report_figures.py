"""The figures of a plan in a report, before and after, and the decision in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mpq.budgets import format_quantity
from mpq.report_formats import choice_text, common_ending
from mpq.report_layers import short_loss
from mpq.report_subject import Subject
from mpq.verification_report import FULL_PRECISION, figure_text, interval_text

MOST_FORMATS = 3  # named in the sentence


@dataclass(frozen=True)
class Figure:
    """One quantity of the model in full precision and under the plan.

    Attributes:
        name: of the quantity.
        how: "counted", "measured", "predicted", or "" where it is not known.
        before, after: texts; empty where they are not known.
        ratio: after over before, where both are positive.
        note: one line: an interval, what else was found, what to pass where nothing is known.
    """

    name: str
    how: str = ""
    before: str = ""
    after: str = ""
    ratio: float | None = None
    note: str = ""


def main_figures(subject: Subject) -> list[Figure]:
    """Size, latency, energy and loss, each there even where it is not known."""
    return [_size(subject), _cost(subject, "latency"), _cost(subject, "energy"), _divergence(subject), *_loss(subject)]


def _size(subject: Subject) -> Figure:
    plan = subject.plan
    return Figure(
        name="size",
        how="counted",
        before=format_quantity(plan.full_bytes, "B"),
        after=format_quantity(plan.size_bytes, "B"),
        ratio=plan.size_bytes / plan.full_bytes if plan.full_bytes else None,
        note=f"{plan.full_bits:.3g} → {plan.average_bits:.3f} bits a planned weight, scales included",
    )


def _cost(subject: Subject, name: str) -> Figure:
    """A quantity that a device prices: measured on it where it was, else predicted."""
    measure = subject.measures.get(name, {"latency": "s", "energy": "J"}.get(name, ""))
    predicted = subject.plan.predicted.get(name, subject.totals.get(name))
    found = _on_device(subject, name)
    if predicted is None and found is None:
        device = subject.plan.provenance.get("hardware", {}).get("target", "storage")
        why = "no device was given" if device == "storage" else f"{device} has no numbers for it"
        return Figure(name=name, note=f"{why}: search with --hardware NAME of one that has (mpq list, mpq device show)")
    after = found if found is not None else predicted
    before, what = _before(subject, name)
    notes = []
    if found is not None and predicted is not None:
        notes.append(f"predicted {format_quantity(predicted, measure)}")
    if what:
        notes.append(what)
    if found is None and name in subject.plan.provenance.get("estimates", ()):
        notes.append("rests on estimated device numbers")
    return Figure(
        name=name,
        how="measured" if found is not None else "predicted",
        before="" if before is None else format_quantity(before, measure),
        after=format_quantity(after, measure) if after is not None else "",
        ratio=after / before if after is not None and before else None,
        note="; ".join(notes),
    )


def _on_device(subject: Subject, name: str) -> float | None:
    checks = () if subject.verification is None else subject.verification.quantities
    return next((check.found for check in checks if check.quantity == name and check.how == "measured"), None)


def _before(subject: Subject, name: str) -> tuple[float | None, str]:
    table = subject.table
    if table is None:
        return None, "before: give --table TABLE.parquet"
    if name in table.reference:
        return table.reference[name], ""
    if name not in table.quantities:
        return None, ""
    return table.reachable(name)[1], "before: the dearest allowed option everywhere, as it stands it cannot run there"


def _divergence(subject: Subject) -> Figure:
    """How far outputs move from full precision: measured where it was, else predicted."""
    measure = subject.measures.get("sensitivity", "loss")
    predicted = subject.plan.predicted.get("sensitivity", subject.totals.get("sensitivity"))
    said = "" if predicted is None else f"{subject.loss_name} {short_loss(predicted, measure)}"
    verification = subject.verification
    if verification is not None:
        name, row = verification.divergence_name, verification.plan
        text = interval_text(name, row.estimates["divergence"])
        value, _, interval = text.partition(" ")
        notes = [f"95% {interval.strip('()')}"] if interval else []
        notes += [said] if said else []
        return Figure(
            name=f"{name} from full precision", how="measured", before="0", after=value, note="; ".join(notes)
        )
    name = next((n for n in subject.plan.measured if f"{n}_se" in subject.plan.measured), "")
    if name:
        found, margin = subject.plan.measured[name], 1.96 * subject.plan.measured[f"{name}_se"]
        note = "; ".join([f"± {margin:.2g} at 95%", *([said] if said else [])])
        title = f"{name} from full precision"
        return Figure(name=title, how="measured", before="0", after=f"{found:.3g}", note=note)
    todo = "not measured: give --model MODEL"
    if predicted is None:
        return Figure(name="loss added", note=todo)
    what = "loss added" if subject.is_comparable else "score"
    return Figure(name=what, how="predicted", before="0", after=short_loss(predicted, measure), note=todo)


def _loss(subject: Subject) -> Iterator[Figure]:
    """The loss and the task's own metric, where there are labels."""
    verification = subject.verification
    if verification is not None:
        full = next(row for row in verification.rows if row.name == FULL_PRECISION)
        for name in dict.fromkeys(("loss", verification.metric_name)):
            if name is not None and name in verification.plan.estimates:
                estimate, before = verification.plan.estimates[name], full.estimates[name].value
                value, _, interval = interval_text(name, estimate).partition(" ")
                yield Figure(
                    name=name,
                    how="measured",
                    before=figure_text(name, before),
                    after=value,
                    ratio=estimate.value / before if before > 0 else None,
                    note=f"95% {interval.strip('()')}" if interval else "",
                )
        return
    for name in ("loss", "accuracy", "perplexity"):
        if name in subject.plan.measured:
            todo = "before: give --model MODEL"
            yield Figure(name=name, how="measured", after=figure_text(name, subject.plan.measured[name]), note=todo)


def other_figures(subject: Subject) -> list[Figure]:
    """Everything else that is known: other costs, shares of changed decisions, intervals."""
    shown = {"size", "latency", "energy", "sensitivity"}
    names = [name for name in subject.plan.predicted if name not in shown]
    found = [_cost(subject, name) for name in names]
    verification = subject.verification
    if verification is None:
        return found
    full = next(row for row in verification.rows if row.name == FULL_PRECISION)
    listed = {"divergence", "loss", verification.metric_name}
    for name, estimate in verification.plan.estimates.items():
        if name in listed:
            continue
        title = name.replace("divergence p99", f"{verification.divergence_name}, 99th percentile")
        value, _, interval = interval_text(name, estimate).partition(" ")
        before = figure_text(name, full.estimates[name].value)
        note = f"95% {interval.strip('()')}" if interval else ""
        found.append(Figure(name=title, how="measured", before=before, after=value, note=note))
    return found


def decision(subject: Subject) -> str:
    """The plan in one sentence."""
    plan = subject.plan
    counts: dict[str, int] = {}
    for entry in plan.entries:
        label = "a mix of formats" if len(entry.options) > 1 else str(entry.options[0])
        counts[label] = counts.get(label, 0) + 1
    ranked = sorted(counts.items(), key=lambda pair: -pair[1])
    named = ranked[:MOST_FORMATS] if len(ranked) > MOST_FORMATS + 1 else ranked
    rest = sum(count for _, count in ranked[len(named) :])
    ending = common_ending([label for label, _ in named]) if not rest else ""
    parts = [f"{count} in {label.removesuffix(ending)}" for label, count in named]
    parts += [f"{rest} in other formats"] if rest else []
    total = len(plan.entries)
    who = f"All {total} layers in {ranked[0][0]}" if len(ranked) == 1 else _of_total(parts, total)
    who += f" (all {ending})" if ending else ""
    full = f" instead of {format_quantity(plan.full_bytes, 'B')}" if plan.full_bytes else ""
    share = f" ({plan.size_bytes / plan.full_bytes:.0%})" if plan.full_bytes else ""
    return f"{who} make a model of {format_quantity(plan.size_bytes, 'B')}{full}{share}{_how_good(subject)}."


def _of_total(parts: list[str], total: int) -> str:
    first = parts[0].replace(" in ", f" of {total} layers in ", 1)
    return first if len(parts) == 1 else ", ".join([first, *parts[1:-1]]) + f" and {parts[-1]}"


def _how_good(subject: Subject) -> str:
    figure = _divergence(subject)
    latency = _cost(subject, "latency")
    texts = []
    if latency.after and "latency" in subject.limits:
        texts.append(f"at a {latency.how} {latency.after} a pass")
    if figure.how == "measured":
        texts.append(f"with a measured {figure.name.replace(' from', f' of {figure.after} from')}")
    elif figure.how == "predicted":
        texts.append(f"with a predicted {'added loss' if subject.is_comparable else 'score'} of {figure.after}")
    return f", {' and '.join(texts)}" if texts else ""


def proof_sentence(subject: Subject) -> str:
    """What the solver proved, in words."""
    proof, objective = subject.plan.proof, subject.objective
    if proof is None:
        return "No solver stands behind this plan: it was made or edited by hand."
    if proof.status == "optimal":
        return f"Proved optimal: no plan from these options has a lower predicted {objective} within the budgets."
    if proof.gap is not None and math.isfinite(proof.gap):
        return f"At most {proof.gap:.2g} of its predicted {objective} above the best possible plan ({proof.status})."
    return "Found by a rule, without a bound on how much better another plan could be."


def formats_in_use(subject: Subject) -> str:
    """What layers take and how many of them, for readers of screens."""
    counts: dict[str, int] = {}
    for entry in subject.plan.entries:
        label = choice_text(entry) if len(entry.options) == 1 else "a mix"
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{label} in {count}" for label, count in counts.items())
