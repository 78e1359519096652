"""Tables of measured kernels: a dict of rows as reference, HAWQ-V3's published latencies, and every wrong file."""

import json
from pathlib import Path

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.cells import Cells
from mpq.hardware_models.lookup_table import lookup_csv, parse_lookup_rows, read_lookup_table, read_shapes
from mpq.layers import Layer, Network
from mpq.options import Option, SearchSpace
from mpq.problem import AllocationProblem
from mpq.solvers import ILPSolver

HEADER = "kind,m,k,n,repeats,taps,weight,activation,latency [us]\n"
DEVICE = """\
schema = 1

[target]
name = "mine"
kind = "cpu"
runtime = "kernels"

[[source]]
id = "clock"
title = "a clock"
kind = "{kind}"
read = "2026"

[lookup]
file = "tables/times.csv"
entries = {entries}
source = ["clock"]
"""


def device(folder, rows, *, entries=None, kind="measured", header=HEADER):
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables" / "times.csv").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    path = folder / "mine.toml"
    path.write_text(DEVICE.format(entries=len(rows) if entries is None else entries, kind=kind))
    return path


def linear(name, m, k, n, *, batch=1, calls=1, dtype_bytes=4):
    positions = (batch, m, k), (batch, m, n)
    return Layer(
        name, "linear", (n, k), n * k, batch * m * k * n * calls, *positions,
        batch=batch, calls=calls, weight_bytes=dtype_bytes * n * k,
        input_elements=batch * m * k * calls, output_elements=batch * m * n * calls,
    )  # fmt: skip


