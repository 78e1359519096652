"""A plan as comma-separated values, for spreadsheets and tools without an exporter."""

from __future__ import annotations

import csv
import io
from typing import Any

from mpq.plan import Plan

COLUMNS = ("layer", "parameter", "option", "weight_bits", "stored_bits_per_weight", "weights", "bytes")


def to_csv(plan: Plan) -> dict[str, Any]:
    """The plan as ``columns`` and ``rows``, a row a layer; `csv_text` writes them.

    ``weight_bits`` are of one value, ``stored_bits_per_weight`` count scales and zero points too, ``bytes`` are of the
    weight as stored. A split layer has averages and its counts in ``option``; an operator of attention has no weights,
    and ``weight_bits`` are those of its inputs.
    """
    rows = [
        [
            entry.layer.name,
            entry.layer.weight_name,
            str(entry.choice),
            entry.value_bits,
            entry.storage_bits / max(entry.layer.parameters, 1),
            entry.layer.parameters,
            entry.storage_bits / 8,
        ]
        for entry in plan.entries
    ]
    return {"columns": list(COLUMNS), "rows": rows}


def csv_text(exported: dict[str, Any]) -> str:
    r"""The text of a CSV file.

    Example:
        >>> csv_text({"columns": ["layer", "option"], "rows": [["fc", "int4"]]})
        'layer,option\nfc,int4\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(exported["columns"])
    writer.writerows(exported["rows"])
    return text.getvalue()
