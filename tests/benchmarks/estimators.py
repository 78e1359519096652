"""What every sensitivity estimator is worth on a model: ranks, plans, seconds and memory, as one Markdown table.

    python tests/benchmarks/estimators.py net.py:load --holdout net.py:holdout --budget "3 bits values" --folder results

Random plans around every budget are drawn once and measured once on held-out data. Then every estimator scores the
calibration data in a process of its own (`kl+loss` in one for both, which share their runs and have one cost), stopped
after `--seconds` of CPU time, and its table is judged twice: by
Spearman's ρ of predicted against measured random plans, and by the measured divergence of the plan that it leads to,
next to the best uniform precision at that budget. A method may have settings, `fisher:labels=data`. CPU seconds are of
all threads, for scores alone; memory is the peak of the whole process while it scores (Linux). The folder keeps tables
and measurements: a run that was stopped goes on there.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from mpq.model_source import ModelSource, call_function, load_source
from mpq.options import SearchSpace
from mpq.pipeline import price
from mpq.plan import Plan, uniform_plan
from mpq.rank_correlation import spearman
from mpq.sensitivity import additivity, available, estimate_together
from mpq.table_entries import entries_of
from mpq.tables import CostTable


@dataclass(frozen=True)
class Bench:
    """What is tried on what: the command line's arguments."""

    model: str
    holdout: str | None
    options: str
    budget: tuple[str, ...]
    task: str | None
    batches: int | None
    holdout_batches: int | None
    plans: int
    width: float
    seconds: float
    folder: Path

    @property
    def space(self) -> SearchSpace:
        return SearchSpace(self.options.split(","))

    def source(self) -> ModelSource:
        """The model with as many batches as asked for."""
        source = load_source(self.model)
        heldout = call_function(self.holdout) if self.holdout else source.holdout
        if heldout is None:
            raise click.UsageError("plans are measured on held-out data: give --holdout FILE.py:function")
        task = self.task or source.task
        return replace(
            source, data=list(source.data)[: self.batches], holdout=list(heldout)[: self.holdout_batches], task=task
        )


def settings_of(method: str) -> tuple[str, dict[str, Any]]:
    """("fisher", {"labels": "data"}) of "fisher:labels=data"."""
    name, _, text = method.partition(":")
    pairs = (part.split("=", 1) for part in text.split(",") if part)
    return name, {key: int(value) if value.isdigit() else value for key, value in pairs}


