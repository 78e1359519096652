"""The plan on disk: versioned JSON, checked against `plan.schema.json`, with a digest of its content."""

from __future__ import annotations

import base64
import hashlib
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mpq.atomic import write_atomically
from mpq.formats import parse
from mpq.input_range import InputRange
from mpq.layers import Layer, Network
from mpq.options import Option
from mpq.plan import AskedBudget, Entry, Plan, Split
from mpq.problem import Proof

SCHEMA_VERSION = 1


class SplitRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a layer's rows or groups; `codes` is base64 of zlib of one byte a unit."""

    granularity: str
    options: list[str]
    codes: str


class RangeRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The calibrated range of a layer's input: one end below and one above a scale of the format."""

    format: str
    low: list[float]
    high: list[float]
    method: str


class EntryRecord(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One layer and its option, or its split; and the range of its input where it was calibrated."""

    layer: Layer
    option: str | None = None
    split: SplitRecord | None = None
    input_range: RangeRecord | None = None


class PlanRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    schema_version: int
    fingerprint: str
    layers: list[EntryRecord]
    predicted: dict[str, float]
    measures: dict[str, str]
    proof: Proof | None
    budgets: list[AskedBudget]
    outside: dict[str, float]
    measured: dict[str, float]
    edited: list[str]
    provenance: dict[str, Any]
    digest: str = ""


def schema() -> dict[str, Any]:
    """The JSON schema of a plan file; `plan.schema.json` holds it."""
    return msgspec.json.schema(PlanRecord)


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan, whole or not at all."""
    record = PlanRecord(
        schema_version=SCHEMA_VERSION,
        fingerprint=plan.fingerprint,
        layers=[_entry_record(entry) for entry in plan.entries],
        predicted=dict(plan.predicted),
        measures=dict(plan.measures),
        proof=plan.proof,
        budgets=list(plan.budgets),
        outside=dict(plan.outside),
        measured=dict(plan.measured),
        edited=list(plan.edited),
        provenance=dict(plan.provenance),
    )
    record.digest = _digest(record)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ValueError: if the file is missing, not JSON, of another version, not of the schema, or its digest is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read plan {str(path)!r}: {error.strerror}") from error
    _check_version(path, content)
    try:
        record = msgspec.json.decode(content, type=PlanRecord)
    except msgspec.DecodeError as error:
        raise ValueError(f"{str(path)!r} is not a valid plan: {error}") from error
    if record.digest != _digest(record):
        raise ValueError(
            f"{str(path)!r} was changed after mpq wrote it (its digest does not match): its predictions may be false. "
            "Load the original, change it with plan.with_options({...}) and save it again"
        )
    return _plan(record)


def _check_version(path: Path, content: bytes) -> None:
    try:
        raw = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ValueError(f"{str(path)!r} is not a whole JSON file: {error}; write the plan again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version is None:
        raise ValueError(f"{str(path)!r} is not an mpq plan: it has no schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{str(path)!r} has schema_version {version}, this mpq reads version {SCHEMA_VERSION}: "
            "use the mpq that wrote it, or search again"
        )


def _digest(record: PlanRecord) -> str:
    content = msgspec.structs.replace(record, digest="")
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _entry_record(entry: Entry) -> EntryRecord:
    found = entry.input_range
    given = RangeRecord(str(found.fmt), list(found.low), list(found.high), found.method) if found else None
    if isinstance(entry.choice, Option):
        return EntryRecord(entry.layer, option=str(entry.choice), input_range=given)
    split = entry.choice
    codes = base64.b64encode(zlib.compress(split.codes.tobytes(), 9)).decode()
    record = SplitRecord(split.granularity, list(map(str, split.options)), codes)
    return EntryRecord(entry.layer, split=record, input_range=given)


def _plan(record: PlanRecord) -> Plan:
    return Plan(
        entries=tuple(_entry(entry) for entry in record.layers),
        fingerprint=record.fingerprint,
        predicted=record.predicted,
        measures=record.measures,
        proof=record.proof,
        budgets=tuple(record.budgets),
        outside=record.outside,
        measured=record.measured,
        edited=tuple(record.edited),
        provenance=record.provenance,
    )


def _entry(record: EntryRecord) -> Entry:
    name = record.layer.name
    if (record.option is None) == (record.split is None):
        raise ValueError(f"plan entry {name!r} must have an option or a split, not both or neither")
    given = record.input_range
    found = InputRange(parse(given.format), tuple(given.low), tuple(given.high), given.method) if given else None
    if record.split is None:
        return Entry(record.layer, Option.parse(record.option or ""), found)
    split = record.split
    codes = np.frombuffer(_inflated(split.codes, record.layer.parameters), np.uint8)
    count = len(Network((record.layer,)).units(split.granularity))
    if len(codes) != count:
        raise ValueError(
            f"plan entry {name!r} has {len(codes)} codes, cut into {split.granularity} it has {count} units"
        )
    if codes.max() >= len(split.options):
        raise ValueError(f"plan entry {name!r} names an option that its split does not list")
    return Entry(record.layer, Split(split.granularity, tuple(map(Option.parse, split.options)), codes), found)


def _inflated(text: str, limit: int) -> bytes:
    """Decompressed codes, never more than one a weight."""
    try:
        inflate = zlib.decompressobj()
        return inflate.decompress(base64.b64decode(text, validate=True), limit + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"a plan's codes are not readable: {error}") from error
