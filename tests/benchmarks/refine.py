"""Measured refinement next to the plan of the table and to a plain local search, on held-out data.

    python tests/benchmarks/refine.py net.py:load --holdout net.py:holdout --bits 2.5,3,4,5 --seeds 3

`load` returns model and calibration data. One Markdown row a budget and method: held-out divergence of every seed, what
it was on the selection data, evaluations of the whole data, plans, and CPU seconds. `--level 0.5` takes whatever is
better on fresh samples. The plain search changes one to three layers at random, repairs, fills, and keeps what measures
better on all the selection data.
"""

from __future__ import annotations

import time

import click
import numpy as np

import mpq
from mpq.evaluator import Evaluator
from mpq.level_switches import LevelSwitches
from mpq.model_source import call_function, load_source
from mpq.planning import choices_of
from mpq.refinement import refine


def plain_search(evaluator, problem, start, rng, patience=100):
    """A random change at a time, kept if it is better; what `refine` must beat."""
    switches, best, stale = LevelSwitches(problem), start, 0
    flat = np.zeros_like(problem.objective)
    while stale < patience:
        child = switches.child(best, rng, flat - problem.resources["size"])
        if child is None or child.tobytes() in evaluator.measured:
            stale += 1
            continue
        better = evaluator.measure(child).divergence < evaluator.measure(best).divergence
        best, stale = (child, 0) if better else (best, stale + 1)
    return best


def row(name, judge, outcomes):
    """One row: held-out figures of all seeds, then the means of the rest."""
    heldout = [judge.measure(choices).divergence for choices, *_ in outcomes]
    selection, evaluations, plans, seconds = np.mean([rest for _, *rest in outcomes], axis=0)
    listed = " / ".join(f"{value:.5f}" for value in heldout)
    click.echo(
        f"| {name} | {listed} | {np.mean(heldout):.5f} | {selection:.5f} | {evaluations:.0f} | {plans:.0f} "
        f"| {seconds:.1f} |"
    )


@click.command()
@click.argument("model")
@click.option("--holdout", required=True)
@click.option("--options", default="int2,int3,int4,int6,int8")
@click.option("--bits", default="2.5,3,4,5")
@click.option("--sensitivity", default="kl")
@click.option("--task", default=None)
@click.option("--seeds", default=3)
@click.option("--evaluations", default=300.0)
@click.option("--levels", default="0.05,0.5")
@click.option("--patience", default=100, help="Of the plain search; 0 leaves it out.")
@click.option("--pin", "pins", multiple=True)
def main(**given) -> None:
    """Refine MODEL at every budget and seed, and print a row a method."""
    source = load_source(given["model"])
    task = given["task"] or source.task
    pins = dict(pin.split("=") for pin in given["pins"])
    space = mpq.SearchSpace(given["options"].split(","), pins, None)
    started = time.process_time()
    table = mpq.measure(source.model, source.data, space, sensitivity=given["sensitivity"], task=task, progress=False)
    click.echo(f"table: {given['sensitivity']}, {time.process_time() - started:.1f} CPU s")
    judge = Evaluator(source.model, call_function(given["holdout"]), table, task=task)
    for bits in given["bits"].split(","):
        budgets = {"size": f"{bits} bits values"}
        start = choices_of(table, table.solve(budgets))
        click.echo(f"\n## {bits} bits\n\n| method | held out | mean | selection | evaluations | plans | CPU s |")
        click.echo("|---|---|---|---|---|---|---|")
        row("table", judge, [(start, np.nan, 0, 1, 0)])
        for level in map(float, given["levels"].split(",")):
            outcomes = []
            for seed in range(given["seeds"]):
                started = time.process_time()
                settings = {"evaluations": given["evaluations"], "level": level, "seed": seed, "task": task}
                found = refine(source.model, source.data, table, budgets, **settings)
                taken, plans = time.process_time() - started, len(found.evaluator.measured)
                plan = choices_of(table, found.plan)
                outcomes.append((plan, found.selection.best, found.evaluations, plans, taken))
            row(f"refine, level {level:g}", judge, outcomes)
        outcomes = []
        for seed in range(given["seeds"] if given["patience"] else 0):
            evaluator, started = Evaluator(source.model, source.data, table, task=task), time.process_time()
            problem = table.problem(budgets)
            plan = plain_search(evaluator, problem, start, np.random.default_rng(seed), given["patience"])
            best, taken = evaluator.measure(plan).divergence, time.process_time() - started
            outcomes.append((plan, best, evaluator.spent, len(evaluator.measured), taken))
        if outcomes:
            row("plain local search", judge, outcomes)


if __name__ == "__main__":
    main()
