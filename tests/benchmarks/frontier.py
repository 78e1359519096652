"""The exact frontier of 200 layers × 6 options next to a plain dominance merge, and the frontiers with an epsilon.

    python tests/benchmarks/frontier.py [--layers 200] [--options 6] [--seeds 2]

CPU seconds in one run, and the peak of the memory of each stage (the kernel's high-water mark, on Linux). The plain
merge finds the points without their choices: an outer sum, a sort and a running minimum a layer. The problems look like
bit allocation: sizes and sensitivities lognormal, errors falling as 4^−bits with noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from mpq.problem import AllocationProblem
from mpq.solvers import solve
from mpq.solvers.dynamic import DynamicSolver
from mpq.solvers.pareto import pareto_frontier


def bit_allocation(layers: int, options: int, seed: int) -> AllocationProblem:
    """One resource, no budget."""
    rng = np.random.default_rng(seed)
    count, trace = rng.lognormal(12, 1.2, layers), rng.lognormal(0, 1.5, layers)
    bits = np.linspace(2, 8, options)
    objective = (trace * count)[:, None] * 4.0**-bits * rng.lognormal(0, 0.3, (layers, options))
    return AllocationProblem(objective=objective, resources={"size": count[:, None] * bits / 8})


def plain_merge(problem: AllocationProblem) -> int:
    """Number of points, by one vectorised dominance merge a layer."""
    cost, value = np.zeros(1), np.zeros(1)
    for scores, sizes in zip(problem.objective, problem.resources["size"], strict=True):
        cost, value = (cost[:, None] + sizes).ravel(), (value[:, None] + scores).ravel()
        order = np.argsort(cost)
        cost, value = cost[order], value[order]
        kept = np.append(True, value[1:] < np.minimum.accumulate(value)[:-1])
        cost, value = cost[kept], value[kept]
    return len(cost)


def measured(what: str, run: Callable[[], object]) -> tuple[object, float]:
    """The result and its CPU seconds, printed with the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    result = run()
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * float(next(line for line in status if line.startswith("VmHWM")).split()[1])
    click.echo(f"  {what}: {seconds:.3f} CPU s, peak {peak / 1e6:.0f} MB")
    return result, seconds


@click.command()
@click.option("--layers", default=200)
@click.option("--options", default=6)
@click.option("--seeds", default=2)
def main(layers: int, options: int, seeds: int) -> None:
    """Print one block a seed."""
    for seed in range(seeds):
        problem = bit_allocation(layers, options, seed)
        click.echo(f"{layers} layers, {options} options, seed {seed}")
        size = problem.resources["size"]
        budget = float(size.min(1).sum() + 0.4 * (size.max(1).sum() - size.min(1).sum()))
        tight = AllocationProblem(objective=problem.objective, resources={"size": size}, budgets={"size": budget})
        _, one = measured("one solve, auto", lambda: solve(tight))
        measured("one solve, dynamic", lambda: DynamicSolver().solve(tight))
        points, plain = measured("plain merge, no choices", lambda: plain_merge(problem))
        front, exact = measured("exact frontier", lambda: pareto_frontier(problem, "size"))
        click.echo(f"    {front}; {points} points by the plain merge, {exact / plain:.2f} times its CPU time")
        for epsilon in (1e-4, 1e-3, 1e-2):
            front, seconds = measured(f"epsilon {epsilon:g}", lambda: pareto_frontier(problem, "size", epsilon=epsilon))
            click.echo(f"    {len(front)} points, {seconds / one:.0f} times one solve")


if __name__ == "__main__":
    main()
