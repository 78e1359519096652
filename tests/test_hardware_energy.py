"""The energy of cells against slow sums and hand arithmetic; what a device file must say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.attention import Attention
from mpq.hardware_models import load
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.device_numbers import Entry
from mpq.hardware_models.energy import CountedEnergy
from mpq.hardware_models.energy_operations import NamedOperations, OneEnergy
from mpq.hardware_models.energy_tables import OPERATIONS
from mpq.hardware_models.prices import Prices
from mpq.hardware_models.pricing import price
from mpq.hardware_models.technology import energy_factor
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace


def linear(name, out, inner, positions):
    shapes = (1, positions, inner), (1, positions, out)
    return Layer(
        name, "linear", (out, inner), out * inner, out * inner * positions, *shapes, weight_bytes=4 * out * inner
    )


def lookup(name, entries, width, positions):
    shapes = (1, positions), (1, positions, width)
    return Layer(name, "embedding", (entries, width), entries * width, 0, *shapes, weight_bytes=4 * entries * width)


NETWORK = Network((lookup("embed", 50, 16, 6), linear("up", 32, 16, 6), linear("down", 16, 32, 6)))
HEAD = """\
schema = 1
[target]
name = "toy"
kind = "asic"
runtime = "toy kernels"
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
"""
COMPUTE = """\
[memory.dram]
bandwidth_Bps = 2e9
efficiency = 0.5
energy_pJ_per_bit = 7
source = ["sheet"]
[[compute]]
unit = "all"
weight = ["int2", "int4", "int8", "fp16", "fp32"]
activation = ["int4", "int8", "fp16", "fp32"]
ops_per_s = 4e9
efficiency = 0.25
launch_overhead_s = 5e-6
source = ["guess"]
"""


def device(energy, compute=COMPUTE):
    return parse_target(HEAD + compute + energy, "toy.toml")


def cells_of(*options, network=NETWORK, **run):
    pairs = [option.partition("/") for option in options]
    return Cells.of(network, [Option(weight, activation or None) for weight, _, activation in pairs], **run)


NAMED = '[energy]\noperations = "horowitz-45nm"\n'


def slow_energy(target, cells, layer, column, e_mac):
    """Joules of one cell, by the roofline's traffic."""
    work, bits = cells.work, cells.activation_bits[column]
    bytes_moved = cells.weight_bytes[layer, column] * work.weight_reads[layer]
    moved = 8 * bytes_moved + (work.inputs[layer] + work.outputs[layer]) * bits
    return 1e-12 * (work.macs[layer] * (e_mac if work.macs[layer] else 0) + moved * 7)


def test_energy_of_cells_by_hand():
    cells = cells_of("int4/int8", "int8/int8", "int4", batch=3)
    target = device(NAMED + 'static_W = 2.0\nsource = ["sheet"]\n')
    prices = price(target, cells)
    assert prices.measures["energy"] == "J"
    each = [0.1 + 0.12, 0.2 + 0.12, 3.7 + 0.9, 3.7 + 0.9]
    for layer, column in np.ndindex(cells.shape):
        expected = (
            slow_energy(target, cells, layer, column, each[column]) + 2.0 * prices.tables["latency"][layer, column]
        )
        assert prices.tables["energy"][layer, column] == pytest.approx(expected, rel=1e-12)
    note = prices.notes["energy"]
    for part in ("horowitz-45nm (Horowitz, ISSCC 2014: 45 nm, 0.9 V)", "32 bits", "dram 7 pJ a bit", "static 2 W"):
        assert part in note


def test_a_table_is_scaled_to_the_process():
    scaled = device(NAMED + 'process_nm = 16\nvoltage_V = 0.8\naccumulator_bits = 16\nsource = ["sheet"]\n')
    cells = cells_of("int8/int8")
    energy = price(scaled, cells).tables["energy"]
    each = (0.2 + 0.06) * energy_factor(45, 0.9, 16, 0.8)
    assert energy[1, 0] == pytest.approx(slow_energy(scaled, cells, 1, 0, each))
    assert "scaled by 0.142 to 16 nm at 0.8 V" in price(scaled, cells).notes["energy"]


