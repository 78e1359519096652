"""Tables of measured kernels as files: a row a kernel, keyed by operator, shape and formats.

    kind,m,k,n,repeats,taps,weight,activation,latency [s]
    linear,1,4096,4096,1,1,int4@group32,fp32,0.000473
    conv2d,3136,576,64,1,9,int8,int8,0.000337

A row is one call of a layer: `repeats` products of an (m, k) by a (k, n) matrix (`mpq.layers.Layer.matmul`); taps are
the kernel positions of a convolution. Quantities carry their unit in the header. CSV or parquet.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpq.formats import NumberFormat, parse
from mpq.suggestions import did_you_mean

from .device_schema import LAYER_KINDS

SIZES = ("m", "k", "n", "repeats", "taps")
REMARKS = ("ratio", "measured [s]", "reference [s]", "spread", "load", "runtime", "note")
"""Columns about how a row was measured, that prices do not read."""

_UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "energy": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6},
}
_NEEDED = ("kind", "m", "k", "n", "weight", "activation")
_SHOWN = 20

Record = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class LookupTable:
    """Measured kernels, one an entry.

    Attributes:
        kinds: kind of layer (`kernel_kind`), (entries,).
        sizes: m, k, n, repeats, taps of one call, (entries, 5).
        weights, activations: names of formats, of weights with `@group<n>` where they were measured so, (entries,).
        quantities: latency [s] and possibly energy [J], by name, (entries,) each.
        remarks: how each was measured, as text, by column, (entries,) each.
    """

    kinds: tuple[str, ...]
    sizes: NDArray[np.int64]
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    quantities: Mapping[str, NDArray[np.float64]]
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def kernel_keys(self) -> list[tuple[str, ...]]:
        """What tells entries apart: kind, the five sizes, both formats."""
        return [
            (kind, *map(str, sizes), weight, activation)
            for kind, sizes, weight, activation in zip(
                self.kinds, self.sizes.tolist(), self.weights, self.activations, strict=True
            )
        ]


Shape = tuple[str, int, int, int, int, int]  # kind, m, k, n, repeats, taps


def read_shapes(path: str | Path) -> list[Shape]:
    """The shapes of a .csv or .parquet file with the columns kind, m, k, n and possibly repeats, taps.

    Raises:
        ValueError: if it cannot be read, or a kind or number is wrong, with the line.
    """
    path = Path(path)
    header, rows = _rows(path)
    filled = [*header, "weight", "activation", "latency [s]"]
    numbered = list(rows)
    table = parse_lookup_rows(filled, [(line, [*cells, "fp32", "fp32", "1"]) for line, cells in numbered], path.name)
    return [(kind, *sizes) for kind, sizes in zip(table.kinds, table.sizes.tolist(), strict=True)]


def read_lookup_table(path: str | Path) -> LookupTable:
    """A table from a .csv or .parquet file.

    Raises:
        ValueError: if it cannot be read, a column, unit, number, kind or format is wrong, or two rows price one
            kernel; every problem on a line of its own, with the line of the file.
    """
    path = Path(path)
    return parse_lookup_rows(*_rows(path), path.name)


def parse_lookup_rows(header: Sequence[str], rows: Iterable[tuple[int, Sequence[str]]], name: str) -> LookupTable:
    """A table from its header and its rows with their line numbers; `name` begins every message.

    Raises:
        ValueError: as `read_lookup_table`.

    Example:
        >>> header = ["kind", "m", "k", "n", "weight", "activation", "latency [us]"]
        >>> table = parse_lookup_rows(header, [(2, ["linear", "1", "64", "10", "int8", "int8", "3.5"])], "t.csv")
        >>> table.sizes.tolist(), table.quantities["latency"]
        ([[1, 64, 10, 1, 1]], array([3.5e-06]))
        >>> parse_lookup_rows(header, [(2, ["linear", "1", "64", "10", "int8", "int8", "-1"])], "t.csv")
        Traceback (most recent call last):
        ...
        ValueError: t.csv:2: latency [us] must be a number above 0, got '-1'
    """
    header = [text.strip() for text in header]
    problems = [f"{name}:1: {problem}" for problem in _problems_of_header(header)]
    _stop(problems)
    scales = {text: scale for text in header if (scale := _scale(text))}
    records, first = [], dict[tuple[str, ...], int]()
    for line, cells in rows:
        if len(cells) != len(header):
            problems.append(f"{name}:{line}: has {len(cells)} cells, the header {len(header)}")
            continue
        record = {"repeats": "1", "taps": "1", **dict(zip(header, map(str.strip, cells), strict=True))}
        own = [f"{name}:{line}: {problem}" for problem in _problems_of_row(record, scales)]
        key = tuple(str(int(record[text])) if text in SIZES else record[text] for text in KEY) if not own else ()
        if key in first:
            own.append(f"{name}:{line}: prices the kernel of line {first[key]} again: {_words(key)}")
        elif key:
            first[key] = line
        problems += own
        records.append(record)
    _stop(problems)
    return _table(records, scales)


KEY = ("kind", *SIZES, "weight", "activation")


def lookup_csv(table: LookupTable) -> str:
    """The table as the text of a CSV file, quantities in base units."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    units = {"latency": "s", "energy": "J"}
    writer.writerow([*KEY, *(f"{name} [{units[name]}]" for name in table.quantities), *table.remarks])
    columns = [*(map(repr, values.tolist()) for values in table.quantities.values()), *table.remarks.values()]
    writer.writerows([*key, *rest] for key, *rest in zip(table.kernel_keys, *columns, strict=True))
    return text.getvalue()


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        return _parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"cannot read the table {path.name!r}: {error}") from None


