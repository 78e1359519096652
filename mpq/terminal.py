"""Plans, verifications and inspections as tables in a terminal."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpq.budgets import format_quantity
from mpq.verification_report import FULL_PRECISION, figure_text

if TYPE_CHECKING:
    from rich.console import Console

    from mpq.confidence import Estimate
    from mpq.inspection import Inspection
    from mpq.plan import Plan
    from mpq.verification_report import Verification

_SHOWN = ("sensitivity", "size", "latency", "energy", "bops")
_FIGURE_BREAK = re.compile(r" (?=±|to )")  # where figures may fold: never before their unit
_GAP = 2  # spaces between columns
_VERDICTS = {
    "is better": "green",
    "is WORSE": "red",
    "is of NO USE": "red",
    "nothing can be compared": "red",
    "did not earn": "yellow",
}
_NAME_WIDTH = 14  # what names of layers fold to before other columns give way


def show_plan(plan: Plan) -> None:
    """The plan layer by layer, what it is predicted to cost, and how good it is proved to be."""
    console = open_console()
    show_layers(console, plan)
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True, highlight=False)


def show_layers(console: Console, plan: Plan) -> None:
    """The option of every layer, what it takes, and what it saves of what has a budget."""
    rows: list[tuple[str, ...]] = []
    saved = _savings(plan)
    largest = max(entry.value_bits * entry.layer.parameters for entry in plan.entries)
    pinned = _pinned(plan)
    for entry in plan.entries:
        layer = entry.layer
        mark = " (pinned)" if layer.name in pinned else ""
        rows.append(
            (
                layer.name,
                layer.kind,
                f"{layer.parameters:,}",
                f"{entry.choice}{mark}",
                f"{entry.value_bits:.3g}",
                format_quantity(entry.storage_bits / 8, "B"),
                *(texts[len(rows)] for texts in saved.values()),
                "█" * max(1, round(8 * entry.value_bits * layer.parameters / largest)),
            )
        )
    titles = tuple(f"saves {name}" for name in saved)
    header = ("layer", "kind", "weights", "option", "bits", "size", *titles, "bytes")
    print_table(console, header, rows, right=(2, *range(4, 6 + len(titles))))
    if saved:
        console.print("saves: against the layer's most accurate option", highlight=False)


def _savings(plan: Plan) -> dict[str, list[str]]:
    """What each layer's choice saves of every budget but size, against its most accurate option; needs the table."""
    table = plan.table
    names = [name for name in dict.fromkeys(b.quantity for b in plan.budgets) if name not in ("size", "value_size")]
    if table is None or table.granularity != "layer" or plan.edited or not names:
        return {}
    from mpq.explanation import savings
    from mpq.planning import choices_of

    saved = savings(table, choices_of(table, plan), names)
    return {
        name: [format_quantity(float(value), table.measures[name]) for value in values]
        for name, values in saved.items()
        if values.any()
    }


def plan_lines(plan: Plan) -> Iterable[str]:
    """What stands below the layers: totals, budgets, proof, price of pins."""
    full = plan.full_bytes
    share = f" of {format_quantity(full, 'B')} ({plan.size_bytes / full:.1%})" if full else ""
    yield (
        f"size {format_quantity(plan.size_bytes, 'B')}{share}, "
        f"{plan.average_bits:.3f} bits a planned weight, scales included"
    )
    predicted = [
        f"{name} {format_quantity(plan.predicted[name], plan.measures.get(name, ''))}"
        for name in _SHOWN
        if name in plan.predicted
    ]
    yield "predicted: " + (", ".join(predicted) or "nothing: the plan was edited by hand")
    yield from _made_with(plan)
    for budget in plan.budgets:
        yield f"budget: {budget.meaning}"
    for text in plan.provenance.get("binding", ()):
        yield f"binds: {text}"
    if plan.proof is not None:
        gap = "" if plan.proof.gap is None else f", gap {plan.proof.gap:.2g}"
        yield f"proof: {plan.proof.status} for the predicted table{gap}"
    if robust := plan.provenance.get("robust"):
        gap = "" if robust["gap"] is None else f", gap {robust['gap']:.2g}"
        worst = f"{robust['worst_case']:.4g} at worst, {robust['standard_errors']:g} standard errors off"
        yield f"robust: {worst} ({robust['status']}{gap})"
    if price := plan.provenance.get("price_of_pins"):
        text = ", ".join(
            f"{name} {'-' if value < 0 else '+'}{format_quantity(abs(value), plan.measures.get(name, ''))}"
            for name, value in price.items()
            if name in _SHOWN
        )
        yield f"price of the pins: {text}"
    if plan.measured:
        figures = {name: f"{value:.4g}" for name, value in plan.measured.items()}
        errors = {name: f" ±{figures[f'{name}_se']}" for name in figures if f"{name}_se" in figures}
        shown = [f"{name} {figure}{errors.get(name, '')}" for name, figure in figures.items() if name[-3:] != "_se"]
        yield "measured on held-out data: " + ", ".join(shown)
    if estimates := plan.provenance.get("estimates"):
        yield f"rests on estimated device numbers: {', '.join(estimates)}"


