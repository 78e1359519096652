"""Decoding: one position a sample, attention over a cache, and stacks of experts of which few are read."""

import itertools
import tomllib
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq.hardware_models as hardware
from mpq.attention import Attention
from mpq.hardware_models.attention import attention_work
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.workload import experts_used, work_of
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace

GPUS = [name for name in hardware.available() if hardware.load(name).kind == "gpu"]


def linear(name, out, inner, positions, batch=1):
    shapes = (batch, positions, inner), (batch, positions, out)
    sizes = {"weight_bytes": 2 * out * inner, "batch": batch}
    return Layer(name, "linear", (out, inner), out * inner, out * inner * positions * batch, *shapes, **sizes)


def experts(name, count, out, inner, rows, batch=1):
    """`rows`: tokens times the experts that each takes."""
    shapes = (rows, inner), (rows, out)
    sizes = {"weight_bytes": 2 * count * out * inner, "batch": batch, "experts": count}
    return Layer(name, "experts", (count * out, inner), count * out * inner, rows * out * inner, *shapes, **sizes)


def network_of(*layers, dtype="fp16", attention=()):
    stored = sum(layer.weight_bytes for layer in layers)
    return Network(tuple(layers), batch=layers[0].batch, total_bytes=stored, dtype=dtype, attention=attention)


@pytest.mark.parametrize(("count", "active", "tokens"), [(4, 1, 1), (4, 2, 1), (4, 2, 2), (5, 3, 2), (4, 1, 3)])
def test_experts_used_is_the_mean_over_every_way_to_route(count, active, tokens):
    choices = list(itertools.combinations(range(count), active))
    used = [len(set().union(*routed)) for routed in itertools.product(choices, repeat=tokens)]
    assert experts_used(count, active, tokens) == pytest.approx(np.mean(used), rel=1e-12)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 400))
def test_experts_used_is_never_more_than_there_are_or_are_asked(count, active, tokens):
    used = experts_used(count, min(active, count), tokens)
    assert min(active, count) * (1 - 1e-12) <= used <= min(count, active * tokens) * (1 + 1e-12)


MIXTURE = network_of(linear("router", 8, 64, 40, batch=2), experts("experts", 8, 96, 64, 160, batch=2))


@pytest.mark.parametrize("batch", [1, 3, 2000])
def test_each_token_reads_its_own_experts(batch):
    # 80 tokens took 160 rows on the example inputs: two experts a token.
    work = work_of(MIXTURE, batch=batch, phase="decode")
    used = experts_used(8, 2, batch)
    assert work.macs[1] == 2 * batch * 96 * 64
    assert work.weight_reads[1] * work.weights[1] == pytest.approx(used * 96 * 64)
    assert (work.inputs[1], work.outputs[1]) == (2 * batch * 64, 2 * batch * 96)
    assert work.m[1] * work.repeats[1] == pytest.approx(2 * batch)
    assert work.repeats[1] == used
    traced = work_of(MIXTURE, batch=2)
    assert traced.macs[1] == MIXTURE.layers[1].macs
    assert traced.weight_reads[1] == pytest.approx(1, abs=1e-9)  # 80 tokens leave no expert out


def test_a_decoding_step_of_one_sample_reads_a_quarter_of_eight_experts():
    frame = hardware.load("nvidia-h100").costs(MIXTURE, SearchSpace(["fp16", "int4"]), phase="decode")
    bytes_of = {"fp16": 2 * 96 * 64 * 2, "int4": 2 * 96 * 64 / 2 + 2 * 96 * 2}
    for option, weights in bytes_of.items():
        seconds = (weights + 2 * (2 * 64 + 2 * 96)) / (0.8 * 3.35e12) + 3e-6
        unpack = 2 * 96 * 64 * 6.6e-14 if option == "int4" else 0
        assert frame.loc[("experts", option), "latency"] == pytest.approx(seconds + unpack, rel=1e-9)


