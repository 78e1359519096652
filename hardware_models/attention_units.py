"""Attention's operators as rows of the table of costs: what a search that plans them decides about.

    cache     cache = bits of the stored keys and values / 8, scales included; latency, energy: of the run that reads it
    scores    bops = macs of q.k in the convention of the layers, both inputs in the option's format
    mixing    bops = macs of p.v likewise

Everything else is 0, what the softmax's output takes as well: operators have no weights, and their activations stay on
the chip. A run's latency and energy depend on its cache's format where a family prices a decoding step
(`Prices.attention`): there they move from the offset to the cache's row. Faster products in narrow formats are not
priced, nor is there a check that the target has a kernel for a format: device files do not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpq.attention_operators import runs_of
from mpq.layers import Layer

from .attention import attention_work, cache_bits
from .bops import bit_operations
from .cells import Cells
from .prices import Prices, Table


def with_operators(prices: Prices, cells: Cells, operators: Sequence[Layer]) -> Prices:
    """Prices of layers with a row more for each planned operator, and the cache [B] where one of them is a cache.

    The offset of the cache are keys and values of runs that are not planned.

    Example:
        >>> from mpq.attention import Attention
        >>> from mpq.attention_operators import attention_operators
        >>> from mpq.layers import Network
        >>> from mpq.options import Option
        >>> run = Attention("attn", 4, 2, 10, 10, 16, 16, qk_macs=6400, pv_macs=6400, is_replaceable=True)
        >>> network, options = Network((), attention=(run,)), [Option(None, "int8@token"), Option(None, "fp16")]
        >>> with_operators(Prices(), Cells.of(network, options), attention_operators(network)[2:3]).tables["cache"]
        array([[ 720., 1280., 2560.]])
    """
    if not operators:
        return prices
    layers, columns = cells.shape
    tables = {name: np.vstack([table, np.zeros((len(operators), columns))]) for name, table in prices.tables.items()}
    offsets, measures = dict(prices.offsets), dict(prices.measures)
    if any(operator.kind == "cache" for operator in operators):
        each = cache_bits(cells) / 8
        tables["cache"], measures["cache"] = np.zeros((layers + len(operators), columns)), "B"
        offsets["cache"] = float(each[:, -1].sum())
    for row, operator in enumerate(operators, layers):
        runs = runs_of(operator, cells.network)
        if operator.kind != "cache":
            if "bops" in tables and operator.kind != "softmax":
                tables["bops"][row] = _bops(operator, cells, runs)
            continue
        for name, table in {**prices.attention, "cache": each}.items():
            tables[name][row] = table[runs].sum(axis=0)
            offsets[name] = max(offsets.get(name, 0.0) - tables[name][row, -1], 0.0)
    reasons = prices.reasons
    if reasons is not None:
        reasons = np.vstack([reasons, np.full((len(operators), columns), "", dtype=object)])
    return replace(
        prices,
        tables=tables,
        measures=measures,
        offsets=offsets,
        reasons=reasons,
        rests_on=lambda used: prices.rests_on(used[:layers]),
    )


def _bops(operator: Layer, cells: Cells, runs: Sequence[int]) -> Table:
    """(columns,): bit operations a sample of one product, all runs of its module."""
    found = np.zeros(len(cells.activations))
    for at, work in enumerate(attention_work(cells)):
        if at in runs:
            run = cells.network.attention[at]
            is_scores = operator.kind == "scores"
            share, summed = (run.qk_macs, run.head_dim) if is_scores else (run.pv_macs, run.key_positions)
            macs = work.macs * share / (run.qk_macs + run.pv_macs) / cells.batch
            bits = cells.activation_bits, cells.activation_bits
            reduction = np.array([summed], dtype=np.float64)
            found += bit_operations(np.array([macs]), *bits, convention=cells.bops, reduction=reduction)[0]
    return found
