"""The labelled table: rows, units, reference, reasons."""

import subprocess
import sys

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.layers import Layer, Network
from mpq.options import SearchSpace

POSITIONS = 6


def linear(name, out, inner):
    shapes = (1, POSITIONS, inner), (1, POSITIONS, out)
    return Layer(
        name, "linear", (out, inner), out * inner, out * inner * POSITIONS, *shapes, weight_bytes=4 * out * inner
    )


def embedding(name, entries, width, **extra):
    parameters = entries * width
    shapes = (1, POSITIONS), (1, POSITIONS, width)
    given = {"macs": 0, "weight_bytes": 4 * parameters} | extra
    return Layer(name, "embedding", (entries, width), parameters, given.pop("macs"), *shapes, **given)


def network_of(*layers, dtype="fp32", outside=100):
    stored = sum(layer.weight_bytes for layer in layers)
    return Network(tuple(layers), total_bytes=stored + outside, outside_bytes=outside, dtype=dtype)


@pytest.fixture
def t4():
    return hardware.load("nvidia-t4")


NETWORK = network_of(embedding("embed", 1000, 64), linear("up", 128, 64), linear("down", 64, 128))


def test_rows_columns_and_measures(t4):
    frame = t4.costs(NETWORK, SearchSpace(["int4", "int8/int8"]))
    assert frame.index.names == ["layer", "option"]
    layers = ["embed", "up", "down"]
    assert list(frame.index) == [(layer, option) for layer in layers for option in ("int4", "int8/int8")]
    assert frame.attrs["measures"] == {"size": "B", "value_size": "B", "bops": "bops", "latency": "s"}
    assert list(frame.columns) == list(frame.attrs["measures"])
    assert np.isfinite(frame.to_numpy()).all()
    assert frame.attrs["offsets"] == {"size": 100.0}
    assert frame.attrs["refused"] == {}


def test_sizes_and_bops_by_hand(t4):
    frame = t4.costs(NETWORK, SearchSpace(["int4", "int8/int8"]))
    assert frame.loc[("up", "int4"), "size"] == 128 * 64 / 2 + 128 * 2
    assert frame.loc[("up", "int4"), "value_size"] == 128 * 64 / 2
    assert frame.loc[("up", "int4"), "bops"] == POSITIONS * 128 * 64 * 4 * 32
    assert frame.loc[("up", "int8/int8"), "bops"] == POSITIONS * 128 * 64 * 64
    assert frame.loc[("embed", "int4"), "bops"] == 0


def test_reference_is_the_unquantised_model(t4):
    frame = t4.costs(NETWORK, SearchSpace(["int4", "fp32"]), batch=4)
    reference, fp32 = frame.attrs["reference"], frame.xs("fp32", level="option")
    assert reference["size"] == NETWORK.total_bytes == fp32["size"].sum() + 100
    assert reference["value_size"] == NETWORK.total_bytes - 100
    assert reference["bops"] == 2 * POSITIONS * 128 * 64 * 32 * 32
    assert reference["latency"] == pytest.approx(fp32["latency"].sum(), rel=1e-12)
    assert set(reference) == set(frame.attrs["reference_meaning"]) == set(frame.columns)


def test_reference_is_the_dearest_option_where_the_model_cannot_run(t4):
    layers = [linear("up", 128, 64), linear("down", 64, 128)]
    frame = t4.costs(network_of(*layers, dtype="bf16"), SearchSpace(["int4", "int8/int8", "bf16"]))
    assert frame.xs("bf16", level="option").isna().all(axis=None)
    assert "no kernel for bf16 weights and bf16 inputs in a linear" in frame.attrs["refused"]["up", "bf16"]
    dearest = frame["latency"].groupby(level="layer").max().sum()
    assert frame.attrs["reference"]["latency"] == pytest.approx(dearest, rel=1e-12)
    assert "dearest" in frame.attrs["reference_meaning"]["latency"]
    assert "dearest" not in frame.attrs["reference_meaning"]["bops"]


def test_what_cannot_be_chosen_is_nan_with_its_reason(t4):
    space = SearchSpace({"*": ["int4/int4", "int6/int6"], "up": ["int8/int8"]}, pins={"embed": "int8"})
    frame = t4.costs(NETWORK, space)
    refused = frame.attrs["refused"]
    assert set(refused) == {key for key, row in frame.iterrows() if row.isna().any()}
    assert all(frame.loc[key].isna().all() for key in refused)
    assert refused["up", "int4/int4"] == "not among the layer's options"
    assert refused["down", "int6/int6"].startswith(
        "nvidia-t4 (TVM kernels as in HAWQ-V3, batch 8) has no kernel for int6"
    )
    allowed = {("embed", "int8"), ("up", "int8/int8"), ("down", "int4/int4")}
    assert {key for key in frame.index if key not in refused} == allowed


