"""What the pages of the documentation show, taken out of them so that tests can run it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*$")
FENCE = re.compile(r"(?ms)^```(?P<language>[\w{}-]+)[^\n]*\n(?P<text>.*?)^```\s*$")


@dataclass(frozen=True)
class Command:
    """A line after `$ mpq` and what the page shows that it prints."""

    arguments: list[str]
    shown: list[str]


def blocks(page: str, language: str) -> Iterator[str]:
    """The blocks of a language that a page does not mark as `<!-- not run: reason -->`."""
    for found in FENCE.finditer(page):
        if found["language"] == language and not NOT_RUN.search(page[: found.start()]):
            yield found["text"]


def run_python(page: str, name: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page, in order and in one namespace, which comes back."""
    names = {} if names is None else names
    for text in blocks(page, "python"):
        exec(compile(text, name, "exec"), names)
    return names


def commands(page: str) -> Iterator[Command]:
    """The `mpq` commands of a page's console blocks, continued lines joined, with the lines shown after each."""
    for text in blocks(page, "console"):
        for part in re.split(r"(?m)^\$ ", re.sub(r"\\\n\s*", " ", text))[1:]:
            line, *shown = part.splitlines()
            words = shlex.split(line, comments=True)
            if words and words[0] == "mpq":
                yield Command(words[1:], [row.rstrip() for row in shown if row.strip() not in {"", "..."}])
