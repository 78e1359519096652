"""The device file of a measured machine: what was measured, on what, how noisy it was, in words and numbers."""

from __future__ import annotations

import json
from datetime import date

import numpy as np

from .measured import WIDE, Measured, Timing

_NOTES = """\
Each kernel was timed alone, in turn with one fp32 product of 64 x 768 x 768, {repeats} times {rounds} rounds, by the
processor time of its thread where it has one thread. Its latency is the median ratio times the fastest reference,
{reference:.3g} us. Load average {load}; {wide} of {rows} rows differ by more than {limit:.0%} between repeats
(median {median:.1%}, worst {worst:.1%}). A network is not the sum of its kernels: neighbours fuse and share caches.
Calibrate with a measured network where totals matter."""


def device_text(name: str, table_file: str, measured: Measured, timing: Timing, today: str = "") -> str:
    """The text of a device file whose prices are a table of measured kernels.

    Args:
        name: of the target.
        table_file: the table, as the device file names it.
        measured: what was measured.
        timing: how.
        today: the date of the measurement, today unless given.
    """
    remarks = measured.table.remarks
    spreads = np.array([float(spread) for spread in remarks["spread"]])
    loads = [float(load) for load in remarks["load"] if load]
    runtime, _, chip = remarks["runtime"][0].partition("; ")
    notes = _NOTES.format(
        repeats=timing.repeats,
        rounds=timing.rounds,
        reference=1e6 * min(map(float, remarks["reference [s]"])),
        load=f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown",
        wide=measured.wide,
        rows=len(measured.table),
        limit=WIDE,
        median=float(np.median(spreads)),
        worst=float(spreads.max()),
    )
    missing = sorted({f"{kernel.weight} x {kernel.activation} in {kernel.kind}" for kernel in measured.refused})
    if missing:
        notes += f"\nThe runtime has no kernel for {', '.join(missing)}."
    lines = [
        "# Written by `mpq device measure`. Units are in the key names.",
        "schema = 1",
        "",
        "[target]",
        f"name = {json.dumps(name)}",
        'kind = "cpu"',
        f"runtime = {json.dumps(runtime)}",
        f'notes = """\n{_escaped(notes)}\n"""',
        "",
        "[[source]]",
        'id = "measured-here"',
        f"title = {json.dumps(f'{runtime} on {chip}', ensure_ascii=False)}",
        'kind = "measured"',
        f'read = "{today or date.today().isoformat()}: kernels timed in turn with a reference, ratios in the table"',
        "",
        "[lookup]",
        f"file = {json.dumps(table_file, ensure_ascii=False)}",
        f"entries = {len(measured.table)}",
        'source = ["measured-here"]',
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
