"""What `--json` prints: plain data in base units (B, s, J, bops), and what its keys mean. The keys are stable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq.comparison import Comparison
    from mpq.confidence import Estimate
    from mpq.inspection import Inspection
    from mpq.plan import Plan
    from mpq.problem import Proof
    from mpq.tables import CostTable
    from mpq.verification_report import Verification

PLAN_KEYS = {
    "layers": "list of layer, kind, weights (how many), option, bits (of a value), size, pinned",
    "size": "bytes of the whole model",
    "full_size": "bytes of the model as it stands",
    "average_bits": "bits a planned weight, scales included",
    "predicted": "a number a quantity",
    "measures": "the base unit of each quantity",
    "measured": "figures on held-out data; empty if there were none",
    "budgets": "list of quantity, asked, limit, measure, meaning",
    "proof": "status (optimal, feasible, heuristic), bound, gap; or null",
    "provenance": "where the plan came from, as in its file",
}
VERIFICATION_KEYS = {
    "models": "list of name, size, average_bits, predicted, fits, figures and difference (the plan's divergence less "
    "this one's), each with value, low and high",
    "divergence": "what the figure divergence is: KL, rel. error, loss added",
    "samples": "how many were measured",
    "data": "held-out or calibration",
    "quantities": "list of quantity, measure, limit, predicted, found, how",
    "skipped": "baselines that were not measured, with the reason",
    "rank_correlation": "Spearman's rho of predicted and measured, and of how many plans; or null",
    "verdict": "a sentence",
    "quantizer": "how weights were quantised",
    "adjustments": "what was done after quantising, to the plan and to every baseline",
    "written": "files",
}
SEARCH_KEYS = {
    "plan": "as `mpq show --json`",
    "verification": "as `mpq verify --json`; null without held-out data",
    "written": "files",
}
INSPECTION_KEYS = {
    "layers": "list of layer, kind, weight_shape, weights, macs (of a batch)",
    "batch": "samples a batch",
    "ties": "groups of layers that take one option",
    "not_planned": "what is left alone, with the reason",
    "reach": "list of quantity, measure, smallest, largest, whole (what 100% is)",
    "refused": "list of layer, option, reason",
    "task": "how a batch is judged",
    "samples": "of calibration data",
    "method": "of the scores",
    "seconds": "estimate of what the scores take",
    "memory": "estimate of the peak, bytes",
}
TABLE_KEYS = {
    "units": "how many",
    "granularity": "layer, rows:16, groups:64",
    "options": "list of names",
    "quantities": "list of quantity, measure, smallest, largest, whole (what 100% is)",
    "layers": "list of layer and its sensitivity by option; empty where layers are split",
    "masked": "how many choices are not allowed",
    "provenance": "where the table came from",
    "written": "files",
}
SOLUTION_KEYS = {
    "minimised": "the quantity",
    "objective": "what it comes to, without what no option touches",
    "totals": "a number a quantity",
    "measures": "the base unit of each quantity",
    "budgets": "list of quantity, asked, limit, used, shadow_price (what one more base unit lowers the objective by)",
    "proof": "status (optimal, feasible, heuristic), bound, gap",
    "robust": "worst_case, status, bound, gap; or null",
    "options": "the option of every unit",
}
FRONT_KEYS = {
    "resource": "the quantity that is traded; a list of several",
    "minimised": "the quantity that is bought",
    "measures": "their base units",
    "options": "list of names",
    "units": "list of names",
    "points": "list of the quantities and choices, the position in options of every unit's option",
}
COMPARISON_KEYS = {
    "layers": "how many",
    "same": "how many take the same",
    "differences": "list of layer, first, second, first_size, second_size, loss_change (second less first; or null)",
    "sizes": "bytes of the whole model in both",
    "measure": "of the loss",
}
DEVICE_KEYS = {
    "name": "of the device",
    "kind": "of the chip",
    "runtime": "what runs on it",
    "notes": "what it says of itself",
    "numbers": "list of table, key, value, unit, estimate, sources",
    "models": "what it prices and how, in words",
    "calibration": "fitted_on, method, date; or null",
    "sources": "list of id, kind, title, url, read",
}
CHECK_KEYS = {"ok": "whether the file is right", "problems": "list, each with its line", "summary": "what it holds"}
MEASURED_KEYS = {
    "kernels": "how many were measured",
    "spread": "how many of them repeat more than 15 % apart",
    "refused": "how many kernels by reason",
    "written": "files",
}


def json_text(content: Any) -> str:
    """JSON of an answer; numbers that are not finite are null, which every reader takes.

    Example:
        >>> print(json_text({"gap": float("inf"), "bits": (4, 8)}))
        {
         "gap": null,
         "bits": [
          4,
          8
         ]
        }
    """
    try:
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # arrays, infinities
        return json.dumps(_plain(content), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a number of numpy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def plan_answer(plan: Plan) -> dict[str, Any]:
    """`PLAN_KEYS` of a plan."""
    from mpq.attention_operators import is_named

    patterns = [*plan.edited, *plan.provenance.get("pins", {})]
    layers = [
        {
            "layer": entry.layer.name,
            "kind": entry.layer.kind,
            "weights": entry.layer.parameters,
            "option": str(entry.choice),
            "bits": entry.value_bits,
            "size": entry.storage_bits / 8,
            "pinned": any(is_named(entry.layer.name, pattern) for pattern in patterns),
        }
        for entry in plan.entries
    ]
    budgets = [
        {name: getattr(budget, name) for name in ("quantity", "asked", "limit", "measure", "meaning")}
        for budget in plan.budgets
    ]
    return {
        "layers": layers,
        "size": plan.size_bytes,
        "full_size": plan.full_bytes,
        "average_bits": plan.average_bits,
        "predicted": dict(plan.predicted),
        "measures": dict(plan.measures),
        "measured": dict(plan.measured),
        "budgets": budgets,
        "proof": None if plan.proof is None else proof_answer(plan.proof),
        "provenance": dict(plan.provenance),
    }


def proof_answer(proof: Proof) -> dict[str, Any]:
    """What is proved."""
    return {"status": proof.status, "bound": proof.bound, "gap": proof.gap}


def verification_answer(verification: Verification, *, data: str, written: Sequence[str] = ()) -> dict[str, Any]:
    """`VERIFICATION_KEYS` of a verification; `data` says on what."""
    models = [
        {
            "name": row.name,
            "size": row.size_bytes,
            "average_bits": row.average_bits,
            "predicted": row.predicted,
            "fits": row.fits,
            "figures": {name: _estimate(found) for name, found in row.estimates.items()},
            "difference": _estimate(verification.difference(row)),
        }
        for row in verification.rows
    ]
    rank = verification.rank_correlation
    fields = ("quantity", "measure", "limit", "predicted", "found", "how")
    return {
        "models": models,
        "divergence": verification.divergence_name,
        "samples": verification.samples,
        "data": data,
        "quantities": [{name: getattr(check, name) for name in fields} for check in verification.quantities],
        "skipped": dict(verification.skipped),
        "rank_correlation": None if rank is None else {"rho": rank[0], "plans": rank[1]},
        "verdict": verification.verdict,
        "quantizer": verification.quantizer,
        "adjustments": list(verification.adjustments),
        "written": list(written),
    }


def _estimate(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def inspection_answer(inspection: Inspection) -> dict[str, Any]:
    """`INSPECTION_KEYS` of an inspection."""
    network = inspection.priced.network
    layers = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "weight_shape": list(layer.weight_shape),
            "weights": layer.parameters,
            "macs": layer.macs,
        }
        for layer in network.layers
    ]
    reach = [
        {"quantity": r.quantity, "measure": r.measure, "smallest": r.low, "largest": r.high, "whole": r.whole}
        for r in inspection.reaches
    ]
    refused = [{"layer": layer, "option": option, "reason": why} for (layer, option), why in inspection.refused.items()]
    return {
        "layers": layers,
        "batch": network.batch,
        "ties": [list(group) for group in inspection.ties],
        "not_planned": dict(network.skipped),
        "reach": reach,
        "refused": refused,
        "task": inspection.task,
        "samples": inspection.samples,
        "method": inspection.method,
        "seconds": inspection.seconds,
        "memory": inspection.memory_bytes,
    }


def table_answer(table: CostTable, *, written: Sequence[str] = ()) -> dict[str, Any]:
    """`TABLE_KEYS` of a table."""
    layers = []
    if table.granularity == "layer" and "sensitivity" in table.quantities:
        rows = zip(map(str, table.units), table.quantities["sensitivity"].tolist(), strict=True)
        layers = [{"layer": unit, "sensitivity": dict(zip(table.options, row, strict=True))} for unit, row in rows]
    return {
        "units": len(table.units),
        "granularity": table.granularity,
        "options": list(table.options),
        "quantities": [reach_answer(table, name) for name in additive(table)],
        "layers": layers,
        "masked": int((~table.allowed).sum()),
        "provenance": dict(table.provenance),
        "written": list(written),
    }


def additive(table: CostTable) -> list[str]:
    """The quantities of a table that have totals: all but standard errors."""
    return [name for name in table.quantities if not name.endswith("_se")]


def reach_answer(table: CostTable, name: str) -> dict[str, Any]:
    """Smallest and largest total of a quantity, and what 100 % is; base units."""
    low, high = table.reachable(name)
    whole = table.reference.get(name)
    return {"quantity": name, "measure": table.measures[name], "smallest": low, "largest": high, "whole": whole}


def comparison_answer(comparison: Comparison) -> dict[str, Any]:
    """`COMPARISON_KEYS` of a comparison."""
    differences = [
        {
            "layer": each.layer,
            "first": each.first,
            "second": each.second,
            "first_size": each.first_bytes,
            "second_size": each.second_bytes,
            "loss_change": each.loss_change,
        }
        for each in comparison.differences
    ]
    count = len(comparison.first.entries)
    return {
        "layers": count,
        "same": count - len(differences),
        "differences": differences,
        "sizes": [comparison.first.size_bytes, comparison.second.size_bytes],
        "measure": comparison.measure,
    }


def device_answer(target: Any) -> dict[str, Any]:
    """`DEVICE_KEYS` of a target."""
    numbers = [
        {
            "table": number.where,
            "key": number.key,
            "value": number.value,
            "unit": number.unit,
            "estimate": number.is_estimate,
            "sources": [source.id for source in number.sources],
        }
        for number in target.numbers
    ]
    sources = [
        {"id": source.id, "kind": source.kind, "title": source.title, "url": source.url, "read": source.read}
        for source in target.sources
    ]
    calibration: Mapping[str, Any] | None = target.calibration
    return {
        "name": target.name,
        "kind": target.kind,
        "runtime": target.runtime,
        "notes": " ".join(target.notes.split()),
        "numbers": numbers,
        "models": [line for model in target.models for line in model.describe()],
        "calibration": None
        if calibration is None
        else {key: str(calibration[key]) for key in ("fitted_on", "method", "date")},
        "sources": sources,
    }
