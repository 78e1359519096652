"""What can be wrong with a device file, told with the line and key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fnmatch import filter as matching
from typing import Any

from mpq.formats import parse
from mpq.suggestions import did_you_mean

from .device_schema import LAYER_KINDS, Key, Schema, TableSchema, header, keys_of, right_spelling

Table = dict[str, Any]

_HEADER = re.compile(r"\[\[?\s*([\w.-]+)\s*\]\]?")
_KEY = re.compile(r"([\w-]+)\s*=")
_FAMILIES = ("fp3", "fp4", "fp5", "fp6", "fp7", "fp8", "mxfp6", "mxfp8")


def checked_tables(document: Table, text: str, filename: str, schema: Schema) -> dict[str, list[Table]]:
    """The tables of a device file, each as a list, if nothing is wrong with them one by one.

    Args:
        document: the file as TOML reads it.
        text: the file as it stands, for line numbers.
        filename: begins every message.
        schema: every table that a device file may have.

    Raises:
        ValueError: every problem on a line of its own.
    """
    report = Report(filename, line_numbers(text), schema)
    tables = _tables(document, schema, report)
    for table, entries in tables.items():
        for position, entry in enumerate(entries):
            _check_keys(table, position, entry, schema[table], report)
    _check_bandwidths(tables, report)
    report.stop_if_wrong()
    _check_sources(tables, schema, report)
    report.stop_if_wrong()
    return tables


def line_numbers(text: str) -> dict[tuple[str, int, str], int]:
    r"""The line of every (table, position among its likes, key); the table's own line under the key "".

    Example:
        >>> line_numbers("schema = 1\n[[compute]]\nunit = 'a'\n[[compute]]\nunit = 'b'")[("compute", 1, "unit")]
        5
    """
    lines: dict[tuple[str, int, str], int] = {}
    table, position, quotes = "", 0, 0
    for number, line in enumerate(text.splitlines(), start=1):
        in_text, stripped = quotes % 2, line.strip()
        quotes += line.count('"""') + line.count("'''")
        if in_text:
            continue
        if opened := _HEADER.match(stripped):
            table = opened[1]
            position = sum(known == table and not key for known, _, key in lines)
            lines[table, position, ""] = number
        elif assigned := _KEY.match(stripped):
            lines.setdefault((table, position, assigned[1]), number)
    return lines


def as_list(value: str | list[str]) -> tuple[str, ...]:
    """One text or a list of them, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def source_ids(entry: Table, key: Key) -> tuple[str, ...]:
    """The ids of the sources of one number: its own, or the table's."""
    own: str | list[str] | None = entry.get(f"{key.stem}_source", entry.get("source"))
    return as_list(own or [])


class Report:
    """The problems found so far."""

    def __init__(self, filename: str, lines: dict[tuple[str, int, str], int], schema: Schema) -> None:
        self._filename = filename
        self._lines = lines
        self._schema = schema
        self.problems: list[str] = []

    def add(self, problem: str, table: str = "", position: int = 0, key: str = "") -> None:
        """Note a problem with its line: of a key, else of its table, else none."""
        line = self._lines.get((table, position, key)) or self._lines.get((table, position, ""))
        place = f":{line}" if line else ""
        if known := self._schema.get(table):
            place += f": {header(table, known)}" + (f" number {position + 1}" if known.repeated else "")
        self.problems.append(f"{self._filename}{place}: {problem}")

    def stop_if_wrong(self) -> None:
        """Raise what was found.

        Raises:
            ValueError: every problem on a line of its own.
        """
        if self.problems:
            raise ValueError("\n".join(self.problems))


def _tables(document: Table, schema: Schema, report: Report) -> dict[str, list[Table]]:
    if document.get("schema") != 1:
        report.add(f"schema must be 1, got {document.get('schema')!r}", key="schema")
    result: dict[str, list[Table]] = {table: [] for table in schema}
    for name, value in _flattened(document):
        known = schema.get(name)
        if known is None:
            report.add(f"unknown table or key {name!r}{did_you_mean(name, schema)}", name)
        elif known.repeated and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            result[name] = value
        elif not known.repeated and isinstance(value, dict):
            result[name] = [value]
        else:
            report.add(f"{name} must be a table that begins with {header(name, known)}", name)
    if not report.problems:
        for name, known in schema.items():
            if known.required and not result[name]:
                report.add(f"{header(name, known)} is missing")
    return result


