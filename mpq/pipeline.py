"""The main job: trace, score, price, and solve for a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpq.options import Option, SearchSpace
from mpq.plan import Plan
from mpq.planning import solve_table
from mpq.pricing import price
from mpq.tables import CostTable

if TYPE_CHECKING:
    from torch import nn

    from mpq.checkpoints import Checkpoint
    from mpq.frontier import Frontier

Candidates = Iterable[Option | str] | Mapping[str, Iterable[Option | str]]


def search(  # noqa: PLR0917 - the order is public
    model: nn.Module | str | Path | Checkpoint,
    data: Any,
    options: Candidates,
    budgets: Mapping[str, float | str],
    holdout: Any = None,
    hardware: Any = None,
    sensitivity: Any = "auto",
    solver: Any = "auto",
    pins: Mapping[str, Option | str] | None = None,
    ties: Literal["auto"] | Iterable[str] | None = "auto",
    seed: int = 0,
    cache: str | Path | None = None,
    *,
    refine: float | bool | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """Which layer gets which format: the plan with the least predicted loss that keeps every budget.

    Args:
        model: a trained model in full precision; comes back bit for bit. Or the path of a safetensors file or folder,
            however large, which is read a few rows at a time: then `data` is None and the error of weights is scored.
        data: calibration data: a DataLoader, a list of batches, or one batch. A batch is `(inputs, targets)`, a mapping
            the model is called with, or inputs alone.
        options: formats a layer may take, such as ["int4", "int8"] or ["int4/int8"], or a mapping from name patterns.
        budgets: a limit a quantity: "18%" (of the model as it stands), "4.5 bits", "7.9 MB", "4 ms", or base units.
        holdout: data the plan was not made on; with it the plan is verified and `plan.measured` filled.
        hardware: name of a device, path of a device file, or a `Target`; needed for budgets of latency.
        sensitivity: a method of `mpq.sensitivity`, or an estimator.
        solver: a solver of `mpq.solvers`, or an instance.
        pins: name patterns and the option those layers take.
        ties: "auto", None, or name patterns; see `SearchSpace`.
        seed: of everything random.
        cache: a folder for finished measurements: an interrupted search goes on there.
        refine: measure other plans on the data and take a better one that fresh samples confirm (`mpq.refine`): how
            many measurements of the whole data, the settings of `refine`, or True for its defaults.
        **settings: those of `measure` (task, granularity, quantizer, batch, phase, context, target, progress).

    Returns:
        The plan; `plan.table` solves for other budgets in milliseconds.

    Raises:
        InfeasibleError: if no plan keeps the budgets, before anything long starts; it says what could be reached.
        ValueError: if a name, pattern, unit or the data is wrong.
    """
    space = SearchSpace(options, pins, ties)
    refine = None if refine is False else refine
    if data is None and (refine is not None or holdout is not None):
        raise ValueError("refine and holdout measure the model: load it and give data")
    if refine is not None:
        data = import_module("mpq.batches").batches_of(data)  # read once: a loader may shuffle, a generator ends
    if holdout is not None:
        if hasattr(settings.get("quantizer"), "squared_errors"):
            raise ValueError(
                "holdout cannot be measured with an ErrorDatabase, which knows errors but no weights: leave holdout "
                "out, or take a WeightDatabase"
            )
        holdout = import_module("mpq.batches").batches_of(holdout, role="holdout")
    table = measure(
        model,
        data,
        space,
        hardware=hardware,
        sensitivity=sensitivity,
        seed=seed,
        cache=cache,
        budgets=budgets,
        solver=solver,
        **settings,
    )
    plan = solve_table(table, budgets, solver=solver)
    if refine is not None:
        plan = _refined(model, data, plan, {"seed": seed, "cache": cache} | _asked_of_refine(refine, settings))
    if holdout is None:
        return plan
    verify = import_module("mpq.verification").verify
    same = {name: settings[name] for name in ("task", "quantizer", "progress") if name in settings}
    report = verify(model, holdout, plan, baselines=(), seed=seed, **same)
    return replace(plan, measured=report.measured)


def _asked_of_refine(refine: float | bool | Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the refinement: those given, with the task and quantiser of the search."""
    asked = dict(refine) if isinstance(refine, Mapping) else {} if refine is True else {"evaluations": refine}
    return {name: settings[name] for name in ("task", "quantizer", "progress") if name in settings} | asked


def _refined(model: Any, data: Any, plan: Plan, asked: Mapping[str, Any]) -> Plan:
    found: Plan = import_module("mpq.refinement").refine(model, data, plan, **asked).plan
    return found


