"""A composed target against its parts, priced one by one."""

import numpy as np
import pytest

from mpq.hardware_models import compose, load, storage
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.prices import Prices
from mpq.hardware_models.pricing import price
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace


def linear(name, out, inner, positions):
    shapes = (1, positions, inner), (1, positions, out)
    elements = out * inner
    return Layer(name, "linear", (out, inner), elements, elements * positions, *shapes, weight_bytes=4 * elements)


NETWORK = Network((linear("up", 64, 32, 6), linear("down", 32, 64, 6)), total_bytes=16384)
OPTIONS = ("int4/int8", "int8/int8", "fp16/fp16")
CALIBRATION = """
[calibration]
fitted_on = "a net"
method = "affine"
date = "2026"
alpha = 0.5
beta_s = 0.25
samples = 9
mape = 0.1
kendall_tau = 0.9
source = ["quick sheet"]
"""
CONVERSION = """
[[conversion]]
from = "int8"
to = "fp16"
s_per_element = 1e-9
energy_pJ_per_element = 3
source = ["quick sheet"]
"""


def device(name, formats, ops, capacity, extra="", kind="datasheet"):
    return parse_target(
        f"""\
schema = 1
[target]
name = "{name}"
kind = "npu"
runtime = "{name} kernels"
notes = "notes of {name}"
[[source]]
id = "{name} sheet"
title = "a sheet of {name}"
kind = "{kind}"
read = "2026"
[memory.flash]
capacity_bytes = {capacity}
holds = ["weights"]
source = ["{name} sheet"]
[memory.dram]
bandwidth_Bps = 2e9
efficiency = 0.5
energy_pJ_per_bit = 7
source = ["{name} sheet"]
[[compute]]
unit = "unit"
weight = {list(formats)}
activation = ["int8", "fp16", "fp32"]
ops_per_s = {ops}
efficiency = 0.25
launch_overhead_s = 5e-6
source = ["{name} sheet"]
{extra}
""",
        f"{name}.toml",
    )


QUICK = device("quick", ["int8", "fp16", "fp32"], 4e9, 9000, CALIBRATION + CONVERSION)
FRUGAL = device(
    "frugal", ["int4", "int8", "fp32"], 1e9, 7000, '[energy]\noperations = "horowitz-45nm"\n', kind="estimate"
)


def cells():
    return Cells.of(NETWORK, [Option(*option.split("/")) for option in OPTIONS])


def test_quantities_are_those_of_their_targets():
    both = compose(latency=QUICK, energy=FRUGAL)
    found, quick, frugal = (price(target, cells()) for target in (both, QUICK, FRUGAL))
    assert np.array_equal(found.tables["latency"], quick.tables["latency"], equal_nan=True)
    assert np.array_equal(found.tables["energy"], frugal.tables["energy"], equal_nan=True)
    assert not np.array_equal(quick.tables["latency"], frugal.tables["latency"], equal_nan=True)
    assert found.offsets["latency"] == 0.25  # of the calibration, which the energy does not see
    assert found.offsets.get("energy", 0.0) == frugal.offsets.get("energy", 0.0)
    assert set(found.tables) == {*quick.tables, "energy"}
    for name in ("size", "value_size", "bops", "activation_peak"):
        if name in quick.tables:
            assert np.array_equal(found.tables[name], quick.tables[name], equal_nan=True)
            assert found.offsets.get(name) == quick.offsets.get(name)


def test_what_one_refuses_is_refused_and_named():
    frame = compose(latency=QUICK, energy=FRUGAL).costs(NETWORK, SearchSpace(OPTIONS))
    alone = {target.name: target.costs(NETWORK, SearchSpace(OPTIONS)).attrs["refused"] for target in (QUICK, FRUGAL)}
    assert alone["quick"].keys() == {("up", "int4/int8"), ("down", "int4/int8")}
    assert frame.attrs["refused"].keys() == alone["quick"].keys() | alone["frugal"].keys()
    assert frame.attrs["refused"]["up", "int4/int8"].endswith("(on quick)")
    assert frame.attrs["refused"]["up", "fp16/fp16"].endswith("(on frugal)")
    assert frame["energy"].isna().sum() == frame["latency"].isna().sum() == 4


