"""What a device file may say: tables, keys, units and limits. Families add their own tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SOURCE_KINDS = ("datasheet", "paper", "code", "secondary", "measured", "derived", "estimate")
TARGET_KINDS = ("gpu", "cpu", "npu", "mcu", "fpga", "asic")
MEMORIES = (
    "dram", "flash", "sram", "l2", "l1", "buffer", "weight_buffer", "input_buffer", "output_buffer",
    "array", "register",
)  # fmt: skip
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LAYER_KINDS = (
    "linear", *_CONVOLUTIONS, *(f"depthwise_{kind}" for kind in _CONVOLUTIONS),
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "experts",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One key of a table.

    `holds` says what its value is; formats, kinds (of layers, shell patterns) and sources are one text or a list.
    A file is a path from the device file on.
    Numbers have a `unit` in words and lie between `above` and `below`, both exclusive; `<stem>_source` names the
    sources of one number where they are not the table's `source`.
    """

    name: str
    holds: Literal["text", "file", "texts", "formats", "kinds", "sources", "integer", "number"]
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


@dataclass(frozen=True)
class TableSchema:
    """One table of a device file; a repeated one is opened by `[[name]]`.

    `named_by` is the key by which messages and `Number.where` tell repeated tables apart; without it they are counted.
    """

    keys: tuple[Key, ...]
    repeated: bool = False
    required: bool = False
    named_by: str = ""


Schema = Mapping[str, TableSchema]


def number(
    name: str, unit: str, stem: str, *, required: bool = False, above: float = 0.0, below: float = float("inf")
) -> Key:
    """A key that holds a number between two limits, both exclusive."""
    return Key(name, "number", required, unit, stem, above, below)


def integer(name: str, unit: str, stem: str, *, required: bool = False, above: float = 0.0) -> Key:
    """A key that holds a whole number."""
    return Key(name, "integer", required, unit, stem, above)


EFFICIENCY = number("efficiency", "share of the peak that kernels reach", "efficiency", required=True, below=1.0)
FORMAT_PAIR = (
    Key("weight", "formats", required=True),
    Key("activation", "formats", required=True),
    Key("ops", "kinds"),
)

_MEMORY = TableSchema(
    (
        number("capacity_bytes", "bytes", "capacity"),
        number("bandwidth_Bps", "bytes a second", "bandwidth"),
        number("efficiency", "share of the peak that kernels reach", "efficiency", below=1.0),
        number("energy_pJ_per_bit", "picojoules a bit", "energy"),
        Key("holds", "texts", choices=("weights", "activations")),
    )
)

COMMON: Schema = {
    "target": TableSchema(
        (
            Key("name", "text", required=True),
            Key("kind", "text", required=True, choices=TARGET_KINDS),
            Key("runtime", "text", required=True),
            Key("notes", "text"),
        ),
        required=True,
    ),
    "source": TableSchema(
        (
            Key("id", "text", required=True),
            Key("title", "text", required=True),
            Key("kind", "text", required=True, choices=SOURCE_KINDS),
            Key("read", "text", required=True),
            Key("url", "text"),
        ),
        repeated=True,
        required=True,
    ),
    **{f"memory.{level}": _MEMORY for level in MEMORIES},
    "conversion": TableSchema(
        (
            Key("from", "formats", required=True),
            Key("to", "formats", required=True),
            number("s_per_element", "seconds an element", "s_per_element", required=True),
            number("launch_overhead_s", "seconds a call", "launch_overhead"),
            number("energy_pJ_per_element", "picojoules an element", "energy"),
        ),
        repeated=True,
    ),
    "calibration": TableSchema(
        (
            Key("fitted_on", "text", required=True),
            Key("method", "text", required=True),
            Key("date", "text", required=True),
            number("alpha", "factor on the sum of the layers' latencies", "alpha"),
            number("beta_s", "seconds a pass that belong to no layer", "beta", above=-1e300),
            integer("samples", "measurements", "samples", required=True),
            number("mape", "mean absolute relative error", "mape", required=True),
            number("kendall_tau", "rank correlation", "kendall_tau", required=True, above=-1.0),
        )
    ),
}


def keys_of(schema: TableSchema) -> dict[str, Key]:
    """Every key a table may have, those that name sources included."""
    keys = {key.name: key for key in schema.keys}
    numbers = [key for key in schema.keys if key.is_number]
    if numbers:
        keys["source"] = Key("source", "sources")
        keys |= {f"{key.stem}_source": Key(f"{key.stem}_source", "sources") for key in numbers}
    return keys


def header(table: str, schema: TableSchema) -> str:
    """How a table is opened in the file.

    Example:
        >>> header("source", COMMON["source"]), header("memory.dram", COMMON["memory.dram"])
        ('[[source]]', '[memory.dram]')
    """
    return f"[[{table}]]" if schema.repeated else f"[{table}]"


def right_spelling(schema: TableSchema, key: str) -> str:
    """How a key with the wrong unit in its name is spelt, as the tail of a message; empty where nothing is close.

    Example:
        >>> right_spelling(COMMON["memory.dram"], "bandwidth_GBps")
        ': give it in bytes a second as bandwidth_Bps'
    """
    lowered = key.lower()
    for known in schema.keys:
        is_rate = known.name == "ops_per_s" and ("tops" in lowered or "flops" in lowered)
        if known.is_number and (is_rate or lowered == known.stem or lowered.startswith(f"{known.stem}_")):
            return f": give it in {known.unit} as {known.name}"
    return ""