def _csv_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    reader = csv.reader(path.read_text(encoding="utf-8").splitlines())
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError("it is empty")
    return rows[0][1], rows[1:]


def _parquet_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    columns = [["" if cell is None else str(cell) for cell in column.to_pylist()] for column in table.columns]
    return table.column_names, [(line, list(row)) for line, row in enumerate(zip(*columns, strict=True), start=2)]


def _problems_of_header(header: list[str]) -> Iterable[str]:
    yield from (f"column {text!r} is there twice" for text in dict.fromkeys(header) if header.count(text) > 1)
    yield from (f"column {text!r} is missing" for text in _NEEDED if text not in header)
    named = [text.partition(" [")[0] for text in header]
    yield from (f"{name} is there twice, in two units" for name in _UNITS if len(set(_spelt(header, name))) > 1)
    if "latency" not in named:
        yield "column 'latency [s]' is missing"
    for text, name in zip(header, named, strict=True):
        if name in _UNITS and not _scale(text):
            yield f"{text!r} must name its unit: '{name} [{next(iter(_UNITS[name]))}]', or {', '.join(_UNITS[name])}"
        elif name not in _UNITS and text not in (*KEY, *REMARKS):
            yield f"unknown column {text!r}{did_you_mean(text, (*KEY, 'latency [s]', 'energy [J]', *REMARKS))}"


def _spelt(header: list[str], name: str) -> list[str]:
    return [text for text in header if text.partition(" [")[0] == name]


def _scale(text: str) -> float | None:
    name, _, unit = text.partition(" [")
    return _UNITS.get(name, {}).get(unit.removesuffix("]"))


def _problems_of_row(record: Record, scales: Mapping[str, float]) -> Iterable[str]:
    if (kind := record["kind"]) not in LAYER_KINDS:
        yield f"kind must be a kind of layer, got {kind!r}{did_you_mean(kind, LAYER_KINDS)}"
    for size in SIZES:
        if not record[size].isascii() or not record[size].isdigit() or int(record[size]) < 1:
            yield f"{size} must be a whole number of at least 1, got {record[size]!r}"
    for role in ("weight", "activation"):
        if problem := _problem_of_format(record[role]):
            yield f"{role} {problem}"
    for column in scales:
        if not _is_positive(record[column]):
            yield f"{column} must be a number above 0, got {record[column]!r}"


def _problem_of_format(text: str) -> str:
    try:
        plain = parse(text)
    except ValueError as error:
        return f"has an unknown format: {error}"
    allowed = format_keys(plain)
    return "" if text in allowed else f"must be {' or '.join(map(repr, allowed))}, got {text!r}"


def format_keys(fmt: NumberFormat) -> tuple[str, ...]:
    """How tables may name a format, the narrowest first: with its group size, then without.

    Example:
        >>> format_keys(parse("int4@group128@mse")), format_keys(parse("int8@channel"))
        (('int4@group128', 'int4'), ('int8',))
    """
    is_grouped = "granularity" in fmt.takes and fmt.granularity is not None and fmt.granularity.kind == "group"
    return (f"{fmt.name}@{fmt.granularity}", fmt.name) if is_grouped else (fmt.name,)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _words(key: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(KEY, key, strict=True))


def _stop(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join([*problems[:_SHOWN], *more]))


def _table(records: Sequence[Record], scales: Mapping[str, float]) -> LookupTable:
    remarks = [name for name in REMARKS if records and name in records[0]]
    return LookupTable(
        kinds=tuple(record["kind"] for record in records),
        sizes=np.array([[int(record[size]) for size in SIZES] for record in records], dtype=np.int64).reshape(-1, 5),
        weights=tuple(record["weight"] for record in records),
        activations=tuple(record["activation"] for record in records),
        quantities={
            column.partition(" [")[0]: scale * np.array([float(record[column]) for record in records], dtype=np.float64)
            for column, scale in scales.items()
        },
        remarks={name: tuple(record[name] for record in records) for name in remarks},
    )