def test_provenance_names_both():
    both = compose(latency=QUICK, energy=FRUGAL)
    assert both.name == "latency of quick, energy of frugal"
    assert both.runtime == "quick kernels; frugal kernels"
    frame = both.costs(NETWORK, SearchSpace(["int8/int8"]))
    provenance = frame.attrs["provenance"]
    assert provenance["notes"]["latency"] == "quick: quick kernels"
    assert provenance["notes"]["energy"].startswith("frugal: horowitz-45nm")
    assert set(provenance["sources"]) == {"quick sheet", "frugal sheet"}
    assert frame.attrs["estimates"] == ("energy",)
    assert provenance["estimates"]["energy"] == ["frugal: memory.dram: energy_pJ_per_bit"]
    text = both.describe()
    for part in (
        "quick: memory.dram: bandwidth_Bps = 2e+09",
        "frugal: energy: horowitz",
        "calibrated, a net",
        "notes of",
    ):
        assert part in text


def test_limits_are_the_least():
    assert compose(latency=QUICK, energy=FRUGAL).limits == {"size": 7000.0}
    assert compose(latency=FRUGAL, energy=FRUGAL).limits == {"size": 7000.0}
    assert compose(latency=QUICK).limits == {"size": 9000.0}


def test_conversions_belong_to_latency():
    (row,) = compose(latency=QUICK, energy=FRUGAL).conversions
    assert row["s_per_element"] == 1e-9
    assert "energy_pJ_per_element" not in row
    assert QUICK.conversions[0]["energy_pJ_per_element"] == 3
    assert compose(energy=QUICK, latency=FRUGAL).conversions == ()
    whole = compose(latency=QUICK, energy=QUICK)
    assert whole.conversions == QUICK.conversions


class Scratch:
    """A family that asks for more activation memory, as a microcontroller's does."""

    def __init__(self, bytes_):
        self.bytes, self.limits = bytes_, {}

    def price(self, cells, so_far):
        return Prices(tables={f"luts{self.bytes}": np.ones(cells.shape)}, offsets={"activation_peak": self.bytes})

    def describe(self):
        return []


def test_scratch_memory_is_the_most_of_both():
    one, two = (type(QUICK)(f"t{size}", "mcu", "none", models=(Scratch(size),)) for size in (10, 30))
    offsets = [price(target, cells()).offsets["activation_peak"] for target in (two, compose(luts10=one, luts30=two))]
    assert offsets[0] == offsets[1]
    assert price(compose(luts10=one), cells()).offsets["activation_peak"] == offsets[0] - 20


def test_a_composed_target_can_be_composed():
    nested = compose(latency=compose(latency=QUICK, energy=FRUGAL), energy=compose(energy=FRUGAL))
    flat = compose(latency=QUICK, energy=FRUGAL)
    for name in ("latency", "energy"):
        found, expected = (price(target, cells()).tables[name] for target in (nested, flat))
        assert np.array_equal(found, expected, equal_nan=True)
    assert price(nested, cells()).offsets["latency"] == 0.25


def test_compose_refuses_nonsense():
    with pytest.raises(ValueError, match="needs targets by quantity"):
        compose()
    with pytest.raises(ValueError, match="size is priced on every target"):
        compose(size=QUICK)
    with pytest.raises(TypeError, match="energy must come from a Target, as load.name. returns, got str"):
        compose(energy="frugal")
    with pytest.raises(ValueError, match="quick does not price 'energy': it prices latency"):
        price(compose(energy=QUICK), cells())
    with pytest.raises(ValueError, match="storage does not price 'latency': it prices nothing of its own"):
        price(compose(latency=storage()), cells())


def test_shipped_targets_compose():
    frame = compose(latency=load("nvidia-t4"), energy=FRUGAL).costs(NETWORK, SearchSpace(["int8/int8"]))
    assert np.isfinite(frame[["latency", "energy"]].to_numpy()).all()
