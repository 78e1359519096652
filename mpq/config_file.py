"""`mpq.toml`: what the options of commands are when they are not typed, checked key by key.

    [defaults]
    hardware = "nvidia-t4"          # for every command that has such an option

    [search]
    model = "net.py:load"           # arguments have keys as well
    options = ["int4", "int8"]
    budget = { size = "25%", latency = "4 ms" }

    [table.measure]
    cache = "measured"

A table a command, a key an option without its dashes. What is typed wins over the file, a command's table over
`[defaults]`. Paths are relative to the folder that mpq runs in.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mpq.command_arguments import CommaSeparated
from mpq.command_group import long_name
from mpq.suggestions import did_you_mean

FILE_NAME = "mpq.toml"
DEFAULTS = "defaults"
SHARED = (  # keys of [defaults]: options that mean the same wherever they are
    *("model", "data", "samples", "tokens", "holdout", "task", "options", "pin", "ties", "sensitivity", "granularity"),
    *("quantizer", "adjust"),
    *("hardware", "target", "batch", "phase", "context", "bops", "budget", "solver", "seed", "cache"),
)
UNSET = ("help", "json", "csv")  # said anew every time
WITHOUT_TABLE = ("config", "completion")
_HEADER = re.compile(r"\s*\[\s*([\w.\-\" ]+?)\s*\]\s*(#.*)?")
_KEY = re.compile(r"\s*([\w\-]+|\"[^\"]+\")\s*(?:\.\s*[\w\-\"]+\s*)*=")


def settings(path: str | Path, group: click.Group) -> dict[str, Any]:
    """The settings of a file, in the form of click's `default_map`.

    Raises:
        ValueError: if the file cannot be read, or anything in it is wrong: then everything that is, with lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read settings {str(path)!r}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"settings {str(path)!r} are not TOML: {error}") from error
    reader = _Reader(name=str(path), lines=_lines_of(text))
    shared = reader.shared(content.pop(DEFAULTS, {}), group)
    found = reader.group(content, group, shared, ())
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    return found


@dataclass(kw_only=True)
class _Reader:
    """Collects settings and what is wrong with them."""

    name: str
    lines: Mapping[tuple[str, ...], int]
    problems: list[str] = field(default_factory=list)

    def say(self, problem: str, *place: str) -> None:
        line = self.lines.get(place)
        self.problems.append(f"{self.name}{f', line {line}' if line else ''}: {problem}")

    def shared(self, content: Any, group: click.Group) -> dict[str, Any]:
        """The keys of `[defaults]`, each checked by the first command that has such an option."""
        parameters: dict[str, click.Parameter] = {}
        for _, command in commands(group):
            for name, parameter in keys(command).items():
                parameters.setdefault(name, parameter)
        known = {name: parameters[name] for name in SHARED if name in parameters}
        return self.table(content, known, (DEFAULTS,))

    def group(
        self, content: Mapping[str, Any], group: click.Group, shared: Mapping[str, Any], place: tuple[str, ...]
    ) -> dict[str, Any]:
        """The settings of a group's commands."""
        names = [name for name in group.commands if name not in WITHOUT_TABLE]
        for name in content:
            if name not in names:
                where = f"[{'.'.join((*place, name))}]" if isinstance(content[name], Mapping) else f"key {name!r}"
                rule = "is no command" if isinstance(content[name], Mapping) else "stands in no table of a command"
                self.say(f"{where} {rule}{did_you_mean(name, [DEFAULTS, *names])}", *place, name)
        found = {}
        for name in names:
            command, own, here = group.commands[name], content.get(name, {}), (*place, name)
            if isinstance(command, click.Group):
                found[name] = self.group(own if isinstance(own, Mapping) else {}, command, shared, here)
            else:
                known = keys(command)
                of_all = {known[key].name: value for key, value in shared.items() if key in known}
                typed = self.table(own, known, here)
                found[name] = of_all | {known[key].name: value for key, value in typed.items()}
        return found

    def table(self, content: Any, known: Mapping[str, click.Parameter], place: tuple[str, ...]) -> dict[str, Any]:
        """The checked values of one table, by key."""
        title = f"[{'.'.join(place)}]"
        if not isinstance(content, Mapping):
            self.say(f"{place[-1]!r} must be a table: write {title}", *place)
            return {}
        found = {}
        for key, value in content.items():
            if key not in known:
                self.say(f"{title} has no key {key!r}{did_you_mean(key, known)}", *place, key)
                continue
            try:
                found[key] = converted(value, known[key])
            except (TypeError, ValueError, click.BadParameter):
                self.say(f"{key!r} of {title} must be {meaning(known[key])}, got {_toml(value)}", *place, key)
        return found


