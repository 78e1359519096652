"""Plans, verifications and inspections as tables in a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mpq.budgets import format_quantity

if TYPE_CHECKING:
    from rich.console import Console

    from mpq.inspection import Inspection
    from mpq.plan import Plan
    from mpq.verification import Verification

_SHOWN = ("sensitivity", "size", "latency", "energy", "bops")


def show_plan(plan: Plan) -> None:
    """The plan layer by layer, what it is predicted to cost, and how good it is proved to be."""
    console = _console()
    rows = []
    largest = max(entry.layer.parameters for entry in plan.entries)
    for entry in plan.entries:
        layer = entry.layer
        mark = " (pinned)" if layer.name in plan.edited else ""
        rows.append(
            (
                layer.name,
                layer.kind,
                f"{layer.parameters:,}",
                f"{entry.choice}{mark}",
                f"{entry.value_bits:.3g}",
                format_quantity(entry.storage_bits / 8, "B"),
                "█" * max(1, round(16 * entry.value_bits * layer.parameters / (8 * largest))),
            )
        )
    _table(console, ("layer", "kind", "weights", "option", "bits", "size", "bytes"), rows, right=(2, 4, 5))
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True, highlight=False)


def plan_lines(plan: Plan) -> Iterable[str]:
    """What stands below the layers: totals, budgets, proof, price of pins."""
    full = plan.full_bytes
    share = plan.size_bytes / full if full else float("nan")
    yield (
        f"size {format_quantity(plan.size_bytes, 'B')} of {format_quantity(full, 'B')} ({share:.1%}), "
        f"{plan.average_bits:.3f} bits a planned weight, scales included"
    )
    predicted = [
        f"{name} {format_quantity(plan.predicted[name], plan.measures.get(name, ''))}"
        for name in _SHOWN
        if name in plan.predicted
    ]
    yield "predicted: " + (", ".join(predicted) or "nothing: the plan was edited by hand")
    for budget in plan.budgets:
        yield f"budget: {budget.meaning}"
    if plan.proof is not None:
        gap = "" if plan.proof.gap is None else f", gap {plan.proof.gap:.2g}"
        yield f"proof: {plan.proof.status} for the predicted table{gap}"
    if price := plan.provenance.get("price_of_pins"):
        text = ", ".join(
            f"{name} {value:+.4g} {plan.measures.get(name, '')}".strip()
            for name, value in price.items()
            if name in _SHOWN
        )
        yield f"price of the pins: {text}"
    if plan.measured:
        yield "measured on held-out data: " + ", ".join(f"{name} {value:.4g}" for name, value in plan.measured.items())
    if estimates := plan.provenance.get("estimates"):
        yield f"rests on estimated device numbers: {', '.join(estimates)}"


def plan_csv(plan: Plan) -> str:
    """The plan as comma-separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layer", "kind", "weights", "option", "value_bits", "size_bytes"))
    for entry in plan.entries:
        layer = entry.layer
        writer.writerow(
            (layer.name, layer.kind, layer.parameters, str(entry.choice), entry.value_bits, entry.storage_bits / 8)
        )
    return text.getvalue()


def show_verification(verification: Verification) -> None:
    """Measured figures of the plan, of uniform precisions and of full precision."""
    console = _console()
    rows = [
        (
            row.name,
            format_quantity(row.size_bytes, "B"),
            f"{row.divergence:.5f} ±{row.divergence_se:.5f}",
            "" if row.predicted is None else f"{row.predicted:.5f}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            "yes" if row.fits else "no",
        )
        for row in verification.rows
    ]
    name = verification.divergence_name
    header = ("", "size", f"{name} measured", "predicted", "loss", "agree", "fits")
    _table(console, header, rows, right=(1, 2, 3, 4, 5))
    console.print(f"measured on {verification.samples} held-out samples", highlight=False)
    console.print(verification.verdict, highlight=False, soft_wrap=True)


def show_inspection(inspection: Inspection) -> None:
    """Layers, ties, reachable budgets, refused options, time and memory."""
    console = _console()
    network = inspection.priced.network
    rows = [
        (layer.name, layer.kind, "x".join(map(str, layer.weight_shape)), f"{layer.parameters:,}", f"{layer.macs:,}")
        for layer in network.layers
    ]
    _table(
        console,
        ("layer", "kind", "weight (out, in...)", "weights", f"MACs, {network.batch} samples"),
        rows,
        right=(3, 4),
    )
    for group in inspection.ties:
        console.print(f"tied: {', '.join(group)}", highlight=False, soft_wrap=True)
    for name, reason in network.skipped.items():
        console.print(f"not planned: {name}: {reason}", highlight=False, soft_wrap=True)
    reach_rows = [
        (
            reach.quantity,
            *(format_quantity(value, reach.measure) for value in (reach.low, reach.high)),
            "" if reach.whole is None else format_quantity(reach.whole, reach.measure),
            "" if not reach.whole else f"{reach.low / reach.whole:.1%} to {reach.high / reach.whole:.1%}",
        )
        for reach in inspection.reaches
    ]
    _table(console, ("budget", "smallest", "largest", "100% is", "reachable"), reach_rows, right=(1, 2, 3, 4))
    for (layer, option), reason in list(inspection.refused.items())[:12]:
        console.print(f"refused: {layer} {option}: {reason}", highlight=False, soft_wrap=True)
    if len(inspection.refused) > 12:
        console.print(f"refused: {len(inspection.refused) - 12} more")
    console.print(
        f"{inspection.task}, {inspection.samples} samples, method {inspection.method}: "
        f"about {inspection.seconds:.0f} s and "
        f"{format_quantity(inspection.memory_bytes, 'B')} at the peak (estimated from one timed forward pass)",
        highlight=False,
        soft_wrap=True,
    )


def _console() -> Console:
    from rich.console import Console

    return Console()


def _table(console: Console, header: tuple[str, ...], rows: list[Any], right: tuple[int, ...]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(header):
        table.add_column(title, justify="right" if position in right else "left", no_wrap=position in (0, *right))
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
