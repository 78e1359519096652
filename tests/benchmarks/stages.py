"""Seconds and peak memory of every stage of a search, and the plan next to uniform precision on held-out data.

    python tests/benchmarks/stages.py net.py:load --holdout net.py:holdout --options int3,int4,int6 --budget size=20%

One Markdown row a budget; CPU seconds and wall seconds; the peak of each stage is its own (the kernel's high-water mark
is reset between stages, on Linux). Run it on an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

import mpq
from mpq.model_source import call_function, load_source
from mpq.options import SearchSpace
from mpq.pipeline import price
from mpq.planning import solve_table


@dataclass
class Stage:
    """One stage's wall seconds, CPU seconds and peak resident bytes."""

    wall: float = 0.0
    cpu: float = 0.0
    peak: float = 0.0

    def __str__(self) -> str:
        return f"{self.wall:.1f} ({self.cpu:.1f} CPU) s, {self.peak / 1e9:.2f} GB"


@contextmanager
def measured(stage: Stage) -> Iterator[None]:
    """Fill a stage with what the block took."""
    Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    stage.wall, stage.cpu = time.perf_counter() - wall, time.process_time() - cpu
    status = Path("/proc/self/status").read_text().splitlines()
    stage.peak = 1024 * float(next(line for line in status if line.startswith("VmHWM")).split()[1])


@click.command()
@click.argument("model")
@click.option("--holdout", required=True)
@click.option("--options", default="int2,int3,int4,int6,int8")
@click.option("--budget", "budgets", multiple=True, default=("4 bits",))
@click.option("--pin", "pins", multiple=True)
@click.option("--sensitivity", default="auto")
@click.option("--labels", default=None)
@click.option("--task", default=None)
@click.option("--ties/--no-ties", default=True)
def main(**given) -> None:
    """Search, solve and verify MODEL, and print a row a budget."""
    source = load_source(given["model"])
    heldout = call_function(given["holdout"])
    task = given["task"] or source.task
    pins = dict(pin.split("=") for pin in given["pins"])
    space = SearchSpace(given["options"].split(","), pins, "auto" if given["ties"] else None)
    stages = {name: Stage() for name in ("trace and price", "score", "solve", "verify")}
    with measured(stages["trace and price"]):
        priced = price(source.model, source.data, space)
    settings = {"labels": given["labels"]} if given["labels"] else {}
    with measured(stages["score"]):
        table = mpq.measure(
            source.model, source.data, space, sensitivity=given["sensitivity"], task=task, method_settings=settings
        )
    click.echo(f"{priced.network}; {len(priced.network.siblings)} ties; {table.provenance['sensitivity']}; {task}")
    for budget in given["budgets"]:
        with measured(stages["solve"]):
            plan = solve_table(table, {"size": budget})
        with measured(stages["verify"]):
            report = mpq.verify(source.model, heldout, plan, task=task)
        click.echo(f"## size {budget}: {plan}")
        click.echo(str(report))
        click.echo(" | ".join(f"{name}: {stage}" for name, stage in stages.items()))


if __name__ == "__main__":
    main()
