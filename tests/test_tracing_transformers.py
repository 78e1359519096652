"""Tiny models of the transformers library: what their layers, ties and multiply-adds must be."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mpq.tracing import trace

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(10).reshape(2, 5)


def build(family, device="cpu", head="ForCausalLM", **settings):
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device(device):
        return getattr(transformers, f"{family}{head}")(config).eval()


def linear_macs(model, **inputs):
    """Multiply-adds of matrix products outside attention, by PyTorch's flop counter with attention in one kernel."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return (
        sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)) // 2
    )


def last_names(groups):
    return [[name.rpartition(".")[2] for name in group] for group in groups]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama(attention, device):
    model = build("Llama", device, **SIZES, num_key_value_heads=2, attn_implementation=attention)
    network = trace(model, {"input_ids": IDS.to(device)})
    block = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    block += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in block]
    assert [layer.name for layer in network.layers] == ["model.embed_tokens", *names, "lm_head"]
    assert (
        last_names(network.siblings)
        == [
            ["q_proj", "k_proj", "v_proj"],
            ["gate_proj", "up_proj"],
        ]
        * 2
    )
    assert network.skipped == {}
    assert ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj") in network.edges
    assert ("model.embed_tokens", "lm_head") in network.edges
    if (attention, device) == ("sdpa", "cpu"):
        assert sum(layer.macs for layer in network.layers) == linear_macs(model, input_ids=IDS)


def test_llama_with_a_tied_head_and_labels():
    model = build("Llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    embedding = trace(model, {"input_ids": IDS, "labels": IDS})["model.embed_tokens"]
    assert (embedding.aliases, embedding.macs, embedding.calls) == (("lm_head.weight",), 10 * 50 * 16, 2)


def test_llama_keeps_no_hooks_of_its_own_either():
    model = build("Llama", **SIZES, num_key_value_heads=2)
    trace(model, {"input_ids": IDS, "output_hidden_states": True})
    assert all(not module._forward_hooks for module in model.modules())
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention):
    model = build("Bert", head="Model", **SIZES, attn_implementation=attention)
    network = trace(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    path = "encoder.layer.{}.attention.self.{}"
    assert network.siblings == tuple(
        tuple(path.format(i, name) for name in ("query", "key", "value")) for i in range(2)
    )
    assert [layer.kind for layer in network.layers[:4]] == ["embedding"] * 3 + ["linear"]


def test_gpt2():
    model = build("GPT2", head="LMHeadModel", vocab_size=50, n_embd=16, n_layer=2, n_head=2)
    network = trace(model, {"input_ids": IDS})
    layer = network["transformer.h.0.attn.c_attn"]
    assert (layer.kind, layer.weight_shape, layer.channel_axis) == ("linear", (48, 16), 1)
    assert network["transformer.wte"].aliases == ("lm_head.weight",)
    assert network.siblings == ()
    assert sum(layer.macs for layer in network.layers) == linear_macs(model, input_ids=IDS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_mixtral(experts, device):
    if (experts, device) == ("eager", "meta"):
        pytest.skip("which token goes where depends on values, and the meta device has none")
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    model = build("Mixtral", device, **SIZES, **settings, experts_implementation=experts)
    network = trace(model, {"input_ids": IDS.to(device)})
    path = "model.layers.0.mlp."
    router, joined, down = (
        network[path + name] for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    assert (router.kind, router.module, router.macs) == ("linear", None, 10 * 64)
    assert (joined.kind, joined.weight_shape, joined.channel_axis, joined.experts) == ("experts", (256, 16), 1, 4)
    assert (joined.macs, down.macs) == (20 * 16 * 64, 20 * 32 * 16)
    assert joined.calls == down.calls == 1
    assert joined.matmul() == (5, 16, 64, 4)
    assert last_names(network.siblings) == [["q_proj", "k_proj", "v_proj"]] * 2
    assert (joined.name, down.name) in network.edges


def test_t5_ties_keys_and_values_of_the_encoder():
    model = build(
        *("T5", "cpu", "ForConditionalGeneration"),
        **{"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4},
    )
    network = trace(model, {"input_ids": IDS, "decoder_input_ids": IDS})
    assert last_names(network.siblings) == [
        ["q", "k", "v"],
        ["q", "k", "v"],
        ["k", "v"],
    ]
