"""The roofline against hand arithmetic and against a slow reading of the device file."""

import math
import tomllib
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.formats import parse
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.prices import Prices
from mpq.hardware_models.workload import work_of
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace

DEVICE = """\
schema = 1
[target]
name = "toy"
kind = "gpu"
runtime = "toy kernels"
[[source]]
id = "sheet"
title = "a sheet"
kind = "datasheet"
read = "2026"
[memory.dram]
bandwidth_Bps = 2e9
efficiency = 0.5
source = ["sheet"]
[[compute]]
unit = "int8-unit"
weight = ["int8", "uint8"]
activation = ["int8", "uint8"]
ops_per_s = 4e12
efficiency = 0.25
launch_overhead_s = 5e-6
align_k = 32
align_n = 16
source = ["sheet"]
[[compute]]
unit = "fp-unit"
weight = ["fp16", "fp32"]
activation = ["fp16", "fp32"]
ops_per_s = 2e11
efficiency = 0.5
launch_overhead_s = 3e-6
dequant_s_per_weight = 1e-13
source = ["sheet"]
[[fallback]]
weight = ["int4", "mxfp4"]
activation = ["fp32", "fp16"]
runs_as = "fp-unit"
dequant_s_per_weight = 2e-12
source = ["sheet"]
[[fallback]]
weight = "int4"
activation = "int8"
ops = ["linear", "conv2d"]
runs_as = "int8-unit"
source = ["sheet"]
"""
# The same device, whose kernels cut outputs into tiles and unpack weights for every few rows.
TILED = DEVICE.replace(
    "align_k = 32\nalign_n = 16\n",
    "align_k = 32\nalign_n = 16\ntile_m = 8\ntile_n = 24\nunits = 5\nsplit_k = 3\n",
).replace("dequant_s_per_weight = 2e-12", "dequant_s_per_weight = 2e-12\ndequant_tile_m = 4")
OPTIONS = ("int8/int8", "int4/int8", "int4", "mxfp4", "fp16", "fp32", "int2", "uint8/uint8")


def linear(name, out, inner, positions, batch=1, calls=1):
    macs = out * inner * positions * batch * calls
    elements = {"input_elements": batch * positions * inner * calls, "output_elements": batch * positions * out * calls}
    shapes = (batch, positions, inner), (batch, positions, out)
    weight = {"weight_bytes": 4 * out * inner, "batch": batch, "calls": calls}
    return Layer(name, "linear", (out, inner), out * inner, macs, *shapes, **weight, **elements)


