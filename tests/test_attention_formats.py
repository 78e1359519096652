"""Quantised attention against the formula written out, with every argument the kernel takes."""

import pytest
import torch
from small_models import decoder, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.attention_formats import AttentionChoice, quantised_attention
from mpq.fake_quantize import fake_quantize
from mpq.options import Option
from mpq.plan import Entry, Plan

MASK = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
MASK[:, 0] = True


def operands(heads=4, kv_heads=4):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 6)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": MASK.float().log()},
        {"scale": 0.1},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_formats_without_loss_are_the_kernel(settings):
    q, k, v = operands(kv_heads=2 if "enable_gqa" in settings else 4)
    exact = functional.scaled_dot_product_attention(q, k, v, **settings)
    lossless = AttentionChoice(scores="-/fp32", mixing="-/fp32", cache="-/fp32")
    with quantised_attention(nn.Module(), {"*": lossless}):
        found = functional.scaled_dot_product_attention(q, k, v, **settings)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def by_loops(q, k, v, choice):
    """Head by head, with operands quantised by hand: int8 a tensor in the products, int4 a token in the cache."""
    q8 = q if "scores" not in choice else fake_quantize(q, "int8@tensor")
    stored = [
        x if "cache" not in choice else torch.stack([fake_quantize(x[b], "int4@token") for b in range(2)])
        for x in (k, v)
    ]
    k8 = stored[0] if "scores" not in choice else fake_quantize(stored[0], "int8@tensor")
    v8 = stored[1] if "mixing" not in choice else fake_quantize(stored[1], "int8@tensor")
    p = torch.empty(2, 4, 5, 7)
    for b in range(2):
        for h in range(4):
            p[b, h] = (q8[b, h] @ k8[b, h].T / 8**0.5).softmax(-1)
    if "probabilities" in choice:
        p = fake_quantize(p, "ulog3@tensor")
    elif "mixing" in choice:
        p = fake_quantize(p, "int8@tensor")
    return torch.einsum("bhqk,bhkd->bhqd", p, v8)


CHOICE = {"scores": "-/int8", "mixing": "-/int8", "cache": "-/int4@token", "probabilities": "ulog3"}


@pytest.mark.parametrize("names", [["scores"], ["mixing"], ["cache"], ["probabilities"], list(CHOICE)], ids=str)
def test_each_operator_is_quantised_on_its_own(names):
    q, k, v = operands()
    choice = {name: CHOICE[name] for name in names}
    with quantised_attention(nn.Module(), {"*": AttentionChoice(**choice)}):
        found = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, by_loops(q, k, v, choice), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, functional.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_keys_a_channel():
    q, k, v = operands()
    with quantised_attention(nn.Module(), {"*": AttentionChoice(cache="-/int2@channel")}):
        found = functional.scaled_dot_product_attention(q, k, v)
    k2, v2 = (torch.stack([fake_quantize(x[..., c], "int2@tensor") for c in range(x.shape[-1])], -1) for x in (k, v))
    torch.testing.assert_close(found, functional.scaled_dot_product_attention(q, k2, v2), rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        return self.b(*[self.a(x, x, x, need_weights=False)[0]] * 3, need_weights=False)[0]


def test_patterns_choose_modules_by_the_names_of_the_trace():
    model, x = Two().train(), torch.randn(2, 5, 8)  # in training, the module has no fused kernel
    names = [run.name for run in mpq.trace(model, x).attention]
    assert names == ["a", "b"]
    seen = {}
    for pattern in ("a", "b", "*"):
        with quantised_attention(model, {pattern: AttentionChoice(scores="-/int2")}), torch.no_grad():
            seen[pattern] = model(x)
    with torch.no_grad():
        exact = model(x)
    assert all(not torch.allclose(one, exact) for one in seen.values())
    assert not torch.allclose(seen["a"], seen["b"])
    with quantised_attention(model, {"b": AttentionChoice(), "*": AttentionChoice(scores="-/int2")}), torch.no_grad():
        torch.testing.assert_close(model(x), seen["a"])


def test_beside_a_quantised_plan_and_gone_after_an_error():
    model, batch = decoder(), tokens()[0]
    network = mpq.trace(model, batch)
    plan = Plan(tuple(Entry(layer, Option.parse("int4/int8")) for layer in network.layers), network.fingerprint)
    kernel = functional.scaled_dot_product_attention
    with torch.no_grad(), mpq.quantized(model, plan):
        weights_alone = model(**batch)["logits"]
        with quantised_attention(model, {"*": AttentionChoice(scores="-/int3", probabilities="ulogsqrt3")}):
            both = model(**batch)["logits"]
        assert torch.equal(weights_alone, model(**batch)["logits"])
    assert not torch.equal(weights_alone, both)
    with pytest.raises(RuntimeError), quantised_attention(model, {"*": AttentionChoice()}):
        model(torch.zeros(2, 2))
    assert functional.scaled_dot_product_attention is kernel


def test_errors():
    with pytest.raises(ValueError, match="scores must be an option without weight, such as -/int8, got int8"):
        AttentionChoice(scores="int8")
    q, k, v = operands()
    with (
        pytest.raises(ValueError, match="pattern 'attn' matched no attention that ran"),
        quantised_attention(nn.Module(), {"attn": AttentionChoice(scores="-/int2")}),
    ):
        functional.scaled_dot_product_attention(q, k, v)
