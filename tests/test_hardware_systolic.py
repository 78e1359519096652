"""Systolic arrays against SCALE-Sim, a simulation element by element, and a walk over every fold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq.hardware_models as hardware
from mpq.hardware_models.array_kernels import half_buffers
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.double_buffering import Operands, stalled_cycles
from mpq.hardware_models.prices import Prices
from mpq.hardware_models.systolic_cycles import (
    DATAFLOWS,
    PACKINGS,
    buffer_accesses,
    compute_cycles,
    lanes,
    mapped,
    mapping_efficiency,
    utilisation,
)
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace

GOLDEN = Path(__file__).parents[2] / "shared" / "reference" / "scalesim_golden.json"

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
bandwidth_Bps = 4e9
efficiency = 0.5
energy_pJ_per_bit = 10
source = ["sheet"]
[memory.input_buffer]
capacity_bytes = 512
source = ["sheet"]
[memory.weight_buffer]
capacity_bytes = 1024
source = ["sheet"]
[memory.output_buffer]
capacity_bytes = 2048
source = ["sheet"]
[memory.register]
energy_pJ_per_bit = 0.1
source = ["sheet"]
[memory.array]
energy_pJ_per_bit = 0.2
source = ["sheet"]
[array]
weight = ["int2", "int4", "int8", "int16"]
activation = ["int2", "int4", "int8"]
rows = 8
columns = 4
dataflow = "ws"
packing = "none"
multiplier_bits = 8
accumulator_bits = 32
frequency_hz = 1e9
source = ["sheet"]
"""


def device(dataflow="ws", packing="none", bandwidth=4e9, **buffers):
    text = DEVICE.replace('"ws"', f'"{dataflow}"').replace('"none"', f'"{packing}"')
    text = text.replace("bandwidth_Bps = 4e9", f"bandwidth_Bps = {bandwidth}")
    for name, size in {"input": 512, "weight": 1024, "output": 2048}.items():
        text = text.replace(f"capacity_bytes = {size}", f"capacity_bytes = {buffers.get(name, size)}")
    return parse_target(text)


def linear(name, out, inner, positions, calls=1):
    macs = out * inner * positions * calls
    elements = {"input_elements": positions * inner * calls, "output_elements": positions * out * calls}
    return Layer(
        name,
        "linear",
        (out, inner),
        out * inner,
        macs,
        (1, positions, inner),
        (1, positions, out),
        calls=calls,
        **elements,
    )