@pytest.mark.parametrize(("node", "kind"), [(32, "secondary"), (28, "derived")])
def test_a_node_between_those_of_the_table_is_derived(node, kind):
    target = device(NAMED + f'process_nm = {node}\nvoltage_V = 0.9\nsource = ["sheet"]\n')
    used = np.array([[False, True]] * 3)
    found = price(target, cells_of("int8/int8")).rests_on(used)["energy"]
    (multiply,) = (number for number in found if number.key == "fp32 x fp32 multiply-add")
    assert multiply.sources[0].kind == kind
    assert multiply.value == pytest.approx(4.6 * energy_factor(45, 0.9, node, 0.9))


def test_zigzag_counts_every_multiply_add_alike():
    macs = 56 * 56 * 64 * 64 * 9
    conv = Layer("conv", "conv2d", (64, 64, 3, 3), 36864, macs, (1, 64, 56, 56), (1, 64, 56, 56), kernel=(3, 3))
    flat = device('[energy]\nenergy_pJ_per_mac = 0.04\nsource = ["sheet"]\n')
    cells = cells_of("int2/int4", "int8/int8", network=Network((conv,)))
    counted = next(model for model in flat.models if isinstance(model, CountedEnergy))
    assert isinstance(counted.operations, OneEnergy)
    assert macs == 115605504
    silent = counted.price(cells, Prices(accesses={"dram": np.zeros(cells.shape)}))
    assert silent.tables["energy"][0] * 1e12 == pytest.approx([4624220.16] * 3, rel=1e-12)
    assert "0.04 pJ a multiply-add in every format" in silent.notes["energy"]


def test_rows_of_the_device():
    rows = ""
    for weight, kind, energy in (("int4", '"linear"', 0.1), ("int8", '"*"', 0.3)):
        rows += (
            f'[[mac_energy]]\nweight = "{weight}"\nactivation = "int8"\nops = {kind}\nenergy_pJ_per_mac = {energy}\n'
        )
        rows += 'source = ["guess"]\n'
    cells = cells_of("int4/int8", "int8/int8", "fp16/fp16")
    target = device(rows)
    prices = price(target, cells)
    for column, each in enumerate((0.1, 0.3)):
        assert prices.tables["energy"][1, column] == pytest.approx(slow_energy(target, cells, 1, column, each))
    assert np.isnan(prices.tables["energy"][1:, 2:]).all()
    assert prices.reasons[1, 2] == "has no energy of a multiply-add of fp16 weights and fp16 inputs"
    assert np.isfinite(prices.tables["energy"][0]).all()  # looked up, never multiplied
    used = np.zeros(cells.shape, dtype=bool)
    used[1, 0] = True
    assert {number.value for number in prices.rests_on(used)["energy"]} == {0.1, 7.0}


def test_refused_cells_cost_nothing_known():
    assert np.isnan(price(device(NAMED), cells_of("int3/int8")).tables["energy"][1:, 0]).all()
    frame = device(NAMED).costs(NETWORK, SearchSpace(["int8/int8", "int3/int8"]))
    assert np.isnan(frame.loc[("up", "int3/int8"), "energy"])
    assert frame.attrs["refused"][("up", "int3/int8")].startswith("toy (toy kernels) has no kernel for int3 weights")
    assert frame.attrs["measures"]["energy"] == "J"
    assert frame.attrs["reference"]["energy"] > frame["energy"].xs("int8/int8", level="option").sum()


def test_what_rests_on_an_estimate_says_so():
    named = device(NAMED)
    used = cells_of("int8/int8")
    mask = np.array([[True, False]] * 3)
    assert not any(number.is_estimate for number in price(named, used).rests_on(mask)["energy"])
    frame = named.costs(NETWORK, SearchSpace(["int4/int8"]))
    assert set(frame.attrs["estimates"]) == {"latency", "energy"}
    found = frame.attrs["provenance"]["estimates"]["energy"]
    assert found == ["energy table horowitz-45nm: int4 x int8 multiply-add"]
    assert "horowitz-45nm" in frame.attrs["provenance"]["notes"]["energy"]
    timed = device(NAMED + 'static_W = 1\nsource = ["sheet"]\n').costs(NETWORK, SearchSpace(["int8/int8"]))
    assert "compute all: efficiency" in timed.attrs["provenance"]["estimates"]["energy"]