def conv(name, out, inner, size, groups=1, batch=1):
    shape = (out, inner // groups, 3, 3)
    parameters = math.prod(shape)
    macs = parameters * size * size * batch
    images = (batch, inner, size, size), (batch, out, size, size)
    extra = {"groups": groups, "kernel": (3, 3), "batch": batch, "weight_bytes": 4 * parameters}
    return Layer(name, "conv2d", shape, parameters, macs, *images, **extra)


def network_of(*layers):
    stored = sum(layer.weight_bytes for layer in layers)
    return Network(tuple(layers), batch=layers[0].batch, total_bytes=stored + 64, outside_bytes=64)


def latency(network, options=OPTIONS, device=DEVICE, **settings):
    frame = parse_target(device).costs(network, SearchSpace(list(options)), **settings)
    return frame["latency"].to_numpy().reshape(len(network.layers), -1)


def priced(network, options=OPTIONS, device=DEVICE, **settings):
    """What the roofline itself says, the unquantised model as the last column."""
    (model,) = parse_target(device).models
    return model.price(Cells.of(network, [Option.parse(text) for text in options], **settings), Prices())


def test_a_linear_layer_by_hand():
    # 40 -> 24 features on 10 positions. K = 40 is padded to 64, N = 24 to 32.
    network = network_of(linear("fc", 24, 40, 10))
    compute = 2 * 10 * 64 * 32 / (0.25 * 4e12)  # 4.096e-08 s
    moved = 24 * 40 + 24 * 2 + 10 * 40 + 10 * 24  # values, fp16 scales of 24 channels, inputs, outputs: 1648 bytes
    assert moved == 1648
    assert compute < moved / 1e9
    assert latency(network, ["int8/int8"])[0, 0] == pytest.approx(1.648e-6 + 5e-6, rel=1e-12)
    moved_as_stored = 4 * (24 * 40 + 10 * 40 + 10 * 24)
    moves = priced(network, ["int8/int8"]).accesses["dram"]
    assert moves.tolist() == [[8 * moved, 8 * moved_as_stored]]


def test_a_weight_only_layer_by_hand():
    # fp32 inputs stay, the weight is unpacked to the fp unit: 960 weights at 2 ps each on top.
    network = network_of(linear("fc", 24, 40, 1000))
    compute = 2 * 1000 * 40 * 24 / 1e11  # 1.92e-05 s
    memory = (24 * 40 / 2 + 24 * 2 + 1000 * (40 + 24) * 4) / 1e9  # 2.56528e-04 s
    assert compute < memory
    assert latency(network, ["int4"])[0, 0] == pytest.approx(memory + 960 * 2e-12 + 3e-6, rel=1e-12)


def test_a_layer_bound_by_arithmetic_by_hand():
    network = network_of(conv("conv", 64, 64, 14))
    device = DEVICE.replace("bandwidth_Bps = 2e9", "bandwidth_Bps = 2e12")
    compute = 2 * 196 * 576 * 64 / 1e11  # 1.445e-04 s
    assert latency(network, ["fp32"], device)[0, 0] == pytest.approx(compute + 36864 * 1e-13 + 3e-6, rel=1e-12)


def slow_padding(m, n, repeats, unit):
    """How much longer than its useful work one call takes: tiles are handed out one by one, wave after wave."""
    while n % unit.get("align_n", 1):
        n += 1
    if "tile_m" not in unit:
        return n
    tiles = 0
    for _ in range(repeats):
        for _ in range(0, m, unit["tile_m"]):
            tiles += len(range(0, n, unit["tile_n"]))
    best = math.inf
    for parts in range(1, unit.get("split_k", 1) + 1):
        waves, left = 0, tiles * parts
        while left > 0:
            waves, left = waves + 1, left - unit["units"]
        best = min(best, waves * unit["units"] / parts)  # tiles' worth of time of the whole chip
    return best * unit["tile_m"] * unit["tile_n"] / (m * repeats)  # columns' worth


def slow_latency(layer, option, document, batch, dtype="fp32"):
    """One cell, from the file as TOML reads it, with no arrays."""
    names = [(fmt and fmt.name) or dtype for fmt in (option.weight, option.activation)]
    rows = [*document["compute"], *document["fallback"]]
    for row in rows:
        takes = [[row[key]] if isinstance(row[key], str) else row[key] for key in ("weight", "activation")]
        if any(fnmatchcase(layer.kind, pattern) for pattern in row.get("ops", ["*"])) and all(
            name in taken for name, taken in zip(names, takes, strict=True)
        ):
            break
    else:
        return math.nan
    unit = next(entry for entry in document["compute"] if entry["unit"] == row.get("runs_as", row.get("unit")))
    m, k, n, repeats = layer.matmul(batch)
    m //= layer.calls
    if layer.groups == 1:
        while k % unit.get("align_k", 1):
            k += 1
        n = slow_padding(m, n, repeats, unit)
    compute = layer.calls * 2 * m * k * n * repeats / (unit["efficiency"] * unit["ops_per_s"])
    weight = parse(dtype) if option.weight is None else option.weight
    activation = parse(dtype) if option.activation is None else option.activation
    elements = (layer.input_elements + layer.output_elements) * batch / layer.batch
    moved = layer.calls * weight.storage_bits(layer.weight_shape) / 8 + elements * activation.bits / 8
    memory = moved / (document["memory"]["dram"]["efficiency"] * document["memory"]["dram"]["bandwidth_Bps"])
    copies = len(range(0, m, row.get("dequant_tile_m", m)))
    dequant = row.get("dequant_s_per_weight", 0) * layer.parameters * layer.calls * copies
    return max(compute, memory) + dequant + layer.calls * unit["launch_overhead_s"]


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("bandwidth", ["2e8", "2e9", "2e13"])
@pytest.mark.parametrize("device", [DEVICE, TILED], ids=["plain", "tiled"])
def test_table_is_that_of_three_loops(batch, bandwidth, device):
    device = device.replace("2e9", bandwidth)
    layers = [
        linear("a", 24, 40, 10, batch=2),
        linear("narrow", 20, 640, 3, batch=2),
        linear("shared", 33, 65, 7, batch=2, calls=3),
        conv("conv", 32, 16, 8, batch=2),
        conv("depthwise", 48, 48, 9, groups=48, batch=2),
        conv("grouped", 64, 32, 5, groups=2, batch=2),
    ]
    network, document = network_of(*layers), tomllib.loads(device)
    document["fallback"][1]["ops"] = ["linear", "conv2d", "depthwise_conv2d"]
    device = device.replace('ops = ["linear", "conv2d"]', 'ops = ["linear", "*conv2d"]')
    options = [Option.parse(text) for text in OPTIONS]
    expected = [[slow_latency(layer, option, document, batch) for option in options] for layer in layers]
    table = latency(network, device=device, batch=batch)
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    assert np.isnan(table).any(axis=0).tolist() == [text == "int2" for text in OPTIONS]


def test_the_last_wave_and_the_cut_of_sums_by_hand():
    # 70 x 100 outputs are 9 x 5 tiles of 8 x 24, N = 100 rounded up to 112 first: nine waves on 5 processors, full.
    full = network_of(linear("fc", 100, 64, 70))
    device = TILED.replace("2e9", "2e15")
    padded = 2 * 64 * (9 * 8) * (5 * 24) / 1e12
    assert latency(full, ["int8/int8"], device)[0, 0] == pytest.approx(padded + 5e-6, rel=1e-6)
    # 6 tiles are two waves, 1.2 of them useful; cut in two 12 tiles in three waves, in three 18 tiles in four.
    ragged = network_of(linear("fc", 48, 64, 24))
    useful = 2 * 64 * 24 * 48 / 1e12
    assert latency(ragged, ["int8/int8"], device)[0, 0] == pytest.approx(useful * 20 / 18 + 5e-6, rel=1e-6)


def test_each_tile_of_rows_unpacks_its_own_weights():
    for positions, copies in ((1, 1), (4, 1), (5, 2), (64, 16)):
        network = network_of(linear("fc", 24, 40, positions))
        once, each = (latency(network, ["int4"], device)[0, 0] for device in (DEVICE, TILED))
        assert each - once == pytest.approx((copies - 1) * 960 * 2e-12, rel=1e-6, abs=1e-18)


def _linears(draw_sizes):
    return network_of(
        *(linear(f"fc{i}", out, inner, positions) for i, (out, inner, positions) in enumerate(draw_sizes))
    )


sizes = st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(6, 14))
def test_doubling_the_bandwidth_never_slows(shapes, exponent):
    network = _linears(shapes)
    slow = latency(network, device=DEVICE.replace("2e9", f"2e{exponent}"))
    fast = latency(network, device=DEVICE.replace("2e9", f"4e{exponent}"))
    known = ~np.isnan(slow)
    assert (fast[known] <= slow[known]).all()
    assert (known == ~np.isnan(fast)).all()


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from([DEVICE, TILED]))
def test_doubling_the_arithmetic_never_slows(shapes, device):
    network = _linears(shapes)
    slow = latency(network, device=device)
    fast = latency(network, device=device.replace("4e12", "8e12").replace("2e11", "4e11"))
    assert ((fast <= slow) | np.isnan(slow)).all()
    assert (np.isnan(fast) == np.isnan(slow)).all()


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from(["", "@group16"]))
def test_size_and_traffic_grow_with_bits(shapes, granularity):
    network = _linears(shapes)
    options = [f"int{bits}{granularity}/int{bits}" for bits in range(2, 9)]
    device = DEVICE.replace('"int4", "mxfp4"', ", ".join(f'"int{bits}"' for bits in range(2, 8)))
    cells = Cells.of(network, [Option.parse(text) for text in options])
    traffic = priced(network, options, device).accesses["dram"][:, :-1]
    for table in (cells.weight_bytes[:, :-1], traffic):
        assert (np.diff(table, axis=1) > 0).all()


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 8))
def test_larger_batches_never_take_less(shapes, batch):
    network = _linears(shapes)
    one, more = latency(network, batch=batch), latency(network, batch=batch + 1)
    assert (np.nan_to_num(more) >= np.nan_to_num(one)).all()