def conv(name, out, inner, size, groups=1):
    shape = (out, inner // groups, 3, 3)
    images = (1, inner, size, size), (1, out, size, size)
    macs = math.prod(shape) * size * size
    return Layer(name, "conv2d", shape, math.prod(shape), macs, *images, groups=groups, kernel=(3, 3))


def priced(target, layers, options):
    cells = Cells.of(Network(tuple(layers)), [Option(*option.split("/")) for option in options])
    return cells, target.models[0].price(cells, Prices())


# What the array does, element by element.


def simulated(dataflow, m, k, n, rows, columns):
    """Cycles and accesses of every fold, from when each element passes each processing element."""
    on_rows, on_columns, streamed = (int(size) for size in mapped(dataflow, m, k, n))
    cycles, stationary, passed, results = 0, 0, 0, 0
    load = 0 if dataflow == "os" else rows
    for row in range(0, on_rows, rows):
        for column in range(0, on_columns, columns):
            used_rows, used_columns = min(rows, on_rows - row), min(columns, on_columns - column)
            last = 0
            for i in range(rows):
                for j in range(columns):
                    for t in range(streamed):
                        last = max(last, load + i + j + t)
            cycles += last + 1
            stationary += used_rows * used_columns
            passed += used_rows * streamed
            results += used_columns * streamed
    if dataflow == "os":
        return cycles, passed, results, stationary
    return (cycles, passed, stationary, results) if dataflow == "ws" else (cycles, stationary, passed, results)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_cycles_and_accesses_are_those_of_a_simulation(dataflow, matmul, rows, columns):
    cycles, *accesses = simulated(dataflow, *matmul, rows, columns)
    assert compute_cycles(dataflow, matmul, rows, columns) == cycles
    assert [float(count) for count in buffer_accesses(dataflow, matmul, rows, columns)] == accesses
    on_rows, on_columns, _ = mapped(dataflow, *matmul)
    folds = math.ceil(on_rows / rows) * math.ceil(on_columns / columns)
    stationary = {"os": accesses[2], "ws": accesses[1], "is": accesses[0]}[dataflow]
    assert mapping_efficiency(dataflow, matmul, rows, columns) == pytest.approx(stationary / (folds * rows * columns))
    assert utilisation(dataflow, matmul, rows, columns) == pytest.approx(math.prod(matmul) / (cycles * rows * columns))


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no published data at {GOLDEN}")
def test_golden_run_of_scalesim():
    golden = json.loads(GOLDEN.read_text())
    layer, report = golden["topologies"]["alexnet_part"][0], golden["golden"]["COMPUTE_REPORT"][0]
    access = golden["golden"]["DETAILED_ACCESS_REPORT"][0]
    kernel, stride = layer["Filter Height"], layer["Strides"]
    side = math.ceil((layer["IFMAP Height"] - kernel + stride) / stride)
    matmul = (side**2, kernel**2 * layer["Channels"], layer["Num Filter"])
    cycles = compute_cycles("ws", matmul, 32, 32)
    assert cycles == report["Total Cycles"] + 1 == 112284
    reads = buffer_accesses("ws", matmul, 32, 32)
    assert [*reads] == [access[f"SRAM {name}"] for name in ("IFMAP Reads", "Filter Reads", "OFMAP Writes")]
    assert 100 * mapping_efficiency("ws", matmul, 32, 32) == pytest.approx(report["Mapping Efficiency %"], rel=1e-12)
    used = 100 * utilisation("ws", matmul, 32, 32) * cycles / report["Total Cycles"]
    assert used == pytest.approx(report["Overall Util %"], rel=1e-12)


def scalesim_counts(dataflow, m, k, n, rows, columns):
    from importlib import import_module

    compute = import_module(f"scalesim.compute.systolic_compute_{dataflow}")
    scale = import_module("scalesim.scale_config").scale_config()
    scale.array_rows, scale.array_cols, scale.df, scale.valid_conf_flag = rows, columns, dataflow, True
    simulator = getattr(compute, f"systolic_compute_{dataflow}")()
    inputs = np.arange(m * k, dtype=float).reshape(m, k)
    weights = 10**7 + np.arange(k * n, dtype=float).reshape(k, n)
    outputs = 2 * 10**7 + np.arange(m * n, dtype=float).reshape(m, n)
    simulator.set_params(config_obj=scale, ifmap_op_mat=inputs, filter_op_mat=weights, ofmap_op_mat=outputs)
    cycles = simulator.get_demand_matrices()[0].shape[0]
    counts = simulator.get_ifmap_requests(), simulator.get_filter_requests(), simulator.get_ofmap_requests()
    return cycles, counts, simulator.get_avg_mapping_efficiency()


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_random_shapes_against_scalesim(dataflow):
    pytest.importorskip("scalesim", reason="scalesim 3.0.0 is not installed")
    rng = np.random.default_rng(["os", "ws", "is"].index(dataflow))
    for _ in range(12):
        matmul = tuple(int(size) for size in rng.integers(1, 70, 3))
        rows, columns = (int(size) for size in rng.integers(2, 20, 2))
        cycles, counts, efficiency = scalesim_counts(dataflow, *matmul, rows, columns)
        assert compute_cycles(dataflow, matmul, rows, columns) == cycles
        ours = buffer_accesses(dataflow, matmul, rows, columns)
        assert [*ours[:2]] == [*counts[:2]]
        folds = math.ceil(matmul[0] / rows) * math.ceil(matmul[2] / columns) if dataflow == "os" else 0
        assert ours[2] + folds * (rows + columns) == counts[2]  # the quirk that is not followed
        assert mapping_efficiency(dataflow, matmul, rows, columns) == pytest.approx(efficiency)


# Waiting for memory.


def walked(dataflow, operands, outer_axis, inner_axis, fold, rate):
    """Every fold in turn, with what the buffers hold."""
    cycles, moved, first_load = 0.0, {"inputs": 0.0, "weights": 0.0, "outputs": 0.0}, None
    chunks = int(operands.chunks)
    (outer, outer_tile), (inner, inner_tile) = outer_axis, inner_axis
    seen_outer, seen_inner, seen_still = None, set(), set()
    for chunk in range(chunks):
        seen_inner.clear()
        for o in range(0, outer, outer_tile):
            for i in range(0, inner, inner_tile):
                share_o, share_i = min(outer_tile, outer - o) / outer, min(inner_tile, inner - i) / inner
                ends = i + inner_tile >= inner
                fresh = i not in seen_inner
                seen_inner.add(i)
                if dataflow == "os":
                    new_row = seen_outer != o
                    seen_outer = o
                    bits = {
                        "inputs": operands.inputs * share_o if new_row or not operands.inputs_stay else 0,
                        "weights": operands.weights * share_i if fresh or not operands.weights_stay else 0,
                        "outputs": operands.outputs * share_o * share_i,
                    }
                else:
                    still, streamed = ("weights", "inputs") if dataflow == "ws" else ("inputs", "weights")
                    known = (o, i) in seen_still and getattr(operands, f"{still}_stay")
                    seen_still.add((o, i))
                    again = fresh or not getattr(operands, f"{streamed}_stay")
                    bits = {
                        still: 0 if known else getattr(operands, still) * share_o * share_i,
                        streamed: getattr(operands, streamed) * share_i / chunks if again else 0,
                        "outputs": operands.outputs * share_o / chunks if ends else 0,
                    }
                if first_load is None:
                    first_load = (bits["inputs"] + bits["weights"]) / rate
                cycles += max(fold, sum(bits.values()) / rate)
                moved = {name: moved[name] + bits[name] for name in moved}
    return cycles, first_load, moved


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@given(
    st.tuples(*[st.floats(1, 1000)] * 3),
    st.tuples(*[st.booleans()] * 2),
    st.integers(1, 4),
    st.tuples(*[st.integers(1, 20)] * 4),
    st.floats(1, 100),
)
@settings(max_examples=60, deadline=None)
def test_stalls_are_those_of_a_walk_over_every_fold(dataflow, bits, stay, chunks, sizes, fold):
    chunks = 1 if dataflow == "os" else chunks
    operands = Operands(*map(np.array, bits), *map(np.array, stay), np.array(float(chunks)))
    outer, inner = (sizes[0], sizes[1]), (sizes[2], sizes[3])
    axes = tuple((np.array(float(size)), tile) for size, tile in (outer, inner))
    cycles, first, moved = stalled_cycles(dataflow, operands, axes, np.array(fold), 3.0)
    expected = walked(dataflow, operands, outer, inner, fold, 3.0)
    assert float(cycles) == pytest.approx(expected[0], rel=1e-9)
    assert float(first) == pytest.approx(expected[1], rel=1e-9)
    assert {name: float(value) for name, value in moved.items()} == pytest.approx(expected[2], rel=1e-9)


# A network on a device.


def test_a_linear_layer_by_hand():
    # 10 positions, 20 -> 6 features on 8 x 4, weights stationary: 3 x 2 folds of 10 + 16 + 4 - 2 = 28 cycles.
    _, prices = priced(device(), [linear("fc", 6, 20, 10)], ["int8/int8"])
    rate = 16  # bits a cycle: 2e9 B/s at 1 GHz
    weights = 6 * 20 * 8 + 6 * 16  # scales of 6 channels in fp16: 1056 bits, at most half of 1024 B: they stay
    inputs, outputs = 20 * 10 * 8, 6 * 10 * 8
    full, part = (
        weights * (8 / 20),
        weights * (4 / 20),
    )  # of the weights along k: 8, 8 and 4 of 20; along n: 4 and 2 of 6
    folds = [full * 4 / 6 + inputs * 8 / 20] * 2 + [part * 4 / 6 + inputs * 4 / 20 + outputs * 4 / 6]
    folds += [full * 2 / 6] * 2 + [part * 2 / 6 + outputs * 2 / 6]  # the inputs, 1600 bits, stay: half of 512 B
    cycles = folds[0] / rate + sum(max(28, bits / rate) for bits in folds)
    assert max(folds) / rate > 28 > min(folds) / rate
    assert prices.tables["latency"][0, 0] == pytest.approx(cycles / 1e9, rel=1e-12)
    assert prices.accesses["dram"][0, 0] == pytest.approx(weights + inputs + outputs)
    assert prices.accesses["input_buffer"][0, 0] == pytest.approx(20 * 10 * 2 * 8 + inputs)
    assert prices.accesses["weight_buffer"][0, 0] == pytest.approx(6 * 20 * 8 + weights)
    assert prices.accesses["output_buffer"][0, 0] == pytest.approx(60 * (2 * 2 * 32 + 8) + outputs)
    assert prices.accesses["register"][0, 0] == pytest.approx(1200 * (8 + 8 + 64))
    assert prices.accesses["array"][0, 0] == pytest.approx(1200 * (8 + 32))
    assert np.isnan(prices.tables["latency"][0, 1])


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_without_stalls_latency_is_compute(dataflow):
    target = device(dataflow, bandwidth=1e30, output=10**9)
    layers = [linear("fc", 30, 50, 7), conv("c", 16, 8, 6), conv("dw", 8, 8, 6, groups=8)]
    cells, prices = priced(target, layers, ["int8/int8", "int4/int8", "int2/int2"])
    work = cells.work
    for row in range(3):
        matmul = work.m[row], work.k[row], work.n[row]
        expected = work.repeats[row] * compute_cycles(dataflow, matmul, 8, 4) / 1e9
        assert prices.tables["latency"][row, :-1] == pytest.approx([expected] * 3, rel=1e-9)


def test_groups_and_calls_are_products_one_after_the_other():
    target = device()
    (_, once), (_, thrice) = (priced(target, [linear("fc", 30, 50, 7, calls)], ["int4/int4"]) for calls in (1, 3))
    assert thrice.tables["latency"][0, 0] == pytest.approx(3 * once.tables["latency"][0, 0])
    (_, depthwise), (_, single) = (
        priced(device(bandwidth=1e30), [conv("c", channels, channels, 6, groups=channels)], ["int4/int4"])
        for channels in (8, 1)
    )
    assert depthwise.tables["latency"][0, 0] == pytest.approx(8 * single.tables["latency"][0, 0])
    for name, bits in depthwise.accesses.items():
        assert bits[0, 0] == pytest.approx(8 * single.accesses[name][0, 0])


def test_the_first_load_is_paid_once_a_call_not_once_a_group():
    # Depthwise on 8 x 4: k = 9 makes two folds; the first loads 8 of 9 weights and of the inputs, at 16 bits a cycle.
    one, two = (
        priced(device(), [conv("c", channels, channels, 3, groups=channels)], ["int8/int8"])[1].tables["latency"][0, 0]
        for channels in (1, 2)
    )
    first_load = 8 / 9 * (9 * 8 + 16 + 9 * 8) / 16 / 1e9
    assert 2 * one - two == pytest.approx(first_load, rel=1e-9)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@given(st.tuples(*[st.integers(1, 60)] * 3), st.tuples(*[st.integers(20, 900)] * 3))
@settings(max_examples=40, deadline=None)
def test_what_stays_in_the_buffers_follows_their_capacities(dataflow, matmul, capacities):
    m, k, n = matmul
    half = dict(zip(("inputs", "weights", "sums"), (4 * capacity for capacity in capacities), strict=True))  # bits
    inputs, weights, outputs = m * k * 8, n * k * 8 + n * 16, m * n * 8
    chunks, sizes = 1, {"os": ((m, 8), (n, 4)), "ws": ((n, 4), (k, 8)), "is": ((m, 4), (k, 8))}[dataflow]
    streamed = {"os": k, "ws": m, "is": n}[dataflow]
    while dataflow != "os" and streamed / chunks * min(sizes[0][0], 4) * 32 > half["sums"] and chunks < streamed:
        chunks += 1
    operands = Operands(
        *(np.array(float(bits)) for bits in (inputs, weights, outputs)),
        inputs_stay=(inputs if dataflow == "is" else inputs * min(8, m) / m if dataflow == "os" else inputs / chunks)
        <= half["inputs"],
        weights_stay=(weights / chunks if dataflow == "is" else weights) <= half["weights"],
        chunks=chunks,
    )
    fold = streamed / chunks + 8 + 4 - 2 + (0 if dataflow == "os" else 8)
    cycles, first, moved = walked(dataflow, operands, *sizes, fold, 16)
    target = device(dataflow, **dict(zip(("input", "weight", "output"), capacities, strict=True)))
    _, prices = priced(target, [linear("fc", n, k, m)], ["int8/int8"])
    assert prices.tables["latency"][0, 0] == pytest.approx((cycles + first) / 1e9, rel=1e-9)
    assert prices.accesses["dram"][0, 0] == pytest.approx(sum(moved.values()), rel=1e-9)


def test_partial_sums_that_do_not_fit_split_the_stream():
    # 100 positions x 4 columns x 32 bits against half of 800 bytes: 4 chunks of 25 positions.
    target = device(bandwidth=1e30, output=800)
    _, prices = priced(target, [linear("fc", 4, 8, 100)], ["int8/int8"])
    assert prices.tables["latency"][0, 0] == pytest.approx(4 * (25 + 16 + 4 - 2) / 1e9)
    assert prices.accesses["weight_buffer"][0, 0] == pytest.approx(4 * 32 * 8 + 32 * 8 + 4 * 16)
    small = device(bandwidth=1e30, output=800, weight=16)  # weights that do not fit come once a chunk
    _, again = priced(small, [linear("fc", 4, 8, 100)], ["int8/int8"])
    more = again.accesses["dram"][0, 0] - prices.accesses["dram"][0, 0]
    assert more == pytest.approx(3 * (32 * 8 + 4 * 16))


def test_packing_shortens_the_reduction():
    widths = np.array([8, 5, 4, 3, 2])
    assert lanes("none", widths, widths, 8).tolist() == [1, 1, 1, 1, 1]
    assert lanes("weights", widths, 8, 8).tolist() == [1, 1, 2, 2, 4]
    assert lanes("bitfusion", widths, widths, 8).tolist() == [1, 1, 4, 4, 16]
    assert lanes("ideal", widths, widths, 8) == pytest.approx(64 / widths**2)
    with pytest.raises(ValueError, match="packing must be one of none, weights, bitfusion, ideal, got 'dense'"):
        lanes("dense", 8, 8, 8)
    with pytest.raises(ValueError, match="dataflow must be one of os, ws, is, got 'rs'"):
        compute_cycles("rs", (1, 1, 1), 2, 2)
    for packing, steps in {"none": 64, "weights": 32, "bitfusion": 16, "ideal": 16}.items():
        target = device("os", packing, bandwidth=1e30)
        _, prices = priced(target, [linear("fc", 4, 64, 8)], ["int4/int4"])
        assert prices.tables["latency"][0, 0] == pytest.approx((steps + 8 + 4 - 2) / 1e9), packing


@given(
    st.sampled_from(DATAFLOWS), st.sampled_from(PACKINGS), st.tuples(*[st.integers(1, 200)] * 3), st.integers(50, 5000)
)
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_never_slows_and_without_packing_fewer_bits_never_do(dataflow, packing, shape, capacity):
    n, k, m = shape
    layers = [linear("fc", n, k, m)]
    times = []
    for bandwidth in (1e8, 2e8, 1e10):
        target = device(dataflow, packing, bandwidth, input=capacity, weight=capacity, output=capacity)
        _, prices = priced(target, layers, ["int8/int8", "int4/int8", "int4/int4", "int2/int2"])
        times.append(prices.tables["latency"][0, :-1])
        if packing == "none":  # packed, a fold takes more operands and the first load is longer
            assert np.all(np.diff(times[-1]) <= 1e-12 * times[-1][:-1])
    assert np.all(times[0] >= times[1])
    assert np.all(times[1] >= times[2])
    moved, least = prices.accesses["dram"][0, 0], 8 * (n * k + m * k + m * n) + 16 * n
    assert moved >= least * (1 - 1e-12)


def test_what_the_array_cannot_run_is_refused_with_the_reason():
    frame = device().costs(Network((linear("fc", 4, 8, 2),)), SearchSpace(["int8/int8", "int16/int8", "int8"]))
    assert frame["latency"].notna().tolist() == [True, False, False]
    reasons = {option.split("@")[0]: reason for (_, option), reason in frame.attrs["refused"].items()}
    assert "multiplies operands of at most 8 bits" in " ".join(reasons.values())
    assert "has no kernel for int8 weights and fp32 inputs in a linear" in " ".join(reasons.values())
    assert "toy cannot run the model in fp32" in frame.attrs["reference_meaning"]["latency"]


def test_lookups_cost_the_rows_they_read():
    table = Layer("e", "embedding", (1000, 64), 64000, 0, (1, 5), (1, 5, 64))
    _, prices = priced(device(), [table], ["int8/int8", "int4/int8"])
    rows = [5 * 64 * 8 + 5 * 16, 5 * 64 * 4 + 5 * 16]
    assert prices.accesses["dram"][0, :2] == pytest.approx(rows)
    assert prices.tables["latency"][0, :2] == pytest.approx([bits / 16 / 1e9 for bits in rows])
    assert np.all(prices.accesses["register"][0, :2] == 0)


def test_one_buffer_serves_all_operands():
    text = DEVICE.replace("input_buffer", "buffer")
    for name in ("weight", "output"):
        start = text.index(f"[memory.{name}_buffer]")
        text = text[:start] + text[text.index("[memory.", start + 1) :]
    _, own = priced(device(bandwidth=1e30), [linear("fc", 4, 8, 2)], ["int8/int8"])
    _, shared = priced(parse_target(text), [linear("fc", 4, 8, 2)], ["int8/int8"])
    assert half_buffers(parse_target(text).models[0].memories) == dict.fromkeys(
        ("inputs", "weights", "outputs"), 512 * 8 / 6
    )
    assert half_buffers(device().models[0].memories) == {"inputs": 2048, "weights": 4096, "outputs": 8192}
    each = sum(own.accesses[f"{name}_buffer"][0, 0] for name in ("input", "weight", "output"))
    assert shared.accesses["buffer"][0, 0] == pytest.approx(each)
    assert "input_buffer" not in shared.accesses


def test_an_array_needs_the_bandwidth_of_its_memory():
    with pytest.raises(ValueError, match=r"\[memory.dram\] with bandwidth_Bps and efficiency is missing: \[array\]"):
        parse_target(DEVICE.replace("bandwidth_Bps = 4e9\nefficiency = 0.5\n", ""))
    with pytest.raises(ValueError, match="dataflow must be one of os, ws, is, got 'rs'"):
        parse_target(DEVICE.replace('"ws"', '"rs"'))


@pytest.mark.parametrize("name", ["systolic", "eyeriss"])
def test_shipped_arrays_price_bits_and_shapes(name):
    target = hardware.load(name)
    layers = (conv("c", 64, 64, 16), conv("dw", 64, 64, 16, groups=64), linear("fc", 512, 512, 1))
    network = Network(layers)
    cells = Cells.of(network, [Option("int8", "int8"), Option("int4", "int4")])
    prices = target.models[0].price(cells, Prices())
    times = prices.tables["latency"]
    macs_a_second = cells.work.macs / times[:, 0]
    assert macs_a_second[0] > 5 * macs_a_second[1]  # a depthwise layer leaves the array idle
    assert macs_a_second[0] > 2 * macs_a_second[2]  # so does one position, waiting for weights
    gain = times[0, 0] / times[0, 1]
    assert gain == pytest.approx(1, abs=0.1) if name == "eyeriss" else 3 < gain <= 4.1
    assert all("energy_pJ_per_bit" in entry for entry in target.models[0].memories.values())
    assert set(prices.accesses) == set(target.models[0].memories)