def _made_with(plan: Plan) -> Iterable[str]:
    """How the formats were scored, and what was done after they were chosen."""
    if method := plan.provenance.get("sensitivity"):
        why = f": {plan.provenance['why']}" if "why" in plan.provenance else ""
        quantizer = plan.provenance.get("quantizer", "RoundToNearest").partition("(")[0]
        by = "" if quantizer == "RoundToNearest" else f", quantised by {quantizer}"
        yield f"scored by {method.split('(')[0]} on {plan.provenance['samples']} samples{by}{why}"
    if refined := plan.provenance.get("refined"):
        yield f"refined by measurement: {refinement_in_words(refined)}"
    if found := plan.provenance.get("smallest"):
        yield f"smallest by measurement: {smallest_in_words(found)}"
    if point := plan.provenance.get("frontier"):
        error = f" ± {point['standard_error']:.2g}" if "standard_error" in point else ""
        figure = f"{point['measured']} {point['value']:.4g}{error}"
        yield f"a point of a measured frontier: {figure} on the data that chose it"
    if plan.help:
        yield f"done after the formats were chosen: {', '.join(plan.help)}"


def refinement_in_words(refined: Mapping[str, Any]) -> str:
    """What a plan's provenance says of its refinement; figures on data that chose it and on other data apart.

    Example:
        >>> chosen = {"start": 0.3, "best": 0.25, "p_value": 0.01, "samples": 96}
        >>> refinement_in_words({"measured": "divergence", "plans": 7, "selection": chosen, "heldout": None})
        'divergence 0.3 -> 0.25 on the 96 samples that chose it among 7 plans; not judged on held-out data'
    """
    chosen, held, unit = refined["selection"], refined["heldout"], refined.get("independent", "samples")
    if chosen["best"] == chosen["start"]:
        return f"nothing better was found among {refined['plans']} plans on {chosen['samples']} {unit}"
    judged = "not judged on held-out data"
    if held is not None:
        judged = f"held out {held['start']:.4g} -> {held['best']:.4g} on {held['samples']} (p = {held['p_value']:.2g})"
    gain = f"{refined['measured']} {chosen['start']:.4g} -> {chosen['best']:.4g}"
    return f"{gain} on the {chosen['samples']} {unit} that chose it among {refined['plans']} plans; {judged}"


def smallest_in_words(found: Mapping[str, Any]) -> str:
    r"""What a plan's provenance says of the search for the smallest.

    Example:
        >>> print(smallest_in_words({"measured": "accuracy drop", "resource": "size", "drop": 0.002, "limit": 0.01,
        ...     "p_value": 0.014, "plans": 11, "samples": 512, "heldout": None}).replace("; ", ";\n"))
        accuracy drop 0.002 of 0.01 allowed, p = 0.014, least size of 11 plans on 512 samples;
        not judged on held-out data
    """
    held, judged = found["heldout"], "not judged on held-out data"
    if held is not None:
        judged = f"held out {held['drop']:.4g} ± {held['standard_error']:.2g} on {held['samples']}"
    allowed = f"{found['measured']} {found['drop']:.4g} of {found['limit']:g} allowed, p = {found['p_value']:.2g}"
    unit = found.get("independent", "samples")
    return f"{allowed}, least {found['resource']} of {found['plans']} plans on {found['samples']} {unit}; {judged}"


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


def show_verification(verification: Verification, *, data: str = "held-out") -> None:
    """Measured figures of the plan, of baselines and of full precision; `data` says on what."""
    console = open_console()
    print_table(console, *_comparison(verification), right=(1, 2, 3, 4, 5, 6))
    quantities = [check.texts for check in verification.quantities]
    print_table(console, ("of the plan", "budget", "predicted", "found"), quantities, right=(1, 2, 3))
    for line in verification.plan_lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"measured on {verification.samples} {data} samples; ± and ranges are 95% confidence; "
        "less: the plan's figure less this one's, sample by sample",
        highlight=False,
    )
    for line in verification.notes:
        console.print(line, highlight=False, soft_wrap=True)
    verdict = verification.verdict
    colour = next((colour for words, colour in _VERDICTS.items() if words in verdict), "default")
    console.print(verdict, style=colour, highlight=False, soft_wrap=True)


