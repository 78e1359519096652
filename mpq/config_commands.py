"""`mpq config`: a settings file to start from; `mpq completion`: names that the shell completes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from mpq.config_file import DEFAULTS, FILE_NAME, SHARED, commands, keys, kind_of, meaning
from mpq.suggestions import did_you_mean

_SHELLS = {
    "bash": 'eval "$(mpq completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(mpq completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "mpq completion fish | source   # in ~/.config/fish/config.fish",
}
_WIDTH = 100


@click.command(short_help="Print a settings file (mpq.toml) with every key.")
@click.argument("names", nargs=-1, metavar="[COMMAND]")
@click.pass_context
def config(context: click.Context, names: tuple[str, ...]) -> None:
    """Print a settings file with every key of every command, or of one, as comments: what it means and its default.

    mpq reads mpq.toml of the folder it runs in, or `mpq --config FILE`. A table a command, a key an option without its
    dashes; [defaults] is for all of them. What is typed wins.

    \b
    mpq config > mpq.toml
    mpq config search
    mpq config table measure
    mpq --config nightly.toml search
    """  # noqa: D301 - click wants the character itself
    root = context.find_root().command
    if not isinstance(root, click.Group):
        raise TypeError(f"mpq config must be a command of a group, got one of {root!r}")
    known = dict(commands(root))
    chosen = {place: command for place, command in known.items() if place[: len(names)] == names}
    if not chosen:
        wrong, spoken = " ".join(names), [" ".join(place) for place in known]
        raise ValueError(f"no command {wrong!r} has settings{did_you_mean(wrong, spoken)}")
    click.echo("\n".join(_template(chosen, all_of_them=not names)))


def _template(chosen: dict[tuple[str, ...], click.Command], *, all_of_them: bool) -> Iterator[str]:
    yield f"# {FILE_NAME}: what options are when they are not typed. A key an option without its dashes."
    if all_of_them:
        yield "# [defaults] is for every command that has such an option; a command's own table wins over it."
        yield f"\n[{DEFAULTS}]"
        shared: dict[str, click.Parameter] = {}
        for command in chosen.values():
            for key, parameter in keys(command).items():
                shared.setdefault(key, parameter)
        for key in SHARED:
            yield from _lines(key, shared[key])
    for place, command in chosen.items():
        yield f"\n[{'.'.join(place)}]"
        for key, parameter in keys(command).items():
            yield from _lines(key, parameter)


def _lines(key: str, parameter: click.Parameter) -> Iterator[str]:
    about = getattr(parameter, "help", None) or f"{parameter.make_metavar(click.Context(click.Command(key)))}."
    yield from textwrap.wrap(about, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    yield f"# {'takes' if _default(parameter) is None else 'default, takes'} {meaning(parameter)}:"
    yield f"# {key} = {_example(parameter)}"


def _default(parameter: click.Parameter) -> Any:
    value = parameter.to_info_dict().get("default")
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _example(parameter: click.Parameter) -> str:
    """The default, or what a value looks like; TOML that is taken as it stands."""
    value, kind = _default(parameter), kind_of(parameter)
    if value is not None:
        return json.dumps(str(value).split(",") if kind == "comma separated" else value)
    name, _, limit = (parameter.metavar or "").partition("=")
    examples = {
        "pairs": f'{{ {name} = "{limit}" }}',
        "texts": json.dumps([parameter.metavar or "TEXT"]),
        "flag": "false",
        "choice": json.dumps(str(next(iter(getattr(parameter.type, "choices", ())), ""))),
        "whole number": "2",
        "number": "60.0",
    }
    return examples.get(kind, json.dumps(parameter.metavar or (parameter.name or "").upper()))


@click.command(short_help="Print the script that lets a shell complete mpq's names.")
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, devices, solvers, methods, libraries and layers.

    \b
    eval "$(mpq completion bash)"     in ~/.bashrc
    eval "$(mpq completion zsh)"      in ~/.zshrc, after compinit
    mpq completion fish | source      in ~/.config/fish/config.fish
    """  # noqa: D301 - click wants the character itself
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise ValueError(f"click cannot complete for {shell!r}")
    root = context.find_root()
    click.echo(f"# {_SHELLS[shell]}")
    click.echo(found(root.command, {}, "mpq", "_MPQ_COMPLETE").source())
