"""How to make a plan again: the command, the Python, and what was recorded of versions and seeds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mpq.drops import METRICS
from mpq.report_subject import Subject
from mpq.terminal import refinement_in_words, smallest_in_words
from mpq.version import VERSION

_TARGETS_OWN = "the target's"  # how a budget is asked that the device itself sets


def commands(subject: Subject) -> list[str]:
    """Command lines: the search, the same plan from its table, and this page."""
    kept = subject.plan.provenance
    if not subject.plan.budgets or "options" not in kept:
        return []
    search: list[str] = ["mpq", "search", subject.model]
    for name, value in _settings(subject).items():
        search += [f"--{name}", value]
    for quantity, asked in asked_budgets(subject).items():
        search += ["--budget", f"{quantity}={asked}"]
    for pattern, option in _pins(subject).items():
        search += ["--pin", f"{pattern}={option}"]
    search += ["--output", "plan.json", "--table", "table.parquet"]
    again = ["mpq", "solve", "table.parquet"]
    if kept.get("refined"):
        again = ["mpq", "refine", subject.model, "table.parquet", *_refined_options(subject), "--output", "plan.json"]
    for quantity, asked in asked_budgets(subject).items():
        again += ["--budget", f"{quantity}={asked}"]
    report = ["mpq", "report", "plan.json", "--table", "table.parquet", "--model", subject.model]
    if quantizer := _quantizer(kept.get("refined") or kept):
        report += ["--quantizer", quantizer]
    return [shlex.join(line) for line in (search, again, [*report, "--output", "report.html"])]


def _quantizer(kept: Mapping[str, Any]) -> str:
    """What --quantizer was; empty for rounding to nearest."""
    described = str(kept.get("quantizer", ""))
    if described.startswith("GPTQ("):
        return "gptq"
    return "FOLDER" if described.startswith("WeightDatabase(") else ""


def _refined_options(subject: Subject) -> list[str]:
    """Options of `mpq refine`, as far as the command has them."""
    settings = dict(subject.plan.provenance["refined"]["asked"])
    if settings.get("metric", "loss") not in METRICS:
        settings["metric"] = f"FILE.py:{settings['metric']}"
    if quantizer := _quantizer(subject.plan.provenance["refined"]):
        settings["quantizer"] = quantizer
    known = ("evaluations", "seconds", "seed", "level", "quantizer", "metric", "independent")
    found = {name: str(settings[name]) for name in known if name in settings}
    pins = [("pin", f"{pattern}={option}") for pattern, option in _pins(subject).items()]
    return [part for name, value in (*found.items(), *pins) for part in (f"--{name}", value)]


def asked_budgets(subject: Subject) -> dict[str, str]:
    """Budgets as they were asked; those that the device sets are none."""
    found = {}
    for budget in subject.plan.budgets:
        if budget.asked != _TARGETS_OWN:
            quantity = "size" if budget.quantity == "value_size" and "bit" in budget.asked else budget.quantity
            found[quantity] = budget.asked
    return found


def _settings(subject: Subject) -> dict[str, str]:
    """Options of `mpq search` by name, where they are not its defaults."""
    kept = subject.plan.provenance
    hardware: Mapping[str, Any] = kept.get("hardware") or {}
    found = {"options": ",".join(kept["options"])}
    if hardware.get("target", "storage") != "storage":
        found["hardware"] = str(hardware["target"])
    if method := method_name(str(kept.get("sensitivity", "")), automatic="why" in kept):
        found["sensitivity"] = method
    if quantizer := _quantizer(kept):
        found["quantizer"] = quantizer
    if kept.get("granularity", "layer") != "layer":
        found["granularity"] = str(kept["granularity"])
    for name in ("phase", "context"):
        if hardware.get(name):
            found[name] = str(hardware[name])
    if hardware.get("batch", 1) != 1:
        found["batch"] = str(hardware["batch"])
    if kept.get("target"):
        found["target"] = str(kept["target"])
    if "seed" in kept:
        found["seed"] = str(kept["seed"])
    return found


def method_name(described: str, *, automatic: bool) -> str:
    """What a method is called on the command line; empty for the default and for one that has no name.

    Example:
        >>> method_name("OutputFisher(labels='auto', keep_bytes=1)", automatic=False), method_name("?", automatic=False)
        ('output_fisher', '')
    """
    if automatic:
        return ""
    known = import_module("mpq.sensitivity").METHODS
    kind = described.partition("(")[0]
    return next((name for name, (_, made) in known.items() if made == kind), "")


def _pins(subject: Subject) -> dict[str, str]:
    kept = subject.plan.provenance
    pins = {str(pattern): str(option) for pattern, option in (kept.get("pins") or {}).items()}
    if "price_of_pins" in kept:
        chosen = subject.plan.options
        pins |= {name: chosen[name] for name in subject.plan.edited}
    return pins


def python_lines(subject: Subject) -> str:
    """The same in Python."""
    kept = subject.plan.provenance
    if not subject.plan.budgets or "options" not in kept:
        return ""
    settings = _settings(subject)
    arguments = [f"options={kept['options']!r}", f"budgets={asked_budgets(subject)!r}"]
    arguments += [f"{name}={settings[name]!r}" for name in ("hardware", "sensitivity") if name in settings]
    if pins := _pins(subject):
        arguments.append(f"pins={pins!r}")
    for name in ("granularity", "phase", "target"):
        if name in settings:
            arguments.append(f"{name}={settings[name]!r}")
    arguments += [f"{name}={settings[name]}" for name in ("batch", "context", "seed") if name in settings]
    arguments += ["quantizer=quantizer"] if "quantizer" in settings else []
    inner = "".join(f"    {argument},\n" for argument in arguments)
    refined = ""
    if kept.get("refined"):
        asked = {name: repr(value) for name, value in kept["refined"]["asked"].items()}
        if (metric := kept["refined"]["asked"].get("metric", "loss")) not in METRICS:
            asked["metric"] = metric
        asked |= {"quantizer": "quantizer"} if _quantizer(kept["refined"]) else {}
        refined = "".join(f", {name}={value}" for name, value in asked.items())
        refined = f"plan = mpq.refine(model, data, plan{refined}).plan\n"
    return f'import mpq\n\nplan = mpq.search(\n    model,\n    data,\n{inner})\n{refined}plan.report("report.html")\n'


def record(subject: Subject) -> list[tuple[str, str]]:
    """Seeds, versions and the fingerprint of the model."""
    kept = subject.plan.provenance
    facts = [("fingerprint of the model", subject.plan.fingerprint)]
    if "seed" in kept:
        facts.append(("seed", str(kept["seed"])))
    facts += [(f"{name}, of the search", str(version)) for name, version in (kept.get("versions") or {}).items()]
    facts.append(("mpq, of this page", VERSION))
    if kept.get("refined"):
        facts.append(("refined", refinement_in_words(kept["refined"])))
    if kept.get("smallest"):
        facts.append(("smallest", smallest_in_words(kept["smallest"])))
    if kept.get("imported"):
        facts.append(("imported from", str(kept["imported"])))
    return facts