def test_experts_that_nothing_counts_the_tokens_of_are_refused_in_decode_only():
    alone = network_of(experts("experts", 8, 96, 64, 160))
    assert work_of(alone).weight_reads[0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="how many experts of 'experts' a token takes"):
        work_of(alone, phase="decode")


RUN = Attention("attn", 8, 2, 32, 32, 64, 48, batch=2, qk_macs=2 * 8 * 32 * 32 * 64, pv_macs=2 * 8 * 32 * 32 * 48)
MODEL = network_of(linear("q", 512, 512, 32, batch=2), linear("o", 512, 384, 32, batch=2), attention=(RUN,))


def work(batch=2, **settings):
    (run,) = attention_work(Cells.of(MODEL, [Option("int8")], batch=batch, **settings))
    return run


def loops(batch, queries, keys):
    """Multiply-adds, and elements of queries, keys, values and outputs, one by one."""
    macs = sum(64 + 48 for _ in range(batch) for _ in range(8) for _ in range(queries) for _ in range(keys))
    asked = sum(64 + 48 for _ in range(batch) for _ in range(8) for _ in range(queries))
    kept = sum(64 + 48 for _ in range(batch) for _ in range(2) for _ in range(keys))
    return macs, asked, kept


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_attention_is_that_of_loops(batch):
    macs, asked, kept = loops(batch, 32, 32)
    traced = work(batch)
    assert (traced.macs, traced.elements, traced.cache) == (macs, asked + kept, kept)
    for context, keys in ((None, 32), (7, 7), (1000, 1000)):
        macs, asked, kept = loops(batch, 1, keys)
        step = work(batch, phase="decode", context=context)
        assert (step.macs, step.cache) == (macs, kept)
        assert step.elements == asked + kept + batch * 2 * (64 + 48)  # the new key and value are written


def offset(device="nvidia-h100", **settings):
    return hardware.load(device).costs(MODEL, SearchSpace(["int8", "fp16"]), **settings).attrs


def test_attention_is_an_offset_of_the_latency_by_hand():
    attrs = offset(batch=2, phase="decode", context=4096)
    step = work(phase="decode", context=4096)
    memory, compute = step.elements * 2 / (0.8 * 3.35e12), 2 * step.macs / (0.6 * 9.89e14)
    assert memory > compute
    assert attrs["offsets"]["latency"] == pytest.approx(memory + 3e-6, rel=1e-12)
    assert attrs["reference"]["latency"] > memory + 3e-6
    notes = attrs["provenance"]["notes"]
    assert notes["kv_cache"] == f"{2 * 2 * 4096 * 112 * 2} bytes of keys and values in fp16, not part of size"
    assert "attention on hmma-fp16" in notes["latency"]
    assert "latency" in attrs["estimates"]


def test_attention_grows_with_the_context_and_not_with_the_options():
    offsets = [offset(batch=2, phase="decode", context=length)["offsets"]["latency"] for length in (512, 4096, 65536)]
    assert offsets[0] < offsets[1] < offsets[2]
    assert (offsets[2] - 3e-6) / (offsets[1] - 3e-6) == pytest.approx(16, rel=0.01)  # a kernel's overhead apart
    assert offset(batch=2, phase="decode")["offsets"] == offset(batch=2, phase="decode", context=32)["offsets"]


def test_a_model_in_a_format_without_a_unit_runs_its_attention_in_fp16():
    settings = {"batch": 2, "phase": "decode", "context": 64}
    network = Network(MODEL.layers, batch=2, dtype="bf16", attention=MODEL.attention)
    notes = hardware.load("nvidia-t4").costs(network, SearchSpace(["int8"]), **settings).attrs["provenance"]["notes"]
    assert "attention on hmma-fp16" in notes["latency"]


