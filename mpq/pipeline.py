"""The main job: trace, score, price, and solve for a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpq.export_restriction import without_refused
from mpq.limits import Limit, apply_budgets
from mpq.options import Option, SearchSpace
from mpq.plan import Plan, weight_format
from mpq.planning import solve_table
from mpq.tables import CostTable
from mpq.unit_storage import unit_storage_bits
from mpq.version import VERSION

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from mpq.frontier import Frontier
    from mpq.layers import Network, Units

Candidates = Iterable[Option | str] | Mapping[str, Iterable[Option | str]]


def search(  # noqa: PLR0917 - the order is public
    model: nn.Module,
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
    refine: float | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """Which layer gets which format: the plan with the least predicted loss that keeps every budget.

    Args:
        model: a trained model in full precision; comes back bit for bit.
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
            many measurements of the whole data, or the settings of `refine`.
        **settings: those of `measure` (task, granularity, quantizer, batch, phase, context, target, progress).

    Returns:
        The plan; `plan.table` solves for other budgets in milliseconds.

    Raises:
        InfeasibleError: if no plan keeps the budgets, before anything long starts; it says what could be reached.
        ValueError: if a name, pattern, unit or the data is wrong.
    """
    space = SearchSpace(options, pins, ties)
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


def _asked_of_refine(refine: float | Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the refinement: those given, with the task and quantiser of the search."""
    asked = dict(refine) if isinstance(refine, Mapping) else {"evaluations": refine}
    return {name: settings[name] for name in ("task", "quantizer") if name in settings} | asked


def _refined(model: nn.Module, data: Any, plan: Plan, asked: Mapping[str, Any]) -> Plan:
    found: Plan = import_module("mpq.refinement").refine(model, data, plan, **asked).plan
    return found


