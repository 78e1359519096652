"""Groups and commands of the command line: one-line errors, Ctrl-C that says how to go on, `--json` with its keys."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

KEPT = {"device": "finished kernels are kept"}  # what commands without --cache keep all the same
TYPED = "mpq.typed"  # in the context's meta: the arguments as they were typed
SETTINGS = "mpq.settings"  # there as well: the settings file that is in force


class CommandGroup(click.Group):
    """A group that suggests a command for a mistyped one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command, with a suggestion for a mistyped one."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from mpq.suggestions import did_you_mean

            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands, count=2)}")
        return super().resolve_command(ctx, args)


class OneLineErrors(CommandGroup):
    """The outermost group: errors about input are one line, without a traceback; Ctrl-C says how to go on."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what was typed."""
        ctx.meta[TYPED] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own, and a reader such as `head` that has seen enough
        except KeyboardInterrupt as interrupt:
            interrupt.__traceback__ = None  # ends what its frames hold: bars of progress are wiped before the message
            click.echo(interruption(ctx), err=True)
            ctx.exit(130)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"{styled('error:', 'red')} {_one_line(error, ctx)}", err=True)
            ctx.exit(3 if type(error).__name__ == "InfeasibleError" else 1)


class ToldCommand(click.Command):
    """A command that says on standard error what the settings file gave it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what the settings file gave it is said first."""
        source = click.core.ParameterSource.DEFAULT_MAP
        names = [long_name(one) for one in self.params if ctx.get_parameter_source(one.name or "") is source]
        if names:
            click.echo(f"from {ctx.meta.get(SETTINGS, 'settings')}: {', '.join(names)}", err=True)
        return super().invoke(ctx)


class AnswerCommand(ToldCommand):
    """A command that prints an answer, and with `--json` prints it for machines.

    Args:
        answer: the keys of the JSON object and what each holds; they stand in the command's help.
    """

    def __init__(self, *arguments: Any, answer: Mapping[str, str], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.answer = dict(answer)
        help_text = "JSON for machines, in base units; its keys stand below."
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help=help_text))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what MODEL or TABLE may be, then the keys of the answer."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Keys of --json"):
            formatter.write_dl(list(self.answer.items()))


def long_name(parameter: click.Parameter) -> str:
    """The long name of an option without dashes, or the name of an argument: the key in a settings file."""
    if isinstance(parameter, click.Argument):
        return parameter.name or ""
    return max(parameter.opts, key=len).lstrip("-")


def interruption(ctx: click.Context) -> str:
    """What is left after Ctrl-C, and the command that goes on."""
    typed = ctx.meta.get(TYPED, [])
    again = shlex.join(["mpq", *typed])
    command = ctx.invoked_subcommand or ""
    if cache := _place_of("cache", ctx, typed) or _place_of("storage", ctx, typed):
        return f"interrupted: what was measured is kept in {cache}; to go on:\n  {again}"
    if command in KEPT and "measure" in typed:
        return f"interrupted: {KEPT[command]}; to go on:\n  {again}"
    if _takes_cache(ctx, typed):
        why = "interrupted: measurements were not kept, for want of --cache; what keeps them"
        return f"{why}:\n  {again} --cache measured"
    return "interrupted"


def _invoked(ctx: click.Context, typed: list[str]) -> tuple[click.Command | None, Mapping[str, Any]]:
    """The command that was run, and what the settings file gives it."""
    found: click.Command | None = ctx.command
    settings: Any = ctx.default_map or {}
    for word in typed:
        if not isinstance(found, click.Group):
            break
        if word in found.commands:
            found, settings = found.commands[word], settings.get(word, {})
    return found, settings if isinstance(settings, Mapping) else {}


def _takes_cache(ctx: click.Context, typed: list[str]) -> bool:
    command, _ = _invoked(ctx, typed)
    return command is not None and any(one.name == "cache" for one in command.params)


def _place_of(option: str, ctx: click.Context, typed: list[str]) -> str | None:
    """What --cache or --storage names, typed or from the settings file."""
    for position, word in enumerate(typed):
        if word == f"--{option}":
            return next(iter(typed[position + 1 :]), None)
        if word.startswith(f"--{option}="):
            return word.removeprefix(f"--{option}=")
    found = _invoked(ctx, typed)[1].get(option)
    return None if found is None else str(found)


def styled(text: str, colour: str) -> str:
    """Text in a colour where standard error is a terminal that wants colours."""
    wanted = not os.environ.get("NO_COLOR") and sys.stderr.isatty()
    return click.style(text, fg=colour) if wanted else text


def _one_line(error: Exception, ctx: click.Context) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (`mpq --debug {ctx.invoked_subcommand} ...` shows where)"
