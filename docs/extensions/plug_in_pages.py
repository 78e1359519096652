"""Directives for what ships: `{estimator} kl`, `{solver} ilp`, `{family} roofline`, `{exporter} csv`, `{device} gap8`.

Each writes what the code says of itself (docstring, settings, what it takes, what was measured of it), so that a page
adds only what the code cannot know: when it is worth it and what goes wrong.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
BITS = ("int2", "int3", "int4", "int5", "int6", "int8", "uint4", "int4@group32", "int4@group64", "int4@group128")
OTHERS = ("uint4@group32", "uint4@group128", "int8/int8", "int4/int8", "int8/int8@token", "int4@group32/uint8@token")
FLOATS = ("fp8_e4m3", "fp4_e2m1", "mxfp4", "mxfp8_e4m3", "nvfp4", "nf4", "q4_0", "q4_k", "q6_k", "q8_0", "fp16")


def cell(text: object) -> str:
    """Text in a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n\n"


def auto(kind: str, name: str) -> str:
    """A docstring by autodoc, without a second entry in the index."""
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n   :no-index:\n```\n\n"


def rubric(text: str) -> str:
    """A heading that is no section: a directive cannot open one in the midst of a page."""
    return f"```{{rubric}} {text}\n```\n\n"


def reference(module: str) -> str:
    """A link to a module's page in the reference."""
    return f"Reference: {{py:mod}}`{module}`.\n\n"


def estimator(name: str) -> str:
    """What an estimator says of itself, and its rows in the tables of measurements."""
    module, cls = import_module("mpq.sensitivity").METHODS[name]
    home = f"mpq.sensitivity.{module}"
    return auto("class", f"{home}.{cls}") + reference(home) + measured(name)


def measured(name: str) -> str:
    """The rows of a method in sensitivity/README.md, each table under its heading."""
    text = (ROOT / "sensitivity" / "README.md").read_text(encoding="utf-8")
    parts = []
    for section in re.split(r"(?m)^#+ ", text)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        own = [line for line in lines if re.match(rf"\| `{name}(:[^`]*)?` ", line)]
        if own and "CPU s" in lines[0]:
            best = [line for line in lines if line.startswith("| best uniform")]
            rule = re.sub(r"[^|]+", " --- ", lines[0])
            parts.append("\n".join([section.splitlines()[0] + ":", "", lines[0], rule, *best, *own]) + "\n\n")
    if not parts:
        return "No figure of this method is in the [tables of measurements](/estimators/measured.md).\n"
    how = (
        "From the [tables of measurements](/estimators/measured.md), which say how; ρ: rank correlation of predicted "
        "and measured; plan: divergence of the plan it leads to, lower is better."
    )
    return f"{rubric('Measured')}{how}\n\n" + "".join(parts)


def solver(name: str) -> str:
    """What a solver says of itself, and the problems it takes."""
    cls = import_module("mpq.solvers").SOLVERS[name]
    takes = cls.features
    refused = import_module("mpq.solvers.features").EVERYTHING - takes
    rows = [
        ("proves its optimum", "yes" if cls.exact else "where its bound is reached"),
        ("takes, besides sums under one budget", ", ".join(sorted(takes)) or "nothing"),
        ("does not take", ", ".join(sorted(refused)) or "nothing"),
    ]
    return table(("", ""), list(rows)) + auto("class", f"{cls.__module__}.{cls.__name__}") + reference(cls.__module__)


def family(name: str) -> str:
    """What a family of hardware models says of itself, its tables of a device file, and the devices that have it."""
    (found,) = [known for known in import_module("mpq.hardware_models.families").FAMILIES if known.name == name]
    rows = []
    for title, schema in found.tables.items():
        brackets = f"[[{title}]]" if schema.repeated else f"[{title}]"
        for key in schema.keys:
            says = key.unit or (f"one of {', '.join(key.choices)}" if key.choices else key.holds)
            rows.append((f"`{brackets}`", f"`{key.name}`", "yes" if key.required else "", says))
    devices = import_module("mpq.hardware_models")
    shipped = [device for device in devices.available() if name in families_of(devices.load(device))]
    links = ", ".join(f"[{device}](/devices/{device}.md)" for device in shipped) or "none that ships; measure one"
    keys = rubric("In a device file") + table(("table", "key", "required", "is"), list(rows))
    module = found.read.__module__
    return f"{auto('module', module)}{reference(module)}Devices: {links}.\n\n{keys}"


def families_of(target: Any) -> set[str]:
    """The families that describe a target."""
    families = import_module("mpq.hardware_models.families").FAMILIES
    homes = {found.read.__module__: found.name for found in families}
    return {homes[type(model).__module__] for model in target.models if type(model).__module__ in homes}


def exporter(name: str) -> str:
    """What an exporter says of itself, what was checked, and which options it takes for one linear layer."""
    exporting = import_module("mpq.exporting")
    function = exporting.TARGETS[name].emit
    layer = import_module("mpq.layers").Layer(
        "fc", "linear", (256, 256), 65536, 65536, (1, 256), (1, 256), "fc.weight", "fc"
    )
    refused = {option: exporting.refusal(name, layer, option) for option in (*BITS, *OTHERS, *FLOATS)}
    takes = ", ".join(f"`{option}`" for option, reason in refused.items() if reason is None)
    refuses = [option for option, reason in refused.items() if reason is not None]
    taken = f"{rubric('Options')}Asked for a linear layer of 256 by 256 it takes {takes}.\n\n"
    if refuses:
        listed = ", ".join(f"`{option}`" for option in refuses)
        taken += f"It refuses {listed}. What it says of the first: {refused[refuses[0]]}.\n\n"
    checked = f"Checked in the real library: {_checked(name)}.\n\n"
    home = function.__module__
    return checked + auto("function", f"{home}.{function.__name__}") + reference(home) + taken


def _checked(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("what was checked in the real library")[2]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    found = [row[1].strip() for row in rows if name in re.split(r",\s*", row[0].strip())]
    return found[0] if found else "nothing yet"


def device(name: str) -> str:
    """Every number of a device file with its unit and source; ~ marks what rests on an estimate."""
    target = import_module("mpq.hardware_models").load(name)
    names = sorted(families_of(target))
    links = ", ".join(f"[{found}](/hardware/{found}.md)" for found in names)
    guesses = sum(number.is_estimate for number in target.numbers)
    head = f"{target.runtime}. Kind: {target.kind}. Families: {links}.\n\n{' '.join(target.notes.split())}\n\n"
    share = f"{guesses} of {len(target.numbers)} numbers rest on an estimate (~).\n\n"
    rows = [
        (
            f"`{number.where}`",
            f"`{number.key}`",
            f"{'~' if number.is_estimate else ''}{number.value:.6g}",
            number.unit,
            ", ".join(source.id for source in number.sources),
        )
        for number in target.numbers
    ]
    sources = [
        (source.id, source.kind, f"{source.title}{f', <{source.url}>' if source.url else ''}", source.read)
        for source in target.sources
    ]
    numbers = table(("table", "number", "value", "unit", "sources"), list(rows))
    return f"{head}{share}{numbers}{rubric('Sources')}{table(('id', 'kind', 'what', 'read'), list(sources))}"


def estimates(_: str) -> str:
    """Every device with the share of its numbers that are estimates, and which."""
    load = import_module("mpq.hardware_models").load
    rows = []
    for name in import_module("mpq.hardware_models").available():
        target = load(name)
        guesses = dict.fromkeys(number.key for number in target.numbers if number.is_estimate)
        count = sum(number.is_estimate for number in target.numbers)
        listed = ", ".join(f"`{key}`" for key in guesses)
        rows.append((f"[{name}](/devices/{name}.md)", f"{count} of {len(target.numbers)}", listed))
    return table(("device", "estimates", "of"), list(rows))


class Generated(SphinxDirective):
    """A directive whose text is made by one of the functions above."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The text, parsed as Markdown where the directive stands."""
        name = self.arguments[0] if self.arguments else ""
        self.env.note_dependency(__file__)
        return self.parse_text_to_nodes(WRITERS[self.name](name))


WRITERS = {
    "estimator": estimator,
    "solver": solver,
    "family": family,
    "exporter": exporter,
    "device": device,
    "estimates": estimates,
}


def setup(app: Any) -> dict[str, Any]:
    """Register the directives."""
    for name in WRITERS:
        app.add_directive(name, Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