def pareto(
    model: nn.Module,
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
    model: nn.Module,
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

    space = space if isinstance(space, SearchSpace) else SearchSpace(space)
    data = batches_of(data)  # read once: a loader may shuffle, a generator ends
    run: dict[str, Any] = {"batch": batch, "phase": phase, "context": context, "bops": bops, "target": target}
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


@dataclass(frozen=True)
class Priced:
    """A traced network and the costs of its options; all that is known before the model is measured."""

    network: Network
    space: SearchSpace
    granularity: str
    costs: pd.DataFrame

    @property
    def refused(self) -> dict[tuple[str, str], str]:
        """Candidates that the target cannot run, (layer, option), with the reason."""
        candidates = {name: set(map(str, options)) for name, options in self.space.candidates(self.network).items()}
        refused = self.costs.attrs["refused"].items()
        return {(layer, option): reason for (layer, option), reason in refused if option in candidates[layer]}

    def table(
        self, scores: Mapping[str, pd.DataFrame], measure: str = "score", provenance: Mapping[str, Any] | None = None
    ) -> CostTable:
        """The cost table, with columns of estimates beside the costs."""
        units = self.network.units(self.granularity)
        shape = (len(units), len(self.space.all_options))
        scored = {name: frame[name].to_numpy(float).reshape(shape) for name, frame in scores.items()}
        position = {layer.name: index for index, layer in enumerate(self.network.layers)}
        ties = self.space.tied_layers(self.network) if self.granularity == "layer" else ()
        attributes = self.costs.attrs
        costs = _unit_costs(self.costs, self.network, self.space, units, self.granularity)
        return CostTable(
            units=units.labels,
            options=list(map(str, self.space.all_options)),
            quantities=scored | costs,
            measures={name: attributes["measures"][name] for name in costs} | dict.fromkeys(scored, measure),
            aggregates=_of(costs, attributes["aggregates"]),
            alive=_of(costs, attributes["alive"]),
            parameters=units.parameters,
            layers=self.network.layers,
            layer_index=units.layer_index,
            granularity=self.granularity,
            ties=[[position[name] for name in group] for group in ties],
            offsets=_of(costs, attributes["offsets"]),
            reference=_of(costs, _as_it_stands(attributes)),
            limits=_of(costs, attributes["limits"]),
            transitions=attributes["transitions"] if self.granularity == "layer" else {},
            provenance={**_provenance(self), **(provenance or {})},
            fingerprint=self.network.fingerprint,
        )

    def check_reachable(self, budgets: Mapping[str, float | str], solver: Any = "auto") -> tuple[Limit, ...]:
        """Refuse budgets that no plan keeps, whatever the scores will be, and a solver that does not take them.

        Raises:
            InfeasibleError: if they cannot be kept; it says what could be reached.
        """
        table = self.table({})
        flat = replace(table, quantities={"sensitivity": np.where(table.allowed, 0.0, np.nan), **table.quantities})
        solve_table(flat, budgets, solver=solver)
        return apply_budgets(flat, budgets)


def price(
    model: nn.Module,
    data: Any,
    space: SearchSpace,
    *,
    hardware: Any = None,
    granularity: str = "layer",
    batch: int = 1,
    phase: str | None = None,
    context: int | None = None,
    bops: str = "hawq",
    target: str | None = None,
) -> Priced:
    """Trace the model on the first batch and price every option; nothing is measured. Arguments as for `measure`.

    Raises:
        ValueError: if the data is empty or not finite, the model cannot run on it, or a pattern matches nothing.
    """
    from mpq.batches import batches_of, model_inputs
    from mpq.tracing import trace

    batches = batches_of(data)
    network = trace(model, model_inputs(model, batches[0]))
    if not network.layers:
        raise ValueError("the model must have a layer to plan (linear, convolution, embedding), found none")
    space.candidates(network)
    network.units(granularity)
    costs = _target(hardware).costs(network, space, batch=batch, phase=phase, context=context, bops=bops)
    _check_rows(costs, network, space)
    if target is not None:
        costs = without_refused(costs, network, space, target)
    return Priced(network, space, granularity, costs)


def _check_rows(costs: pd.DataFrame, network: Network, space: SearchSpace) -> None:
    expected = [(layer.name, str(option)) for layer in network.layers for option in space.all_options]
    if wrong := [pair for pair in zip_longest(costs.index, expected) if pair[0] != pair[1]]:
        raise ValueError(f"hardware must price every (layer, option) in order, got {wrong[0][0]} for {wrong[0][1]}")


def _target(hardware: Any) -> Any:
    models = import_module("mpq.hardware_models")
    if hardware is None:
        return models.storage()
    return models.load(hardware) if isinstance(hardware, str | Path) else hardware


def _unit_costs(
    costs: pd.DataFrame, network: Network, space: SearchSpace, units: Units, granularity: str
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Costs a unit: sizes counted exactly, with the index of a split layer; others in proportion to weights.

    Units of one layer share its input: what is no sum over layers (peaks of memory, stages of a pipeline) is left out.
    """
    shape = (len(network.layers), len(space.all_options))
    by_layer = {name: costs[name].to_numpy(float).reshape(shape) for name in costs.columns}
    if granularity == "layer":
        return by_layer
    by_layer = {name: table for name, table in by_layer.items() if name not in costs.attrs["aggregates"]}
    share = (units.parameters / np.array([layer.parameters for layer in network.layers])[units.layer_index])[:, None]
    by_unit = {name: values[units.layer_index] * share for name, values in by_layer.items()}
    index_bits = np.ceil(np.log2(np.isfinite(by_layer["size"]).sum(axis=1).clip(min=1)))
    for column, option in enumerate(space.all_options):
        available = np.isfinite(by_unit["size"][:, column])
        bits = unit_storage_bits(units, weight_format(option)) + index_bits[units.layer_index]
        by_unit["size"][:, column] = np.where(available, bits / 8, np.nan)
    return by_unit


def _of(quantities: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the quantities that a table has."""
    return {name: value for name, value in values.items() if name in quantities}


def _provenance(priced: Priced) -> dict[str, Any]:
    import torch

    attributes = priced.costs.attrs
    candidates = {name: list(map(str, options)) for name, options in priced.space.candidates(priced.network).items()}
    return {
        "options": list(map(str, priced.space.all_options)),
        "candidates": candidates if len({tuple(labels) for labels in candidates.values()}) > 1 else {},
        "pins": {pattern: str(option) for pattern, option in priced.space.pins.items()},
        "granularity": priced.granularity,
        "hardware": attributes["provenance"],
        **({"target": attributes["target"]} if "target" in attributes else {}),
        "estimates": list(attributes["estimates"]),
        "refused": [f"{layer}: {option}: {reason}" for (layer, option), reason in priced.refused.items()],
        "skipped": dict(priced.network.skipped),
        "versions": {"torch": str(torch.__version__), "mpq": VERSION},
    }


def _as_it_stands(attributes: Mapping[Any, Any]) -> dict[str, float]:
    """What 100 % is where the target runs the model as it stands; elsewhere the table takes the dearest option."""
    meaning = attributes["reference_meaning"]
    return {name: value for name, value in attributes["reference"].items() if meaning[name].startswith("the model")}
