"""A search for one library: options that it cannot hold are taken away before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mpq.export_compressed_tensors import fused_by_compressed_tensors
from mpq.exporting import refusal
from mpq.options import merged

if TYPE_CHECKING:
    import pandas as pd

    from mpq.layers import Network
    from mpq.options import SearchSpace


def with_fused(network: Network, target: str | None) -> Network:
    """The network with siblings that a library wants in one format: for vLLM, the experts of a block."""
    if target != "compressed-tensors":
        return network
    groups = [*map(list, network.siblings), *map(list, fused_by_compressed_tensors(network))]
    return replace(network, siblings=merged(groups, [layer.name for layer in network.layers]))


def without_refused(costs: pd.DataFrame, network: Network, space: SearchSpace, target: str) -> pd.DataFrame:
    """Costs in which every option that a library cannot hold is refused, with the reason.

    Args:
        costs: of `Target.costs`.
        network: the traced model.
        space: the options.
        target: a name of `mpq.exporting.targets`.

    Raises:
        ValueError: if the target is unknown, or a layer is left without an option: it names the layer and the reasons.
    """
    refused = dict(costs.attrs["refused"])
    planned = {layer.name: layer for layer in (*network.layers, *space.operators(network))}
    for name, options in space.candidates(network).items():
        reasons = {str(option): refusal(target, planned[name], option) for option in options}
        for label, reason in reasons.items():
            if reason is not None:
                refused.setdefault((name, label), f"{target}: {reason}")
        if all(reasons.values()):
            told = "; ".join(f"{label}: {reason}" for label, reason in reasons.items())
            raise ValueError(
                f"{target} can hold no option of {name!r} ({told}): widen its options, or pin it to one that it can"
            )
    kept = costs.copy()
    rows = [key for key in refused if key in kept.index]
    kept.loc[rows] = np.nan
    kept.attrs = {**costs.attrs, "refused": refused, "target": target}
    return kept
