"""`mpq list`: every name that can be asked for, what it is, and the package that it comes from."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from mpq.plugins import AUTOMATIC, OURS, Plugin, clash, plugins

_WIDTH = 100
_FORMATS = {
    "granularity": "@tensor, @channel (weights), @group{n}, @token (inputs); range @minmax, @mse, @percentile{p}",
    "options": "WEIGHT or WEIGHT/INPUT: int4, int4@group64, int4/int8, w4a8",
}
_TITLES = {
    "methods": "methods: --sensitivity NAME",
    "solvers": "solvers: --solver NAME",
    "devices": "devices: --hardware NAME",
    "exports": "exports: `mpq export PLAN NAME`, --target NAME",
}


@dataclass(frozen=True)
class Listed:
    """One name: what it is, its package, where its entry point leads if it is not ours, and what is wrong with it."""

    name: str
    what: str
    distribution: str = OURS
    entry_point: str | None = None
    problem: str | None = None


@click.command(name="list", short_help="Formats, methods, solvers, devices and exports.")
@click.argument("kind", required=False, type=click.Choice(["formats", *_TITLES]))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(kind: str | None, as_json: bool) -> None:
    """List formats, methods, solvers, devices and exports: ours, and those that other installed packages add.

    What another package adds is followed by the package; BROKEN says why it cannot be used.

    \b
    mpq list
    mpq list devices
    mpq list --json
    """  # noqa: D301 - click wants the character itself
    from mpq.formats import FAMILIES

    formats = {"formats": FAMILIES, **_FORMATS}
    asked = [kind] if kind else ["formats", *_TITLES]
    found = {name: _SECTIONS[name]() for name in asked if name != "formats"}
    if as_json:
        document: dict[str, Any] = {"formats": formats} if "formats" in asked else {}
        document |= {name: [asdict(row) for row in rows] for name, rows in found.items()}
        click.echo(json.dumps(document, indent=2))
        return
    if "formats" in asked:
        click.echo("\n".join(_row(name, text, 11, "") for name, text in formats.items()))
    for name, rows in found.items():
        width = max(len(row.name) for row in rows)
        lines = [_row(row.name, _told(row), width, "  ") for row in rows]
        click.echo("\n".join([*([""] if len(asked) > 1 else []), _TITLES[name], *lines]))


def _told(row: Listed) -> str:
    if row.problem is not None:
        return f"BROKEN: {row.problem}"
    return row.what if row.distribution == OURS else f"{row.what} [{row.distribution}]"


def _row(name: str, text: str, width: int, indent: str) -> str:
    start = f"{indent}{name:{width}}  "
    how: dict[str, Any] = {"subsequent_indent": " " * len(start), "break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(" ".join(text.split()), width=_WIDTH, initial_indent=start, **how)


def _methods() -> list[Listed]:
    methods = import_module("mpq.sensitivity").METHODS
    ours = {AUTOMATIC: "kl where measuring every choice is cheap, else fisher"}
    ours |= {name: _first_line(f"mpq.sensitivity.{module}") for name, (module, _) in methods.items()}
    return _listed("mpq.estimators", ours, lambda plugin: summary(plugin.load()))


def _solvers() -> list[Listed]:
    solvers = import_module("mpq.solvers").SOLVERS
    ours = {name: _first_line(solver.__module__) for name, solver in solvers.items()}
    return _listed("mpq.solvers", ours, lambda plugin: summary(plugin.load()))


def _devices() -> list[Listed]:
    load = import_module("mpq.hardware_models").load
    ours = {name: _device(load(name)) for name in import_module("mpq.hardware_models.device_file").shipped()}
    return _listed("mpq.hardware", ours, lambda plugin: _device(load(plugin.name)))


def _exports() -> list[Listed]:
    from mpq.exporting import TARGETS, targets

    ours = {name: summary(TARGETS[name].emit) for name in targets() if name in TARGETS}
    return _listed("mpq.exporters", ours, lambda plugin: summary(plugin.load().emit))


_SECTIONS: Mapping[str, Callable[[], list[Listed]]] = {
    "methods": _methods,
    "solvers": _solvers,
    "devices": _devices,
    "exports": _exports,
}


def _listed(group: str, ours: Mapping[str, str], describe: Callable[[Plugin], str]) -> list[Listed]:
    """Our names, then every entry point of other packages, loaded to see whether it can be."""
    rows, found = [Listed(name, what) for name, what in ours.items()], plugins(group)
    for plugin in found:
        what, problem = "", _taken(plugin, found, ours)
        if problem is None:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what a stranger's module prints
                    what = describe(plugin)
            except Exception as error:
                problem = str(error)
        rows.append(Listed(plugin.name, what, plugin.distribution, plugin.value, problem))
    return rows


def _taken(plugin: Plugin, found: Iterable[Plugin], ours: Mapping[str, str]) -> str | None:
    if plugin.name == AUTOMATIC:
        return f"{AUTOMATIC!r} is mpq's own name, that of {plugin} is never used"
    return clash(plugin.name, [other for other in found if other.name == plugin.name], ours)


def _device(target: Any) -> str:
    kind, runtime = getattr(target, "kind", None), getattr(target, "runtime", None)
    return f"{kind}, {runtime}" if kind and runtime else summary(target)


def summary(thing: Any) -> str:
    """The first paragraph of a thing's docstring, on one line."""
    return " ".join((getattr(thing, "__doc__", None) or "").strip().partition("\n\n")[0].split())


def _first_line(module: str) -> str:
    """What a module's docstring begins with, read from its source: importing it may take torch."""
    loader: Any = getattr(find_spec(module), "loader", None)
    docstring = ast.get_docstring(ast.parse(loader.get_source(module))) or ""
    return docstring.partition("\n")[0]
