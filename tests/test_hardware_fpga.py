"""FPGA dataflow: cells of a table by hand, what is refused, what a device file may say, ResNet-8 on a real board."""

import math

import numpy as np
import pytest
from tiny_networks import NETWORKS, convolution, dense, network_of

import mpq.hardware_models as hardware
from mpq.formats import parse
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.minifloat_luts import Operand, minifloat_arithmetic
from mpq.layers import Layer
from mpq.options import SearchSpace

DEVICE = """\
schema = 1
[target]
name = "toy"
kind = "fpga"
runtime = "toy dataflow"
[[source]]
id = "sheet"
title = "a sheet"
kind = "datasheet"
read = "2026"
[[source]]
id = "guess"
title = "a guess"
kind = "estimate"
read = "2026"
[fpga]
frequency_hz = 1e6
target_fps = 10
luts = 20000
dsps = 100
bram18 = 50
usable_luts = 0.7
weights = "block"
source = ["sheet"]
[[engine]]
name = "tables"
weight = ["int2", "int4"]
activation = ["uint2", "uint4", "int4"]
multiplier = "lut"
[[engine]]
name = "slices"
weight = "int8"
activation = ["uint8", "uint4"]
multiplier = "dsp"
macs_per_dsp = 2
source = ["sheet"]
[[engine]]
name = "floats"
weight = ["fp4", "fp8"]
activation = ["fp4", "fp8"]
multiplier = "lut"
shifter_luts_per_bit = 0.5
source = ["guess"]
"""
CONV = convolution("conv", (16, 32), (3, 3), 1, (16, 16))  # 256 vectors of 144 inputs, 32 outputs
DEPTH = convolution("depth", (32, None), (3, 3), 2, (16, 16))  # 64 vectors of 9 taps, 32 channels
FC = dense("fc", 100, 10)


def costs(layers, options, device=DEVICE, **settings):
    return parse_target(device).costs(network_of(layers), SearchSpace(list(options)), **settings)


def test_a_convolution_by_hand():
    # 1 MHz and 10 frames a second leave 100,000 cycles. 256 vectors x 144 x 32 = 1,179,648 products:
    # lanes 1, 2, 3, 4, 6, 8, 9 of 4 bits fill 36 bits; 12 lanes: 98,304 cycles < 100,000 and FINN stops there first.
    frame = costs([CONV], ["int4/uint4"])
    assert frame["latency"].iloc[0] == pytest.approx(98304e-6)
    # 1 element of 12 lanes: acc = ceil(log2 144 + 7 + 1) = 16; 12 x 3 x 8 + 8 x 23 + 16 = 488; floor(300 + 1.1 x 488)
    # and 426 of the window
    assert frame["luts"].iloc[0] == 836 + 426
    # weights: 48 bits wide, 384 deep: 1 x ceil(48 / 36) = 2; window: (3 + 1) x 1 x ceil(64 / 36) = 8
    assert frame["bram18"].iloc[0] == 10
    assert frame["dsps"].iloc[0] == 0
    assert costs([CONV], ["int4/uint4"], batch=3)["latency"].iloc[0] == pytest.approx(3 * 98304e-6)


def test_wide_weights_stop_the_lanes_and_take_slices():
    # 8 bits: 6 lanes are 48 bits wide, too many, and 4 it is; then elements: 1,179,648 / 4 / 4 = 73,728 < 100,000
    frame = costs([CONV], ["int8/uint8"])
    assert frame["latency"].iloc[0] == pytest.approx(73728e-6)
    assert frame["dsps"].iloc[0] == 2 * 4  # ceil(4 / 2) x 4
    # acc = ceil(7.17 + 15 + 1) = 24; 16 x 7 + 24 = 136; floor(300 + 1.1 x 4 x 136) + 426
    assert frame["luts"].iloc[0] == 898 + 426


def test_a_depthwise_layer_by_hand():
    # 64 vectors x 9 x 32 = 18,432 cycles are few enough for one element of one lane
    frame = costs([DEPTH], ["int4/uint4"])
    assert frame["latency"].iloc[0] == pytest.approx(18432e-6)
    # acc = ceil(log2 9 + 7 + 1) = 12; 24 + 8 + 12 = 44; floor(300 + 48.4) + 426
    assert frame["luts"].iloc[0] == 348 + 426
    # weights 4 bits x 288: 1; window (2 + 1) x ceil(32 / 512) x ceil(128 / 36)
    assert frame["bram18"].iloc[0] == 1 + 12


