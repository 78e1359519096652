"""Arrays by the bits of their operands: published cycles, and machines simulated step by step."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq.hardware_models as hardware
from mpq.hardware_models.bismo import bismo_cycles
from mpq.hardware_models.bit_array import moved_bits
from mpq.hardware_models.bitfusion import bitfusion_cycles, fused_units
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.loom import loom_cycles
from mpq.hardware_models.prices import Prices
from mpq.hardware_models.stripes import stripes_cycles
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace

# AlexNet with doubled channels, batch 16, on 16 x 32 units: cycles less memory wait of hsharma35/bitfusion,
# results/bitfusion-eyeriss-sim-sweep.csv. Convolutions are cut into halves there; conv1 and fc3 have 8-bit operands.
ALEXNET = {  # positions a sample, taps, input channels, outputs, bits: compute cycles
    "conv1": ((55 * 55, 121, 3, 96, 8), 3339600),
    "conv2": ((27 * 27, 25, 96, 256, 4), 4665600),
    "conv3": ((13 * 13, 9, 512, 384, 4), 2336256),
    "conv4": ((13 * 13, 9, 384, 384, 4), 1752192),
    "conv5": ((13 * 13, 9, 384, 256, 4), 1168128),
    "fc1": ((1, 1, 512 * 36, 8192, 4), 1179648),
    "fc2": ((1, 1, 8192, 8192, 4), 524288),
    "fc3": ((1, 1, 8192, 1000, 8), 262144),
}
# The same at 192 bits a cycle, where tiles are padded to 28 and 14 positions a side.
PADDED = {"conv2": (28, 5018849 - 1249), "conv3": (14, 3248129 - 538625), "conv4": (14, 2436097 - 403969)}

DEVICE = """\
schema = 1
[target]
name = "toy"
kind = "asic"
runtime = "an array"
[[source]]
id = "sheet"
title = "a sheet"
kind = "datasheet"
read = "2026"
[memory.dram]
bandwidth_Bps = 24e9
efficiency = 0.5
source = ["sheet"]
[memory.input_buffer]
capacity_bytes = 32768
source = ["sheet"]
[memory.weight_buffer]
capacity_bytes = 65536
source = ["sheet"]
[memory.output_buffer]
capacity_bytes = 16384
source = ["sheet"]
[bit_array]
law = "bitfusion"
weight = ["int2", "int3", "int4", "int8", "int16"]
activation = ["int2", "int3", "int4", "int8", "int16"]
rows = 16
columns = 32
max_bits = 8
min_bits = 2
accumulator_bits = 32
frequency_hz = 500e6
source = ["sheet"]
"""


def device(law="bitfusion", extra="", **changes):
    text = DEVICE.replace('"bitfusion"', f'"{law}"') + extra
    for key, (before, after) in changes.items():
        text = text.replace(f"{key} = {before}\n", f"{key} = {after}\n")
    return parse_target(text)


def layer_of(positions, taps, channels, outputs, batch=1, name="layer"):
    weights = taps * channels * outputs
    if taps == 1:
        images = (batch, channels), (batch, outputs)
        return Layer(name, "linear", (outputs, channels), weights, weights * batch, *images, batch=batch)
    side, kernel = math.isqrt(positions), math.isqrt(taps)
    images = (batch, channels, side, side), (batch, outputs, side, side)
    shape = (outputs, channels, kernel, kernel)
    return Layer(
        name, "conv2d", shape, weights, weights * positions * batch, *images, kernel=(kernel, kernel), batch=batch
    )


def priced(target, layer, options, batch=1):
    cells = Cells.of(Network((layer,)), [Option(*option.split("/")) for option in options], batch=batch)
    return target.models[0].price(cells, Prices())


# Bit Fusion.


@pytest.mark.parametrize("name", ALEXNET)
def test_published_cycles_of_bitfusion(name):
    (positions, taps, channels, outputs, bits), published = ALEXNET[name]
    units = fused_units(bits, bits)
    assert bitfusion_cycles((16 * positions, taps * channels, outputs), taps, units) == published
    layer = layer_of(positions, taps, channels, outputs)
    prices = priced(device(bandwidth_Bps=("24e9", "1e30")), layer, [f"int{bits}/int{bits}"], batch=16)
    assert prices.tables["latency"][0, 0] * 500e6 == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("name", PADDED)
def test_published_cycles_of_padded_tiles(name):
    (_, taps, channels, outputs, bits), _ = ALEXNET[name]
    side, published = PADDED[name]
    assert bitfusion_cycles((16 * side**2, taps * channels, outputs), taps, fused_units(bits, bits)) == published


# Cycles, and bits read from and written to the memory at 192 bits a cycle, of the same file.
@pytest.mark.parametrize(
    ("name", "cycles", "moved"),
    [
        ("fc1", 3545090, 642908160 + 37748736),
        ("fc2", 1575596, 285736960 + 16777216),
        ("fc3", 398679, 72351744 + 4194304),
    ],
)
def test_layers_bound_by_memory_take_as_long_as_the_interface(name, cycles, moved):
    # The published time is the interface's, to a few cycles. Ours is a closed form of the tiling.
    assert cycles == pytest.approx(math.ceil(moved / 192), abs=6)
    (positions, taps, channels, outputs, bits), compute = ALEXNET[name]
    prices = priced(device(), layer_of(positions, taps, channels, outputs), [f"int{bits}/int{bits}"], batch=16)
    ours, waiting = prices.tables["latency"][0, 0] * 500e6, math.ceil(prices.accesses["dram"][0, 0] / 192)
    assert ours == pytest.approx(max(waiting, compute), rel=1e-12)
    assert waiting > compute
    assert 0.96 * cycles < ours <= cycles
    assert prices.accesses["dram"][0, 0] >= taps * channels * outputs * bits


def fusion_simulated(positions, taps, channels, outputs, widths, rows, columns):
    """Cycles of a loop over all operands, in groups that go into the array together."""
    activation, weight = (next(size for size in (2, 4, 8) if size >= bits) for bits in widths)
    together = rows * (8 // activation) * (8 // weight)
    lowered = channels < rows
    cycles = 0
    for _ in range(positions):
        for _ in range(0, outputs, columns):
            for _ in range(1 if lowered else taps):
                left = channels * taps if lowered else channels
                while left > 0:
                    left -= together
                    cycles += 1
    return cycles


@given(
    st.tuples(st.integers(1, 6), st.sampled_from([1, 9]), st.integers(1, 90), st.integers(1, 40)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(1, 8),
    st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_bitfusion_is_a_loop_over_groups_of_operands(shape, widths, rows, columns):
    positions, taps, channels, outputs = shape
    units = fused_units(*widths)
    cycles = bitfusion_cycles((positions, taps * channels, outputs), taps, units, rows=rows, columns=columns)
    assert cycles == fusion_simulated(*shape, widths, rows, columns)


def test_bitfusion_rounds_widths_up():
    rates = fused_units(np.arange(1, 9), np.arange(1, 9))
    assert rates.tolist() == [16, 16, 4, 4, 1, 1, 1, 1]
    assert fused_units(8, 2) == fused_units(2, 8) == 4
    with pytest.raises(ValueError, match="operands must have at most 8 bits, got 16"):
        fused_units(16, 8)


# Stripes and Loom.


def serial_simulated(m, k, n, bits, dims):
    """Cycles of machines that take one bit of each operand a cycle, a tile of windows x columns x rows at a time."""
    rows, columns, windows = dims
    steps = 0
    for _ in product(range(0, m, windows), range(0, n, columns), range(0, k, rows)):
        for _ in product(range(bits[0]), range(bits[1])):
            steps += 1
    return steps


@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(1, 16)] * 2), st.tuples(*[st.integers(1, 16)] * 2))
@settings(max_examples=60, deadline=None)
def test_serial_laws_are_loops_over_bits(matmul, bits, size):
    rows, columns = size
    m, k, n = matmul
    dims = {"rows": rows, "columns": columns, "windows": 16}
    one_by_one = serial_simulated(m, k, n, (bits[0], 1), (rows, columns, 1))
    assert loom_cycles(matmul, bits, **dims) == min(serial_simulated(m, k, n, bits, (*size, 16)), one_by_one)
    one_by_one = serial_simulated(m, k, n, (1, 1), (rows, columns, 1))
    assert stripes_cycles(matmul, bits[1], **dims) == min(
        serial_simulated(m, k, n, (1, bits[1]), (*size, 16)), one_by_one
    )


@given(st.integers(1, 16), st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_laws_relative_to_the_16_bit_design(weight_bits, activation_bits):
    conv, fc = (196 * 16, 576, 256), (1, 576, 256)  # whole tiles
    parallel = {256: 16, 128: 8}  # multiply-adds a cycle of the 16-bit design: its outputs, 16 inputs each

    def design(matmul, macs):
        m, k, n = matmul
        return m * math.ceil(k / 16) * math.ceil(n / parallel[macs])

    assert stripes_cycles(conv, activation_bits) == pytest.approx(design(conv, 256) * activation_bits / 16)
    assert stripes_cycles(fc, activation_bits) == design(fc, 256)
    bits = weight_bits, activation_bits
    assert loom_cycles(conv, bits) == pytest.approx(design(conv, 128) * weight_bits * activation_bits / 256)
    assert loom_cycles(fc, bits) == pytest.approx(design(fc, 128) * weight_bits / 16)


def test_batches_are_samples_one_after_the_other():
    # 16 samples of one position are no windows of one convolution.
    layer = layer_of(1, 1, 256, 256)
    for law, by_bits in {"stripes": ("int8/int8", "int8/int2"), "loom": ("int8/int4", "int8/int2")}.items():
        target = device(law, "windows = 16\n", bandwidth_Bps=("24e9", "1e30"), max_bits=("8", "16"))
        single, many = (priced(target, layer, by_bits, batch=batch).tables["latency"] for batch in (1, 16))
        assert many[0, :2] == pytest.approx(16 * single[0, :2])
        assert single[0, 0] == single[0, 1]


# BISMO.


def binary_products(left, right, bits, dims):
    """The product of two matrices of small integers, from binary dot products, and how many passes that took."""
    rows, columns, depth = dims
    m, k = left.shape
    n = right.shape[1]
    result, passes = np.zeros((m, n), dtype=np.int64), 0
    for i, j in product(range(0, m, rows), range(0, n, columns)):
        for a, w in product(range(bits[1]), range(bits[0])):
            for t in range(0, k, depth):
                plane = (left[i : i + rows, t : t + depth] >> a) & 1
                other = (right[t : t + depth, j : j + columns] >> w) & 1
                result[i : i + rows, j : j + columns] += (plane @ other) << (a + w)
                passes += 1
    return result, passes


@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 4)] * 2), st.tuples(*[st.integers(2, 7)] * 3))
@settings(max_examples=30, deadline=None)
def test_bismo_multiplies_bit_planes(matmul, bits, dims):
    m, k, n = matmul
    rng = np.random.default_rng(m + 20 * k)
    left, right = rng.integers(0, 2 ** bits[1], (m, k)), rng.integers(0, 2 ** bits[0], (k, n))
    result, passes = binary_products(left, right, bits, dims)
    assert np.array_equal(result, left @ right)
    assert bismo_cycles(matmul, bits, rows=dims[0], columns=dims[1], depth=dims[2]) == passes


def test_published_peaks_of_bismo():
    def binary_tops(rows, depth, columns, frequency):
        matmul = 100 * rows, 100 * depth, 100 * columns
        cycles = bismo_cycles(matmul, (1, 1), rows=rows, columns=columns, depth=depth)
        return 2 * math.prod(matmul) / cycles * frequency / 1e12

    assert binary_tops(8, 256, 8, 200e6) == pytest.approx(6.5, rel=0.01)  # the abstract's PYNQ-Z1
    array = hardware.load("zu3eg-bismo").models[0].array
    size = (array[key] for key in ("rows", "depth", "columns", "frequency_hz"))
    assert binary_tops(*size) == pytest.approx(15.4, rel=0.01)


def test_fill_is_paid_once_a_call():
    extra = "depth = 64\nfill_cycles = 100\n"
    for calls in (1, 3):
        layer = Layer("fc", "linear", (32, 64), 2048, 2048 * 5 * calls, (5, 64), (5, 32), calls=calls)
        latency = priced(device("bismo", extra, bandwidth_Bps=("24e9", "1e30")), layer, ["int3/int2"]).tables["latency"]
        assert latency[0, 0] * 500e6 == pytest.approx(calls * (1 * 1 * 1 * 6 + 100))


# Memory, formats, device files.


@given(st.tuples(*[st.integers(1, 500)] * 3), st.tuples(*[st.integers(1, 200)] * 3))
@settings(max_examples=200, deadline=None)
def test_moved_bits_are_the_best_of_three_loops(bits, room):
    inputs, weights, partials = bits
    weights_stay, inputs_stay = [0, 0, 0], [0, 0, 0]
    for piece in range(0, weights, room[1]):
        weights_stay[1] += min(room[1], weights - piece)
        weights_stay[0] += inputs
    for piece in range(0, inputs, room[0]):
        inputs_stay[0] += min(room[0], inputs - piece)
        inputs_stay[1] += weights
    both_pass, pieces = [inputs, weights, 0], 1
    while inputs / pieces > room[0] and weights / pieces > room[1]:  # until a piece of k of one operand fits
        pieces += 1
        both_pass[2] += 0 if partials <= room[2] else 2 * partials  # written, and read back
    ours = [float(moved) for moved in moved_bits(*bits, room)]
    assert ours in (weights_stay, inputs_stay, both_pass)
    assert sum(ours) == min(sum(weights_stay), sum(inputs_stay), sum(both_pass))
    assert [float(moved) for moved in moved_bits(*bits, (np.inf,) * 3)] == [inputs, weights, 0]


def test_accesses_by_hand():
    # 49 positions of 3 x 3 x 32 to 40 channels on 16 x 32 units, int4 weights and int8 inputs. All of it fits.
    layer = layer_of(49, 9, 32, 40)
    accesses = priced(device(), layer, ["int4/int8"]).accesses
    weights = 9 * 32 * 40 * 4 + 40 * 16  # scales of 40 channels
    inputs, outputs = 49 * 32 * 8, 49 * 40 * 8
    found = {name: table[0, 0] for name, table in accesses.items()}
    assert found == {
        "dram": weights + inputs + outputs,
        "input_buffer": 49 * 288 * 2 * 8 + inputs,
        "weight_buffer": 49 * 288 * 40 * 4 + weights,
        "output_buffer": 2 * outputs,
    }


def test_lookups_cost_the_rows_they_read():
    table = Layer("e", "embedding", (1000, 64), 64000, 0, (1, 5), (1, 5, 64))
    prices = priced(device(), table, ["int8/int8", "int4/int8"])
    rows = np.array([5 * 64 * 8 + 5 * 16, 5 * 64 * 4 + 5 * 16])
    assert prices.accesses["dram"][0, :2] == pytest.approx(rows)
    assert prices.tables["latency"][0, :2] == pytest.approx(np.ceil(rows / 192) / 500e6)
    assert np.all(prices.accesses["weight_buffer"][0, :2] == 0)


def test_wide_operands_and_other_formats_are_refused():
    frame = device().costs(Network((layer_of(1, 1, 64, 64),)), SearchSpace(["int4/int4", "int16/int16", "int4"]))
    assert frame["latency"].notna().tolist() == [True, False, False]
    reasons = " ".join(frame.attrs["refused"].values())
    assert "toy (an array) multiplies operands of at most 8 bits" in reasons
    assert "has no kernel for int4 weights and fp32 inputs in a linear" in reasons


@pytest.mark.parametrize(
    ("law", "key"), [("stripes", "windows"), ("loom", "windows"), ("bismo", "depth"), ("bitfusion", "min_bits")]
)
def test_a_law_needs_its_keys(law, key):
    with pytest.raises(ValueError, match=rf"\[bit_array\]: {key} is missing: the law '{law}' needs it"):
        parse_target(DEVICE.replace('"bitfusion"', f'"{law}"').replace("min_bits = 2\n", ""))


@pytest.mark.parametrize(("name", "gain"), [("bitfusion", [1, 2, 4, 4, 16]), ("zu3eg-bismo", [1, 2, 4, 64 / 9, 16])])
def test_shipped_arrays_gain_from_bits(name, gain):
    target = hardware.load(name)
    options = ["int8/int8", "int4/int8", "int4/int4", "int3/int3", "int2/int2"]
    prices = priced(target, layer_of(28 * 28, 9, 1024, 320), options)
    times = prices.tables["latency"][0]
    assert times[0] / times[:-1] == pytest.approx(gain, rel=1e-6)
    assert np.isnan(times[-1])  # no fp32
    assert all("energy_pJ_per_bit" in entry for entry in target.models[0].memories.values())
    assert set(prices.accesses) == set(target.models[0].memories)