def pareto(
    model: nn.Module | str | Path | Checkpoint,
    data: Any,
    options: Candidates,
    resource: str,
    budgets: Mapping[str, float | str] | None = None,
    *,
    hardware: Any = None,
    pins: Mapping[str, Option | str] | None = None,
    ties: Literal["auto"] | Iterable[str] | None = "auto",
    epsilon: float = 0.0,
    **settings: Any,
) -> Frontier:
    """Every plan that no other beats in both predicted loss and a resource.

    Args:
        model: as for `search`, and so are data, options, hardware, pins and ties.
        data: calibration data.
        options: formats a layer may take.
        resource: the quantity to trade the loss for: "size", "latency", "bops".
        budgets: limits that every point keeps.
        hardware: needed for latency.
        pins: name patterns and the option those layers take.
        ties: "auto", None, or name patterns.
        epsilon: leave out points that are better by less than this fraction; 0 keeps every one.
        **settings: those of `measure` (sensitivity, task, granularity, quantizer, seed, cache, progress).

    Returns:
        The frontier, in order of the resource. `mpq.measure` and `table.pareto` do the same in two steps, of which the
        second takes milliseconds.

    Raises:
        InfeasibleError: if no plan keeps the budgets.
        ValueError: if a name, pattern, unit or the data is wrong.
    """
    budgets = budgets or {}
    table = measure(model, data, SearchSpace(options, pins, ties), hardware=hardware, budgets=budgets, **settings)
    return table.pareto(resource, budgets, epsilon=epsilon)


def measure(
    model: nn.Module | str | Path | Checkpoint,
    data: Any,
    space: SearchSpace | Candidates,
    *,
    hardware: Any = None,
    sensitivity: Any = "auto",
    budgets: Mapping[str, float | str] | None = None,
    solver: Any = "auto",
    task: Any = None,
    granularity: str = "layer",
    quantizer: Any = None,
    batch: int = 1,
    phase: str | None = None,
    context: int | None = None,
    bops: str = "hawq",
    target: str | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    method_settings: Mapping[str, Any] | None = None,
) -> CostTable:
    """Trace, price and score a model: a table that is solved for any budget without the model.

    Args:
        model: as for `search`.
        data: as for `search`.
        space: a `SearchSpace`, or the options of one.
        hardware: as for `search`.
        sensitivity: as for `search`.
        budgets: refused at once if they cannot be kept, before the model is measured.
        solver: the one that will be used; refused at once as well.
        task: how a batch is run and what the loss is (`mpq.tasks`).
        granularity: what takes an option of its own: "layer", "rows:16", "groups:64".
        quantizer: whose error is scored; rounds to nearest by default.
        batch: samples a pass, for latency and energy.
        phase: None or "prefill" prices the positions of the data, "decode" one position a sample.
        context: positions in the cache that attention reads, in "decode".
        bops: convention of bit operations: "hawq", "nncf" or "additions".
        target: library that the plan will be exported to (`mpq.exporting.targets`): what it cannot hold is no option.
        seed: as for `search`.
        cache: as for `search`.
        progress: show a bar on a terminal.
        method_settings: fields of the sensitivity method.

    Raises:
        InfeasibleError: if `budgets` cannot be kept.
        ValueError: if a name, pattern, unit or the data is wrong.
    """
    from mpq.batches import batches_of, samples_in
    from mpq.checkpoints import Checkpoint

    space = space if isinstance(space, SearchSpace) else SearchSpace(space)
    run: dict[str, Any] = {"batch": batch, "phase": phase, "context": context, "bops": bops, "target": target}
    if isinstance(model, str | Path | Checkpoint):
        from mpq.checkpoint_search import measure_checkpoint

        given = {"quantizer": quantizer, "task": task, "method_settings": method_settings}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{unused[0]} needs a model that runs, a folder of weights is only read: load the model")
        run |= {"hardware": hardware, "budgets": budgets, "solver": solver, "granularity": granularity}
        return measure_checkpoint(model, data, space, sensitivity=sensitivity, progress=progress, **run)
    data = batches_of(data)  # read once: a loader may shuffle, a generator ends
    priced = price(model, data, space, hardware=hardware, granularity=granularity, **run)
    if budgets is not None:
        priced.check_reachable(budgets, solver)
    frame = import_module("mpq.sensitivity").estimate(
        model,
        data,
        priced.network,
        space,
        method=sensitivity,
        task=task,
        seed=seed,
        granularity=granularity,
        quantizer=quantizer,
        cache=cache,
        progress=progress,
        **(method_settings or {}),
    )
    provenance = {"samples": samples_in(data), "seed": seed, "sensitivity": frame.attrs["method"]}
    provenance |= {"why": frame.attrs["why"]} if "why" in frame.attrs else {}
    provenance |= {"task": frame.attrs["task"], "quantizer": repr(quantizer) if quantizer else "RoundToNearest()"}
    table = priced.table({"sensitivity": frame, "sensitivity_se": frame}, frame.attrs["measure"], provenance)
    return replace(table, pairs=frame.attrs.get("pairs", {}))
