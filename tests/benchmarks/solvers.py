"""The default solver beside PuLP with CBC and with HiGHS, and the Lagrangian solver on millions of units.

    python tests/benchmarks/solvers.py                 # 200 and 500 layers, 10 seeds, medians; minutes
    python tests/benchmarks/solvers.py --large         # 5000 layers and three budgets: the codes run to their limit
    python tests/benchmarks/solvers.py --units         # the Lagrangian solver, relative to sorting the scores

One Markdown row an instance size. Every side is timed with the building of its model, in CPU seconds of this process
and its children (CBC is one); the ratio is of those. The codes get the textbook program: one binary a layer and option,
one row a layer and a budget, relative gap 1e-6.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import numpy as np
import pulp

from mpq.problem import AllocationProblem
from mpq.solvers.auto import AutoSolver
from mpq.solvers.lagrangian import LagrangianSolver

SIZES = ((200, 1), (500, 2), (500, 3))
UNITS = (10_000, 100_000, 1_000_000, 4_000_000)
LIMIT = 60.0  # seconds


class Instance(NamedTuple):
    """Tables of scores and usage, and budgets."""

    objective: np.ndarray
    resources: dict[str, np.ndarray]
    budgets: dict[str, float]

    def problem(self) -> AllocationProblem:
        return AllocationProblem(objective=self.objective, resources=self.resources, budgets=self.budgets)


class Result(NamedTuple):
    """What a side reached: objective, whether within its gap, and seconds."""

    objective: float
    gap: float | None
    is_done: bool
    cpu: float = 0.0
    wall: float = 0.0


def drawn(layers: int, options: int, budgets: int, seed: int) -> Instance:
    """Layers of lognormal size and sensitivity at 2 to 8 bits, errors 4**-bits times noise; budgets at 40 %."""
    rng = np.random.default_rng(seed)
    size, slope = rng.lognormal(12, 1.2, layers)[:, None], rng.lognormal(0, 1.5, layers)[:, None]
    bits = np.linspace(2, 8, options)
    objective = slope * size * 4.0**-bits * rng.lognormal(0, 0.3, (layers, options))
    stored = size * bits / 8
    latency = stored * rng.uniform(0.5, 2, (layers, 1)) + size * rng.uniform(0, 0.3, (layers, options))
    energy = size * bits * rng.uniform(0.5, 2, (layers, 1))
    tables = dict(zip(("size", "latency", "energy")[:budgets], (stored, latency, energy), strict=False))
    low = {name: float(table.min(1).sum()) for name, table in tables.items()}
    high = {name: float(table.max(1).sum()) for name, table in tables.items()}
    return Instance(objective, tables, {name: low[name] + 0.4 * (high[name] - low[name]) for name in tables})


def timed(run: Callable[[], Result]) -> Result:
    """The result with CPU seconds, of child processes as well, and wall seconds."""
    cpu, wall = used(), time.perf_counter()
    result = run()
    return result._replace(cpu=used() - cpu, wall=time.perf_counter() - wall)


def used() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def ours(instance: Instance) -> Result:
    allocation = AutoSolver().solve(instance.problem())
    return Result(allocation.objective, allocation.proof.gap, allocation.proof.gap <= 1e-4)


def textbook(instance: Instance, code: Any) -> Result:
    """The integer program as one would write it."""
    layers, options = instance.objective.shape
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = [[model.add_variable(f"x_{i}_{k}", 0, 1, pulp.LpBinary) for k in range(options)] for i in range(layers)]
    pairs = [(i, k) for i in range(layers) for k in range(options)]
    model += pulp.lpSum(instance.objective[i, k] * x[i][k] for i, k in pairs)
    for row in x:
        model += pulp.lpSum(row) == 1
    for name, table in instance.resources.items():
        model += pulp.lpSum(table[i, k] * x[i][k] for i, k in pairs) <= instance.budgets[name]
    start = time.perf_counter()
    model.solve(code)
    is_done = time.perf_counter() - start < 0.95 * LIMIT and model.sol_status == 1
    choice = [max(range(options), key=lambda k: row[k].varValue or 0.0) for row in x]
    return Result(float(instance.objective[np.arange(layers), choice].sum()), None, is_done)


def codes() -> dict[str, Any]:
    """The codes that are here. CBC gets no number of threads: one is its default, asked for one it may hang."""
    settings = {"msg": False, "gapRel": 1e-6, "timeLimit": LIMIT}
    path = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    found = {"CBC": pulp.COIN_CMD(path=path, **settings)}
    if "HiGHS" in pulp.listSolvers(onlyAvailable=True):
        found["HiGHS"] = pulp.HiGHS(threads=1, **settings)
    else:
        click.echo("HiGHS is left out: it needs `pip install highspy`")
    return found


def compare(layers: int, budgets: int, seeds: int) -> None:
    """A row of medians, and the worst of what must hold on every seed."""
    others = codes()
    rows = []
    for seed in range(seeds):
        instance = drawn(layers, 8, budgets, seed)
        rows.append(
            [timed(lambda: ours(instance)), *(timed(lambda c=c: textbook(instance, c)) for c in others.values())]
        )
    cpu = [statistics.median(row[side].cpu for row in rows) for side in range(len(others) + 1)]
    wall = [statistics.median(row[side].wall for row in rows) for side in range(len(others) + 1)]
    ratio = statistics.median(min(other.cpu for other in row[1:]) / row[0].cpu for row in rows)
    least = [min(other.objective for other in row[1:]) for row in rows]
    worse = max(row[0].objective / best - 1 for row, best in zip(rows, least, strict=True))
    certified = max(row[0].gap or 0.0 for row in rows)
    done = "; ".join(
        f"{name} done {sum(row[at].is_done for row in rows)}/{seeds}" for at, name in enumerate(others, start=1)
    )
    sides = " | ".join(
        f"{name} {a:.3f} s CPU, {b:.3f} s" for name, a, b in zip(("auto", *others), cpu, wall, strict=True)
    )
    click.echo(
        f"| {layers} layers, {budgets} budgets | {sides} | faster code / auto, CPU: {ratio:.1f} | worst objective "
        f"{worse:+.1e}, worst certified gap {certified:.1e} | {done} |"
    )


def scale(budgets: int, most: int) -> None:
    """Seconds of the Lagrangian solver as units grow, and its ratio to sorting as many numbers as there are scores."""
    for count in (count for count in UNITS if count <= most):
        instance = drawn(count, 4, budgets, 0)
        problem, flat = instance.problem(), instance.objective.ravel().copy()
        sorts = []
        for _ in range(5):
            start = time.process_time()
            np.sort(flat)
            sorts.append(time.process_time() - start)
        start = time.process_time()
        allocation = LagrangianSolver().solve(problem)
        seconds = time.process_time() - start
        click.echo(
            f"| {count:,} units × 4, {budgets} budgets | {seconds:.2f} s CPU | {1e6 * seconds / count:.2f} µs a unit | "
            f"{seconds / statistics.median(sorts):.0f} × np.sort | gap {allocation.proof.gap:.1e} |"
        )


@click.command()
@click.option("--seeds", default=10, show_default=True)
@click.option("--large", is_flag=True, help="5000 layers and three budgets.")
@click.option("--units", is_flag=True, help="The Lagrangian solver on many units.")
@click.option("--most", default=UNITS[-1], show_default=True, help="Units at most.")
def main(seeds: int, large: bool, units: bool, most: int) -> None:
    """Print the rows."""
    if units:
        for budgets in (1, 3):
            scale(budgets, most)
        return
    for layers, budgets in ((5000, 3),) if large else SIZES:
        compare(layers, budgets, seeds)


if __name__ == "__main__":
    main()
