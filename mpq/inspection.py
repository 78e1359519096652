"""What is known before anything long starts: layers, ties, reach of budgets, refused options, time and memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.options import SearchSpace
from mpq.pricing import Priced, price

if TYPE_CHECKING:
    from torch import nn


FILES_BYTES = 100e6
"""What a chunk of a checkpoint's weights, and what is made of it, takes at a time."""


@dataclass(frozen=True)
class Reach:
    """Smallest and largest total of a quantity over all plans, and what 100 % is; base units, offsets included."""

    quantity: str
    measure: str
    low: float
    high: float
    whole: float | None


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect_model`. `seconds` and `memory_bytes` are estimates, `estimated` says from what."""

    priced: Priced
    ties: tuple[tuple[str, ...], ...]
    reaches: tuple[Reach, ...]
    refused: dict[tuple[str, str], str]
    method: str
    task: str
    samples: int
    seconds: float
    memory_bytes: float
    estimated: str = "from one timed forward pass"


def inspect_model(
    model: nn.Module,
    data: Any,
    space: SearchSpace,
    *,
    hardware: Any = None,
    sensitivity: Any = "auto",
    task: Any = None,
    granularity: str = "layer",
    batch: int = 1,
    phase: str | None = None,
    context: int | None = None,
    bops: str = "hawq",
    target: str | None = None,
) -> Inspection:
    """Trace and price a model and time one forward pass; or price a checkpoint, without data.

    Raises:
        ValueError: if the data, a pattern or a name is wrong.
    """
    from mpq.batches import batches_of, samples_in
    from mpq.surgery import evaluating
    from mpq.task_choice import TASKS, choose_task

    run: dict[str, Any] = {"batch": batch, "phase": phase, "context": context, "bops": bops, "target": target}
    if data is None:
        return _inspect_files(model, space, hardware=hardware, granularity=granularity, **run)
    batches = batches_of(data)
    priced = price(model, batches, space, hardware=hardware, granularity=granularity, **run)
    samples = samples_in(batches)
    with evaluating(model):
        chosen = choose_task(model, batches[0], task)
        forward = _forward_seconds(model, chosen, batches[0]) * len(batches)
    method = sensitivity
    if method == "auto":
        estimator = import_module("mpq.sensitivity").automatic(priced.network, space, samples, granularity)
        methods = import_module("mpq.sensitivity").METHODS
        method = next(name for name, (_, kind) in methods.items() if kind == type(estimator).__name__)
    candidates = space.candidates(priced.network)
    runs = sum(map(len, candidates.values()))
    return Inspection(
        priced=priced,
        ties=space.tied_layers(priced.network),
        reaches=_reaches(priced),
        refused=priced.refused,
        method=str(method),
        task=next((name for name, known in TASKS.items() if known == chosen), type(chosen).__name__),
        samples=samples,
        seconds=forward * _forwards(str(method), runs, runs / max(len(candidates), 1)),
        memory_bytes=_memory(priced, str(method)),
    )


def _inspect_files(checkpoint: Any, space: SearchSpace, **run: Any) -> Inspection:
    from mpq.checkpoint_search import METHODS, NANOSECONDS, price_checkpoint

    priced = price_checkpoint(checkpoint, space, **run)
    candidates = space.candidates(priced.network)
    values = sum(layer.parameters * len(candidates[layer.name]) for layer in priced.network.layers)
    return Inspection(
        priced=priced,
        ties=space.tied_layers(priced.network),
        reaches=_reaches(priced),
        refused=priced.refused,
        method=METHODS["auto"],
        task="weights alone",
        samples=0,
        seconds=values * NANOSECONDS / 1e9,
        memory_bytes=_memory(priced, "files"),
        estimated=f"from {NANOSECONDS} ns a weight and option on one core",
    )


def _reaches(priced: Priced) -> tuple[Reach, ...]:
    table = priced.table({})
    return tuple(
        Reach(name, table.measures[name], *table.reachable(name), table.reference.get(name))
        for name in table.quantities
    )


def _forwards(method: str, runs: int, options: float) -> float:
    """What a method costs, in forward passes over the data; 0 where that is not known."""
    return {"kl": runs + 1.0, "fisher": 6.0 + options, "output_fisher": 3.0 + options}.get(method, 0.0)


def _forward_seconds(model: nn.Module, task: Any, batch: Any) -> float:
    import torch

    seconds = []
    with torch.no_grad():
        for _ in range(3):  # the first warms up, and other work on the machine only ever adds time
            start = time.perf_counter()
            task.run(model, batch)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _memory(priced: Priced, method: str) -> float:
    """Peak of the process so far, and on top what the method keeps: quantised weights, layer inputs and outputs."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if method == "files":
        return float(now + FILES_BYTES)
    layers = priced.network.layers
    weights = np.array([layer.weight_bytes for layer in layers], float)
    activations = 4.0 * sum(layer.input_elements + layer.output_elements for layer in layers)
    if method in {"fisher", "output_fisher"}:
        return float(now + weights.sum() * len(priced.space.all_options) + activations)
    return float(now + 3 * weights.max())
