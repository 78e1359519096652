"""Interacting layers: `QuadraticSolver`, the plan without pairs, and `ILPSolver` with the same time; k best plans.

    python tests/benchmarks/quadratic.py [--ilp]

One Markdown row a problem, CPU seconds; with --ilp (slow) the integer program gets the seconds that the quadratic
solver took, twenty at least.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import click
import numpy as np

from mpq.problem import AllocationProblem
from mpq.solvers import ILPSolver
from mpq.solvers.quadratic import QuadraticSolver
from mpq.solvers.ranked_plans import k_best

BITS = {3: (2, 4, 8), 4: (2, 3, 4, 8), 5: (2, 3, 4, 6, 8)}


def interacting(layers: int, options: int, near: int, strength: float, seed: int = 0) -> AllocationProblem:
    """Pairs of layers less than ``near`` apart: a share of the geometric mean of their scores, of either sign."""
    rng, bits = np.random.default_rng(seed), np.array(BITS[options], dtype=float)
    score = rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (layers, options))
    size = rng.lognormal(3, 1, (layers, 1)) * bits
    pairs = {
        (i, j): strength * rng.normal() * np.sqrt(np.outer(score[i], score[j]))
        for i, j in itertools.combinations(range(layers), 2)
        if j - i < near
    }
    budgets = {"size": float(0.5 * size[:, -1].sum())}
    return AllocationProblem(objective=score, resources={"size": size}, budgets=budgets, pairs=pairs)


def additive(layers: int, budgets: int, seed: int) -> AllocationProblem:
    """Five options, scores falling as 4^-bits with noise, up to three budgets at 40 % of their span."""
    rng, bits = np.random.default_rng(seed), np.linspace(2, 8, 5)
    count = rng.lognormal(12, 1.2, (layers, 1))
    score = rng.lognormal(0, 1.5, (layers, 1)) * count * 4.0**-bits * rng.lognormal(0, 0.3, (layers, 5))
    size = count * bits / 8
    tables = {
        "size": size,
        "latency": size * rng.uniform(0.5, 2, (layers, 1)) + count * rng.uniform(0, 0.3, (layers, 5)),
        "energy": count * bits * rng.uniform(0.5, 2, (layers, 1)),
    }
    names = list(tables)[:budgets]
    spans = {name: (tables[name].min(1).sum(), tables[name].max(1).sum()) for name in names}
    limits = {name: float(low + 0.4 * (high - low)) for name, (low, high) in spans.items()}
    return AllocationProblem(objective=score, resources={name: tables[name] for name in names}, budgets=limits)


@click.command()
@click.option("--ilp", is_flag=True)
def main(ilp: bool) -> None:
    """Print both tables."""
    click.echo("| layers | options | near | strength | without pairs | quadratic | bound | status | CPU s | ilp |")
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    problems = [
        (50, 3, 50, 0.03),
        (50, 3, 50, 0.3),
        (60, 4, 60, 0.02),
        (60, 4, 60, 0.1),
        (200, 5, 2, 1.0),
        (200, 5, 5, 0.3),
    ]
    for layers, options, near, strength in problems:
        problem = interacting(layers, options, near, strength)
        start = time.process_time()
        found = QuadraticSolver().solve(problem)
        seconds = time.process_time() - start
        plain = problem.evaluate(ILPSolver().solve(replace(problem, pairs={})).choices)[0]
        answer = ILPSolver(time_limit=max(20.0, seconds)).solve(problem) if ilp else None
        other = "" if answer is None else f"{answer.objective:.5g} ({answer.proof.status})"
        click.echo(
            f"| {layers} | {options} | {near} | {strength} | {plain:.5g} | {found.objective:.5g} "
            f"| {found.proof.bound:.5g} | {found.proof.status} | {seconds:.1f} | {other} |"
        )
    click.echo("\n| layers | budgets | k | CPU s, median of 5 | most |\n|---|---|---|---|---|")
    for layers, budgets in itertools.product((50, 200, 500), (1, 2, 3)):
        times = []
        for seed in range(5):
            problem, start = additive(layers, budgets, seed), time.process_time()
            k_best(problem, 200)
            times.append(time.process_time() - start)
        click.echo(f"| {layers} | {budgets} | 200 | {np.median(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
