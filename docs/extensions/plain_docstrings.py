"""Docstrings in plain text as reStructuredText: indented blocks are formulas, text is text, names link.

The docstrings of this project are written to be read as they stand: a formula is an indented block, `|x|` is an
absolute value and `name` a name. Sphinx reads reStructuredText, where the same characters are markup; this extension
goes between, before napoleon takes the sections (Args, Returns, ...) apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECTIONS = {"Args", "Attributes", "Example", "Examples", "Raises", "Returns", "Yields"}
ITEM = re.compile(r"\s*([-*]|\d+[.)])\s")
CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
NAME = re.compile(r"[A-Za-z_][\w.]*")
MARKUP = re.compile(r"([\\*|@])")
FINAL_UNDERSCORE = re.compile(r"(?<=\w)_(?!\w)")


def indent_of(line: str) -> int:
    """Spaces a line begins with."""
    return len(line) - len(line.lstrip())


def escaped(text: str) -> str:
    """Text without markup: what reStructuredText would read as such is escaped."""
    return FINAL_UNDERSCORE.sub(r"\\_", MARKUP.sub(r"\\\1", text))


def prose(text: str) -> str:
    """A paragraph: text escaped, names in backquotes linked, other code as code."""
    parts = CODE.split(text)
    for position, part in enumerate(parts):
        if position % 2 == 0:
            parts[position] = escaped(part)
            continue
        code = part.strip("`")
        marked = f"`{code}`" if NAME.fullmatch(code) and not part.startswith("``") else f"``{code}``"
        before = r"\ " if re.search(r"[\w/]$", parts[position - 1]) else ""
        after = r"\ " if re.match(r"[\w/]", parts[position + 1]) else ""
        parts[position] = before + marked + after
    return "".join(parts)


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without a blank one."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def converted(lines: list[str]) -> list[str]:
    """A docstring, its common indent taken away, as reStructuredText for napoleon."""
    result: list[str] = []
    base, in_formula = 0, False
    for block in blocks(lines):
        first = block[0]
        if indent_of(first) == 0:
            base = 4 if first.endswith(":") and first[:-1] in SECTIONS else 0
        continues = in_formula
        in_formula = indent_of(first) > base and not first.lstrip().startswith(">>>")
        if in_formula:
            result += block if continues else _formula(block, base)
        else:
            result += _text(block, base)
        result.append("")
    return result


def _formula(block: list[str], base: int) -> list[str]:
    return [" " * base + ".. code-block:: text", "", *block]


def _text(block: list[str], base: int) -> list[str]:
    if block[0].lstrip().startswith(">>>"):
        return block
    if base and indent_of(block[0]) == 0:
        return [block[0], *_text(block[1:], base)] if len(block) > 1 else block
    listed = any(ITEM.match(line) for line in block)
    indented = [position for position, line in enumerate(block) if indent_of(line) > base]
    if base == 0 and indented and not listed:
        first = indented[0]
        if len(block) - first == len(indented) and first:
            return [*_text(block[:first], base), "", *_formula(block[first:], base)]
        return _formula(["    " + line for line in block], base)
    for position, line in enumerate(block):
        if line.lstrip().startswith(">>>"):
            return [*prose("\n".join(block[:position])).split("\n"), "", *block[position:]]
    return prose("\n".join(block)).split("\n")


def convert(*event: Any) -> None:
    """Rewrite the lines of a docstring, the last thing Sphinx hands over, in place."""
    event[-1][:] = converted(event[-1])


def setup(app: Any) -> dict[str, Any]:
    """Connect before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", convert, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
