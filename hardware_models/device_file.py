"""Device files by name or path: TOML in, a `Target` out."""

from __future__ import annotations

import os
import tomllib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from mpq.plugins import Plugin, all_names, plugin_named
from mpq.suggestions import did_you_mean

from .device_checks import Report, Table, checked_tables, line_numbers, source_ids
from .device_numbers import Entry, Number, Source
from .device_schema import COMMON, Schema, TableSchema
from .families import FAMILIES
from .prices import Family
from .target import Target


def _schema(families: tuple[Family, ...]) -> Schema:
    return {**COMMON, **{name: table for family in families for name, table in family.tables.items()}}


SCHEMA = _schema(FAMILIES)


def available() -> list[str]:
    """Names of the targets that come with mpq, then of those that other packages add (`mpq.plugins`).

    Example:
        >>> "nvidia-t4" in available()
        True
    """
    return all_names("mpq.hardware", shipped())


def shipped() -> list[str]:
    """Names of the targets that come with mpq."""
    names = (entry.name for entry in files("mpq.hardware_models").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(name_or_path: str | Path) -> Target:
    """A target by its name, or from a device file of your own.

    Args:
        name_or_path: a name of `available()`; anything that ends in .toml or names a folder is a path.

    Raises:
        ValueError: if there is no such file, something is wrong with it (then everything that is, with lines), or two
            packages have the name.

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
        if plugin := plugin_named("mpq.hardware", path.name, shipped()):
            return _of_plugin(plugin)
        if path.name not in shipped():
            raise ValueError(f"unknown target {path.name!r}{did_you_mean(path.name, available())}")
        return _shipped(path.name)
    return _read(path)


def _read(path: Path) -> Target:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the device file {str(path)!r}: {error}") from None
    return parse_target(text, path.name, path.parent)


def _of_plugin(plugin: Plugin) -> Target:
    """What an entry point of another package leads to, as `mpq.plugins` says.

    Raises:
        ValueError: if it leads to no target; it names the package and the entry point.
    """
    try:
        found = plugin.load()
        if isinstance(found, type) or (callable(found) and not hasattr(found, "costs")):
            found = found()
        if isinstance(found, ModuleType):
            found = Path(str(files(found).joinpath(f"{plugin.name}.toml")))
        target: Any = _read(Path(found)) if isinstance(found, str | os.PathLike) else found
    except Exception as error:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(told if str(plugin) in told else f"device {plugin.name!r} of {plugin}: {told}") from error
    if not callable(getattr(target, "costs", None)):
        raise ValueError(f"device {plugin.name!r} of {plugin} must lead to a Target, got {target!r}")
    return target  # type: ignore[no-any-return]


def parse_target(
    text: str, filename: str = "device file", folder: str | Path = ".", *, families: tuple[Family, ...] = FAMILIES
) -> Target:
    """A target from the text of a device file; `filename` begins every message.

    Files that it names (tables of kernels, predictors) are looked for from `folder` on. `families` are those that may
    describe it, in the order in which they price: `(*FAMILIES, MINE)` reads files with tables of one's own.

    Raises:
        ValueError: if the text is not TOML or breaks a rule.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{filename}: not TOML: {error}") from None
    schema = _schema(families)
    checked = checked_tables(document, text, filename, schema)
    _find_files(checked, schema, Path(folder))
    sources = {entry["id"]: Source(**entry) for entry in checked["source"]}
    tables = {
        name: [_entry(name, schema[name], place, entry, sources) for place, entry in enumerate(entries, start=1)]
        for name, entries in checked.items()
    }
    report = Report(filename, line_numbers(text), schema)
    for family in families:
        for problem in family.check(tables):
            report.add(*problem)
    models = () if report.problems else tuple(filter(None, (family.read(tables) for family in families)))
    if not models and not report.problems:
        ways = ", ".join(f"[{next(iter(family.tables))}]" for family in families)
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


def _find_files(tables: dict[str, list[Table]], schema: Schema, folder: Path) -> None:
    for name, entries in tables.items():
        for key in (key.name for key in schema[name].keys if key.holds == "file"):
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
