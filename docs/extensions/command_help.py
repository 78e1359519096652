"""`{command-help}`: the help of every command as `--help` prints it, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def commands(command: click.Command, path: str = "mpq") -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, by what one types."""
    yield path, command
    if isinstance(command, click.Group):
        for name in command.commands:
            if not command.commands[name].hidden:
                yield from commands(command.commands[name], f"{path} {name}")


def help_text(path: str, command: click.Command) -> str:
    """What `--help` prints, 84 columns wide."""
    context = click.Context(command, info_name=path, terminal_width=84, max_content_width=84)
    return command.get_help(context)


def markdown() -> str:
    """A section a command."""
    main = import_module("mpq.__main__").main
    return "".join(f"## {path}\n\n```text\n{help_text(path, command)}\n```\n\n" for path, command in commands(main))


class CommandHelp(SphinxDirective):
    """The help of all commands."""

    def run(self) -> list[nodes.Node]:
        """The sections, parsed as Markdown."""
        return self.parse_text_to_nodes(markdown(), allow_section_headings=True)


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