def score(bench: Bench, methods: list[str]) -> None:
    """Score in this process, and write the tables with what they cost together in their provenance."""
    source = bench.source()
    priced = price(source.model, source.data, bench.space)
    settings = dict(map(settings_of, methods))
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    limit = math.ceil(start + bench.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    given = {"task": source.task, "progress": False, "settings": settings}
    frames = estimate_together(source.model, source.data, priced.network, bench.space, list(settings), **given)
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    cost = {"seconds": seconds, "peak_bytes": peak, "scored_with": len(methods)}
    for method, frame in zip(methods, frames.values(), strict=True):
        table = priced.table({"sensitivity": frame, "sensitivity_se": frame}, frame.attrs["measure"], cost)
        replace(table, pairs=frame.attrs.get("pairs", {})).save(table_file(bench, method))


def table_file(bench: Bench, method: str) -> Path:
    return bench.folder / f"{method.replace(':', '-')}.parquet"


def scored(bench: Bench, methods: list[str]) -> list[CostTable | str]:
    """The methods' tables, or why there is none."""
    files = [table_file(bench, method) for method in methods]
    reason = files[0].with_suffix(".txt")
    if not reason.exists() and not all(file.exists() for file in files):
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                process.submit(score, bench, methods).result()
        except BrokenProcessPool:
            reason.write_text(f"—, stopped after {bench.seconds:g} CPU s")
        except ValueError as error:
            reason.write_text(f"—, {str(error).splitlines()[0]}")
    if reason.exists():
        return [reason.read_text()] * len(methods)
    return [CostTable.load(file) for file in files]


@dataclass
class Judge:
    """Measured divergences, kept in a file as they come."""

    bench: Bench
    source: ModelSource
    known: dict[str, tuple[float, float]]

    def measure(self, plans: list[Plan]) -> list[tuple[float, float]]:
        """Divergence and standard error of each plan; only new ones run."""
        names = [" ".join(str(entry.choice) for entry in plan.entries) for plan in plans]
        missing = {name: plan for name, plan in zip(names, plans, strict=True) if name not in self.known}
        if missing:
            with additivity.divergences(self.source.model, self.source.holdout, task=self.source.task) as divergence:
                for name, plan in missing.items():
                    self.known[name] = divergence(plan)
                    (self.bench.folder / "measured.json").write_text(json.dumps(self.known))
        return [(self.known[name][0], self.known[name][1]) for name in names]


@dataclass(frozen=True)
class Trial:
    """One budget: random plans and what they measured, and the best uniform precision that keeps it."""

    budget: str
    choices: np.ndarray
    measured: np.ndarray
    uniform: tuple[str, float, float]

    def cells(self, table: CostTable, judge: Judge) -> list[str]:
        """Spearman's ρ, and the measured plan."""
        predicted = np.array([additivity.predicted_by(table, choice) for choice in self.choices])
        error = additivity.rank_error(predicted, self.measured, np.random.default_rng(0))
        [(value, noise)] = judge.measure([table.solve({"size": self.budget})])
        _, other, other_noise = self.uniform
        loses = value - other > 2 * math.hypot(noise, other_noise)
        return [
            f"{spearman(predicted, self.measured):.2f} ± {error:.2f}",
            f"{value:.3g} ± {noise:.1g}{' LOSES' if loses else ''}",
        ]


def trial(budget: str, flat: CostTable, judge: Judge) -> Trial:
    """Draw and measure the random plans of a budget."""
    bench, any_plan = judge.bench, flat.solve({"size": budget})
    rng = np.random.default_rng(0)
    choices = additivity.plans_around(flat, any_plan.budgets[0], width=bench.width, count=bench.plans, rng=rng)
    measured = judge.measure([replace(any_plan, entries=entries_of(flat, choice)) for choice in choices])
    fitting = additivity.fitting_options(flat, any_plan)
    uniform = judge.measure([uniform_plan(any_plan, option) for option in fitting])
    best = min(zip(map(str, fitting), uniform, strict=True), key=lambda pair: pair[1][0])
    return Trial(budget, choices, np.array(measured)[:, 0], (best[0], *best[1]))


@click.command()
@click.argument("model")
@click.option("--holdout", default=None, help="FILE.py:function that returns held-out data.")
@click.option("--options", default="int2,int3,int4,int6,int8")
@click.option("--budget", multiple=True, default=("4 bits values", "6 bits values"))
@click.option("--methods", default=None, help="Separated by spaces; all by default.")
@click.option("--task", default=None)
@click.option("--batches", type=int, default=None, help="Calibration batches; all by default.")
@click.option("--holdout-batches", type=int, default=None)
@click.option("--plans", default=40, help="Random plans a budget.")
@click.option("--width", default=0.08)
@click.option("--seconds", default=360.0, help="CPU seconds an estimator may take.")
@click.option("--folder", type=click.Path(path_type=Path), required=True)
def main(methods: str | None, **given: Any) -> None:
    """Print one row a method, and keep them in FOLDER/table.md."""
    bench = Bench(**given)
    bench.folder.mkdir(parents=True, exist_ok=True)
    source = bench.source()
    priced = price(source.model, source.data, bench.space)
    costs = priced.table({})
    flat = replace(costs, quantities={"sensitivity": np.where(costs.allowed, 0.0, np.nan), **costs.quantities})
    file = bench.folder / "measured.json"
    judge = Judge(bench, source, json.loads(file.read_text()) if file.exists() else {})
    trials = [trial(budget, flat, judge) for budget in bench.budget]
    heads = [f"ρ, {each.budget} | plan, {each.budget}" for each in trials]
    bars = ["| {} {:.3g} ± {:.1g}".format(*each.uniform) for each in trials]
    lines = [f"| method | CPU s | peak GB | {' | '.join(heads)} |", "|---" * (3 + 2 * len(trials)) + "|"]
    lines.append(f"| best uniform | | | {' | '.join(bars)} |")
    click.echo("\n".join(lines))
    for group in methods.split() if methods else available():
        for method, table in zip(group.split("+"), scored(bench, group.split("+")), strict=True):
            lines.append(f"| `{method}` | {' | '.join(cells_of(table, trials, judge))} |")
            click.echo(lines[-1])
            (bench.folder / "table.md").write_text("\n".join(lines) + "\n")


def cells_of(table: CostTable | str, trials: list[Trial], judge: Judge) -> list[str]:
    """What a row says of a method after its name."""
    if isinstance(table, str):
        return [table, "", *([""] * 2 * len(trials))]
    cost = table.provenance
    together = f" for all {cost['scored_with']}" if cost["scored_with"] > 1 else ""
    cells = [f"{cost['seconds']:.1f}{together}", f"{cost['peak_bytes'] / 1e9:.2f}"]
    return cells + [cell for each in trials for cell in each.cells(table, judge)]


if __name__ == "__main__":
    main()