def commands(group: click.Group, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that has a table, with the parts of its name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*place, name))
        elif place or name not in WITHOUT_TABLE:
            yield (*place, name), command


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """The keys of a command's table and what they set; arguments last."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    return {long_name(one): one for one in (*options, *arguments) if long_name(one) not in UNSET}


def converted(value: Any, parameter: click.Parameter) -> Any:
    """A value of TOML as the parameter takes it.

    Raises:
        TypeError: if it has another type.
        click.BadParameter: if it is of the type but not allowed.
    """
    kind = kind_of(parameter)
    if kind in ("pairs", "texts"):
        if isinstance(value, Mapping) and kind == "pairs":
            return [f"{name}={_text(each)}" for name, each in value.items()]
        return [_text(each) for each in (value if isinstance(value, list) else [value])]
    if kind == "comma separated":
        return ",".join(map(_text, value)) if isinstance(value, list) else _text(value)
    types: dict[str, tuple[type, ...]] = {"flag": (bool,), "whole number": (int,), "number": (int, float)}
    checked = _of_type(value, *types[kind]) if kind in types else _text(value)
    return parameter.type.convert(checked, parameter, None)


def kind_of(parameter: click.Parameter) -> str:
    """Pairs, texts, comma separated, flag, choice, whole number, number or text."""
    if getattr(parameter, "multiple", False) or parameter.nargs != 1:
        return "pairs" if "=" in (parameter.metavar or "") else "texts"
    if getattr(parameter, "is_flag", False):
        return "flag"
    kinds: dict[str, type] = {
        "comma separated": CommaSeparated,
        "choice": click.Choice,
        "whole number": click.types.IntParamType,
        "number": click.types.FloatParamType,
    }
    return next((name for name, kind in kinds.items() if isinstance(parameter.type, kind)), "text")


def _of_type(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"got {value!r}")
    return value


def _text(value: Any) -> str:
    """Text, or a number as text; no truth value, date or table."""
    return str(_of_type(value, str, int, float))


def meaning(parameter: click.Parameter) -> str:
    """What a key takes, in words."""
    name, _, value = (parameter.metavar or "").partition("=")
    choices = getattr(parameter.type, "choices", ())
    meanings = {
        "pairs": f'a table {{ {name} = "{value}" }} or a list of "{parameter.metavar}"',
        "texts": "a list of texts",
        "comma separated": "a list of texts, or one text with commas",
        "flag": "true or false",
        "choice": f"one of {', '.join(json.dumps(str(choice)) for choice in choices)}",
        "whole number": f"a whole number{_ends(parameter.type)}",
        "number": f"a number{_ends(parameter.type)}",
        "text": "text",
    }
    return meanings[kind_of(parameter)]


def _ends(kind: Any) -> str:
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    above, below = getattr(kind, "min_open", False), getattr(kind, "max_open", False)
    ends = [] if low is None else [f"{'above' if above else 'of at least'} {low}"]
    ends += [] if high is None else [f"{'below' if below else 'of at most'} {high}"]
    return f" {' and '.join(ends)}" if ends else ""


def _toml(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:  # a date
        return str(value)


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line of every table and key, counted from 1."""
    found: dict[tuple[str, ...], int] = {}
    place: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            place = tuple(part.strip(' "') for part in header[1].split("."))
            found.setdefault(place, number)
        elif key := _KEY.match(line):
            found.setdefault((*place, key[1].strip('"')), number)
    return found