def test_memories_without_energy_take_those_of_a_technology():
    bare = COMPUTE.replace("energy_pJ_per_bit = 7\n", "")
    cells = cells_of("int8/int8")
    given, named = price(device(NAMED), cells), price(device(NAMED + 'dram_technology = "lpddr4"\n', bare), cells)
    difference = given.tables["energy"] - named.tables["energy"]
    assert difference == pytest.approx(2e-12 * given.accesses["dram"])
    assert any(number.is_estimate for number in named.rests_on(np.array([[True, False]] * 3))["energy"])
    sram = device(
        NAMED + 'sram_table = "cacti-45nm"\n', COMPUTE + '[memory.buffer]\ncapacity_bytes = 1024\nsource = ["sheet"]\n'
    )
    (model,) = (model for model in sram.models if isinstance(model, CountedEnergy))
    assert model.bits["buffer"].value == pytest.approx(1.13324 / 32)
    moved = model.price(cells, Prices(accesses={"buffer": np.full(cells.shape, 64.0)})).tables["energy"]
    assert moved[0] == pytest.approx(1e-12 * 2 * 1.13324)  # the lookup multiplies nothing


def test_active_power_times_calibrated_latency():
    calibration = """[calibration]
fitted_on = "a net"
method = "affine"
date = "2026"
alpha = 0.5
beta_s = 0.25
samples = 9
mape = 0.1
kendall_tau = 0.9
source = ["sheet"]
"""
    cells = cells_of("int4/int8")
    prices = price(device(calibration + '[energy]\nactive_W = 3\nsource = ["sheet"]\n'), cells)
    plain = price(device('[energy]\nactive_W = 3\nsource = ["sheet"]\n'), cells)
    assert prices.tables["latency"] == pytest.approx(0.5 * plain.tables["latency"])
    assert prices.tables["energy"] == pytest.approx(3 * prices.tables["latency"])
    assert prices.offsets["energy"] == pytest.approx(3 * 0.25)
    assert prices.notes["energy"] == "3 W times latency"
    static = price(device(calibration + NAMED + 'static_W = 4\nsource = ["sheet"]\n'), cells)
    assert static.offsets["energy"] == pytest.approx(1.0)


def test_a_pipeline_multiplies_its_slowest_stage():
    power = device('[energy]\nactive_W = 3\nsource = ["sheet"]\n').models[-1]
    cells = cells_of("int4/int8")
    stages = Prices(tables={"latency": np.ones(cells.shape)}, aggregates={"latency": "max"})
    assert power.price(cells, stages).aggregates == {"energy": "max"}
    static = device(NAMED + 'static_W = 3\nsource = ["sheet"]\n').models[-1]
    pipeline = Prices(
        {"latency": np.ones(cells.shape)}, aggregates={"latency": "max"}, accesses={"dram": np.ones(cells.shape)}
    )
    with pytest.raises(ValueError, match="static_W cannot be shared out"):
        static.price(cells, pipeline)


def test_attention_is_an_offset():
    run = Attention("attn", 4, 2, 10, 10, 16, 16, qk_macs=6400, pv_macs=6400)
    network = Network(NETWORK.layers, attention=(run,))
    cells = cells_of("int8/int8", network=network, batch=2)
    prices = price(device(NAMED), cells)
    assert prices.offsets["energy"] == pytest.approx(2e-12 * (12800 * 4.6 + 1920 * 32 * 7))
    assert "of attention are an offset" in prices.notes["energy"]
    rows = '[[mac_energy]]\nweight = "int8"\nactivation = "int8"\nenergy_pJ_per_mac = 1\nsource = ["sheet"]\n'
    left_out = price(device(rows), cells)
    assert "energy" not in left_out.offsets
    assert "attention is left out" in left_out.notes["energy"]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(OPERATIONS)), moved=st.floats(0, 1e6))
def test_energy_grows_with_bits_at_fixed_traffic(name, moved):
    options = [f"int{bits}/int8" for bits in range(2, 9)]
    cells = cells_of(*options)
    operations = NamedOperations(Entry("energy", {}, ()), OPERATIONS[name])
    (bit,) = (number for number in device(NAMED).numbers if number.key == "energy_pJ_per_bit")
    counted = CountedEnergy(operations.settings, operations, {"dram": bit})
    found = counted.price(cells, Prices(accesses={"dram": np.full(cells.shape, moved)})).tables["energy"][:, :-1]
    assert np.all(found >= 0)
    assert np.all(np.diff(found, axis=1) >= 0)
    assert found[1, 0] < found[1, -1] or name == "qkeras"  # where the wider operand decides


# --- what is refused