@pytest.mark.parametrize(("context", "phase"), [(128, None), (128, "prefill")])
def test_a_context_without_a_cache_is_refused(context, phase):
    with pytest.raises(ValueError, match="belongs to phase 'decode', got context=128 .* add phase='decode'"):
        offset(batch=2, phase=phase, context=context)
    with pytest.raises(ValueError, match="belongs to phase 'decode'"):
        hardware.storage().costs(MODEL, SearchSpace(["int8"]), phase=phase, context=context)


@pytest.mark.parametrize("context", [0, -1, 1.5, True])
def test_a_context_is_a_whole_number(context):
    with pytest.raises(ValueError, match="context must be a whole number of positions"):
        offset(batch=2, phase="decode", context=context)


def faster(name, key):
    """The shipped device with twice the value of a key in every table."""
    lines = files("mpq.hardware_models").joinpath(f"{name}.toml").read_text("utf-8").splitlines()
    doubled = [f"{key} = {2 * float(line.split('=')[1])}" if line.startswith(f"{key} =") else line for line in lines]
    assert doubled != lines
    return parse_target("\n".join(doubled), f"{name}.toml")


sizes = st.lists(st.tuples(*[st.integers(1024, 16384)] * 2), min_size=1, max_size=4)
OPTIONS = ["int4", "int8", "int4/int8", "int8/int8", "int4/int4", "fp8_e4m3/fp8_e4m3", "nvfp4/nvfp4", "fp16"]


@pytest.mark.parametrize("name", GPUS)
@settings(max_examples=15, deadline=None)
@given(sizes)
def test_decoding_for_one_sample_is_bound_by_memory_on_every_gpu(name, shapes):
    network = network_of(*(linear(f"fc{i}", out, inner, 16) for i, (out, inner) in enumerate(shapes)))
    now, arithmetic, bandwidth = (
        target.costs(network, SearchSpace(OPTIONS), phase="decode")["latency"].dropna()
        for target in (hardware.load(name), faster(name, "ops_per_s"), faster(name, "bandwidth_Bps"))
    )
    assert len(now) >= 5 * len(shapes)
    assert now.equals(arithmetic)
    assert (bandwidth < now).all()


@pytest.mark.parametrize("name", GPUS)
def test_the_unquantised_model_decodes_slower_than_with_weights_of_four_bits(name):
    network = network_of(linear("fc", 8192, 8192, 16))
    settings = {"space": SearchSpace(["int4@group128", "int8", "fp16"])}
    decode = hardware.load(name).costs(network, **settings, phase="decode")["latency"].to_numpy()
    assert decode[0] < decode[1] < decode[2]
    prefill = hardware.load(name).costs(network, **settings, batch=512)["latency"].to_numpy()
    assert prefill[0] > prefill[2], "arithmetic is the limit there, and weights are unpacked on top"


def test_every_gpu_file_is_among_those_asked_for():
    assert {"nvidia-t4", "nvidia-a100", "nvidia-h100", "nvidia-rtx4090", "nvidia-b200", "jetson-orin"} <= set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_units_for_low_precision_are_those_of_the_chip(name):
    units = tomllib.loads(files("mpq.hardware_models").joinpath(f"{name}.toml").read_text("utf-8"))["compute"]
    native = {(weight, activation) for unit in units for weight in np.atleast_1d(unit["weight"])
              for activation in np.atleast_1d(unit["activation"])}  # fmt: skip
    assert (("int4", "int4") in native) == (name in {"nvidia-t4", "nvidia-a100", "nvidia-rtx4090", "jetson-orin"})
    assert (("fp8", "fp8") in native) == (name in {"nvidia-h100", "nvidia-rtx4090", "nvidia-b200"})
    assert (("nvfp4", "nvfp4") in native) == (name == "nvidia-b200")
    frame = hardware.load(name).costs(network_of(linear("fc", 512, 512, 8)), SearchSpace(["int4/int4", "int4/int8"]))
    assert np.isnan(frame["latency"]["fc", "int4/int4"]) == (("int4", "int4") not in native)
    assert np.isfinite(frame["latency"]["fc", "int4/int8"])
