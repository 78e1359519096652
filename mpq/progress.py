"""Progress of long work: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, *, shown: bool = True) -> Iterable[Item]:
    """The items, with a bar and the time left on standard error where that is a terminal."""
    if not shown or not sys.stderr.isatty():
        return items
    return _with_bar(items, description)


@contextmanager
def meter(
    description: str, total: float | None, unit: str, *, digits: int = 0, shown: bool = True
) -> Iterator[Callable[[float, str], None]]:
    """What is told how much of a total is done, and what else to show; a total of None is unknown."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    most = "" if total is None else f" of {total:g}"
    counts = TextColumn(f"{{task.completed:.{digits}f}}{most} {unit}{{task.fields[more]}},")
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, more="")
        yield lambda done, more: progress.update(task, completed=max(done, progress.tasks[task].completed), more=more)


def _with_bar(items: Sequence[Item], description: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = (TimeRemainingColumn(), TextColumn("left"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *left)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, description=description)
