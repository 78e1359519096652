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


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_llama(attention, device):
    model = build("Llama", device, **SIZES, num_key_value_heads=2, attn_implementation=attention)
    runs = trace(model, {"input_ids": IDS.to(device)}).attention
    assert [run.name for run in runs] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for run in runs:
        assert (run.heads, run.kv_heads, run.query_positions, run.key_positions) == (4, 2, 5, 5)
        assert (run.head_dim, run.value_dim, run.batch, run.qk_macs, run.pv_macs) == (4, 4, 2, 800, 800)
        assert run.query_layers == (f"{run.name}.q_proj",)
        assert run.key_layers == (f"{run.name}.k_proj",)
        assert run.value_layers == (f"{run.name}.v_proj",)


def test_attention_of_other_families():
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (run,) = trace(build("GPT2", head="LMHeadModel", **sizes), {"input_ids": IDS}).attention
    assert (run.heads, run.kv_heads, run.query_layers) == (2, 2, ("transformer.h.0.attn.c_attn",))
    assert run.query_layers == run.key_layers == run.value_layers
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = build("T5", "cpu", "ForConditionalGeneration", **sizes)
    runs = trace(model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}).attention
    assert [(run.query_positions, run.key_positions) for run in runs] == [(5, 5), (3, 3), (3, 5)]
    assert [run.name.rpartition(".")[2] for run in runs] == ["SelfAttention", "SelfAttention", "EncDecAttention"]
    assert runs[2].key_layers == ("decoder.block.0.layer.1.EncDecAttention.k",)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_peak_of_llama_is_in_its_mlp(attention):
    """The residual stream, gate and up; scores of 5 positions are smaller."""
    model = build("Llama", **SIZES, num_key_value_heads=2, attn_implementation=attention)
    network = trace(model, {"input_ids": IDS})
    tokens = IDS.numel()
    stream, gate_or_up = tokens * 16, tokens * 32
    head = tokens * 50
    assert network.peak_elements() == max(stream * 2 + gate_or_up * 2, stream + head)


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