def test_lookups_cost_the_rows_they_read_and_ignore_the_activation_format(t4):
    space = SearchSpace(["int4", "int4/int4", "int4/int8"])
    frame = t4.costs(NETWORK, space, batch=10)
    row_bytes = 64 / 2 + 2  # 64 values of 4 bits and an fp16 scale
    expected = 10 * POSITIONS * row_bytes / (0.8 * 320e9)
    assert frame.loc["embed", "latency"].tolist() == pytest.approx([expected] * 3, rel=1e-12)
    decode = t4.costs(NETWORK, space, batch=10, phase="decode")
    assert decode.loc["embed", "latency"].tolist() == pytest.approx([expected / POSITIONS] * 3, rel=1e-12)


def test_a_tied_table_costs_as_much_as_the_linear_it_is(t4):
    tied = embedding("tied", 1000, 64, macs=1000 * 64 * POSITIONS, calls=2, input_elements=POSITIONS * 64,
                     output_elements=POSITIONS * 1000)  # fmt: skip
    space = SearchSpace(["int4", "int8/int8"])
    for phase in (None, "decode"):
        one = t4.costs(network_of(tied), space, phase=phase)["latency"].to_numpy()
        other = t4.costs(network_of(linear("head", 1000, 64)), space, phase=phase)["latency"].to_numpy()
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_what_rests_on_an_estimate_is_said(t4):
    frame = t4.costs(NETWORK, SearchSpace(["int4/int4"]))
    assert frame.attrs["estimates"] == ("latency",)
    behind = frame.attrs["provenance"]["estimates"]["latency"]
    assert "memory.dram: efficiency" in behind
    assert not any("hmma" in name for name in behind), "int4/int4 does not run on the fp16 unit"
    weight_only = t4.costs(NETWORK, SearchSpace(["int4"])).attrs["provenance"]["estimates"]["latency"]
    assert any("hmma" in name for name in weight_only)


def test_size_does_not_depend_on_batch_and_bops_are_a_samples(t4):
    space = SearchSpace(["int4", "int8/int8"])
    one, eight = (t4.costs(NETWORK, space, batch=batch) for batch in (1, 8))
    for column in ("size", "value_size", "bops"):
        assert one[column].equals(eight[column])
    assert (eight["latency"] > one["latency"]).all()


def test_storage_has_sizes_and_no_latency():
    space = SearchSpace(["int6/int6", "q4_k", "bcq3"])
    frame = hardware.storage().costs(network_of(linear("fc", 64, 256)), space)
    assert list(frame.columns) == ["size", "value_size", "bops"]
    assert np.isfinite(frame.to_numpy()).all()
    assert frame.attrs["estimates"] == ()
    assert set(frame.attrs["reference"]) == {"size", "value_size", "bops"}
    assert frame.loc[("fc", "q4_k"), "size"] == 64 * 256 * 4.5 / 8


def test_an_unknown_phase_is_refused(t4):
    with pytest.raises(ValueError, match="phase must be None, 'prefill' or 'decode', got 'train'"):
        t4.costs(NETWORK, SearchSpace(["int4"]), phase="train")


def test_a_traced_model_is_priced(t4):
    import torch

    from mpq.tracing import trace

    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(2048, 10))
    network = trace(model, torch.zeros(2, 16, 8, 8))
    frame = t4.costs(network, SearchSpace(["int4/uint8", "fp32"]), batch=2)
    assert frame["bops"].to_list() == [9437184, 294912 * 1024, 20480 * 32, 20480 * 1024]
    assert frame.loc[("0", "int4/uint8"), "size"] == 4608 / 2 + 32 * 2
    assert frame.attrs["reference"]["size"] == sum(4 * p.numel() for p in model.parameters())
    assert frame.attrs["offsets"]["size"] == 4 * (32 + 10)
    assert frame.attrs["reference"]["latency"] == pytest.approx(frame.xs("fp32", level=1)["latency"].sum(), rel=1e-12)


def test_import_is_lean():
    code = (
        "import sys, mpq.hardware_models as h; h.load('nvidia-t4').describe();"
        "print([m for m in ('torch', 'pandas', 'pulp', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