def _comparison(verification: Verification) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows, one a model."""
    name, metric = verification.divergence_name, verification.metric_name
    rows: list[tuple[str, ...]] = []
    for row in verification.rows:
        compared = row.name not in ("plan", FULL_PRECISION)
        shown = {key: figure_text(key, value.value) for key, value in row.estimates.items()}
        rows.append(
            (
                row.name,
                format_quantity(row.size_bytes, "B"),
                _with_margin(row.estimates["divergence"]),
                _with_margin(verification.difference(row)) if compared else "",
                "" if row.predicted is None else f"{row.predicted:.3g}",
                shown.get(metric or "loss", ""),
                shown.get("agreement", ""),
                {True: "yes", False: "no", None: ""}[row.fits],
            )
        )
    return ("", "size", name, "less", "predicted", metric or "loss", "agree", "fits"), rows


def _with_margin(estimate: Estimate) -> str:
    margin = f" ±{estimate.margin:.1g}" if math.isfinite(estimate.margin) else ""
    return f"{estimate.value:.3g}{margin}"


def show_inspection(inspection: Inspection) -> None:
    """Layers, ties, reachable budgets, refused options, time and memory."""
    console = open_console()
    network = inspection.priced.network
    rows = [
        (layer.name, layer.kind, "x".join(map(str, layer.weight_shape)), f"{layer.parameters:,}", f"{layer.macs:,}")
        for layer in network.layers
    ]
    print_table(
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
            "the largest" if reach.whole is None else format_quantity(reach.whole, reach.measure),
            _range(reach.low / whole, reach.high / whole) if (whole := reach.whole or reach.high) else "",
        )
        for reach in inspection.reaches
    ]
    print_table(console, ("budget", "smallest", "largest", "100% is", "reachable"), reach_rows, right=(1, 2, 3, 4))
    for (option, reason), layers in _grouped(inspection.refused).items():
        where = layers[0] if len(layers) == 1 else f"{len(layers)} layers ({', '.join(layers)})"
        console.print(f"refused: {option} in {where}: {reason}", highlight=False, soft_wrap=True)
    console.print(
        f"{inspection.task}, {inspection.samples} samples, method {inspection.method}: "
        f"about {format_seconds(inspection.seconds)} and "
        f"{format_quantity(inspection.memory_bytes, 'B')} at the peak (estimated {inspection.estimated})",
        highlight=False,
        soft_wrap=True,
    )


def _range(low: float, high: float) -> str:
    return f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"


def format_seconds(seconds: float) -> str:
    """A duration a person plans with.

    Example:
        >>> format_seconds(0.04), format_seconds(7.4), format_seconds(754.0), format_seconds(9000.0)
        ('1 s', '8 s', '13 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _pinned(plan: Plan) -> set[str]:
    """Layers whose option was set by hand, in the search or afterwards."""
    from mpq.attention_operators import is_named

    patterns = [*plan.edited, *plan.provenance.get("pins", {})]
    names = [entry.layer.name for entry in plan.entries]
    return {name for name in names if any(is_named(name, pattern) for pattern in patterns)}


def _grouped(refused: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for (layer, option), reason in refused.items():
        groups.setdefault((option, reason), []).append(layer)
    return groups


def open_console() -> Console:
    """Where tables and lines are printed."""
    from rich.console import Console

    return Console()


def print_table(
    console: Console, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...]
) -> None:
    """Print a table that loses no character: names fold first, and a file or a pipe has room for every column."""
    from rich import box
    from rich.table import Table

    bounded = console.is_terminal or "COLUMNS" in os.environ
    widths = _widths(header, rows, right, console.width if bounded else None)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
    for position, (title, width) in enumerate(zip(header, widths, strict=True)):
        table.add_column(title, justify="right" if position in right else "left", width=width, overflow="fold")
    for row in rows:
        table.add_row(*row)
    room = console.width
    console.width = max(room, sum(widths) + _GAP * (len(widths) - 1))
    console.print(table, highlight=False)
    console.print()
    console.width = room


def _widths(
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...], room: int | None
) -> list[int]:
    """Widths of the columns: as wide as their text, or as little narrower as the room asks for."""
    widths, least = [], []
    for position, column in enumerate(zip(header, *rows, strict=True)):
        widths.append(max(map(len, column)))
        words = [_FIGURE_BREAK.split(cell) if position in right else cell.split() for cell in column[1:]]
        least.append(max(len(word) for words_of in [header[position].split() or [""], *words] for word in words_of))
    least[0] = min(least[0], _NAME_WIDTH)
    excess = 0 if room is None else sum(widths) + _GAP * (len(widths) - 1) - room
    for _ in range(excess):
        widest = max(range(len(widths)), key=lambda position: widths[position] - least[position])
        if widths[widest] == least[widest]:
            break  # nothing left to fold: lines are longer than the terminal
        widths[widest] -= 1
    return widths