def test_fewer_bits_may_take_longer():
    # Weight-only int4 runs on the slow unit: it loses to int8 as soon as arithmetic is the limit.
    table = latency(network_of(linear("fc", 512, 512, 4096)), ["int4", "int8/int8"])
    assert table[0, 0] > table[0, 1]


def test_decode_takes_one_position_a_sample_and_reads_every_weight():
    network = network_of(linear("fc", 24, 40, 10, batch=2))
    (cell,) = latency(network, ["int8/int8"], batch=3, phase="decode")[0]
    moved = 24 * 40 + 24 * 2 + 3 * (40 + 24)
    assert cell == pytest.approx(max(2 * 3 * 64 * 32 / 1e12, moved / 1e9) + 5e-6, rel=1e-12)
    np.testing.assert_array_equal(latency(network, batch=3, phase="prefill"), latency(network, batch=3))


def test_decode_refuses_convolutions_by_name():
    with pytest.raises(
        ValueError,
        match="phase 'decode' prices linear and embedding layers and experts, layer 'conv' is of kind conv2d",
    ):
        work_of(network_of(conv("conv", 8, 8, 4)), phase="decode")


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_batch_must_be_a_whole_number(batch):
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1"):
        work_of(network_of(linear("fc", 2, 2, 2)), batch=batch)


