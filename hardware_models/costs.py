"""From a target, a network and a search space to the labelled table of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .attention_units import with_operators
from .cells import Cells
from .conversion import conversions
from .prices import Prices, Table
from .pricing import estimates_behind, price

if TYPE_CHECKING:
    import pandas as pd

    from mpq.layers import Network
    from mpq.options import Option, SearchSpace

    from .target import Target

Mask = NDArray[np.bool_]  # (layers, options)

MEASURES = {"latency": "s", "energy": "J", "activation_peak": "B"}


def costs_frame(
    target: Target,
    network: Network,
    space: SearchSpace,
    *,
    batch: int = 1,
    phase: str | None = None,
    context: int | None = None,
    bops: str = "hawq",
) -> pd.DataFrame:
    """The table that `Target.costs` returns; see there."""
    import pandas as pd

    candidates, options = space.candidates(network), space.all_options
    cells = Cells.of(network, options, batch=batch, phase=phase, context=context, bops=bops)
    prices = with_operators(price(target, cells), cells, space.operators(network))
    is_candidate = _candidate_mask(candidates, options)
    shape = (len(candidates), len(options) + 1)
    refused = np.zeros(shape, dtype=bool) if prices.reasons is None else prices.reasons.astype(bool)
    allowed = is_candidate & ~refused[:, :-1]
    columns = {name: np.where(allowed, table[:, :-1], np.nan) for name, table in prices.tables.items()}

    layers, labels = list(candidates), [option.label for option in options]
    frame = pd.DataFrame(
        {name: table.ravel() for name, table in columns.items()},
        index=pd.MultiIndex.from_product([layers, labels], names=["layer", "option"]),
    )
    used = np.column_stack([allowed, ~refused[:, -1]])
    estimates = estimates_behind(prices, used)
    frame.attrs |= {
        "measures": {name: {**MEASURES, **prices.measures}[name] for name in columns},
        "aggregates": dict(prices.aggregates),
        "alive": dict(prices.alive),
        "offsets": dict(prices.offsets),
        "limits": target.limits,
        "transitions": {n: c for n, c in conversions(target.conversions, cells).items() if n in columns},
        "estimates": tuple(estimates),
        "refused": _refused(target, prices, is_candidate, frame.index),
        "provenance": _provenance(target, cells, prices, estimates),
    }
    frame.attrs["reference"], frame.attrs["reference_meaning"] = _reference(target, cells, prices, columns)
    return frame


_NO_CANDIDATE = "not among the layer's options"


def _refused(target: Target, prices: Prices, is_candidate: Mask, index: pd.Index[Any]) -> dict[tuple[str, str], str]:
    """Why each cell that cannot be chosen cannot; one text for all cells of one reason."""
    phrases = np.zeros(is_candidate.shape, dtype=object) if prices.reasons is None else prices.reasons[:, :-1]
    cells = np.flatnonzero(~is_candidate | phrases.astype(bool))
    why = np.where(is_candidate, phrases, _NO_CANDIDATE).ravel()[cells].tolist()
    texts = {phrase: f"{target.name} ({target.runtime}) {phrase}" for phrase in set(why)}
    texts[_NO_CANDIDATE] = _NO_CANDIDATE
    return {cell: texts[phrase] for cell, phrase in zip(index[cells].tolist(), why, strict=True)}


def _candidate_mask(candidates: Mapping[str, Sequence[Option]], options: Sequence[Option]) -> Mask:
    masks: dict[int, list[bool]] = {}  # layers share their tuples of candidates, and hashing an option is slow
    for own in candidates.values():
        if id(own) not in masks:
            masks[id(own)] = [option in own for option in options]
    return np.array([masks[id(own)] for own in candidates.values()], dtype=bool).reshape(-1, len(options))


def _reference(
    target: Target, cells: Cells, prices: Prices, columns: Mapping[str, Table]
) -> tuple[dict[str, float], dict[str, str]]:
    reference, meaning = {}, {}
    dtype = cells.network.dtype
    for name, table in prices.tables.items():
        value, what = _total(prices, name, table[:, -1]), f"the model as it stands, in {dtype}"
        if name == "size":
            value = float(cells.network.total_bytes)
        elif np.isnan(value):
            dearest = np.where(np.isnan(columns[name]), -np.inf, columns[name]).max(axis=1, initial=-np.inf)
            value = _total(prices, name, dearest)
            what = f"the dearest allowed option of every layer: {target.name} cannot run the model in {dtype}"
        if np.isfinite(value):
            reference[name], meaning[name] = value, what
    return reference, meaning


def _total(prices: Prices, name: str, per_layer: NDArray[np.float64]) -> float:
    """One number a layer added up as the quantity's aggregate says, offsets included."""
    how, offset = prices.aggregates.get(name, "sum"), prices.offsets.get(name, 0.0)
    if how == "sum":
        return float(per_layer.sum()) + offset
    if how == "max":
        return float(per_layer.max(initial=0.0)) + offset
    step, layer, factor = prices.alive[name].T
    held = np.bincount(step.astype(np.int64), weights=factor * per_layer[layer.astype(np.int64)])
    return float(held.max(initial=0.0)) + offset


def _provenance(
    target: Target, cells: Cells, prices: Prices, estimates: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    return {
        "target": target.name,
        "runtime": target.runtime,
        "batch": cells.batch,
        "phase": cells.phase,
        "context": cells.context,
        "sources": {source.id: f"{source.title} [{source.kind}]" for source in target.sources},
        "estimates": {column: list(names) for column, names in estimates.items()},
        "notes": dict(prices.notes),
    }
