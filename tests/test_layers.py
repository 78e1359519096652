"""`Layer.matmul` against counted multiply-adds, and `Units` against a loop that cuts one block after the other."""

import dataclasses
import json
import subprocess
import sys
from math import prod

import msgspec
import numpy as np
import pytest

from mpq.layers import Layer, Network, Unit, Units

FC = Layer("fc", "linear", (5, 8), 40, 480, (2, 6, 8), (2, 6, 5), batch=2)
CONV = Layer("conv", "conv2d", (6, 2, 3, 3), 108, 108 * 2 * 49, (2, 4, 9, 9), (2, 6, 7, 7), groups=2, kernel=(3, 3))
HEAD = Layer("head", "linear", (1, 4), 4, 4, (1, 4), (1, 1))
NETWORK = Network((FC, CONV, HEAD), edges=(("conv", "fc"),), siblings=(("fc", "head"),), batch=2)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (FC, (12, 8, 5, 1)),
        (dataclasses.replace(CONV, batch=2), (98, 18, 3, 2)),
        # 4 -> 6 channels in 2 groups, 3x3, 5x5 inputs: every input position makes 3 channels x 9 taps from 2
        (
            Layer(
                *("up", "conv_transpose2d", (6, 2, 3, 3), 108, 2 * 25 * 108, (2, 4, 5, 5), (2, 6, 11, 11)),
                **{"groups": 2, "kernel": (3, 3), "batch": 2, "channel_axis": 1},
            ),
            (50, 2, 27, 2),
        ),
        # 4 experts, 8 -> 16, 12 tokens among them
        (Layer("moe", "experts", (64, 8), 512, 12 * 128, (12, 8), (12, 16), experts=4, batch=2), (3, 8, 16, 4)),
        (Layer("emb", "embedding", (100, 8), 800, 0, (2, 6), (2, 6, 8), batch=2), (0, 8, 100, 1)),
        # depthwise
        (Layer("dw", "conv1d", (4, 1, 3), 12, 2 * 7 * 12, (2, 4, 9), (2, 4, 7), groups=4, kernel=(3,)), (14, 3, 1, 4)),
    ],
)
def test_matmul(layer, expected):
    m, k, n, repeats = layer.matmul()
    assert (m, k, n, repeats) == expected
    assert m * k * n * repeats == layer.macs
    assert k * n * repeats == layer.parameters == prod(layer.weight_shape)
    assert layer.matmul(3 * layer.batch) == (3 * m, k, n, repeats)


def test_matmul_of_several_calls_adds_positions():
    twice = dataclasses.replace(FC, macs=2 * FC.macs, calls=2)
    assert twice.matmul() == (24, 8, 5, 1)


def test_matmul_rounds_uneven_experts_up():
    layer = Layer("moe", "experts", (64, 8), 512, 13 * 128, (13, 8), (13, 16), experts=4)
    assert layer.matmul() == (4, 8, 16, 4)


def test_matmul_refuses_no_samples():
    with pytest.raises(ValueError, match=r"batch must be at least 1, got 0 for layer 'fc'"):
        FC.matmul(0)


def test_gemm_takes_a_layer_or_its_name():
    assert NETWORK.gemm("fc", 1) == NETWORK.gemm(FC, 1) == (6, 8, 5, 1)


def test_elements_default_to_the_shapes():
    assert (FC.input_elements, FC.output_elements) == (96, 60)
    assert dataclasses.replace(FC, input_elements=7).input_elements == 7


def test_lookup_by_name():
    assert NETWORK["conv"] is CONV
    assert "conv" in NETWORK
    assert "cnv" not in NETWORK


@pytest.mark.parametrize(
    ("name", "message"),
    [("cnv", "did you mean 'conv'"), ("xyz", "it has fc, conv, head"), ("rnn", "'rnn' is not planned: recurrent")],
)
def test_unknown_layer_is_explained(name, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NETWORK, skipped={"rnn": "recurrent"})[name]


def test_names_must_differ():
    with pytest.raises(ValueError, match="must have different names, got 'fc' twice"):
        Network((FC, CONV, FC))


def test_repr_is_a_summary():
    text = repr(dataclasses.replace(NETWORK, skipped={"rnn": "recurrent"}))
    assert text == ("Network(3 layers, 152 weights in fp32, 11.1 k MACs for 2 samples, 1 group of siblings, 1 skipped)")


