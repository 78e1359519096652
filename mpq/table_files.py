"""Cost tables on disk: parquet for machines, CSV (with a JSON beside it) for people. Both ways are exact.

Parquet is wide, so that a million units load in a second or two: a row a unit, a column a (quantity, option) named like
`size [B] | int4`. CSV is tidy: a row a (unit, option), a column a quantity.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mpq.atomic import check_writable, write_atomically
from mpq.layers import Layer
from mpq.tables import CostTable

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 3  # 2: parquet files are wide; 3: limits of the target, factors of what is alive
_HEADER = re.compile(r"(?P<name>[^\[\]]+?)\s*(?:\[(?P<measure>[^\[\]]*)\])?")
_NOT_QUANTITIES = ("unit", "option", "layer", "parameters")


class TableRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Everything of a table that is not a column."""

    schema_version: int
    units: int
    options: list[str]
    measures: dict[str, str]
    aggregates: dict[str, str]
    layers: list[Layer]
    granularity: str
    ties: list[list[int]]
    offsets: dict[str, float]
    reference: dict[str, float]
    limits: dict[str, float]
    alive: dict[str, list[list[float]]]
    pairs: list[tuple[int, int, list[list[float]]]]
    transitions: dict[str, list[tuple[int, int, list[list[float]]]]]
    provenance: dict[str, Any]
    fingerprint: str
    order: str = ""  # CSV: digest of the labels in order, as ties, layers and blocks go by position
    digest: str = ""  # parquet: of everything in the file


def save_table(table: CostTable, path: Path) -> None:
    """Write a table as `.parquet` or `.csv`, whole or not at all.

    Raises:
        ValueError: if the path has another ending or cannot be written.
    """
    record = _record(table)
    if path.suffix == ".csv":
        record.order = _order(table)
        _check_overwritable(path.with_suffix(".json"))
        write_atomically(path, _columns(table).to_csv(index=False))
        write_atomically(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1))
    elif path.suffix == ".parquet":
        record.digest = _digest(record, table)
        write_atomically(path, lambda partial: _write_parquet(table, record, partial))
    else:
        raise ValueError(f"a table's file must end in .parquet or .csv, got {str(path)!r}")


def load_table(path: Path) -> CostTable:
    """Read a table.

    Raises:
        ValueError: if the file is missing, truncated, changed (parquet), of another version, or not a table.
    """
    if not path.is_file():
        raise ValueError(f"cannot read table {str(path)!r}: there is no such file")
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"a table's file must end in .parquet or .csv, got {str(path)!r}")
    return _load_csv(path) if path.suffix == ".csv" else _load_parquet(path)


def _load_csv(path: Path) -> CostTable:
    frame = _read_csv(path)
    beside = path.with_suffix(".json")
    record = _decode(beside, beside.read_bytes()) if beside.is_file() else None
    if record is not None and (not path.read_bytes().endswith(b"\n") or frame["unit"].nunique() != record.units):
        raise ValueError(f"{str(path)!r} is truncated: {str(beside)!r} says that it has {record.units} units")
    try:
        table = _table(frame, record)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    if record is not None and record.order != _order(table):
        raise ValueError(
            f"{str(path)!r} must keep its units and options in the order mpq wrote them, which ties and layers go by: "
            "sort the rows back, or leave out the JSON beside it"
        )
    return table


def _record(table: CostTable) -> TableRecord:
    return TableRecord(
        schema_version=SCHEMA_VERSION,
        units=len(table.units),
        options=list(table.options),
        measures=dict(table.measures),
        aggregates=dict(table.aggregates),
        layers=list(table.layers),
        granularity=table.granularity,
        ties=[list(group) for group in table.ties],
        offsets=dict(table.offsets),
        reference=dict(table.reference),
        limits=dict(table.limits),
        alive={name: steps.tolist() for name, steps in table.alive.items()},
        pairs=_blocks(table.pairs),
        transitions={name: _blocks(blocks) for name, blocks in table.transitions.items()},
        provenance=dict(table.provenance),
        fingerprint=table.fingerprint,
    )


def _order(table: CostTable) -> str:
    return hashlib.sha256("\0".join([*table.units, "", *table.options]).encode()).hexdigest()


def _check_overwritable(path: Path) -> None:
    """Check that the JSON beside a CSV is not somebody else's, such as the plan of the same name."""
    check_writable(path)
    if path.is_file():
        try:
            _decode(path, path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"cannot write {str(path)!r}: a file is there that describes no table; give the CSV another name"
            ) from error


def _columns(table: CostTable) -> pd.DataFrame:
    frame = table.frame.reset_index()
    frame.insert(2, "layer", np.repeat(table.layer_index, len(table.options)))
    if table.parameters is not None:
        frame.insert(3, "parameters", np.repeat(table.parameters, len(table.options)))
    return frame.rename(columns={name: _header(name, table.measures[name]) for name in table.quantities})