def _flattened(document: Table) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if name == "memory" and isinstance(value, dict):
            yield from ((f"memory.{level}", table) for level, table in value.items())
        elif name != "schema":
            yield name, value


def _check_keys(table: str, position: int, entry: Table, schema: TableSchema, report: Report) -> None:
    keys = keys_of(schema)
    for name, value in entry.items():
        if name not in keys:
            hint = right_spelling(schema, name) or did_you_mean(name, keys)
            report.add(f"unknown key {name!r}{hint}", table, position, name)
        elif problem := _problem(keys[name], value):
            report.add(f"{name} {problem}", table, position, name)
    for key in keys.values():
        if key.required and key.name not in entry:
            report.add(f"{key.name} is missing" + (f" ({key.unit})" if key.unit else ""), table, position)
        if key.is_number and key.name in entry and not source_ids(entry, key):
            rule = f"has no source: add source = [...] for the table or {key.stem}_source = [...] for this number"
            report.add(f"{key.name} {rule}", table, position, key.name)


def _check_bandwidths(tables: dict[str, list[Table]], report: Report) -> None:
    for table, entries in tables.items():
        for entry in entries if table.startswith("memory.") else ():
            missing = {"bandwidth_Bps", "efficiency"} - entry.keys()
            if len(missing) == 1:
                report.add(f"bandwidth_Bps and efficiency go together: {missing.pop()} is missing", table)


def _problem(key: Key, value: object) -> str:
    if key.is_number:
        return _problem_of_number(key, value)
    texts = value if isinstance(value, list) and key.holds not in ("text", "file") else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        return f"must be text{'' if key.holds in ('text', 'file') else ' or a list of texts'}, got {value!r}"
    if key.choices and (wrong := [text for text in texts if text not in key.choices]):
        return f"must be one of {', '.join(key.choices)}, got {wrong[0]!r}"
    rule = {"formats": _problem_of_format, "kinds": _problem_of_kind}.get(key.holds)
    return next(filter(None, map(rule, texts)), "") if rule else ""


def _problem_of_number(key: Key, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"must be a finite number ({key.unit}), got {value!r}"
    if key.holds == "integer" and not isinstance(value, int):
        return f"must be a whole number ({key.unit}), got {value!r}"
    if not key.above < value < key.below:
        limits = f"above {key.above:g}" + (f" and below {key.below:g}" if key.below < math.inf else "")
        return f"must be {limits} ({key.unit}), got {value!r}"
    return ""


def _problem_of_format(name: str) -> str:
    if "@" in name:
        return f"must name formats without granularity, got {name!r}: write {name.partition('@')[0]!r}"
    if name in _FAMILIES:
        return ""
    try:
        parse(name)
    except ValueError as error:
        return f"has an unknown format: {error}"
    return ""


def _problem_of_kind(pattern: str) -> str:
    if matching(LAYER_KINDS, pattern):
        return ""
    return f"must name kinds of layers, got {pattern!r}{did_you_mean(pattern, LAYER_KINDS)}"


def _check_sources(tables: dict[str, list[Table]], schema: Schema, report: Report) -> None:
    ids = [entry["id"] for entry in tables["source"]]
    for position, identifier in enumerate(ids):
        if identifier in ids[:position]:
            report.add(f"source {identifier!r} is there twice", "source", position, "id")
    for table, entries in tables.items():
        naming = [key.name for key in keys_of(schema[table]).values() if key.holds == "sources"]
        for position, entry in enumerate(entries):
            for name in naming:
                for unknown in sorted(set(as_list(entry.get(name, []))) - set(ids)):
                    hint = did_you_mean(unknown, ids)
                    report.add(f"{name}: no [[source]] has the id {unknown!r}{hint}", table, position, name)