def test_json_round_trip():
    network = dataclasses.replace(NETWORK, skipped={"rnn": "recurrent"}, fingerprint="ab")
    assert msgspec.json.decode(msgspec.json.encode(network), type=Network) == network
    assert msgspec.json.decode(json.dumps(dataclasses.asdict(network)), type=Network) == network


def cut_one_by_one(layers, rows, columns):
    """The dumb way: (layer, top, bottom, left, right), one block after the other."""
    for layer in layers:
        height, width = layer.weight_shape[0], prod(layer.weight_shape[1:])
        tall, wide = rows or height, columns or width
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                yield layer, top, min(top + tall, height), left, min(left + wide, width)


@pytest.mark.parametrize(
    ("granularity", "rows", "columns"),
    [
        ("layer", None, None),
        ("rows", 1, None),
        ("rows:1", 1, None),
        ("rows:2", 2, None),
        ("rows:4", 4, None),
        ("rows:100", 100, None),
        ("groups:4", 1, 4),
        ("groups:5", 1, 5),
        ("groups:64", 1, 64),
    ],
)
def test_units_cover_every_weight_once(granularity, rows, columns):
    units = NETWORK.units(granularity)
    expected = list(cut_one_by_one(NETWORK.layers, rows, columns))
    found = [(u.layer, u.rows.start, u.rows.stop, u.columns.start, u.columns.stop) for u in units]
    assert found == expected
    assert [u.parameters for u in units] == [(b - t) * (r - le) for _, t, b, le, r in expected]
    assert [units[i] for i in range(len(units))] == list(units)
    assert [u.label for u in units] == units.labels.tolist()
    assert len(set(units.labels.tolist())) == len(units)
    for layer in NETWORK.layers:
        covered = np.zeros((layer.weight_shape[0], prod(layer.weight_shape[1:])), dtype=int)
        for unit in units:
            if unit.layer is layer:
                covered[unit.rows, unit.columns] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize(
    ("granularity", "labels"),
    [
        ("layer", ["fc", "conv", "head"]),
        ("rows:4", ["fc[0:4]", "fc[4:5]", "conv[0:4]", "conv[4:6]", "head"]),
        ("rows:5", ["fc", "conv[0:5]", "conv[5:6]", "head"]),
    ],
)
def test_labels(granularity, labels):
    assert NETWORK.units(granularity).labels.tolist() == labels


def test_labels_of_groups():
    labels = NETWORK.units("groups:6").labels.tolist()
    assert labels[:3] == ["fc[0,0:6]", "fc[0,6:8]", "fc[1,0:6]"]
    assert labels[-1] == "head"


def test_units_are_a_sequence_of_arrays():
    units = NETWORK.units("rows:2")
    assert isinstance(units[0], Unit)
    assert isinstance(units[1:4], Units)
    assert list(units[1:4]) == list(units)[1:4]
    assert units[-1] == list(units)[-1]
    assert units[np.int64(2)] == units[2]
    for array in (units.layer_index, units.row_start, units.column_stop, units.parameters):
        assert array.dtype == np.int64
    assert repr(units) == "Units(7 units of 3 layers)"
    with pytest.raises(IndexError, match="below 7, got 7"):
        units[7]


def test_a_million_units_stay_arrays():
    layer = Layer("big", "linear", (4096, 16384), 4096 * 16384, 4096 * 16384, (1, 16384), (1, 4096))
    units = Network((layer, FC)).units("groups:64")
    assert len(units) == 4096 * 256 + 5
    assert int(units.parameters.sum()) == layer.parameters + FC.parameters
    assert "labels" not in vars(units)
    assert units[4096 * 256 - 1].label == "big[4095,16320:16384]"


def test_no_layers_no_units():
    assert len(Network(()).units("rows:4")) == 0
    assert Network(()).units().labels.tolist() == []


@pytest.mark.parametrize(
    "granularity", ["", "row", "rows:", "rows:0", "groups", "groups:-1", "groups:0", "layers", "rows:2.5", None, 16]
)
def test_bad_granularity_is_refused_with_the_rule(granularity):
    with pytest.raises(ValueError, match=r"granularity must be 'layer', 'experts', 'rows', 'rows:N'.*got "):
        NETWORK.units(granularity)


def test_layers_need_no_torch():
    code = "import sys, mpq.layers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
