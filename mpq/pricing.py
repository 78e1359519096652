"""What is known before a model is measured: its traced network, and what every option of every layer costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.export_restriction import with_fused, without_refused
from mpq.limits import Limit, apply_budgets
from mpq.options import SearchSpace
from mpq.plan import weight_format
from mpq.planning import solve_table
from mpq.problem import InfeasibleError
from mpq.routers import without_routers
from mpq.tables import CostTable
from mpq.unit_storage import unit_storage_bits
from mpq.version import VERSION

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from mpq.layers import Network, Units


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
        """The cost table, with columns of estimates beside the costs; operators of attention follow the layers."""
        units, operators = self.network.units(self.granularity), self.space.operators(self.network)
        shape = (len(units) + len(operators), len(self.space.all_options))
        scored = {name: frame[name].to_numpy(float).reshape(shape) for name, frame in scores.items()}
        labels = [*units.labels.tolist(), *(operator.name for operator in operators)]
        whole = {label: index for index, label in enumerate(labels)}  # units that are whole layers
        ties = self.space.tied_layers(self.network) if self.granularity in ("layer", "experts") else ()
        attributes = self.costs.attrs
        costs = _unit_costs(self.costs, self.network, self.space, units, self.granularity)
        return CostTable(
            units=labels if operators else units.labels,
            options=list(map(str, self.space.all_options)),
            quantities=scored | costs,
            measures={name: attributes["measures"][name] for name in costs} | dict.fromkeys(scored, measure),
            aggregates=_of(costs, attributes["aggregates"]),
            alive=_of(costs, attributes["alive"]),
            parameters=np.append(units.parameters, [operator.parameters for operator in operators]).astype(np.int64),
            layers=(*self.network.layers, *operators),
            layer_index=np.append(units.layer_index, len(self.network.layers) + np.arange(len(operators))),
            granularity=self.granularity,
            ties=[group for names in ties if len(group := [whole[name] for name in names if name in whole]) > 1],
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
        try:
            solve_table(flat, budgets, solver=solver)
        except InfeasibleError as error:
            if not self.refused:
                raise
            raise InfeasibleError(f"{error}; {self._refusals()}", error.reachable, error.budgets) from error
        return apply_budgets(flat, budgets)

    def _refusals(self) -> str:
        """In words, which options how many layers cannot take, with the first reason of each."""
        told = dict[str, tuple[int, str]]()
        for (_, option), reason in self.refused.items():
            count, first = told.get(option, (0, reason))
            told[option] = (count + 1, first)
        layers = (f"{option} in {count} layers ({first})" for option, (count, first) in told.items())
        return f"refused: {', '.join(layers)}"


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
    run: dict[str, Any] = {"batch": batch, "phase": phase, "context": context, "bops": bops, "target": target}
    return price_network(network, space, hardware=hardware, granularity=granularity, **run)


def price_network(
    network: Network,
    space: SearchSpace,
    *,
    hardware: Any = None,
    granularity: str = "layer",
    target: str | None = None,
    **run: Any,
) -> Priced:
    """Price every option of a network. Routers of experts are left out but where the space names them alone.

    Args:
        network: the layers.
        space: the options.
        hardware: name, path or `Target`.
        granularity: what takes an option.
        target: library that the plan will be exported to.
        **run: `batch`, `phase`, `context` and `bops`, as for `measure`.

    Raises:
        ValueError: if there is nothing to plan, or a pattern matches nothing.
    """
    ties = space.ties if isinstance(space.ties, tuple) else ()
    network = without_routers(network, [*space.options, *space.pins, *ties])
    network = with_fused(network, target)
    if not network.layers:
        raise ValueError("the model must have a layer to plan (linear, convolution, embedding), found none")
    space.candidates(network)
    if granularity != "layer" and (operators := space.operators(network)):
        raise ValueError(
            f"{operators[0].name!r} is scored by measuring, which takes no {granularity!r}: take granularity 'layer', "
            "or leave operators of attention out of options and pins"
        )
    network.units(granularity)
    costs = _target(hardware).costs(network, space, **run)
    _check_rows(costs, network, space)
    if target is not None:
        costs = without_refused(costs, network, space, target)
    return Priced(network, space, granularity, costs)


def _check_rows(costs: pd.DataFrame, network: Network, space: SearchSpace) -> None:
    planned = (*network.layers, *space.operators(network))
    expected = [(layer.name, str(option)) for layer in planned for option in space.all_options]
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
    shape = (len(network.layers) + len(space.operators(network)), len(space.all_options))
    by_layer = {name: costs[name].to_numpy(float).reshape(shape) for name in costs.columns}
    if granularity == "layer":
        return by_layer
    by_layer = {name: table for name, table in by_layer.items() if name not in costs.attrs["aggregates"]}
    share = (units.parameters / np.array([layer.parameters for layer in network.layers])[units.layer_index])[:, None]
    by_unit = {name: values[units.layer_index] * share for name, values in by_layer.items()}
    index_bits = np.ceil(np.log2(np.isfinite(by_layer["size"]).sum(axis=1).clip(min=1)))
    if granularity == "experts":  # a layer that is one unit is not split: it has no index
        index_bits *= [layer.experts > 1 for layer in network.layers]
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
