"""From a target, a network and a search space to the labelled table of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .pricing import REFUSED, Pricing, Table

if TYPE_CHECKING:
    import pandas as pd

    from mpq.layers import Network
    from mpq.options import Option, SearchSpace

    from .target import Target

Mask = NDArray[np.bool_]  # (layers, options)

MEASURES = {"size": "B", "value_size": "B", "bops": "bops", "latency": "s", "energy": "J"}


def costs_frame(
    target: Target,
    network: Network,
    space: SearchSpace,
    *,
    batch: int = 1,
    phase: str | None = None,
    context: int | None = None,
) -> pd.DataFrame:
    """The table that `Target.costs` returns; see there."""
    import pandas as pd

    if context is not None:
        raise ValueError(
            f"context must be None, got {context!r}: attention over a cache holds no weights and is not priced; "
            "for longer inputs, trace with them"
        )
    candidates = space.candidates(network)
    options = space.all_options
    pricing = Pricing.of(target, network, options, batch, phase)
    is_candidate = _candidate_mask(candidates, options)
    allowed = is_candidate & (pricing.row[:, :-1] != REFUSED)
    columns = {name: np.where(allowed, table[:, :-1], np.nan) for name, table in pricing.tables.items()}

    layers, labels = list(candidates), [option.label for option in options]
    frame = pd.DataFrame(
        {name: table.ravel() for name, table in columns.items()},
        index=pd.MultiIndex.from_product([layers, labels], names=["layer", "option"]),
    )
    reference, meaning = _reference(pricing, columns)
    unquantised = pricing.row[:, -1]
    estimates = pricing.estimates(np.concatenate([pricing.row[:, :-1][allowed], unquantised]))
    frame.attrs |= {
        "measures": {name: MEASURES[name] for name in columns},
        "reference": reference,
        "reference_meaning": meaning,
        "offsets": {"size": float(network.outside_bytes)},
        "estimates": tuple(estimates),
        "refused": {
            (layers[i], labels[j]): pricing.reason(i, j) if is_candidate[i, j] else "not among the layer's options"
            for i, j in np.argwhere(~allowed).tolist()
        },
        "provenance": _provenance(target, batch, phase, estimates),
    }
    return frame


def _candidate_mask(candidates: Mapping[str, Sequence[Option]], options: Sequence[Option]) -> Mask:
    masks: dict[int, list[bool]] = {}  # layers share their tuples of candidates, and hashing an option is slow
    for own in candidates.values():
        if id(own) not in masks:
            masks[id(own)] = [option in own for option in options]
    return np.array([masks[id(own)] for own in candidates.values()], dtype=bool).reshape(-1, len(options))


def _reference(pricing: Pricing, columns: Mapping[str, Table]) -> tuple[dict[str, float], dict[str, str]]:
    reference, meaning = {}, {}
    dtype = pricing.network.dtype
    for name, table in pricing.tables.items():
        value, what = float(table[:, -1].sum()), f"the model as it stands, in {dtype}"
        if name == "size":
            value = float(pricing.network.total_bytes)
        elif np.isnan(value):
            value = float(np.where(np.isnan(columns[name]), -np.inf, columns[name]).max(axis=1, initial=-np.inf).sum())
            what = f"the dearest allowed option of every layer: {pricing.target.name} cannot run the model in {dtype}"
        if np.isfinite(value):
            reference[name], meaning[name] = value, what
    return reference, meaning


def _provenance(
    target: Target, batch: int, phase: str | None, estimates: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    return {
        "target": target.name,
        "runtime": target.runtime,
        "batch": batch,
        "phase": phase,
        "sources": {source.id: f"{source.title} [{source.kind}]" for source in target.sources},
        "estimates": {column: list(names) for column, names in estimates.items()},
    }
