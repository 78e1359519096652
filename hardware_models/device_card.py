"""What a notebook shows of a device: every number with its unit and where it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mpq.budgets import format_quantity
from mpq.html_card import card, facts, table

if TYPE_CHECKING:
    from .target import Target


def device_card(target: Target) -> str:
    """The page of a target: what it is, how sure its numbers are, and the numbers."""
    rows = [
        (
            number.where,
            number.key,
            f"{number.value:g}",
            number.unit,
            "estimate" if number.is_estimate else "+".join(dict.fromkeys(source.kind for source in number.sources)),
            ", ".join(source.id for source in number.sources),
        )
        for number in target.numbers
    ]
    title = f"Device: {target.name} ({target.kind})"
    header = ("table", "number", "value", "unit", "kind", "source")
    said = facts(_facts(target))
    return card(title, said, table(header, rows, left=(0, 1, 3, 4, 5), what="numbers") if rows else "")


def _facts(target: Target) -> Iterable[tuple[str, str]]:
    yield "runtime", target.runtime
    yield "priced by", ", ".join(type(model).__name__ for model in target.models) or "storage alone: size and bops"
    yield "holds", ", ".join(f"{name} {format_quantity(most, _MEASURES.get(name, name))}"
                             for name, most in target.limits.items())  # fmt: skip
    kinds = Counter(source.kind for number in target.numbers for source in number.sources)
    yield "sources", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    estimates = sum(number.is_estimate for number in target.numbers)
    if estimates:
        yield "estimates", f"{estimates} of {len(target.numbers)} numbers rest on one: results that use them say so"
    if target.calibration is not None:
        yield "calibrated", " ".join(str(target.calibration["fitted_on"]).split())


_MEASURES = {"size": "B", "activation_peak": "B"}
