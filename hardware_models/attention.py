"""Attention: the products without weights, q.k and p.v, and the keys and values they read: an offset.

    prefill   macs as traced           elements = B (h L_q + h_kv L_k) (d + d_v)    queries and outputs, keys and values
    decode    macs = B h C (d + d_v)   elements = B (h + h_kv (C + 1)) (d + d_v)    one query, C cached, one new
    t = max(2 macs / (e_c * peak), elements * b / 8 / (e_m * bandwidth)) + launch

a run, with h heads of queries, h_kv of keys and values, widths d and d_v, batch B, context C and b bits of the model's
dtype; the traffic of a decoding step is LLM-Viewer's (model_analyzer.py). Scores stay on the chip, as in fused kernels:
a runtime that writes them moves B h L_q L_k elements more. A causal mask saves no multiply-adds here; kernels that skip
the masked half take as little as half the time in long prefills. The softmax is not counted. Cross-attention is given
the context as well.

Where a search plans the cache (``*:cache``), a decoding step moves its C positions in their own format, scales
included, and all else in the model's dtype; multiply-adds stay those of the dtype, and unpacking is free. In other
phases keys and values are read as they were computed, whatever is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.attention import Attention
from mpq.formats import NumberFormat

from .cells import Cells


@dataclass(frozen=True)
class AttentionWork:
    """What one run of attention asks for, for the whole batch: multiply-adds, elements moved, elements of its cache."""

    macs: float
    elements: float
    cache: float


def attention_work(cells: Cells) -> list[AttentionWork]:
    """Every run of attention of the network, at the batch, phase and context of the cells.

    Example:
        >>> from mpq.layers import Network
        >>> traced = Attention("attn", 4, 2, 10, 10, 16, 16, qk_macs=6400, pv_macs=6400)
        >>> network = Network((), attention=(traced,))
        >>> attention_work(Cells(network, (None,), (None,)))
        [AttentionWork(macs=12800.0, elements=1920.0, cache=640.0)]
        >>> attention_work(Cells(network, (None,), (None,), batch=2, phase="decode", context=100))
        [AttentionWork(macs=25600.0, elements=13184.0, cache=12800.0)]
    """
    return [_work(run, cells) for run in cells.network.attention]


def cache_bytes(runs: Iterable[AttentionWork], bits: float) -> float:
    """Bytes of all keys and values in the cache."""
    return sum(run.cache for run in runs) * bits / 8


def cache_bits(cells: Cells) -> NDArray[np.float64]:
    """(runs, columns): bits of each run's keys and values in each column's activation format, scales included.

    Keys and values are a tensor each, (samples, heads, positions, width), with the scales that the simulation gives it
    (`mpq.attention_formats`): one, one a token and head, one a channel of the width, or one a group along it.

    Example:
        >>> from mpq.layers import Network
        >>> from mpq.options import Option
        >>> run = Attention("attn", 4, 2, 10, 10, 16, 16, qk_macs=6400, pv_macs=6400)
        >>> cells = Cells.of(Network((), attention=(run,)), [Option(None, "int8"), Option(None, "int4@token")])
        >>> cache_bits(cells)  # 640 numbers of 8 bits and 2 scales of 16; of 4 bits and 40 scales; fp32
        array([[ 5152.,  3200., 20480.]])
    """
    works = attention_work(cells)
    found = [[_stored(run, work, fmt, cells) for fmt in cells.activations]
             for run, work in zip(cells.network.attention, works, strict=True)]  # fmt: skip
    return np.array(found, dtype=np.float64).reshape(len(works), len(cells.activations))


def moved_bits(cells: Cells) -> NDArray[np.float64]:
    """(runs, columns): bits each run moves with its cache in each column's activation format, in "decode" alone."""
    works = attention_work(cells)
    rest = np.array([work.elements - work.cache for work in works]) * cells.dtype.bits
    moved: NDArray[np.float64] = rest[:, None] + cache_bits(cells)
    return moved


def _stored(run: Attention, work: AttentionWork, fmt: NumberFormat | None, cells: Cells) -> float:
    if fmt is None:
        return work.cache * cells.dtype.bits
    rows = round(work.cache / (run.head_dim + run.value_dim))
    by_channel = fmt.granularity is not None and fmt.granularity.kind == "channel"
    shapes = [(width, rows) if by_channel else (rows, width) for width in (run.head_dim, run.value_dim)]
    return float(sum(fmt.storage_bits(shape) for shape in shapes))


def _work(run: Attention, cells: Cells) -> AttentionWork:
    samples = run.batch * cells.batch / cells.network.batch
    width = run.head_dim + run.value_dim
    if cells.phase != "decode":
        cached = samples * run.kv_heads * run.key_positions * width
        queries = samples * run.heads * run.query_positions * width
        macs = (run.qk_macs + run.pv_macs) * cells.batch / cells.network.batch
        return AttentionWork(macs, queries + cached, cached)
    positions = run.key_positions if cells.context is None else cells.context
    cached = samples * run.kv_heads * positions * width
    queries, new = samples * run.heads * width, samples * run.kv_heads * width
    return AttentionWork(samples * run.heads * positions * width, queries + cached + new, cached)
