"""What a device file may say: tables, keys, units and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SOURCE_KINDS = ("datasheet", "paper", "code", "secondary", "measured", "derived", "estimate")
TARGET_KINDS = ("gpu", "cpu", "npu", "mcu", "fpga", "asic")
LAYER_KINDS = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "experts",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One key of a table.

    `holds` says what its value is; formats, kinds (of layers, shell patterns) and sources are one text or a list.
    Numbers have a `unit` in words and lie between `above` and `below`, both exclusive; `<stem>_source` names the
    sources of one number where they are not the table's `source`.
    """

    name: str
    holds: Literal["text", "formats", "kinds", "sources", "integer", "number"]
    required: bool = False
    unit: str = ""
    stem: str = ""
    above: float = 0.0
    below: float = float("inf")
    choices: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether the value is a number, which needs a source."""
        return self.holds in ("integer", "number")


def _number(
    name: str, unit: str, stem: str, *, required: bool = False, above: float = 0.0, below: float = float("inf")
) -> Key:
    return Key(name, "number", required, unit, stem, above, below)


_PAIR = (Key("weight", "formats", required=True), Key("activation", "formats", required=True), Key("ops", "kinds"))
_EFFICIENCY = _number("efficiency", "share of the peak that kernels reach", "efficiency", required=True, below=1.0)
_DEQUANT = _number("dequant_s_per_weight", "seconds a weight", "dequant")

TABLES: dict[str, tuple[Key, ...]] = {
    "target": (
        Key("name", "text", required=True),
        Key("kind", "text", required=True, choices=TARGET_KINDS),
        Key("runtime", "text", required=True),
        Key("notes", "text"),
    ),
    "source": (
        Key("id", "text", required=True),
        Key("title", "text", required=True),
        Key("kind", "text", required=True, choices=SOURCE_KINDS),
        Key("read", "text", required=True),
        Key("url", "text"),
    ),
    "memory.dram": (
        _number("bandwidth_Bps", "bytes a second", "bandwidth", required=True),
        _EFFICIENCY,
        _number("energy_pJ_per_bit", "picojoules a bit", "energy"),
    ),
    "compute": (
        Key("unit", "text", required=True),
        *_PAIR,
        _number("ops_per_s", "operations a second, two a multiply-add, dense", "ops", required=True),
        _EFFICIENCY,
        _number("launch_overhead_s", "seconds a call", "launch_overhead", required=True),
        Key("align_k", "integer", unit="inputs a tile", stem="align_k"),
        Key("align_n", "integer", unit="outputs a tile", stem="align_n"),
        _DEQUANT,
        _number("energy_pJ_per_mac", "picojoules a multiply-add", "energy"),
    ),
    "fallback": (Key("runs_as", "text", required=True), *_PAIR, _DEQUANT),
    "calibration": (
        Key("fitted_on", "text", required=True),
        Key("method", "text", required=True),
        Key("date", "text", required=True),
        Key("samples", "integer", required=True, unit="measurements", stem="samples"),
        _number("mape", "mean absolute relative error", "mape", required=True),
        _number("kendall_tau", "rank correlation", "kendall_tau", required=True, above=-1.0),
    ),
}

REPEATED = ("source", "compute", "fallback")
REQUIRED = ("target", "source", "memory.dram", "compute")


def keys_of(table: str) -> dict[str, Key]:
    """Every key a table may have, those that name sources included."""
    keys = {key.name: key for key in TABLES[table]}
    numbers = [key for key in TABLES[table] if key.is_number]
    if numbers:
        keys["source"] = Key("source", "sources")
        keys |= {f"{key.stem}_source": Key(f"{key.stem}_source", "sources") for key in numbers}
    return keys


def header(table: str) -> str:
    """How a table is opened in the file.

    Example:
        >>> header("compute"), header("memory.dram")
        ('[[compute]]', '[memory.dram]')
    """
    return f"[[{table}]]" if table in REPEATED else f"[{table}]"


def right_spelling(table: str, key: str) -> str:
    """How a key with the wrong unit in its name is spelt, as the tail of a message; empty where nothing is close.

    Example:
        >>> right_spelling("memory.dram", "bandwidth_GBps")
        ': give it in bytes a second as bandwidth_Bps'
        >>> right_spelling("compute", "peak_TFLOPS")
        ': give it in operations a second, two a multiply-add, dense as ops_per_s'
    """
    lowered = key.lower()
    for known in TABLES[table]:
        is_rate = known.name == "ops_per_s" and ("tops" in lowered or "flops" in lowered)
        if known.is_number and (is_rate or lowered == known.stem or lowered.startswith(f"{known.stem}_")):
            return f": give it in {known.unit} as {known.name}"
    return ""
