"""Learned latencies: the forest against scikit-learn and a loop, held-out shapes, files without pickle."""

import json

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.forest import Forest, grow, of_sklearn
from mpq.hardware_models.lookup_table import LookupTable
from mpq.hardware_models.predictor import Features, Predictor
from mpq.hardware_models.predictor_training import train_predictor
from mpq.layers import Layer, Network
from mpq.options import SearchSpace
from mpq.rank_correlation import kendall

PAIRS = (("fp32", "fp32"), ("int8", "int8"), ("int4", "fp32"))
PEAK = {"fp32": 1e11, "int8": 8e11, "int4": 9e10}


def true_latency(kind, sizes, weight, activation, random):
    """A machine with a peak a format, a memory, a call, a stumble on odd shapes, and noise."""
    m, k, n, repeats, taps = sizes
    bits = {"fp32": 32, "int8": 8, "int4": 4}
    traffic = (k * n * repeats * bits[weight] + (m * k / taps + m * n) * repeats * bits[activation]) / 8
    compute = 2 * m * k * n * repeats / PEAK[weight] * (1.3 if k % 16 else 1) * (1.5 if kind == "conv2d" else 1)
    return (max(compute, traffic / 2e10) + 2e-6) * np.exp(0.05 * random.standard_normal())


def machine_table(shapes=60, seed=0):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(shapes):
        kind = str(random.choice(["linear", "conv2d"]))
        taps = 9 if kind == "conv2d" else 1
        m, k, n = (
            int(2 ** random.uniform(0, 8)),
            taps * int(2 ** random.uniform(4, 8)),
            int(2 ** random.uniform(5, 9)),
        )
        for weight, activation in PAIRS:
            sizes = (m, k, n, 1, taps)
            rows.append((kind, sizes, weight, activation, true_latency(kind, sizes, weight, activation, random)))
    return LookupTable(
        kinds=tuple(row[0] for row in rows),
        sizes=np.array([row[1] for row in rows]),
        weights=tuple(row[2] for row in rows),
        activations=tuple(row[3] for row in rows),
        quantities={"latency": np.array([row[4] for row in rows])},
    )


@pytest.fixture(scope="module")
def predictor():
    return train_predictor(machine_table(), trees=40)


def walk(forest, row, root):
    """One tree, one sample, one step at a time."""
    node = root
    while forest.feature[node] >= 0:
        goes_left = np.float32(row[forest.feature[node]]) <= forest.threshold[node]
        node = forest.left[node] if goes_left else forest.right[node]
    return forest.value[node]


@pytest.mark.parametrize("name", ["RandomForestRegressor", "ExtraTreesRegressor"])
def test_the_forest_is_sklearns(name):
    ensemble = pytest.importorskip("sklearn.ensemble")
    random = np.random.default_rng(0)
    x, fresh = (
        random.normal(size=(300, 6)),
        np.vstack([random.normal(size=(5000, 6)), 10 * random.normal(size=(50, 6))]),
    )
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2] + 1e3
    model = getattr(ensemble, name)(n_estimators=30, random_state=0).fit(x, y)
    forest = of_sklearn(model)
    assert np.abs(forest.predict(fresh) / model.predict(fresh) - 1).max() < 1e-12
    loop = [np.mean([walk(forest, row, root) for root in forest.roots]) for row in fresh[:50]]
    assert forest.predict(fresh[:50]) == pytest.approx(loop, rel=1e-12)


def test_thresholds_are_compared_in_single_precision():
    ensemble = pytest.importorskip("sklearn.ensemble")
    x = np.array([[0.1], [0.1 + 1e-9], [0.2], [0.3]])
    model = ensemble.RandomForestRegressor(n_estimators=5, random_state=0).fit(x, [0.0, 1.0, 2.0, 3.0])
    forest = of_sklearn(model)
    edges = np.unique(forest.threshold)[:, None]
    near = np.concatenate([edges, edges + 1e-12, edges - 1e-12, edges * (1 + 3e-8)])
    assert forest.predict(near) == pytest.approx(model.predict(near), rel=1e-12)


def test_what_equals_a_threshold_goes_left_as_in_sklearn():
    ensemble = pytest.importorskip("sklearn.ensemble")
    model = ensemble.RandomForestRegressor(n_estimators=5, random_state=0).fit(np.arange(8.0)[:, None], np.arange(8.0))
    halves = np.arange(0, 8, 0.5)[:, None]
    assert of_sklearn(model).predict(halves) == pytest.approx(model.predict(halves), rel=1e-12)


def test_growing_is_repeatable():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 3)), random.normal(size=50)
    same, other = (grow(x, y, trees=5, seed=seed).predict(x) for seed in (1, 2))
    assert (grow(x, y, trees=5, seed=1).predict(x) == same).all()
    assert (same != other).any()


