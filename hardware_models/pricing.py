"""Every quantity of every cell on a target: sizes and bit operations, then what its families say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .activation_peak import activation_peak
from .bops import bit_operations
from .cells import Cells
from .prices import Mask, Prices
from .size import value_bytes

if TYPE_CHECKING:
    from .target import Target


def price(target: Target, cells: Cells) -> Prices:
    """Price cells on a target; refused cells are NaN in the quantities of the family that refuses them."""
    prices = storage_prices(cells) + activation_peak(cells)
    for model in target.models:
        prices += _calibrated(target, model.price(cells, prices))  # before what is priced from latencies: energy
    return prices


def storage_prices(cells: Cells) -> Prices:
    """What needs no hardware: size, value_size and bops (a sample)."""
    macs, bits = cells.work.macs / cells.batch, (cells.weight_bits, cells.activation_bits)
    return Prices(
        tables={
            "size": cells.weight_bytes,
            "value_size": value_bytes(cells.network.layers, cells.weights),
            "bops": bit_operations(macs, *bits, convention=cells.bops, reduction=cells.work.k),
        },
        measures={"size": "B", "value_size": "B", "bops": "bops"},
        offsets={"size": float(cells.network.outside_bytes)},
        notes={"bops": f"convention of {cells.bops}"},
    )


def estimates_behind(prices: Prices, used: Mask) -> dict[str, tuple[str, ...]]:
    """The estimated numbers behind each quantity that rests on any, given the cells in use."""
    found = {}
    for name, numbers in prices.rests_on(used).items():
        guessed = {(number.where, number.key) for number in numbers if number.is_estimate}
        if guessed and name in prices.tables:
            found[name] = tuple(f"{where}: {key}" for where, key in sorted(guessed))
    return found


def _calibrated(target: Target, prices: Prices) -> Prices:
    if target.calibration is None or "latency" not in prices.tables:
        return prices
    alpha, beta = target.calibration.get("alpha", 1.0), target.calibration.get("beta_s", 0.0)
    tables: Mapping[str, np.ndarray] = {**prices.tables, "latency": alpha * prices.tables["latency"]}
    offset = alpha * prices.offsets.get("latency", 0.0) + beta
    attention = {name: alpha * table if name == "latency" else table for name, table in prices.attention.items()}
    offsets = {**prices.offsets, "latency": offset} if offset else prices.offsets
    return replace(prices, tables=tables, offsets=offsets, attention=attention)