def test_the_slowest_unit_is_the_latency():
    frame = costs([CONV, DEPTH, FC], ["int4/uint4", "int2/uint4", "int8/uint8"])
    assert frame.attrs["aggregates"] == {"latency": "max"}
    assert frame.attrs["reference"]["latency"] == pytest.approx(frame["latency"].max())
    assert "steady state" in frame.attrs["provenance"]["notes"]["latency"]


def test_units_are_folded_for_what_the_slowest_reaches():
    """A target beyond the first layer's reach: the others are no faster than it is."""
    fast = DEVICE.replace("target_fps = 10", "target_fps = 1e6")
    frame = costs([CONV, DEPTH, FC], ["int4/uint4"], fast)
    # 256 vectors are 256 cycles, all outputs at once: 32 elements of 144 lanes would do it, but 36 bits are 9 lanes
    slowest = 256 * 144 / 9 * 1e-6
    assert frame["latency"].max() == pytest.approx(slowest) == frame["latency"]["conv", "int4/uint4"]
    alone = costs([FC], ["int4/uint4"], fast)
    assert alone["latency"].iloc[0] < frame["latency"]["fc", "int4/uint4"] < slowest
    assert alone["luts"].iloc[0] > frame["luts"]["fc", "int4/uint4"]


def test_resources_grow_with_bits_and_rate():
    for layer in (CONV, DEPTH, FC):
        narrow, wide = (costs([layer], [name])["luts"].iloc[0] for name in ("int2/uint2", "int4/uint4"))
        assert narrow < wide
        frames = [costs([layer], ["int4/uint4"], DEVICE.replace("_fps = 10", f"_fps = {fps}")) for fps in (10, 100)]
        assert frames[0]["luts"].iloc[0] <= frames[1]["luts"].iloc[0]
        assert frames[0]["latency"].iloc[0] >= frames[1]["latency"].iloc[0]


def test_memories_and_thresholds_of_the_device_file():
    block = costs([CONV], ["int4/uint4"]).iloc[0]
    tables = costs([CONV], ["int4/uint4"], DEVICE.replace('"block"', '"distributed"')).iloc[0]
    ultra = costs([CONV], ["int4/uint4"], DEVICE.replace('"block"', '"ultra"\nurams = 9')).iloc[0]
    assert tables["luts"] - block["luts"] == 12 * 4 * 384 / 64
    assert (block["bram18"], tables["bram18"], ultra["bram18"]) == (10, 8, 8)
    assert ultra["urams"] == 1
    assert "urams" not in block
    parallel = costs([CONV], ["int4/uint4"], DEVICE.replace('"block"', '"block"\nthresholds = "parallel"')).iloc[0]
    assert parallel["luts"] == 426 + math.floor(300 + 1.1 * (488 + 15 * 16 * 2))
    search = costs([CONV], ["int4/uint4"], DEVICE.replace('"block"', '"block"\nthresholds = "search"')).iloc[0]
    # 4 comparators of 16 bits; 32, 64, 128 and 256 words of 16 bits
    assert search["luts"] == 426 + math.floor(300 + 1.1 * (488 + 4 * 16 + 16 * (1 + 1 + 2 + 4)))


def test_minifloat_tables_by_hand():
    # e4m3: significands of 4 bits, shifts of up to 14; product 1 + 18 + 18 = 37 bits; 24 for 4 x 4 bits,
    # 8 for the exponents, 0.5 x 37 x ceil(log2 29) for the shifter
    side = Operand.of([parse("fp8_e4m3")])
    found = minifloat_arithmetic(side, side, np.array([144.0]), np.array([0.5]))
    assert found.multiplier_luts[0] == 24
    assert found.alignment_luts[0] == 8 + 92.5
    assert (found.product_bits[0], found.accumulator_bits[0]) == (37, 45)
    # in the unit: 4 lanes of 8 bits, 4 elements as for int8; floor(300 + 4.4 (4 x 124.5 + 37 x 7 + 45)) + 426
    assert costs([CONV], ["fp8_e4m3/fp8_e4m3"])["luts"].iloc[0] == 3828 + 426


def test_minifloats_are_estimates_and_dearer():
    frame = costs([CONV], ["int4/uint4", "fp8_e4m3/fp8_e4m3"])
    assert frame.attrs["estimates"] == ("luts",)
    assert costs([CONV], ["int4/uint4"]).attrs["estimates"] == ()
    as_tables = DEVICE.replace('"dsp"\nmacs_per_dsp = 2\nsource = ["sheet"]', '"lut"')
    luts = costs([CONV], ["int8/uint8", "fp8_e4m3/fp8_e4m3", "int4/uint4", "fp4_e2m1/fp4_e2m1"], as_tables)["luts"]
    assert luts.iloc[1] > 1.5 * luts.iloc[0]
    assert luts.iloc[3] == pytest.approx(luts.iloc[2], rel=0.2)


