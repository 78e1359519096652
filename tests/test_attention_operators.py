"""Attention however it is written: heads, positions, multiply-adds and the layers that feed it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_attention
from torch.utils.flop_counter import FlopCounterMode

from mpq.tracing import trace

DEVICES = ["cpu", "meta"]
BATCH, POSITIONS, MEMORY, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 5, 7, 4, 2, 3, 6


class Attend(nn.Module):
    """Cross-attention of 4 heads of queries to 2 heads of keys and values, which are wider than the keys."""

    def __init__(self, mix, kv_heads=KV_HEADS):
        super().__init__()
        self.mix, self.kv_heads = mix, kv_heads
        self.q, self.k = nn.Linear(8, HEADS * WIDTH), nn.Linear(8, kv_heads * WIDTH)
        self.v, self.o = nn.Linear(8, kv_heads * VALUE_WIDTH), nn.Linear(HEADS * VALUE_WIDTH, 8)

    def forward(self, x, memory):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (layer(memory).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for layer in (self.k, self.v))
        return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))


def softly(scores):
    """What models do between the two products: scale, mask, cast, drop out."""
    mask = torch.zeros(scores.shape[-2:], device=scores.device)
    scores = (scores / math.sqrt(WIDTH) + mask).masked_fill(mask.bool(), -9.0)
    return F.dropout(scores.softmax(-1, dtype=torch.float64).to(scores.dtype), training=False)


def expanded(x):
    batch, heads, *rest = x.shape
    return x[:, :, None].expand(batch, heads, 2, *rest).reshape(batch, 2 * heads, *rest)


def interleaved(x):
    return x.repeat_interleave(2, dim=1)


def with_bias(q, k, v):
    """Scores of content plus scores of position, two products."""
    k, v = expanded(k), expanded(v)
    return softly(q @ k.mT + (q + 1) @ (k * 2).mT) @ v


def with_sinks(q, k, v):
    """One more score a row, which no value answers to."""
    k, v = expanded(k), expanded(v)
    scores = torch.cat([q @ k.mT, torch.zeros(*q.shape[:3], 1, device=q.device)], -1)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def grouped_einsum(q, k, v):
    q = q.unflatten(1, (KV_HEADS, 2))
    weights = torch.einsum("bkgtd,bksd->bkgts", q, k).softmax(-1)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


def flattened(q, k, v):
    """Samples and heads in one axis, as nn.MultiheadAttention has them."""
    q, k, v = (x.flatten(0, 1) for x in (q, expanded(k), expanded(v)))
    weights = torch.softmax(torch.baddbmm(torch.zeros(1, device=q.device), q, k.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, v).unflatten(0, (BATCH, HEADS))


def heads_last(q, k, v):
    """Scores of (batch, queries, keys, heads)."""
    scores = torch.einsum("bhtd,bhsd->btsh", q, expanded(k))
    return torch.einsum("btsh,bhsd->bhtd", scores.softmax(2), expanded(v))


def inferred(q, k, v):
    with torch.inference_mode():
        return imported_attention(q, expanded(k), expanded(v))


MIXES = {
    "kernel": lambda q, k, v: F.scaled_dot_product_attention(q, expanded(k), expanded(v)),
    "kernel, grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "kernel, by keyword": lambda q, k, v: F.scaled_dot_product_attention(
        value=interleaved(v), key=interleaved(k), query=q, attn_mask=q.new_zeros(POSITIONS, MEMORY)
    ),
    "kernel, imported by name": lambda q, k, v: imported_attention(q, expanded(k), expanded(v)),
    "kernel, in inference mode": inferred,
    "scaled first": lambda q, k, v: softly(q @ (expanded(k) * 2).mT) @ (expanded(v) + 1),
    "spelled out": lambda q, k, v: softly(q @ expanded(k).mT) @ expanded(v),
    "interleaved": lambda q, k, v: softly(torch.matmul(q, interleaved(k).transpose(2, 3))) @ interleaved(v),
    "repeated": lambda q, k, v: softly(q @ k.repeat(1, 2, 1, 1).mT) @ v.repeat(1, 2, 1, 1),
    "bias": with_bias,
    "sinks": with_sinks,
    "grouped einsum": grouped_einsum,
    "flattened": flattened,
    "heads last": heads_last,
}


def inputs(device):
    return torch.zeros(BATCH, POSITIONS, 8, device=device), torch.zeros(BATCH, MEMORY, 8, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MIXES)
def test_attention_is_found_however_it_is_written(name, device):
    (run,) = trace(Attend(MIXES[name]).to(device), inputs(device)).attention
    pairs = BATCH * HEADS * POSITIONS * MEMORY
    assert (run.heads, run.kv_heads, run.query_positions, run.key_positions) == (HEADS, KV_HEADS, POSITIONS, MEMORY)
    assert (run.head_dim, run.value_dim, run.batch, run.name) == (WIDTH, VALUE_WIDTH, BATCH, "0")
    assert (run.qk_macs, run.pv_macs) == (pairs * WIDTH * (2 if name == "bias" else 1), pairs * VALUE_WIDTH)
    assert (run.query_layers, run.key_layers, run.value_layers) == (("q",), ("k",), ("v",))
    assert run.cache_elements == BATCH * MEMORY * KV_HEADS * (WIDTH + VALUE_WIDTH)


@pytest.mark.parametrize("name", [name for name in MIXES if "kernel" not in name])
def test_layers_and_attention_are_all_multiply_adds(name):
    model = Attend(MIXES[name])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs("cpu"))
    network = trace(model, inputs("cpu"))
    found = sum(layer.macs for layer in network.layers) + sum(run.qk_macs + run.pv_macs for run in network.attention)
    assert found == counter.get_total_flops() // 2


def test_repeats_through_an_index_go_unnoticed():
    index = torch.tensor([0, 0, 1, 1])
    model = Attend(lambda q, k, v: softly(q @ k[:, index].mT) @ v[:, index])
    (run,) = trace(model, inputs("cpu")).attention
    assert (run.heads, run.kv_heads) == (HEADS, HEADS)


class Block(nn.Module):
    def __init__(self, need_weights=False, **settings):
        super().__init__()
        self.attn, self.need_weights = nn.MultiheadAttention(8, 2, **settings), need_weights

    def forward(self, x, memory):
        return x + self.attn(x, memory, memory, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights, device):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.a, model.b = Block(need_weights, batch_first=True), Block(need_weights, batch_first=True)
    model.forward = lambda x, memory: model.b(y := model.a(x, memory), y)
    first, second = trace(model.to(device), inputs(device)).attention
    assert (first.name, second.name) == ("a.attn", "b.attn")
    assert (first.heads, first.kv_heads, first.query_positions, first.key_positions) == (2, 2, POSITIONS, MEMORY)
    assert (first.head_dim, first.value_dim, first.batch) == (4, 4, BATCH)
    assert first.qk_macs == first.pv_macs == BATCH * 2 * POSITIONS * MEMORY * 4
    assert (second.query_positions, second.key_positions) == (POSITIONS, POSITIONS)
    assert second.query_layers == second.key_layers == second.value_layers == ("b.attn.in_proj_weight",)


def test_one_head_and_positions_without_samples():
    def run(net, x):
        return (net.q(x) @ x.mT).softmax(-1) @ x

    model = nn.Sequential()
    model.q = nn.Linear(8, 8)
    model.forward = lambda x: run(model, x)
    (batched,) = trace(model, torch.zeros(3, 5, 8)).attention
    assert (batched.batch, batched.heads, batched.query_positions, batched.key_layers) == (3, 1, 5, ())
    (single,) = trace(model, torch.zeros(5, 8)).attention
    assert (single.batch, single.heads, single.kv_heads, single.key_positions) == (1, 1, 1, 5)


NO_ATTENTION = {
    "a router": lambda net, x: (net.a(x).softmax(-1) @ x.mT) @ x,
    "no softmax": lambda net, x: (net.a(x) @ x.mT) @ x,
    "a log": lambda net, x: (net.a(x) @ x.mT).log_softmax(-1) @ x,
    "constants": lambda net, x: net.a(x) + (torch.ones(5, 8) @ torch.ones(8, 5)).softmax(-1) @ torch.ones(5, 8),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention(name):
    model = nn.Sequential()
    model.a = nn.Linear(8, 8)
    model.forward = lambda x: NO_ATTENTION[name](model, x)
    assert trace(model, torch.zeros(2, 5, 8)).attention == ()


def test_the_function_is_given_back():
    before = F.scaled_dot_product_attention
    trace(Attend(MIXES["kernel"]), inputs("cpu"))
    with pytest.raises(ValueError, match="cannot run"):
        trace(Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :2, :])), inputs("cpu"))
    assert F.scaled_dot_product_attention is before
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_attention_in_one_kernel_stores_the_same_on_every_device():
    found = [trace(Attend(MIXES["kernel, grouped"]).to(device), inputs(device)).buffers for device in DEVICES]
    assert found[0] == found[1]
    assert all(buffer.elements != BATCH * HEADS * POSITIONS * MEMORY for buffer in found[0])
