"""Llama-3-70B and Mixtral-8x7B by their public shapes, on the meta device: a cost table without a weight in memory."""

import time
import tracemalloc

import numpy as np
import pytest
import torch

import mpq.hardware_models as hardware
from mpq.options import SearchSpace
from mpq.tracing import trace

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

# config.json of meta-llama/Meta-Llama-3-70B and of mistralai/Mixtral-8x7B-v0.1
LLAMA = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SIZES = {"Llama": LLAMA, "Mixtral": MIXTRAL}
WEIGHTS = {"Llama": 70.6e9, "Mixtral": 46.7e9}
OPTIONS = [
    "int2@group64", "int3@group64", "int4@group128", "nf4@group64", "mxfp4", "nvfp4", "int6", "int8",
    "fp8_e4m3", "int4/int8", "int8/int8", "fp8_e4m3/fp8_e4m3",
]  # fmt: skip
DEVICES = ["nvidia-t4", "nvidia-a100", "nvidia-h100", "nvidia-rtx4090", "nvidia-b200"]


@pytest.fixture(scope="module", params=[pytest.param("Llama", marks=pytest.mark.slow), "Mixtral"])
def traced(request):
    """The family and its network on one sample of 64 tokens, in bf16."""
    family = request.param
    extra = {"experts_implementation": "grouped_mm"} if family == "Mixtral" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES[family], **extra)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).eval()
    return family, trace(model, {"input_ids": torch.zeros(1, 64, dtype=torch.long, device="meta")})


def tables(network, **settings):
    space = SearchSpace(OPTIONS)
    return {name: hardware.load(name).costs(network, space, **settings) for name in DEVICES}


def test_whole_table_takes_seconds_and_little_memory(traced):
    family, network = traced
    assert sum(layer.parameters for layer in network.layers) == pytest.approx(WEIGHTS[family], rel=0.01)
    tracemalloc.start()
    before = time.process_time()
    priced = tables(network, phase="decode", context=8192)
    seconds, (_, peak) = time.process_time() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(frame.shape[0] == len(network.layers) * len(OPTIONS) for frame in priced.values())
    assert seconds < 10
    assert peak < 1e9
    for frame in priced.values():
        assert {option for _, option in frame["latency"].dropna().index} >= {"int4@group128", "int8/int8"}


def test_batch_one_decoding_takes_as_long_as_reading_what_a_token_needs(traced):
    family, network = traced
    active = 12.9e9 if family == "Mixtral" else 70.6e9  # Mixtral's own figure: two of eight experts, and the rest
    frame = hardware.load("nvidia-h100").costs(network, SearchSpace(["bf16"]), phase="decode", context=1024)
    read = frame["latency"].sum() - 3e-6 * sum(layer.kind != "embedding" for layer in network.layers)
    vocabulary = 2 * SIZES[family]["vocab_size"] * SIZES[family]["hidden_size"]  # the lookup reads one row of it
    assert read == pytest.approx((2 * active - vocabulary) / (0.8 * 3.35e12), rel=0.02)


def test_cache_and_attention_are_those_of_the_configuration(traced):
    family, network = traced
    sizes = SIZES[family]
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    cache = 2 * 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * width * 8192 * 4  # bf16, 4 samples
    attrs = (
        hardware.load("nvidia-h100").costs(network, SearchSpace(["int8"]), batch=4, phase="decode", context=8192).attrs
    )
    assert attrs["provenance"]["notes"]["kv_cache"].startswith(f"{cache} bytes")
    floor = cache / (0.8 * 3.35e12)
    overhead = 3e-6 * sizes["num_hidden_layers"]
    assert attrs["offsets"]["latency"] == pytest.approx(floor + overhead, rel=0.02)


def test_a_larger_batch_reads_more_experts_until_all_are_read():
    config = transformers.MixtralConfig(**{**MIXTRAL, "num_hidden_layers": 1}, experts_implementation="grouped_mm")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16).eval()
    network = trace(model, {"input_ids": torch.zeros(1, 64, dtype=torch.long, device="meta")})
    stacks = [layer.name for layer in network.layers if layer.kind == "experts"]
    assert len(stacks) == 2
    seconds = []
    for batch in (1, 4, 16, 64):
        frame = hardware.load("nvidia-h100").costs(network, SearchSpace(["bf16"]), batch=batch, phase="decode")
        seconds.append(frame["latency"].unstack().loc[stacks].to_numpy().sum())
    growth = np.array(seconds[1:]) / seconds[:-1]
    assert (growth > 1).all()
    assert growth[0] > 2 > 1.2 > growth[2]