def _table(frame: pd.DataFrame, record: TableRecord | None) -> CostTable:
    for column in ("unit", "option"):
        if column not in frame.columns:
            raise ValueError(f"a table must have a column {column!r}, it has {', '.join(map(str, frame.columns))}")
    measures, renamed = {}, {}
    for column in frame.columns:
        if column not in _NOT_QUANTITIES:
            match = _HEADER.fullmatch(str(column).strip())
            if match is None:
                raise ValueError(f"column {column!r} must be named like 'size [B]'")
            renamed[column] = match["name"]
            if match["measure"] is not None:
                measures[match["name"]] = match["measure"]
    tidy = frame.rename(columns=renamed).set_index(["unit", "option"])
    extra = tidy[[name for name in ("layer", "parameters") if name in tidy.columns]]
    fields: dict[str, Any] = {"measures": measures}
    per_unit = extra[~tidy.index.get_level_values(0).duplicated()]
    fields |= {field: per_unit[name].to_numpy() for name, field in _PER_UNIT.items() if name in per_unit}
    if record is not None:
        fields |= _fields(record)
    return CostTable.from_frame(tidy.drop(columns=list(extra.columns)), **fields)


_PER_UNIT = {"layer": "layer_index", "parameters": "parameters"}


def _fields(record: TableRecord) -> dict[str, Any]:
    return {
        "measures": record.measures,
        "aggregates": record.aggregates,
        "layers": tuple(record.layers),
        "granularity": record.granularity,
        "ties": record.ties,
        "offsets": record.offsets,
        "reference": record.reference,
        "limits": record.limits,
        "alive": record.alive,
        "pairs": {(i, j): np.asarray(block) for i, j, block in record.pairs},
        "transitions": {
            name: {(i, j): np.asarray(block) for i, j, block in blocks} for name, blocks in record.transitions.items()
        },
        "provenance": record.provenance,
        "fingerprint": record.fingerprint,
    }


def _blocks(blocks: Any) -> list[tuple[int, int, list[list[float]]]]:
    return [(int(i), int(j), np.asarray(block, float).tolist()) for (i, j), block in blocks.items()]


def _header(name: str, measure: str) -> str:
    return f"{name} [{measure}]" if measure else name


def _decode(path: Path, content: bytes) -> TableRecord:
    try:
        record = msgspec.json.decode(content, type=TableRecord)
    except msgspec.DecodeError as error:
        raise ValueError(f"{str(path)!r} does not describe an mpq table: {error}") from error
    if record.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"{str(path)!r} has schema_version {record.schema_version}, this mpq reads version {SCHEMA_VERSION}"
        )
    return record


def _digest(record: TableRecord, table: CostTable) -> str:
    """Of the record, the labels and the raw bytes of every array."""
    digest = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(record, digest=""), order="sorted"))
    digest.update("\0".join(np.asarray(table.units).tolist()).encode())  # not the array, whose width may differ
    arrays = {"layer": table.layer_index, "parameters": table.parameters, **table.quantities}
    for name, values in arrays.items():
        if values is not None:
            digest.update(f"{name};".encode())
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def _cell_columns(record: TableRecord) -> dict[str, list[str]]:
    """The columns of each quantity in a parquet file, one an option."""
    headers = {name: _header(name, measure) for name, measure in record.measures.items()}
    return {name: [f"{header} | {option}" for option in record.options] for name, header in headers.items()}


def _write_parquet(table: CostTable, record: TableRecord, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"unit": pa.array(np.asarray(table.units).tolist(), pa.string()), "layer": pa.array(table.layer_index)}
    if table.parameters is not None:
        columns["parameters"] = pa.array(table.parameters)
    for name, titles in _cell_columns(record).items():
        cells = np.ascontiguousarray(table.quantities[name].T)
        columns |= {title: pa.array(values) for title, values in zip(titles, cells, strict=True)}
    arrow = pa.table(columns).replace_schema_metadata({"mpq": msgspec.json.encode(record)})
    pq.write_table(arrow, path, use_dictionary=False)  # distinct numbers: a dictionary takes time, saves nothing


def _load_parquet(path: Path) -> CostTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.ParquetFile(path).read()  # not read_table, which imports pandas
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a whole parquet file: {str(error).splitlines()[0]}") from error
    metadata = arrow.schema.metadata or {}
    if b"mpq" not in metadata:
        raise ValueError(f"{str(path)!r} is a parquet file, but not an mpq table")
    record = _decode(path, metadata[b"mpq"])
    try:
        cells = _cell_columns(record)
        table = CostTable(
            units=arrow["unit"].to_pylist(),
            options=record.options,
            quantities={name: np.stack([_numbers(arrow[title]) for title in cells[name]], axis=1) for name in cells},
            layer_index=_numbers(arrow["layer"]),
            parameters=_numbers(arrow["parameters"]) if "parameters" in arrow.column_names else None,
            **_fields(record),
        )
        why = "" if record.digest == _digest(record, table) else "its digest does not match"
    except (KeyError, ValueError) as error:  # a column is gone, or its values are no table's
        why = str(error)
    if why:
        raise ValueError(f"{str(path)!r} was changed after mpq wrote it: {why}; measure it again")
    return table


def _numbers(column: Any) -> Any:
    """A column as an array; not by `to_numpy`, which imports pandas."""
    return np.from_dlpack(column.combine_chunks())


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        text = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
        labels = [column for column in ("unit", "option") if column in text]
        numbers = text.drop(columns=labels).replace("", "nan").astype(np.float64)  # from text, so the way back is exact
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a readable CSV file: {error}") from error
    return pd.concat([text[labels], numbers], axis=1)