def test_no_samples_no_predictions():
    forest = Forest(np.array([-1]), np.zeros(1), np.zeros(1, int), np.zeros(1, int), np.array([7.0]), np.array([0]))
    assert forest.predict(np.empty((0, 3))).shape == (0,)
    assert forest.predict(np.empty((2, 3))).tolist() == [7, 7]


LOOPS = [
    ({"left": [0, 0, 0]}, "behind their parents"),
    ({"right": [3, 0, 0]}, "behind their parents"),
    ({"roots": [3]}, "within its arrays"),
    ({"roots": []}, "at least one root"),
    ({"value": [0, np.nan, 1]}, "finite"),
    ({"feature": [-2, -1, -1], "left": [1, 0, 0]}, "-1 or more"),
    ({"threshold": [0, 0]}, "one length"),
]


@pytest.mark.parametrize(("change", "message"), LOOPS)
def test_a_forest_that_would_loop_or_leave_its_arrays_is_refused(change, message):
    arrays = {"feature": [0, -1, -1], "threshold": [0.5, 0, 0], "left": [1, 0, 0], "right": [2, 0, 0]}
    arrays |= {"value": [0.0, 1, 2], "roots": [0]}
    with pytest.raises(ValueError, match=message):
        Forest(**{name: np.array(values) for name, values in (arrays | change).items()})


def test_held_out_shapes_are_predicted(predictor):
    good = predictor.held_out
    assert (good.samples, good.shapes) == (180, 60)
    assert good.mape < 0.25
    assert good.kendall_tau > 0.9
    assert good.tau_within > 0.8


def test_the_reported_error_is_not_in_sample(predictor):
    table = machine_table()
    kinds, pairs = predictor.features.kinds, predictor.features.pairs
    kind = np.array([kinds.index(name) for name in table.kinds])
    pair = np.array([pairs.index(own) for own in zip(table.weights, table.activations, strict=True)])
    known = predictor.latency(kind, table.sizes.astype(float), pair)
    in_sample = np.mean(np.abs(known / table.quantities["latency"] - 1))
    fresh = machine_table(shapes=200, seed=5)
    kind = np.array([kinds.index(name) for name in fresh.kinds])
    pair = np.array([pairs.index(own) for own in zip(fresh.weights, fresh.activations, strict=True)])
    new = predictor.latency(kind, fresh.sizes.astype(float), pair)
    out_of_sample = np.mean(np.abs(new / fresh.quantities["latency"] - 1))
    assert 1.5 * in_sample < predictor.held_out.mape
    assert predictor.held_out.mape == pytest.approx(out_of_sample, rel=0.4)
    assert kendall(new, fresh.quantities["latency"]) > 0.9


def test_formats_of_one_shape_are_held_out_together():
    """Latencies that only the shape's own other formats betray are not predicted."""
    random = np.random.default_rng(0)
    table = machine_table(shapes=40)
    secret = np.repeat(np.exp(random.normal(size=40)), len(PAIRS))
    table = LookupTable(table.kinds, table.sizes, table.weights, table.activations, {"latency": 1e-3 * secret})
    assert train_predictor(table, trees=20).held_out.mape > 1


def test_the_roofline_carries_beyond_the_training_range(predictor):
    """Trees alone would say of a product 64 times as large what they say of the largest that they know."""
    kinds, pairs = predictor.features.kinds, predictor.features.pairs
    kind = np.full(2, kinds.index("linear"))
    largest = predictor.high[kind[0]]
    sizes = np.stack([largest, largest * [16, 2, 2, 1, 1]])
    pair = np.full(2, pairs.index(("int8", "int8")))
    small, large = predictor.latency(kind, sizes, pair)
    assert 40 < large / small < 90
    assert predictor.is_extrapolated(kind, sizes).tolist() == [False, True]


def test_a_saved_predictor_predicts_the_same(tmp_path, predictor):
    path = tmp_path / "kernels.safetensors"
    predictor.save(path)
    again = Predictor.load(path)
    random = np.random.default_rng(3)
    sizes = np.column_stack([random.integers(1, 500, (50, 3)), np.ones((50, 2))]).astype(float)
    kind, pair = random.integers(0, 2, 50), random.integers(0, 3, 50)
    assert (again.latency(kind, sizes, pair) == predictor.latency(kind, sizes, pair)).all()
    assert again.held_out == predictor.held_out
    assert (again.trained == predictor.trained).all()


