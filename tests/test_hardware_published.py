"""Shipped targets against published and measured latencies: order and ratio, never time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.device_file import parse_target
from mpq.layers import Layer, Network
from mpq.options import SearchSpace

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "hawq_ilp_resnet18.json"


def kendall_tau_b(ours, theirs):
    i, j = np.triu_indices(len(ours), 1)
    ours, theirs = (np.sign(np.subtract(values[i], values[j])) for values in (np.asarray(ours), np.asarray(theirs)))
    return (ours * theirs).sum() / np.sqrt(np.abs(ours).sum() * np.abs(theirs).sum())


@pytest.fixture(scope="module")
def published():
    if not REFERENCE.is_file():
        pytest.skip("hawq_ilp_resnet18.json is not beside this checkout")
    return json.loads(REFERENCE.read_text())


@pytest.fixture(scope="module")
def resnet18(published):
    rows = zip(published["layers"], published["parameters_raw"], published["bops_raw"], strict=True)
    return Network(tuple(_resnet_layer(name, parameters, macs) for name, parameters, macs in rows))


def _resnet_layer(name, parameters, macs):
    stage, unit = int(name[5]), int(name[11])
    channels, size = 64 * 2 ** (stage - 1), 56 // 2 ** (stage - 1)
    is_first = stage > 1 and unit == 1 and not name.endswith("convbn2")
    inputs, input_size = (channels // 2, 2 * size) if is_first else (channels, size)
    kernel = 1 if "identity" in name else 3
    shape = (channels, inputs, kernel, kernel)
    assert parameters == np.prod(shape)
    assert macs == parameters * size**2
    images = (1, inputs, input_size, input_size), (1, channels, size, size)
    return Layer(name, "conv2d", shape, parameters, macs, *images, kernel=shape[2:], weight_bytes=4 * parameters)


@pytest.fixture(scope="module")
def predicted(resnet18):
    frame = hardware.load("nvidia-t4").costs(resnet18, SearchSpace(["int4/int4", "int8/int8"]), batch=8)
    return frame["latency"].to_numpy().reshape(-1, 2).T * 1e3


@pytest.fixture(scope="module")
def measured(published):
    return np.array([published["latency_int4_ms"], published["latency_int8_ms"]])


def test_order_of_layers_on_t4_is_hawqs(predicted, measured):
    for ours, theirs in zip(predicted.round(6), measured, strict=True):
        # 13 of 19 layers do the same number of multiply-adds and tie here, not there: 0.71 is all that tau-b can be.
        assert kendall_tau_b(ours, theirs) > 0.7
        i, j = np.triu_indices(len(ours), 1)
        differ = ours[i] != ours[j]
        concordant = (ours[i] > ours[j]) == (theirs[i] > theirs[j])
        assert concordant[differ].mean() > 0.98


def test_ratio_of_int8_to_int4_on_t4_is_hawqs(predicted, measured):
    ours, theirs = (table.sum(axis=1)[1] / table.sum(axis=1)[0] for table in (predicted, measured))
    assert ours == pytest.approx(theirs, rel=0.02)
    per_layer = (predicted[1] / predicted[0]) / (measured[1] / measured[0])
    assert np.abs(per_layer - 1).mean() < 0.1
    assert np.abs(per_layer - 1).max() < 0.25


def test_error_on_t4_is_the_one_the_device_file_states(predicted, measured):
    stated = hardware.load("nvidia-t4").calibration
    assert stated["samples"] == measured.size
    assert np.abs(predicted / measured - 1).mean() == pytest.approx(stated["mape"], abs=0.001)
    taus = [kendall_tau_b(a.round(6), b) for a, b in zip(predicted, measured, strict=True)]
    assert np.mean(taus) == pytest.approx(stated["kendall_tau"], abs=0.005)


def test_fp32_takes_as_much_longer_than_int8_on_t4_as_end_to_end(resnet18):
    frame = hardware.load("nvidia-t4").costs(resnet18, SearchSpace(["fp32", "int8/int8"]), batch=8)
    total = frame["latency"].groupby(level="option").sum()
    assert total["fp32"] / total["int8/int8"] == pytest.approx(9.7 / 3.3, rel=0.05)


def linear(inner, out, positions):
    shapes = (1, positions, inner), (1, positions, out)
    macs = inner * out * positions
    return Layer("fc", "linear", (out, inner), inner * out, macs, *shapes, weight_bytes=4 * inner * out)


# Measured with onnxruntime 1.31.1 on one thread of an AMX Xeon, microseconds; the target is a whole socket of another.
MEASURED = {
    (1, 4096, 4096): {"fp32": 2630, "int8/int8": 682, "int4@group32": 473, "int8@group32": 890},
    (256, 1024, 1024): {
        "fp32": 3414,
        "int8/int8": 395,
        "int4@group32": 4726,
        "int8@group32": 3579,
        "int2@group32": 10841,
    },
}


@pytest.mark.parametrize("shape", MEASURED)
def test_order_of_kernels_on_x86_is_the_measured_one(shape):
    positions, inner, out = shape
    microseconds = MEASURED[shape]
    network = Network((linear(inner, out, positions),))
    frame = hardware.load("x86-amx").costs(network, SearchSpace(list(microseconds)))
    ours = frame["latency"].to_numpy()
    assert np.argsort(ours).tolist() == np.argsort(list(microseconds.values())).tolist()
    assert "latency" in frame.attrs["estimates"]


def convolution(channels, size, groups=1):
    shape = (channels, channels // groups, 3, 3)
    parameters, images = channels * channels // groups * 9, (1, channels, size, size)
    extra = {"groups": groups, "kernel": (3, 3), "weight_bytes": 4 * parameters}
    return Layer("conv", "conv2d", shape, parameters, parameters * size * size, images, images, **extra)


@pytest.mark.parametrize("name", ["x86-amx", "x86-vnni"])
def test_int8_gains_less_on_depthwise_convolutions_than_on_dense_ones(name):
    # Measured: 1347 to 337 us for 64 channels of 56 x 56, 397 to 266 us for 128 channels each on its own.
    space, gains = SearchSpace(["fp32", "int8/int8", "int4"]), []
    for layer in (convolution(64, 56), convolution(128, 56, groups=128)):
        fp32, int8, weight_only = hardware.load(name).costs(Network((layer,)), space)["latency"] - 5e-6  # the launch
        assert weight_only > fp32  # unpacked, then run as fp32
        gains.append(fp32 / int8)
    assert gains[0] == pytest.approx(4, rel=0.15)
    assert gains[1] == pytest.approx(1.5, rel=0.15)


def test_what_x86_has_no_kernel_for_is_refused():
    conv = Layer("conv", "conv2d", (8, 8, 3, 3), 576, 576 * 64, (1, 8, 8, 8), (1, 8, 8, 8), weight_bytes=2304)
    frame = hardware.load("x86-amx").costs(Network((conv,)), SearchSpace(["int4/int8", "int8/int8", "int4", "int3"]))
    assert [option for _, option in frame.attrs["refused"]] == ["int4/int8", "int3"]


# One thread of that machine: rates of fp32 and int8, and seconds to unpack a weight, fitted on the last three shapes.
THREAD = """\
schema = 1
[target]
name = "thread"
kind = "cpu"
runtime = "onnxruntime 1.31, one thread"
[[source]]
id = "measured"
title = "the table below"
kind = "measured"
read = "2026"
[memory.dram]
bandwidth_Bps = 5e10
efficiency = 0.5
source = ["measured"]
[[compute]]
unit = "fp32"
weight = "fp32"
activation = "fp32"
ops_per_s = 3e11
efficiency = 0.5
launch_overhead_s = 1e-6
source = ["measured"]
[[compute]]
unit = "int8"
weight = "int8"
activation = "int8"
ops_per_s = 3e12
efficiency = 0.5
launch_overhead_s = 1e-6
source = ["measured"]
"""
UNPACKED = """\
[[fallback]]
weight = "int{bits}"
activation = "fp32"
runs_as = "int8"
dequant_s_per_weight = {seconds}
dequant_tile_m = 1
source = ["measured"]
"""
UNPACKING = {8: 14e-12, 4: 18e-12, 2: 40e-12}
# fp32, int8, blocks of 8, 4 and 2 bits. Two measured shapes are missed by more than a factor of two, and left out:
# the weights of 1 x 768 x 768 stay in a cache (predicted 1.1 to 2.7 times as long), and at 16 x 4096 x 4096 every block
# kernel took 2 to 3 times as long a row as at 1 and 64 rows.
MICROSECONDS = {
    (1, 4096, 4096): (2630, 682, 890, 473, 887),
    (64, 768, 768): (372, 54.6, 590, 688, 1591),
    (256, 1024, 1024): (3414, 395, 3579, 4726, 10841),
    (256, 4096, 4096): (147308, 5780, 97840, 79346, 251038),
}


def seconds_on_a_thread(shape):
    positions, inner, out = shape
    text = THREAD + "".join(UNPACKED.format(bits=bits, seconds=seconds) for bits, seconds in UNPACKING.items())
    space = SearchSpace(["fp32", "int8/int8", "int8@group32", "int4@group32", "int2@group32"])
    frame = parse_target(text).costs(Network((linear(inner, out, positions),)), space)
    return frame["latency"].to_numpy()


@pytest.mark.parametrize("shape", MICROSECONDS)
def test_block_matmuls_that_unpack_every_row_are_within_a_factor_of_two_of_onnxruntime(shape):
    ratio = seconds_on_a_thread(shape)[2:] * 1e6 / MICROSECONDS[shape][2:]
    assert np.abs(np.log2(ratio)).max() < 1


def test_unpacking_makes_few_bits_win_at_one_row_and_lose_at_many():
    one, many = seconds_on_a_thread((1, 4096, 4096)), seconds_on_a_thread((256, 1024, 1024))
    for ours, theirs in ((one, MICROSECONDS[1, 4096, 4096]), (many, MICROSECONDS[256, 1024, 1024])):
        fp32, _, bits8, bits4, bits2 = ours
        assert (bits4 < fp32) == (theirs[3] < theirs[0])
        assert (bits2 > bits4) == (theirs[4] > theirs[3])
        assert (bits4 < bits8) == (theirs[3] < theirs[2])


def test_weights_beyond_the_edge_tpus_sram_cost_a_knee():
    def milliseconds(layers):
        network = Network(tuple(replace(linear(1024, 1024, 49), name=f"fc{i}") for i in range(layers)))
        return hardware.load("edge-tpu").costs(network, SearchSpace(["int8/int8"]))["latency"].sum() * 1e3

    assert milliseconds(7) == pytest.approx(7 * milliseconds(1), rel=1e-9)
    streamed = 24 * (1024 * 1024 + 2 * 1024) - 8e6
    assert milliseconds(24) == pytest.approx(streamed / 0.3e9 * 1e3, rel=0.05)
    assert milliseconds(24) > 5 * 24 * milliseconds(1)


def test_what_is_not_int8_is_refused_on_the_edge_tpu():
    frame = hardware.load("edge-tpu").costs(
        Network((linear(64, 64, 4),)), SearchSpace(["int4/int8", "int8", "int8/int8"])
    )
    assert [option for _, option in frame.attrs["refused"]] == ["int4/int8", "int8"]
    assert "dearest" in frame.attrs["reference_meaning"]["latency"]
