"""CPU seconds of layer traces next to PyHessian's whole-model trace, and products of each method, in one run.

    pip install --target /somewhere --no-deps pyhessian==0.1
    PYTHONPATH=/somewhere python tests/benchmarks/traces.py demo --tolerance 0.05

MODEL is a model source with labelled images, as for `mpq search`. Prints, as Markdown: CPU seconds of PyHessian to a
relative standard error of its whole-model trace, extrapolated from the spread of its own probes; of ours to that error
in every layer; of `fisher` in four formats, as a yardstick; and for each Hessian method the CPU seconds and products,
with the worst relative error reached. One thread; times are CPU seconds, only their ratios within a run mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import mpq
from mpq.batches import batches_of, split_batch
from mpq.model_source import load_source
from mpq.sensitivity import estimate, layer_traces


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of some work, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def rival(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], probes: int, tolerance: float) -> float:
    """PyHessian's CPU seconds to a relative standard error of its one trace."""
    hessian = import_module("pyhessian").hessian

    def run() -> list[float]:
        return hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).trace(maxIter=probes, tol=0)

    spent, values = cpu_seconds(run)
    spread = np.std(values, ddof=1) / abs(np.mean(values))
    needed = (spread / tolerance) ** 2
    click.echo(
        f"PyHessian: {spent / probes:.3f} CPU s a probe, relative spread {spread:.2f}, trace {np.mean(values):.2f}; "
        f"{needed:.0f} probes to {tolerance:.0%}: **{needed * spent / probes:.2f} CPU s** for one number"
    )
    return needed * spent / probes


@click.command()
@click.argument("model")
@click.option("--tolerance", default=0.05, help="Relative standard error, of every layer.")
@click.option("--rival-probes", default=30, help="PyHessian's probes that its cost is extrapolated from.")
@click.option("--probes", default=2000, help="Most products a layer of the Hessian methods.")
@click.option("--methods", default="auto,block,joint,xtrace,hutch++")
@click.option("--samples", default=512, help="Images, in one batch.")
def main(model: str, tolerance: float, rival_probes: int, probes: int, methods: str, samples: int) -> None:
    """Compare traces of MODEL."""
    torch.set_num_threads(1)
    source = load_source(model)
    parts = [split_batch(batch) for batch in batches_of(source.data)]
    batch = tuple(torch.cat([part[side] for part in parts])[:samples] for side in (0, 1))
    network = mpq.trace(source.model, batch[0][:2])
    net = source.model.eval()
    click.echo(f"{network}; {len(batch[0])} samples; {tolerance:.0%} relative standard error in every layer\n")
    settings = {"tolerance": tolerance, "probes": probes, "progress": False}
    layer_traces(net, (batch[0][:8], batch[1][:8]), network, probes=2, curvature="ggn", progress=False)  # warm up
    spent, frame = cpu_seconds(lambda: layer_traces(net, batch, network, curvature="ggn", **settings))
    worst = (frame["standard_error"] / frame["trace"].abs()).max()
    click.echo(f"ours, ggn: {frame['probes'].max()} draws, worst layer {worst:.1%}: **{spent:.2f} CPU s**")
    space = mpq.SearchSpace([f"int{bits}" for bits in (3, 4, 6, 8)])
    yardstick, _ = cpu_seconds(lambda: estimate(net, batch, network, space, "fisher", progress=False))
    draw = spent / frame["probes"].max()
    click.echo(
        f"fisher: {yardstick:.2f} CPU s; ggn is {spent / yardstick:.1f} times that, {draw / yardstick:.2f} a draw"
    )
    try:
        other = rival(net, batch, rival_probes, tolerance)
        click.echo(f"PyHessian takes {other / spent:.1f} times as long as ggn does for every layer")
    except ModuleNotFoundError:
        click.echo("PyHessian is not installed")
    click.echo("\n| method | CPU s | products, layers' sum | mean a layer | worst layer | methods chosen |")
    click.echo("|---|---|---|---|---|---|")
    for method in methods.split(","):
        spent, frame = cpu_seconds(
            lambda method=method: layer_traces(net, batch, network, algorithm=method, **settings)
        )
        worst = (frame["standard_error"] / frame["trace"].abs()).max()
        chosen = ", ".join(f"{count} {name}" for name, count in frame["method"].value_counts().items())
        counts = frame["probes"]
        click.echo(f"| {method} | {spent:.2f} | {counts.sum()} | {counts.mean():.0f} | {worst:.1%} | {chosen} |")


if __name__ == "__main__":
    main()
