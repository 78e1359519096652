"""Where the numbers of a report come from: the device with every number and source, and how scores were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mpq.report_subject import Subject

NO_DEVICE = "storage"


@dataclass(frozen=True)
class NumberLine:
    """One number of a device."""

    where: str
    key: str
    value: str
    unit: str
    kinds: str
    sources: str
    is_estimate: bool


@dataclass(frozen=True)
class SourceLine:
    """One source: what it is, of which kind, where, and what was read there."""

    id: str
    kind: str
    title: str
    url: str
    read: str


@dataclass(frozen=True, eq=False)
class DeviceFacts:
    """The device of a plan.

    Attributes:
        name, runtime, notes: of the device.
        run: batch, phase, context in words.
        estimates: a quantity and the numbers it rests on that are estimates.
        remarks: a quantity and what is to be known about it.
        numbers, sources: all of them; of sources at least what the plan itself keeps.
        calibration: what predictions were fitted on; empty where they were not.
        missing: what to pass where the numbers are not at hand.
    """

    name: str
    runtime: str
    notes: str
    run: str
    estimates: Mapping[str, tuple[str, ...]]
    remarks: Mapping[str, str]
    numbers: tuple[NumberLine, ...]
    sources: tuple[SourceLine, ...]
    calibration: str
    missing: str


def device_facts(subject: Subject) -> DeviceFacts | None:
    """The plan's device; None where there was none."""
    kept: Mapping[str, Any] = subject.plan.provenance.get("hardware") or {}
    name = kept.get("target", NO_DEVICE)
    target = subject.device if subject.device is not None else _known(name)
    if target is None and name == NO_DEVICE:
        return None
    if target is not None and subject.device is not None and name not in (NO_DEVICE, target.name):
        raise ValueError(f"the plan was priced on {name!r}, the device given is {target.name!r}: give that of the plan")
    numbers = () if target is None else tuple(map(_number, target.numbers))
    missing = "" if target is not None else f"The numbers of {name} are in its device file: give --hardware FILE.toml."
    return DeviceFacts(
        name=name,
        runtime=kept.get("runtime", ""),
        notes="" if target is None else " ".join(target.notes.split()),
        run=_run(kept),
        estimates={quantity: tuple(names) for quantity, names in (kept.get("estimates") or {}).items()},
        remarks=dict(kept.get("notes") or {}),
        numbers=numbers,
        sources=_sources(kept, target),
        calibration=_calibration(target),
        missing=missing,
    )


def _known(name: str) -> Any:
    """The device of that name that comes with mpq or a package beside it; None where there is none."""
    models = import_module("mpq.hardware_models")
    if name == NO_DEVICE or name not in models.available():
        return None
    return models.load(name)


def _number(number: Any) -> NumberLine:
    kinds = ", ".join(dict.fromkeys(source.kind for source in number.sources))
    ids = ", ".join(source.id for source in number.sources)
    value = f"{number.value:.6g}"
    return NumberLine(number.where, number.key, value, number.unit, kinds, ids, number.is_estimate)


def _sources(kept: Mapping[str, Any], target: Any) -> tuple[SourceLine, ...]:
    if target is not None:
        return tuple(
            SourceLine(source.id, source.kind, source.title, source.url or "", " ".join(source.read.split()))
            for source in target.sources
        )
    found = []
    for identity, text in (kept.get("sources") or {}).items():
        title, _, kind = str(text).rpartition(" [")
        found.append(SourceLine(identity, kind.rstrip("]"), title or str(text), "", ""))
    return tuple(found)


def _calibration(target: Any) -> str:
    if target is None or target.calibration is None:
        return ""
    return ", ".join(" ".join(str(target.calibration[key]).split()) for key in ("fitted_on", "method", "date"))


def _run(kept: Mapping[str, Any]) -> str:
    batch = kept.get("batch", 1)
    parts = [f"{batch} sample{'s' * (batch != 1)} a pass"]
    if kept.get("phase"):
        parts.append(str(kept["phase"]))
    if kept.get("context"):
        parts.append(f"{kept['context']:,} positions in the cache")
    return ", ".join(parts)


def score_facts(subject: Subject) -> list[tuple[str, str]]:
    """How the predicted loss was made, as pairs of a name and a text."""
    kept = subject.plan.provenance
    facts = []
    if "sensitivity" in kept:
        why = f"; {kept['why']}" if "why" in kept else ""
        facts.append(("predicted loss", f"{kept['sensitivity']}{why}"))
    names = {"samples": "calibration samples", "task": "task", "quantizer": "quantiser", "granularity": "granularity"}
    facts += [(title, str(kept[name])) for name, title in names.items() if kept.get(name)]
    if subject.plan.help:
        facts.append(("done after the formats were chosen", ", ".join(subject.plan.help)))
    if skipped := kept.get("skipped"):
        facts.append(("not planned", "; ".join(f"{name}: {reason}" for name, reason in skipped.items())))
    return facts


def refusals(subject: Subject) -> list[str]:
    """Options that the device or the library cannot run, with the reason."""
    return [str(text) for text in subject.plan.provenance.get("refused", ())]
