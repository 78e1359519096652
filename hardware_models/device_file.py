"""Device files by name or path: TOML in, a `Target` out."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from mpq.suggestions import did_you_mean

from .device_checks import Report, Table, checked_tables, line_numbers, source_ids
from .device_numbers import Entry, Number, Source
from .device_schema import COMMON, TableSchema
from .families import FAMILIES
from .target import Target

SCHEMA = {**COMMON, **{name: table for family in FAMILIES for name, table in family.tables.items()}}


def available() -> list[str]:
    """Names of the targets that come with mpq.

    Example:
        >>> "nvidia-t4" in available()
        True
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
        >>> load("gap9")
        Traceback (most recent call last):
        ...
        ValueError: unknown target 'gap9': did you mean 'gap8'?
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
    return parse_target(text, path.name, path.parent)


def parse_target(text: str, filename: str = "device file", folder: str | Path = ".") -> Target:
    """A target from the text of a device file; `filename` begins every message.

    Files that it names (tables of kernels, predictors) are looked for from `folder` on.

    Raises:
        ValueError: if the text is not TOML or breaks a rule.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{filename}: not TOML: {error}") from None
    checked = checked_tables(document, text, filename, SCHEMA)
    _find_files(checked, Path(folder))
    sources = {entry["id"]: Source(**entry) for entry in checked["source"]}
    tables = {
        name: [_entry(name, SCHEMA[name], place, entry, sources) for place, entry in enumerate(entries, start=1)]
        for name, entries in checked.items()
    }
    report = Report(filename, line_numbers(text), SCHEMA)
    for family in FAMILIES:
        for problem in family.check(tables):
            report.add(*problem)
    models = () if report.problems else tuple(filter(None, (family.read(tables) for family in FAMILIES)))
    if not models and not report.problems:
        ways = ", ".join(f"[{next(iter(family.tables))}]" for family in FAMILIES)
        report.add(f"nothing says how fast the target is: it needs one of {ways}")
    report.stop_if_wrong()
    order = {(name, place): line for (name, place, key), line in line_numbers(text).items() if not key}
    placed = [(order.get((name, place), 0), entry) for name, own in tables.items() for place, entry in enumerate(own)]
    return Target(
        **checked["target"][0],
        models=models,
        entries=tuple(entry for _, entry in sorted(placed, key=lambda item: item[0]) if entry.numbers),
        sources=tuple(sources.values()),
        calibration=next(iter(tables["calibration"]), None),
        conversions=tuple(tables["conversion"]),
    )


def _find_files(tables: dict[str, list[Table]], folder: Path) -> None:
    for name, entries in tables.items():
        for key in (key.name for key in SCHEMA[name].keys if key.holds == "file"):
            for entry in entries:
                if key in entry:
                    entry[key] = str(folder / entry[key])


@lru_cache
def _shipped(name: str) -> Target:
    text = files("mpq.hardware_models").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_target(text, f"{name}.toml")


def _entry(name: str, schema: TableSchema, place: int, values: Table, sources: dict[str, Source]) -> Entry:
    where = name
    if schema.repeated:
        where = f"{name} {values[schema.named_by]}" if schema.named_by else f"{name} {place}"
    numbers = tuple(
        Number(where, key.name, values[key.name], key.unit, tuple(sources[id] for id in source_ids(values, key)))
        for key in schema.keys
        if key.is_number and key.name in values
    )
    return Entry(where, values, numbers)
