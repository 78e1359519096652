"""Device files by name or path: TOML in, a `Target` out."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from mpq.suggestions import did_you_mean

from .device_checks import Table, as_list, checked_tables, source_ids
from .device_schema import TABLES
from .target import ComputeUnit, Fallback, Memory, Number, Source, Target


def available() -> list[str]:
    """Names of the targets that come with mpq.

    Example:
        >>> available()
        ['nvidia-t4', 'x86-amx']
    """
    names = (entry.name for entry in files("mpq.hardware_models").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(name_or_path: str | Path) -> Target:
    """A target by its name, or from a device file of your own.

    Args:
        name_or_path: a name of `available()`; anything that ends in .toml or names a folder is a path.

    Raises:
        ValueError: if there is no such file, or something is wrong with it: then everything that is, with lines.

    Example:
        >>> load("nvidia-t4").runtime
        'TVM kernels as in HAWQ-V3, batch 8'
        >>> load("nvidia-t5")
        Traceback (most recent call last):
        ...
        ValueError: unknown target 'nvidia-t5': did you mean 'nvidia-t4'?
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and path.name == str(name_or_path):
        if path.name not in available():
            raise ValueError(f"unknown target {path.name!r}{did_you_mean(path.name, available())}")
        return _shipped(path.name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the device file {str(path)!r}: {error}") from None
    return parse_target(text, path.name)


def parse_target(text: str, filename: str = "device file") -> Target:
    """A target from the text of a device file; `filename` begins every message.

    Raises:
        ValueError: if the text is not TOML or breaks a rule.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{filename}: not TOML: {error}") from None
    tables = checked_tables(document, text, filename)
    sources = {entry["id"]: Source(**entry) for entry in tables["source"]}
    calibration = tables["calibration"][0] if tables["calibration"] else {}
    return Target(
        **tables["target"][0],
        memory=_memory(tables["memory.dram"][0], sources),
        units=tuple(_unit(entry, sources) for entry in tables["compute"]),
        fallbacks=tuple(_fallback(entry, place, sources) for place, entry in enumerate(tables["fallback"], start=1)),
        sources=tuple(sources.values()),
        calibration=tuple((key, calibration[key]) for key in ("fitted_on", "method", "date") if key in calibration),
        calibration_numbers=_numbers("calibration", "calibration", calibration, sources),
    )


@lru_cache
def _shipped(name: str) -> Target:
    text = files("mpq.hardware_models").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_target(text, f"{name}.toml")


def _memory(entry: Table, sources: dict[str, Source]) -> Memory:
    return Memory(
        bytes_per_s=float(entry["bandwidth_Bps"] * entry["efficiency"]),
        pj_per_bit=entry.get("energy_pJ_per_bit"),
        numbers=_numbers("memory.dram", "memory.dram", entry, sources),
    )


def _unit(entry: Table, sources: dict[str, Source]) -> ComputeUnit:
    return ComputeUnit(
        name=entry["unit"],
        weights=as_list(entry["weight"]),
        activations=as_list(entry["activation"]),
        kinds=as_list(entry.get("ops", "*")),
        ops_per_s=float(entry["ops_per_s"] * entry["efficiency"]),
        launch_overhead_s=float(entry["launch_overhead_s"]),
        align_k=entry.get("align_k", 1),
        align_n=entry.get("align_n", 1),
        dequant_s_per_weight=float(entry.get("dequant_s_per_weight", 0.0)),
        pj_per_mac=entry.get("energy_pJ_per_mac"),
        numbers=_numbers("compute", f"compute {entry['unit']}", entry, sources),
    )


def _fallback(entry: Table, place: int, sources: dict[str, Source]) -> Fallback:
    return Fallback(
        runs_as=entry["runs_as"],
        weights=as_list(entry["weight"]),
        activations=as_list(entry["activation"]),
        kinds=as_list(entry.get("ops", "*")),
        dequant_s_per_weight=float(entry.get("dequant_s_per_weight", 0.0)),
        numbers=_numbers("fallback", f"fallback {place} to {entry['runs_as']}", entry, sources),
    )


def _numbers(table: str, where: str, entry: Table, sources: dict[str, Source]) -> tuple[Number, ...]:
    return tuple(
        Number(where, key.name, entry[key.name], key.unit, tuple(sources[name] for name in source_ids(entry, key)))
        for key in TABLES[table]
        if key.is_number and key.name in entry
    )
