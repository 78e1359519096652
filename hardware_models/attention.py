"""Attention: the products without weights, q.k and p.v, and the keys and values they read. Not planned: an offset.

    prefill   macs as traced           elements = B (h L_q + h_kv L_k) (d + d_v)    queries and outputs, keys and values
    decode    macs = B h C (d + d_v)   elements = B (h + h_kv (C + 1)) (d + d_v)    one query, C cached, one new
    t = max(2 macs / (e_c * peak), elements * b / 8 / (e_m * bandwidth)) + launch

a run, with h heads of queries, h_kv of keys and values, widths d and d_v, batch B, context C and b bits of the model's
dtype; the traffic of a decoding step is LLM-Viewer's (model_analyzer.py). Scores stay on the chip, as in fused kernels:
a runtime that writes them moves B h L_q L_k elements more. A causal mask saves no multiply-adds here; kernels that skip
the masked half take as little as half the time in long prefills. The softmax is not counted. Cross-attention is given
the context as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpq.attention import Attention

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