def test_files_that_are_no_predictor_are_refused(tmp_path, predictor):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"cannot read the predictor 'x.safetensors'"):
        Predictor.load(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="cannot read the predictor"):
        Predictor.load(path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no predictor of latencies"):
        Predictor.load(path)
    predictor.save(path)
    save_file({"a": np.zeros(1)}, path, metadata={"predictor": json.dumps({"format": "mpq latency forest 1"})})
    with pytest.raises(ValueError, match="is damaged"):
        Predictor.load(path)


def test_too_few_shapes():
    with pytest.raises(ValueError, match="folds must be at least 2 and at most the number of shapes, got 5 for 3"):
        train_predictor(machine_table(shapes=3))


DEVICE = """\
schema = 1

[target]
name = "learnt"
kind = "cpu"
runtime = "kernels"

[[source]]
id = "clock"
title = "a clock"
kind = "measured"
read = "2026"

[predictor]
file = "kernels.safetensors"
samples = {good.samples}
mape = {good.mape:.5g}
kendall_tau = {good.kendall_tau:.5g}
source = ["clock"]
"""


def device(folder, predictor):
    predictor.save(folder / "kernels.safetensors")
    path = folder / "learnt.toml"
    path.write_text(DEVICE.format(good=predictor.held_out))
    return path


def linear(name, m, k, n, calls=1):
    return Layer(
        name, "linear", (n, k), n * k, m * k * n * calls, (1, m, k), (1, m, n), calls=calls, weight_bytes=4 * n * k,
        input_elements=m * k * calls, output_elements=m * n * calls,
    )  # fmt: skip


def test_a_device_file_prices_with_it(tmp_path, predictor):
    layers = (linear("a", 12, 64, 100), linear("twin", 12, 64, 100), linear("twice", 12, 64, 100, calls=2))
    target = hardware.load(device(tmp_path, predictor))
    frame = target.costs(Network(layers), SearchSpace(["int8/int8", "int4", "int3", "int4@group32"]))
    kinds, pairs = predictor.features.kinds, predictor.features.pairs

    def one(pair):
        codes = np.array([kinds.index("linear")]), np.array([[12.0, 64, 100, 1, 1]]), np.array([pairs.index(pair)])
        return float(predictor.latency(*codes)[0])

    for option, pair in (
        ("int8/int8", ("int8", "int8")),
        ("int4", ("int4", "fp32")),
        ("int4@group32", ("int4", "fp32")),
    ):
        for layer in layers:
            expected = layer.calls * one(pair)
            assert frame.loc[(layer.name, option), "latency"] == pytest.approx(expected, rel=1e-12)
    assert frame.attrs["reference"]["latency"] == pytest.approx(4 * one(("fp32", "fp32")))
    reason = frame.attrs["refused"]["a", "int3"]
    assert reason == "learnt (kernels) was not trained on int3 weights and fp32 inputs in a linear"
    assert frame.attrs["provenance"]["notes"].get("latency") is None


def test_extrapolated_layers_are_priced_and_noted(tmp_path, predictor):
    layers = (linear("a", 12, 64, 100), linear("far", 12, 64, 4000))
    frame = hardware.load(device(tmp_path, predictor)).costs(Network(layers), SearchSpace(["int8/int8"]))
    assert np.isfinite(frame["latency"]).all()
    assert frame.attrs["provenance"]["notes"]["latency"].startswith("1 of 2 layers are extrapolated")


def test_a_kind_that_was_not_seen_is_refused(tmp_path, predictor):
    shape = (1, 8, 4, 4)
    layer = Layer("dw", "conv2d", (8, 1, 3, 3), 72, 72 * 16, shape, shape, groups=8, kernel=(3, 3), weight_bytes=288)
    frame = hardware.load(device(tmp_path, predictor)).costs(Network((layer,)), SearchSpace(["int8/int8"]))
    assert frame.attrs["refused"]["dw", "int8/int8"].endswith("int8 weights and int8 inputs in a depthwise_conv2d")


def test_a_device_file_that_flatters_its_predictor_is_told(tmp_path, predictor):
    path = device(tmp_path, predictor)
    good = predictor.held_out
    path.write_text(DEVICE.format(good=good).replace(f"mape = {good.mape:.5g}", "mape = 0.01"))
    with pytest.raises(ValueError, match=r"learnt.toml:17: \[predictor\]: mape says 0.01, the file 0\."):
        hardware.load(path)
    (tmp_path / "kernels.safetensors").unlink()
    with pytest.raises(ValueError, match=r"learnt.toml:15: \[predictor\]: file: cannot read the predictor"):
        hardware.load(path)


def test_features_name_work_and_bytes():
    features = Features(("linear", "conv2d"), (("int4", "int8"),), np.array([1e9]), 1e8)
    roofline, inputs = features.of(np.array([1]), np.array([[49.0, 72, 16, 2, 9]]), np.array([0]))
    macs, traffic = 49 * 72 * 16 * 2, (72 * 16 * 2 * 4 + (49 * 8 + 49 * 16) * 2 * 8) / 8
    assert roofline == pytest.approx([max(2 * macs / 1e9, traffic / 1e8)])
    logs = np.log2([49, 72, 16, 2, 9, macs, traffic, 2 * macs / 1e9, traffic / 1e8, macs / traffic])
    assert inputs[0] == pytest.approx([*logs, 4, 8, 0, 1, 0, 1, 1])
