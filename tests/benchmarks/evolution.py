"""Evolution: plans a second over a table, gaps to the optimum, what a measured trial costs, two workers against one.

    python tests/benchmarks/evolution.py [--layers 200] [--trials 400] [--tpe-trials 60] [--pause 0.05]

CPU seconds but for the last table, where workers wait as a model would make them wait, and wall seconds are compared.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mpq.evolution import evolve as evolve_measured
from mpq.problem import AllocationProblem
from mpq.solvers import EvolutionSolver, evolve, pareto_frontier, solve
from mpq.solvers.hypervolume import hypervolume
from mpq.tables import CostTable

BITS = np.array([2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
POPULATION, GENERATIONS = 200, 200


def quantities(layers: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Scores falling as 4^-bits with noise, sizes, latencies and energies."""
    rng = np.random.default_rng(seed)
    count = rng.lognormal(12, 1.2, (layers, 1))
    noise = rng.lognormal(0, 0.3, (layers, 6))
    return {
        "sensitivity": rng.lognormal(0, 1.5, (layers, 1)) * count * 4.0**-BITS * noise,
        "size": count * BITS / 8,
        "latency": count * BITS * rng.uniform(0.5, 2, (layers, 1)) + count * rng.uniform(0, 0.3, (layers, 6)),
        "energy": count * BITS * rng.uniform(0.5, 2, (layers, 1)),
    }


def problem_of(layers: int, budgets: int, share: float = 0.3) -> AllocationProblem:
    """Budgets at a share of their span."""
    tables = quantities(layers)
    score = tables.pop("sensitivity")
    names = list(tables)[:budgets]
    spans = {name: (tables[name].min(1).sum(), tables[name].max(1).sum()) for name in names}
    limits = {name: float(low + share * (high - low)) for name, (low, high) in spans.items()}
    return AllocationProblem(objective=score, resources=tables, budgets=limits)


class Stand:
    """Measures the table's sum and interactions of neighbours, after a pause."""

    def __init__(self, layers: int, pause: float = 0.0) -> None:
        self.table = CostTable(
            units=[f"layer{index}" for index in range(layers)],
            options=[f"int{int(bit)}" for bit in BITS],
            quantities=quantities(layers),
        )
        self.pause, self.rows = pause, np.arange(layers)
        self.scores = self.table.quantity("sensitivity")

    def measure(self, choices: NDArray[np.int64]) -> Any:
        """The stand-in for a measurement."""
        time.sleep(self.pause)
        taken = self.scores[self.rows, choices]
        loss = float(taken.sum() + np.sqrt(taken[1:] * taken[:-1]).sum())
        return SimpleNamespace(divergence=loss, standard_error=0.0, samples=1)