def convolution(name, channels, filters, size, window, groups=1):
    weights = filters * channels // groups * window**2
    return Layer(
        name, "conv2d", (filters, channels // groups, window, window), weights, weights * size**2,
        (1, channels, size, size), (1, filters, size, size), kernel=(window, window), groups=groups,
        weight_bytes=4 * weights,
    )  # fmt: skip


def costs(path, network, options, **settings):
    return hardware.load(path).costs(network, SearchSpace(options), **settings)


def test_prices_are_those_of_a_dict_of_rows(tmp_path):
    random = np.random.default_rng(0)
    layers = [
        linear("a", 3, 16, 8), linear("twin", 3, 16, 8), linear("b", 5, 16, 8), linear("twice", 3, 16, 8, calls=2),
        convolution("c", 8, 12, 4, 3), convolution("grouped", 8, 12, 4, 3, groups=2),
        convolution("depthwise", 8, 8, 4, 3, groups=8), convolution("pointwise", 8, 12, 4, 1),
    ]  # fmt: skip
    shapes = [
        "linear,3,16,8,1,1", "linear,5,16,8,1,1", "conv2d,16,72,12,1,9", "conv2d,16,36,6,2,9",
        "depthwise_conv2d,16,9,1,8,9", "conv2d,16,8,12,1,1",
    ]  # fmt: skip
    pairs = [("int4", "fp32"), ("int8", "int8"), ("fp32", "fp32")]
    times = {(shape, pair): float(random.integers(1, 1000)) for shape in shapes for pair in pairs}
    del times["conv2d,16,72,12,1,9", ("int4", "fp32")]
    rows = [f"{shape},{','.join(pair)},{time}" for (shape, pair), time in times.items()]
    frame = costs(device(tmp_path, list(random.permutation(rows))), Network(tuple(layers)), ["int4", "int8/int8"])
    shape_of = dict(zip([layer.name for layer in layers], [0, 0, 1, 0, 2, 3, 4, 5], strict=True))
    for layer in layers:
        for option, pair in (("int4", ("int4", "fp32")), ("int8/int8", ("int8", "int8"))):
            expected = times.get((shapes[shape_of[layer.name]], pair), np.nan) * 1e-6 * layer.calls
            assert frame.loc[(layer.name, option), "latency"] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    whole = sum(times[shapes[shape_of[layer.name]], ("fp32", "fp32")] * layer.calls for layer in layers)
    assert frame.attrs["reference"]["latency"] == pytest.approx(1e-6 * whole, rel=1e-12)
    assert frame.attrs["measures"]["latency"] == "s"
    assert frame.attrs["refused"] == {
        (
            "c",
            "int4",
        ): "mine (kernels) has no measured entry for int4 weights and fp32 inputs in a conv2d of m=16, k=72, "
        "n=12, taps=9"
    }


@pytest.mark.parametrize("change", [{"m": 4}, {"k": 15}, {"n": 9}])
def test_no_neighbouring_shape_stands_in(tmp_path, change):
    path = device(tmp_path, ["linear,3,16,8,1,1,int8,int8,5", "linear,3,16,8,1,1,fp32,fp32,9"])
    sizes = {"m": 3, "k": 16, "n": 8} | change
    frame = costs(path, Network((linear("a", **sizes),)), ["int8/int8"])
    assert np.isnan(frame["latency"]).all()
    reason = frame.attrs["refused"]["a", "int8/int8"]
    assert "has no measured entry for int8 weights and int8 inputs in a linear of m={m}, k={k}, n={n}".format(
        **sizes
    ) in (reason)
    assert "latency" not in frame.attrs["reference"]


def test_batch_and_phase_ask_for_other_rows(tmp_path):
    path = device(tmp_path, [f"linear,{m},16,8,1,1,{f},{f},{m}" for m in (1, 2, 12, 24) for f in ("int8", "fp32")])
    network = Network((linear("a", 12, 16, 8, batch=4),), batch=4)

    def latency(**settings):
        return costs(path, network, ["int8/int8"], **settings).loc[("a", "int8/int8"), "latency"]

    assert latency() == pytest.approx(12e-6)
    assert latency(batch=2) == pytest.approx(24e-6)
    assert latency(batch=2, phase="decode") == pytest.approx(2e-6)


def test_a_row_with_the_group_size_goes_before_one_without(tmp_path):
    rows = ["linear,3,64,8,1,1,int4@group32,fp32,5", "linear,3,64,8,1,1,int4,fp32,7", "linear,3,64,8,1,1,fp32,fp32,9"]
    options = ["int4@group32", "int4@group16", "int4@mse", "int4@group32@mse"]
    frame = costs(device(tmp_path, rows), Network((linear("a", 3, 64, 8),)), options)
    assert frame["latency"].tolist() == pytest.approx([5e-6, 7e-6, 7e-6, 5e-6])
    only = costs(device(tmp_path, rows[:1] + rows[2:]), Network((linear("a", 3, 64, 8),)), options)
    assert np.isnan(only["latency"]).tolist() == [False, True, True, False]


def test_energy_units_and_estimates(tmp_path):
    header = HEADER.replace("latency [us]", "latency [ms],energy [mJ],note")
    rows = ["linear,3,16,8,1,1,int8,int8,5,2,warm", "linear,3,16,8,1,1,fp32,fp32,9,4,"]
    frame = costs(
        device(tmp_path, rows, header=header, kind="estimate"), Network((linear("a", 3, 16, 8),)), ["int8/int8"]
    )
    assert frame.iloc[0][["latency", "energy"]].tolist() == pytest.approx([5e-3, 2e-3])
    assert frame.attrs["measures"]["energy"] == "J"
    assert set(frame.attrs["estimates"]) == {"latency", "energy"}


def test_a_table_of_embeddings_is_looked_up_for_free(tmp_path):
    embedding = Layer("words", "embedding", (100, 16), 1600, 0, (1, 12), (1, 12, 16), weight_bytes=6400)
    rows = ["linear,12,16,8,1,1,int8,fp32,5", "linear,12,16,8,1,1,fp32,fp32,9"]
    frame = costs(device(tmp_path, rows), Network((embedding, linear("a", 12, 16, 8))), ["int8", "int4"])
    assert frame.loc[("words", "int8"), "latency"] == 0
    assert np.isnan(frame.loc[("words", "int4"), "latency"])
    assert frame.attrs["reference"]["latency"] == pytest.approx(9e-6)


def test_traffic_is_told_where_there_is_a_memory(tmp_path):
    path = device(tmp_path, ["linear,3,16,8,1,1,int4,int8,5"])
    memory = '[memory.dram]\nenergy_pJ_per_bit = 4\nsource = ["clock"]\n'
    path.write_text(path.read_text() + memory)
    model = next(model for model in hardware.load(path).models if hasattr(model, "table"))
    cells = Cells.of(Network((linear("a", 3, 16, 8),)), [Option("int4@group16", "int8")])
    prices = model.price(cells, None)
    weights = 16 * 8 * 4 + 8 * 16  # eight groups of sixteen with a scale each
    assert prices.accesses["dram"][0, 0] == weights + (3 * 16 + 3 * 8) * 8


def test_a_written_table_is_read_back(tmp_path):
    random = np.random.default_rng(1)
    rows = [f"linear,{m},16,8,1,1,int8,int8,{random.random()}" for m in range(1, 20)]
    table = read_lookup_table(device(tmp_path, rows).parent / "tables" / "times.csv")
    (tmp_path / "again.csv").write_text(lookup_csv(table))
    again = read_lookup_table(tmp_path / "again.csv")
    assert again.kernel_keys == table.kernel_keys
    assert (again.quantities["latency"] == table.quantities["latency"]).all()


def test_parquet_says_the_same(tmp_path):
    import pandas as pd

    path = device(tmp_path, ["linear,3,16,8,1,1,int8,int8,5", "linear,4,16,8,1,1,int8,int8,6.5"])
    pd.read_csv(tmp_path / "tables" / "times.csv").to_parquet(tmp_path / "tables" / "times.parquet")
    path.write_text(path.read_text().replace("times.csv", "times.parquet"))
    frame = costs(path, Network((linear("a", 4, 16, 8),)), ["int8/int8"])
    assert frame.iloc[0]["latency"] == pytest.approx(6.5e-6)


GOOD = ["linear,3,16,8,1,1,int8,int8,5", "linear,4,16,8,1,1,int8,int8,6"]
WRONG = [
    (HEADER, ["linear,3,16,8,1,1,int8,int8,5", "linear,03,16,8,1,1,int8,int8,6"],
     "times.csv:3: prices the kernel of line 2 again: kind linear, m 3, k 16"),
    (HEADER, ["linaer,3,16,8,1,1,int8,int8,5"], "csv:2: kind must be a kind of layer, got 'linaer': did you"),
    (HEADER, ["linear,3.5,16,8,1,1,int8,int8,5"], "times.csv:2: m must be a whole number of at least 1, got '3.5'"),
    (HEADER, ["linear,3,16,0,1,1,int8,int8,5"], "times.csv:2: n must be a whole number of at least 1, got '0'"),
    (HEADER, ["linear,3,16,8,1,1,int88,int8,5"], "times.csv:2: weight has an unknown format"),
    (HEADER, ["linear,3,16,8,1,1,int8,int8@tensor,5"], "times.csv:2: activation must be 'int8', got 'int8@tensor'"),
    (HEADER, [*GOOD, "linear,5,16,8,1,1,int8,int8,nan"], "csv:4: latency [us] must be a number above 0, got 'nan'"),
    (HEADER, ["linear,3,16,8,1,1,int8,int8,4 ms"], "times.csv:2: latency [us] must be a number above 0, got '4 ms'"),
    (HEADER, ["linear,3,16,8,1,1,int8,int8"], "times.csv:2: has 8 cells, the header 9"),
    (HEADER.replace(" [us]", ""), GOOD, "times.csv:1: 'latency' must name its unit: 'latency [s]', or s, ms, us"),
    (HEADER.replace("[us]", "[min]"), GOOD, "times.csv:1: 'latency [min]' must name its unit"),
    (HEADER.replace("latency [us]", "energy [J]"), GOOD, "times.csv:1: column 'latency [s]' is missing"),
    (HEADER.replace("weight,", "wieght,"), GOOD, "times.csv:1: column 'weight' is missing"),
    (HEADER.replace("weight,", "wieght,"), GOOD, "times.csv:1: unknown column 'wieght': did you mean 'weight'"),
    (HEADER.replace("taps", "latency [s]"), GOOD, "times.csv:1: latency is there twice, in two units"),
    (HEADER.replace("taps", "m"), GOOD, "times.csv:1: column 'm' is there twice"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "rows", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_a_table_is_told_with_its_line(tmp_path, header, rows, message):
    path = device(tmp_path, rows, header=header)
    with pytest.raises(ValueError, match=r"^mine.toml:15: \[lookup\]: file: ") as caught:
        hardware.load(path)
    assert message in str(caught.value)


def test_a_missing_or_short_table_is_told(tmp_path):
    path = device(tmp_path, GOOD, entries=3)
    with pytest.raises(ValueError, match=r"mine.toml:16: \[lookup\]: entries says 3, the file has 2: is it whole"):
        hardware.load(path)
    (tmp_path / "tables" / "times.csv").unlink()
    with pytest.raises(ValueError, match=r"mine.toml:15: \[lookup\]: file: cannot read the table 'times.csv'"):
        hardware.load(path)


def test_shapes_are_read_without_formats(tmp_path):
    path = tmp_path / "shapes.csv"
    path.write_text("kind,m,k,n,taps\nconv2d,196,72,16,9\nlinear,1,8,4,1\n")
    assert read_shapes(path) == [("conv2d", 196, 72, 16, 1, 9), ("linear", 1, 8, 4, 1, 1)]
    path.write_text("kind,m,k,n\nlinear,1,8,-4\n")
    with pytest.raises(ValueError, match="shapes.csv:2: n must be a whole number"):
        read_shapes(path)


def test_many_problems_are_counted():
    rows = [(line, ["linear", "0", "1", "1", "int8", "int8", "1"]) for line in range(2, 102)]
    with pytest.raises(ValueError, match="and 80 more"):
        parse_lookup_rows(["kind", "m", "k", "n", "weight", "activation", "latency [s]"], rows, "t.csv")


REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no published data at {REFERENCE}")
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_hawq_latency_plans_through_a_table(tmp_path, fraction):
    data = json.loads((REFERENCE / "hawq_ilp_resnet18.json").read_text())
    count = len(data["layers"])
    # every layer gets a shape of its own, so that the table keeps apart what was timed apart
    layers = [linear(name, 8 + i, 16, 8) for i, name in enumerate(data["layers"])]
    rows = [
        f"linear,{8 + i},16,8,1,1,int{bits},int{bits},{data[f'latency_int{bits}_ms'][i]}"
        for i in range(count)
        for bits in (4, 8)
    ]
    path = device(tmp_path, rows, header=HEADER.replace("[us]", "[ms]"))
    frame = costs(path, Network(tuple(layers)), ["int4/int4", "int8/int8"])
    prices = frame["latency"].to_numpy().reshape(count, 2)
    assert prices.sum(axis=0) == pytest.approx([1e-3 * sum(data[f"latency_int{bits}_ms"]) for bits in (4, 8)])
    low, high = prices.sum(axis=0)
    trace = np.array(data["hutchinson_trace_per_param"])[:, None]
    found = ILPSolver().solve(
        AllocationProblem(
            objective=trace * np.array([data["delta_w_sq_int4"], data["delta_w_sq_int8"]]).T,
            resources={"latency": prices},
            budgets={"latency": low + fraction * (high - low)},
            ties=data["tied_groups_0based"],
            layers=data["layers"],
            options=("4", "8"),
        )
    )
    published = {0.25: "8884848444444444444", 0.5: "8888848848884484844", 0.75: "8888888848888484884"}
    assert "".join(found.options) == published[fraction]