def test_work_is_that_of_the_layers_products():
    layers = [linear("a", 24, 40, 10, batch=2), conv("conv", 32, 16, 8, groups=4, batch=2)]
    work = work_of(network_of(*layers), batch=5)
    for index, layer in enumerate(layers):
        m, k, n, repeats = layer.matmul(5)
        assert work.macs[index] == m * k * n * repeats
        assert (work.m[index], work.k[index], work.n[index], work.repeats[index]) == (m, k, n, repeats)


def test_a_cell_without_a_row_is_nan_and_leaves_its_neighbours():
    network = network_of(linear("fc", 24, 40, 10), conv("conv", 8, 8, 4))
    device = DEVICE.replace('ops = ["linear", "conv2d"]', 'ops = ["linear"]')
    prices = priced(network, ["int4/int8", "int8/int8"], device)
    assert np.isnan(prices.tables["latency"]).tolist() == [[False] * 3, [True, False, False]]
    assert prices.reasons[1, 0] == "has no kernel for int4 weights and int8 inputs in a conv2d"
    assert not prices.reasons[0].any()
    np.testing.assert_array_equal(
        prices.tables["latency"][:, 1:], priced(network, ["int8/int8"], device).tables["latency"]
    )


SCRATCHPAD = DEVICE + '[scratchpad]\ncapacity_bytes = 1000\nsource = "sheet"\n'


def test_weights_that_fit_the_scratchpad_are_not_read_and_the_rest_is_streamed():
    small, large = linear("small", 20, 40, 10), linear("large", 60, 40, 10)
    fits = priced(network_of(small), ["int8/int8"], SCRATCHPAD)
    assert fits.accesses["dram"][0, 0] == 0  # 800 values and 40 bytes of scales; activations stay on the chip
    both = priced(network_of(small, large), ["int8/int8"], SCRATCHPAD)
    bytes_of = np.array([20 * 42, 60 * 42])
    streamed = 1 - 1000 / bytes_of.sum()
    np.testing.assert_allclose(both.accesses["dram"][:, 0], 8 * bytes_of * streamed, rtol=1e-12)
    compute = 2 * 10 * 64 * np.array([32, 64]) / 1e12
    expected = np.maximum(compute, bytes_of * streamed / 1e9) + 5e-6
    np.testing.assert_allclose(both.tables["latency"][:, 0], expected, rtol=1e-12)


def test_the_knee_of_the_scratchpad_comes_with_its_capacity():
    per_layer = [
        latency(network_of(*(linear(f"{i}", 8, 40, 10) for i in range(count))), ["int8/int8"], SCRATCHPAD).mean()
        for count in (1, 2, 3, 6, 12)
    ]
    assert per_layer[0] == per_layer[1]
    assert per_layer[2] < per_layer[3] < per_layer[4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("units = 5", "units needs tile_m and tile_n"),
        ("split_k = 2", "split_k needs units"),
        ("dequant_tile_m = 2", "dequant_tile_m needs dequant_s_per_weight"),
    ],
)
def test_keys_that_need_others_are_told(line, message):
    number = DEVICE.splitlines().index("[[compute]]") + 9
    lines = DEVICE.splitlines()
    with pytest.raises(ValueError, match=f"compute.* number 1: {message}"):
        parse_target("\n".join([*lines[:number], line, *lines[number:]]))


def test_an_option_outside_a_layers_own_is_told_as_that_even_where_no_kernel_runs_it():
    network = network_of(linear("a", 8, 8, 4), linear("b", 8, 8, 4))
    refused = (
        parse_target(DEVICE)
        .costs(network, SearchSpace({"*": ["int8/int8"], "a": ["int2", "int8/int8"]}))
        .attrs["refused"]
    )
    assert refused == {
        ("a", "int2"): "toy (toy kernels) has no kernel for int2 weights and fp32 inputs in a linear",
        ("b", "int2"): "not among the layer's options",
    }