def over_tables() -> None:
    """One plan under budgets, and fronts."""
    click.echo("| layers | budgets | seeded | above the optimum | plans a CPU second |\n|---|---|---|---|---|")
    for layers in (20, 50, 200):
        for budgets in (1, 2, 3):
            problem = problem_of(layers, budgets)
            best = solve(problem).objective
            for seeded in (True, False):
                start = time.process_time()
                found = EvolutionSolver(seeded=seeded, population=POPULATION, generations=GENERATIONS).solve(problem)
                rate = POPULATION * (GENERATIONS + 1) / (time.process_time() - start)
                gap = found.objective / best - 1
                click.echo(f"| {layers} | {budgets} | {'yes' if seeded else 'no'} | {gap:.3%} | {rate:,.0f} |")
    click.echo("\n| layers | resources | points | plans a CPU second | volume: seeded | unseeded | random | exact |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for layers in (20, 50, 200):
        for names in (("size",), ("size", "latency"), ("size", "latency", "energy")):
            problem = problem_of(layers, 0)
            start = time.process_time()
            front = evolve(problem, names, population=POPULATION, generations=GENERATIONS)
            rate = POPULATION * (GENERATIONS + 1) / (time.process_time() - start)
            blind = evolve(problem, names, population=POPULATION, generations=GENERATIONS, seeds=[])
            plans = np.random.default_rng(0).integers(0, 6, (POPULATION * GENERATIONS, layers))
            drawn = evolve(problem, names, population=2, generations=1, seeds=plans)
            fronts = [front, blind, drawn]
            if len(names) == 1:
                fronts.append(pareto_frontier(problem, "size", epsilon=0.01))
            volumes = " | ".join(f"{volume(one, problem):.4f}" for one in fronts)
            exact = "" if len(names) == 1 else " | "
            click.echo(f"| {layers} | {len(names)} | {len(front)} | {rate:,.0f} | {volumes} |{exact}")


def volume(front: Any, problem: AllocationProblem) -> float:
    """Share of the box between all cheapest and all dearest, scores on a log scale; three resources: of 80 points."""
    cost = front.resource.reshape(len(front), -1)
    tables = [problem.resources[name] for name in front.names]
    low, high = (np.array([getattr(table, end)(1).sum() for table in tables]) for end in ("min", "max"))
    best, worst = problem.objective.min(1).sum(), problem.objective.max(1).sum()
    points = np.column_stack([(cost - low) / (high - low), np.log(front.objective / best) / np.log(worst / best)])
    if points.shape[1] > 3:
        points = points[np.linspace(0, len(points) - 1, min(len(points), 80)).astype(int)]
    return hypervolume(points, np.ones(points.shape[1]))


def overhead(layers: int, trials: int, tpe_trials: int) -> None:
    """CPU milliseconds a trial, without the measurement and without the start."""
    click.echo(f"\n| sampler | storage | trials | CPU ms a trial at {layers} layers |\n|---|---|---|---|")
    for sampler, storage, count in (
        ("nsga2", "memory", trials),
        ("nsga3", "memory", trials),
        ("nsga2", "journal", trials),
        ("nsga2", "sqlite", max(trials // 4, 20)),
        ("tpe", "memory", tpe_trials),
        ("tpe", "journal", tpe_trials),
    ):
        with tempfile.TemporaryDirectory() as folder:
            places = {"memory": None, "journal": f"{folder}/study.log", "sqlite": f"sqlite:///{folder}/study.db"}
            seconds = []
            for name, number in (("warm", 10), ("short", 10), ("long", count)):
                start = time.process_time()
                how: dict[str, Any] = {"sampler": sampler, "storage": places[storage], "study": name}
                evolve_measured(Stand(layers), ["size"], evaluations=number, **how)
                seconds.append(time.process_time() - start)
        click.echo(f"| {sampler} | {storage} | {count} | {1e3 * (seconds[2] - seconds[1]) / (count - 10):.1f} |")


def workers(layers: int, trials: int, pause: float) -> None:
    """Wall seconds of one worker and of two, each with a pause a plan; starting a process is not counted."""
    click.echo("\n| workers | plans | wall s | front | hypervolume |\n|---|---|---|---|---|")
    problem = Stand(layers).table.problem({})
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            storage = str(Path(folder) / "study.log")
            command = [sys.executable, __file__, "--work", storage, "--layers", str(layers)]
            command += ["--trials", str(trials), "--pause", str(pause)]
            running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            spans = [tuple(map(float, worker.communicate()[0].split())) for worker in running]
            wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
            front = evolve_measured(Stand(layers), ["size"], storage=storage, evaluations=1)
            plans = front.provenance["plans"]
            click.echo(f"| {count} | {plans} | {wall:.1f} | {len(front)} | {volume(front, problem):.4f} |")


@click.command()
@click.option("--layers", default=200)
@click.option("--trials", default=400)
@click.option("--tpe-trials", default=60)
@click.option("--pause", default=0.05)
@click.option("--work", default="", help="be a worker on this storage")
def main(layers: int, trials: int, tpe_trials: int, pause: float, work: str) -> None:
    """Print all tables."""
    if work:
        evolve_measured(Stand(layers), ["size"], storage=work, study="warm", evaluations=1)
        begin = time.time()
        evolve_measured(Stand(layers, pause), ["size"], storage=work, evaluations=trials)
        click.echo(f"{begin} {time.time()}")
        return
    over_tables()
    overhead(layers, trials, tpe_trials)
    workers(min(layers, 50), trials, pause)


if __name__ == "__main__":
    main()