def test_what_no_unit_multiplies_is_refused():
    grouped = Layer("grouped", "conv2d", (8, 4, 3, 3), 288, 288, (1, 8, 3, 3), (1, 8, 1, 1), groups=2, kernel=(3, 3))
    up = Layer("up", "conv_transpose2d", (8, 4, 2, 2), 128, 128, (1, 4, 1, 1), (1, 8, 2, 2), kernel=(2, 2))
    table = Layer("table", "embedding", (100, 4), 400, 0, (1, 1), (1, 4))
    frame = costs([grouped, up, table, FC], ["int4/uint4", "int4", "int8/int4"])
    refused = frame.attrs["refused"]
    assert {layer for layer, option in refused if option == "int4/uint4"} == {"grouped", "up", "table"}
    assert refused["grouped", "int4/uint4"] == "toy (toy dataflow) has no unit for a conv2d in 2 groups"
    assert "int4 weights" in refused["up", "int4/uint4"]
    assert {option for layer, option in refused if layer == "fc"} == {"int4", "int8/int4"}
    assert frame.loc[list(refused)][["latency", "luts"]].isna().all(axis=None)
    meaning = costs([FC], ["int4/uint4"]).attrs["reference_meaning"]["luts"]
    assert meaning == "the dearest allowed option of every layer: toy cannot run the model in fp32"


def test_limits_are_what_closes_timing():
    assert parse_target(DEVICE).limits == {"luts": 14000.0, "dsps": 100.0, "bram18": 50.0}
    frame = costs([FC], ["int4/uint4"])
    assert {name: frame.attrs["measures"][name] for name in ("luts", "dsps", "bram18")} == {
        "luts": "luts", "dsps": "dsps", "bram18": "bram18",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"block"', '"ultra"', "urams is missing"),
        ('shifter_luts_per_bit = 0.5\nsource = ["guess"]\n', "", "shifter_luts_per_bit is missing"),
        ('["fp4", "fp8"]\nact', '["fp4", "mxfp4"]\nact', "not mxfp4"),
        ('["int2", "int4"]', '["int2", "int8"]', "has a row already"),
        (DEVICE[DEVICE.index("[[engine]]") :], "", r"\[\[engine\]\] is missing"),
        ("usable_luts = 0.7", "usable_luts = 1.7", "usable_luts must be above 0 and below 1"),
        ("target_fps = 10\n", "", "target_fps is missing"),
    ],
)
def test_device_files_that_are_wrong(old, new, message):
    assert old in DEVICE
    with pytest.raises(ValueError, match=message):
        parse_target(DEVICE.replace(old, new))


def test_resnet8_on_the_zu3eg():
    """1000 frames a second: 4 bits fit, 8-bit minifloats do not; each format pays in another resource."""
    names = ["int4/uint4", "int2/uint2", "int8/uint8", "fp4_e2m1/fp4_e2m1", "fp8_e4m3/fp8_e4m3"]
    target = hardware.load("zu3eg-finn")
    frame = target.costs(NETWORKS["ic"], SearchSpace(names))
    assert not frame.isna().any(axis=None)
    assert frame["latency"].max() < 1e-3
    totals = frame[["luts", "dsps", "bram18"]].groupby("option").sum()
    fits = (totals <= [target.limits[name] for name in totals.columns]).all(axis=1)
    assert fits["int4/uint4"]
    assert fits["int2/uint2"]
    assert not fits["fp8_e4m3/fp8_e4m3"]
    assert totals["dsps"]["int8/uint8"] > 0 == totals["dsps"]["int4/uint4"]
    assert totals["luts"]["int2/uint2"] < totals["luts"]["int4/uint4"] < totals["luts"]["fp8_e4m3/fp8_e4m3"]
    assert totals["bram18"]["int2/uint2"] < totals["bram18"]["int4/uint4"] < totals["bram18"]["int8/uint8"]


def test_a_batch_takes_longer_and_no_more_room():
    frame = costs([CONV, DEPTH, FC], ["int2/uint2", "int4/uint4"], batch=4)
    alone = costs([CONV, DEPTH, FC], ["int2/uint2", "int4/uint4"])
    assert np.allclose(frame["latency"], 4 * alone["latency"])
    assert (frame["luts"] == alone["luts"]).all()
