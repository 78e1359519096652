"""The report page: one HTML file that explains a plan, without network, for screens, paper and screen readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.atomic import write_atomically
from mpq.format_colours import ACCENT
from mpq.plan import Split
from mpq.report_agreement import agreement_picture, check_lines, rival_lines
from mpq.report_budgets import budget_lines
from mpq.report_exchange import exchanges, layer_codes
from mpq.report_figures import decision, formats_in_use, main_figures, other_figures, proof_sentence
from mpq.report_formats import Look, common_ending, looks
from mpq.report_layers import MOST_ROWS, layer_rows, strip
from mpq.report_pictures import Picture, agreement_marks, exchange_pictures, scatter_picture
from mpq.report_reproduction import commands, python_lines, record
from mpq.report_sources import device_facts, refusals, score_facts
from mpq.report_subject import Subject

if TYPE_CHECKING:
    from mpq.plan import Plan
    from mpq.tables import CostTable
    from mpq.verification_report import Verification

MOST_NAMED = 2_000  # layers beyond which the page does not carry the options behind points
MOST_CELLS = 10_000  # layers x options whose costs the page carries, to price the differences of two plans
FOLDER = Path(__file__).parent


def write_report(
    plan: Plan,
    path: str | Path,
    table: CostTable | None = None,
    verification: Verification | None = None,
    **extra: Any,
) -> Path:
    """Write the report page of a plan, whole or not at all.

    Args:
        plan: what is reported on.
        path: of the HTML file.
        table: the cost table it was solved from; the plan's own by default, if it still has it.
        verification: what `mpq.verify` found.
        **extra: those of `report_html`.

    Returns:
        The path.

    Raises:
        ValueError: if the table or the device is not the plan's, or the file cannot be written.
    """
    page = report_html(plan, table, verification, **extra)
    write_atomically(path, page)
    return Path(path)


def report_html(
    plan: Plan,
    table: CostTable | None = None,
    verification: Verification | None = None,
    *,
    device: Any = None,
    model: str = "MODEL",
    data: str = "verification",
) -> str:
    """The report page of a plan as text. The same input makes the same page.

    What a section needs and was not given is named there in one line. Predicted figures are never shown as measured.

    Args:
        plan: what is reported on.
        table: the cost table it was solved from; the plan's own by default, if it still has it. With it the page has
            the frontier, what more of a budget would buy, and the sensitivity of layers.
        verification: what `mpq.verify` found: measured figures, baselines, how well predictions agree with them.
        device: name, file or `Target` of the plan's device, where it is none that comes with mpq.
        model: how commands name the model.
        data: what kind of data `verification` was measured on: "held-out", "calibration", or any other word.

    Cost: about 40 solved problems and 20 random plans a picture; some seconds for 200 layers.

    Raises:
        ValueError: if the table or the device is not the plan's.
    """
    if isinstance(device, str | Path):
        from importlib import import_module

        device = import_module("mpq.hardware_models").load(device)
    table = table if table is not None else plan.table
    what = {"model": model, "data": data}
    subject = Subject(plan=plan, table=table, verification=verification, device=device, **what)
    page: str = _environment().get_template("report.html.jinja").render(_content(subject))
    return page


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(subject: Subject) -> dict[str, Any]:
    """Everything that the template shows."""
    plan, verification = subject.plan, subject.verification
    options = subject.table.options if subject.table is not None else plan.provenance.get("options", ())
    known = looks(plan, options)
    rows = layer_rows(subject, known)
    pictures = [tuple(exchange_pictures(subject, exchange)) for exchange in exchanges(subject)]
    agreement = agreement_picture(subject)
    return {
        "subject": subject,
        "plan": plan,
        "accent": ACCENT,
        "sentence": decision(subject),
        "proof": proof_sentence(subject),
        "verdict": "" if verification is None else verification.verdict,
        "warnings": subject.warnings,
        "figures": main_figures(subject),
        "others": other_figures(subject),
        "looks": list(known.values()),
        "formats": formats_in_use(subject),
        "same_worst": len({row.worst_option for row in rows}) == 1,
        "rows": _shown(rows),
        "strip": strip(rows),
        "budgets": budget_lines(subject),
        "exchanges": pictures,
        "scatter": scatter_picture(subject, _shown(rows)),
        "agreement": None if agreement is None else agreement_marks(agreement),
        "rank": None if verification is None else verification.rank_correlation,
        "checks": check_lines(subject),
        "rivals": [] if verification is None else rival_lines(verification),
        "skipped": [] if verification is None else [line for line in verification.notes if "skipped" in line],
        "device": device_facts(subject),
        "scores": score_facts(subject),
        "refusals": refusals(subject),
        "commands": commands(subject),
        "python": python_lines(subject),
        "record": record(subject),
        "css": _file("report.css"),
        "js": _file("report.js"),
        "data": script_json(_data(subject, list(known.values()), [p for several in pictures for p in several])),
    }


def _shown(rows: list[Any]) -> list[Any]:
    """Rows of the table; of too many layers the largest."""
    if len(rows) <= MOST_ROWS:
        return rows
    largest = sorted(rows, key=lambda row: -row.bytes)[:MOST_ROWS]
    return sorted(largest, key=lambda row: row.index)


def _file(name: str) -> Any:
    """A style sheet or script that is part of the page as it stands: ours, and so not escaped."""
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text("utf-8"))


def script_json(content: Any) -> Any:
    r"""JSON that can stand in a script element: what could end or open one is written as escapes.

    Example:
        >>> print(script_json({"layer": "</script><b>"}))
        {"layer":"\u003c/script\u003e\u003cb\u003e"}
    """
    from markupsafe import Markup

    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _data(subject: Subject, known: list[Look], pictures: list[Picture]) -> dict[str, Any]:
    """What the page's script needs: layers, looks, and the options behind every point of a frontier."""
    plan, table = subject.plan, subject.table
    is_split = any(isinstance(entry.choice, Split) for entry in plan.entries)
    labels = list(table.options) if table is not None else []
    by_label = {look.label: look for look in known}
    whole = table is not None and table.granularity == "layer" and not is_split
    return {
        "layers": [entry.layer.name for entry in plan.entries] if _is_small(subject) else [],
        "options": [label.removesuffix(common_ending(labels)) for label in labels],
        "colours": [by_label[label].colour for label in labels],
        "whole": whole,
        "bits": [round(entry.value_bits, 2) for entry in plan.entries],
        "plan": _codes(subject, subject.choices),
        "bytes": _cells(subject, "size") if whole else None,
        "loss": _cells(subject, "sensitivity") if whole and table is not None and not table.pairs else None,
        "points": {picture.name: [_point(subject, mark) for mark in picture.marks] for picture in pictures},
    }


def _point(subject: Subject, mark: Any) -> dict[str, Any]:
    return {"figures": mark.figures, "codes": _codes(subject, mark.choices)}


def _is_small(subject: Subject) -> bool:
    return len(subject.plan.entries) <= MOST_NAMED


def _codes(subject: Subject, choices: Any) -> str | list[float] | None:
    return None if choices is None or not _is_small(subject) else layer_codes(subject, choices)


def _cells(subject: Subject, quantity: str) -> list[list[float | None]] | None:
    """A quantity of every (layer, option) in four digits; None for what is not allowed, or of too many."""
    table = subject.table
    if table is None or quantity not in table.quantities or table.allowed.size > MOST_CELLS:
        return None
    values = np.where(table.allowed, table.quantity(quantity), np.nan)
    return [[None if np.isnan(v) else _short(v) for v in row] for row in values.tolist()]


def _short(value: float) -> float | int:
    """Four digits, or a whole number as it is: short in JSON."""
    return int(value) if value.is_integer() else float(f"{value:.4g}")