BARE = COMPUTE.replace("energy_pJ_per_bit = 7\n", "")
SHEET = 'source = ["sheet"]\n'
WRONG = [
    (NAMED, BARE, r"\[memory.dram\]: energy_pJ_per_bit is missing: \[energy\] counts what passes here"),
    ("[energy]\naccumulator_bits = 16\n" + SHEET, COMPUTE, "one of these four: got none of them"),
    (NAMED + "active_W = 2\n" + SHEET, COMPUTE, "one of these four: got operations and active_W"),
    ("[energy]\nactive_W = 2\nstatic_W = 1\n" + SHEET, COMPUTE, r"toy.toml:\d+: \[energy\]: static_W has no meaning"),
    (
        '[energy]\noperations = "bitfusion-45nm-fixed"\naccumulator_bits = 16\n' + SHEET,
        COMPUTE,
        r"toy.toml:\d+: \[energy\]: bitfusion-45nm-fixed has an adder of its own",
    ),
    (NAMED + "process_nm = 16\n" + SHEET, COMPUTE, "give both or neither"),
    (NAMED + "process_nm = 3\nvoltage_V = 0.8\n" + SHEET, COMPUTE, r"toy.toml:\d+: .*between 7 and 130 nm, got 3 nm"),
    (
        "[energy]\nenergy_pJ_per_mac = 1\naccumulator_bits = 16\n" + SHEET,
        COMPUTE,
        "accumulator_bits scales a named table",
    ),
    ('[energy]\noperations = "horowitz"\n', COMPUTE, "operations must be one of horowitz-45nm, .*, got 'horowitz'"),
    (NAMED + "static_W = 2\n", COMPUTE, "static_W has no source"),
    (
        NAMED + 'sram_table = "cacti-45nm"\n',
        COMPUTE + "[memory.register]\ncapacity_bytes = 64\n" + SHEET,
        "capacity_bytes 64 has no energy",
    ),
]


@pytest.mark.parametrize(("energy", "compute", "message"), WRONG)
def test_a_device_file_is_told_what_is_wrong(energy, compute, message):
    with pytest.raises(ValueError, match=message):
        device(energy, compute)


def test_a_level_without_energy_stops_the_price():
    model, cells = device(NAMED).models[-1], cells_of("int8/int8")
    ones = np.ones(cells.shape)
    with pytest.raises(ValueError, match=r"\[memory.l2\] is accessed but has no energy: give it energy_pJ_per_bit"):
        model.price(cells, Prices(accesses={"dram": ones, "l2": ones}))
    with pytest.raises(ValueError, match="describes none that counts"):
        model.price(cells, Prices(tables={"latency": ones}))
    power = device("[energy]\nactive_W = 2\n" + SHEET).models[-1]
    with pytest.raises(ValueError, match="active_W needs latency"):
        power.price(cells, Prices())


SHIPPED = ("bitfusion", "eyeriss", "gap8", "stm32h743-cmsisnn", "stm32h743-tinyengine", "systolic")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_devices_price_energy(name):
    shapes = (1, 16, 14, 14), (1, 32, 14, 14)
    conv = Layer("conv", "conv2d", (32, 16, 3, 3), 4608, 4608 * 196, *shapes, kernel=(3, 3), weight_bytes=4 * 4608)
    prices = price(load(name), cells_of("int8/int8", "int4/int8", network=Network((conv,))))
    energy = prices.tables["energy"]
    assert energy[0, 0] > 0
    assert prices.notes["energy"]
    mcu = "gap8", "stm32h743-cmsisnn"
    if name in mcu:
        assert energy[0, 1] > energy[0, 0]  # unpacking takes time, and time is all there is
    elif np.isfinite(energy[0, 1]):
        assert energy[0, 1] < energy[0, 0]


def test_bitfusion_by_hand():
    target = load("bitfusion")
    cells = cells_of("int2/int2", "int4/int8", network=Network((linear("fc", 64, 64, 16),)))
    prices = price(target, cells)
    per_bit = {n.where: n.value for n in target.numbers if n.key == "energy_pJ_per_bit"}
    moved = sum(per_bit[f"memory.{level}"] * bits for level, bits in prices.accesses.items())
    arithmetic = 64 * 64 * 16 * np.array([0.55992 / 16, 0.55992 / 2])
    expected = 1e-12 * (arithmetic + moved[0, :2]) + 0.0329 * prices.tables["latency"][0, :2]
    assert prices.tables["energy"][0, :2] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(prices.tables["energy"][0, 2])  # fp32


def test_without_an_energy_table_nothing_is_priced():
    assert "energy" not in price(device(""), cells_of("int8/int8")).tables
