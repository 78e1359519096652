"""Measured KL against a copy of the model with one quantised layer; weight error against plain sums."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens

import mpq
from mpq.batches import split_batch
from mpq.cache import description
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace


def estimate(model, data, options, method="kl", **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    frame = mpq.sensitivity.estimate(model, data, network, SearchSpace(options), method, progress=False, **settings)
    return frame, network


def kl(p_logits, q_logits):
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def test_equals_a_copied_model_with_that_layer_quantised():
    model, data = cnn(), images()
    frame, _ = estimate(model, data, ["int2", "int4/int8", "fp32"])
    with torch.no_grad():
        exact = torch.cat([model(x) for x, _ in data])
        for name in ("first", "depthwise", "head"):
            changed = copy.deepcopy(model)
            layer = changed.get_submodule(name)
            layer.weight.data = fake_quantize(layer.weight, "int4")
            layer.register_forward_pre_hook(lambda module, args: fake_quantize(args[0], "int8@tensor"))
            each = kl(exact, torch.cat([changed(x) for x, _ in data]))
            row = frame.loc[(name, "int4/int8")]
            assert row["sensitivity"] == pytest.approx(float(each.mean()), rel=1e-5)
            assert row["sensitivity_se"] == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-5)
    assert (frame.xs("fp32", level=1)["sensitivity"] == 0).all()


def test_means_over_positions_leave_padding_out():
    model = decoder()
    batch = tokens(batches=1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 4:] = 0
    padded, _ = estimate(model, [{**batch, "attention_mask": mask}], ["int2"], task="classification")
    short, _ = estimate(model, [{"input_ids": batch["input_ids"][:, :4]}], ["int2"], task="classification")
    np.testing.assert_allclose(padded["sensitivity"], short["sensitivity"], rtol=1e-4)


def test_a_killed_measurement_goes_on_where_it_was_and_never_serves_a_changed_model(tmp_path, monkeypatch):
    model, data = cnn(), images()
    first, _ = estimate(model, data, ["int2", "int4"], cache=tmp_path)
    pieces = sorted(tmp_path.rglob("*.npy"))
    assert len(pieces) == 8  # one a layer and batch
    pieces[0].unlink()
    from mpq.sensitivity import single_layer

    measured = []
    original = single_layer._sums
    monkeypatch.setattr(single_layer, "_sums", lambda *args: measured.append(args[-1].name) or original(*args))
    again, _ = estimate(model, data, ["int2", "int4"], cache=tmp_path)
    assert len(measured) == 1
    assert again.equals(first)
    for change in (
        lambda: model.head.bias.data.add_(0.1),
        lambda: data[0][0].add_(0.1),
    ):
        measured.clear()
        change()
        estimate(model, data, ["int2", "int4"], cache=tmp_path)
        assert len(measured) == 8
    measured.clear()
    estimate(model, data, ["int2", "int8"], cache=tmp_path)
    assert len(measured) == 8


def test_units_finer_than_layers_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"use output_fisher \(rows\) or weight_error"):
        estimate(cnn(), images(), ["int4"], granularity="rows:2")


def test_unknown_methods_and_settings_are_named():
    with pytest.raises(ValueError, match="'kll' is not known.*'kl'"):
        estimate(cnn(), images(), ["int4"], method="kll")
    with pytest.raises(ValueError, match="settings of kl"):
        estimate(cnn(), images(), ["int4"], probes=3)


def test_weight_error_is_the_squared_error_of_every_unit():
    model = cnn()
    for granularity in ("layer", "rows:3", "groups:2"):
        frame, network = estimate(model, images(), ["int3"], method="weight_error", granularity=granularity)
        layer = network["first"]
        weight = model.first.weight.detach().reshape(4, 9)
        for unit in network.units(granularity):
            if unit.layer == layer:
                block = weight[unit.rows, unit.columns]
                expected = (fake_quantize(block, "int3") - block).square().sum()
                assert frame.loc[(unit.label, "int3"), "sensitivity"] == pytest.approx(float(expected), rel=1e-5)
        assert (frame["sensitivity_se"] == 0).all()


def test_a_weight_with_nan_is_an_error_that_names_the_layer():
    model = cnn()
    model.depthwise.weight.data[0, 0, 0, 0] = float("nan")
    for method in ("kl", "output_fisher", "weight_error"):
        with pytest.raises(ValueError, match="depthwise"):
            estimate(model, images(), ["int4"], method=method)


def test_automatic_measures_small_models_and_estimates_large_ones(monkeypatch):
    from mpq.sensitivity import KL, Fisher, automatic, method_choice

    model, data = cnn(), images()
    network, space = mpq.trace(model, data[0][0]), SearchSpace(["int4", "int8"])
    assert automatic(network, space, 6) == KL()
    assert automatic(network, space, 6, "rows:2") == automatic(network, space, 6, "groups:2") == Fisher()
    macs = sum(layer.macs for layer in network.layers) / network.batch * 8  # 4 layers x 2 options
    monkeypatch.setattr(method_choice, "MEASURED_MACS", macs * 6)
    assert automatic(network, space, 6) == KL()
    assert automatic(network, space, 7) == Fisher()


def test_automatic_has_no_gradients_of_units_that_no_sample_meets():
    from mpq.sensitivity import KL, Fisher, WeightError, automatic

    model = torch.nn.Sequential(torch.nn.Embedding(20, 4), torch.nn.Linear(4, 20)).eval()
    network = mpq.trace(model, torch.randint(0, 20, (2, 3)))
    free, pinned = SearchSpace(["int4", "int8"]), SearchSpace(["int4", "int8"], pins={"0": "int8"})
    for granularity in ("rows:1", "groups:2"):
        assert automatic(network, free, 6, granularity) == WeightError()
        assert automatic(network, pinned, 6, granularity) == Fisher()
    assert automatic(network, free, 6) == KL()


def test_automatic_says_why(monkeypatch):
    from mpq.sensitivity import method_choice

    frame, _ = estimate(cnn(), images(), ["int4", "int8"], method="auto")
    assert "all 8 choices" in frame.attrs["why"]
    named, _ = estimate(cnn(), images(), ["int4", "int8"])
    assert "why" not in named.attrs
    split, _ = estimate(cnn(), images(), ["int4", "int8"], method="auto", granularity="groups:2")
    assert "groups:2" in split.attrs["why"]
    assert split.attrs["method"].startswith("Fisher")
    monkeypatch.setattr(method_choice, "MEASURED_MACS", 1.0)
    model, data = cnn(), images()
    given = model, data, mpq.trace(model, data[0][0]), SearchSpace(["int4"])
    frames = mpq.sensitivity.estimate_together(*given, ["auto", "weight_error"], progress=False)
    assert frames["auto"].attrs["method"].startswith("Fisher")
    assert "beyond 1e+00 it is estimated" in frames["auto"].attrs["why"]
    assert "why" not in frames["weight_error"].attrs


def test_automatic_scores_weights_that_functions_use_however_fine_the_units(monkeypatch):
    from mpq.sensitivity import method_choice

    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    data = [torch.randn(2, 3, 8)]
    monkeypatch.setattr(method_choice, "MEASURED_MACS", 1.0)
    network = mpq.trace(block, data[0])
    assert any(layer.module is None for layer in network.layers)
    for granularity in ("layer", "groups:4"):
        given = {"task": "features", "granularity": granularity, "progress": False}
        frame = mpq.sensitivity.estimate(block, data, network, SearchSpace(["int2", "int8"]), **given)
        scores = frame["sensitivity"].unstack(sort=False)
        assert scores.notna().all(axis=None)
        assert scores["int2"].sum() > 10 * scores["int8"].sum() > 0


def test_finished_pieces_are_not_reused_for_other_candidates_or_another_loss(tmp_path):
    model, data = cnn(), images()
    estimate(model, data, {"*": ["int4", "int8"], "head": ["int8"]}, cache=tmp_path)
    again, _ = estimate(model, data, ["int4", "int8"], cache=tmp_path)
    assert again["sensitivity"].notna().all()

    def scores(factor):
        def loss(model, batch):
            return factor * torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        return estimate(model, data, ["int2"], task=loss, cache=tmp_path)[0]["sensitivity"]

    np.testing.assert_allclose(scores(2.0), 2 * scores(1.0), rtol=1e-5)
    folders = len(list(tmp_path.iterdir()))
    scores(2.0)
    assert len(list(tmp_path.iterdir())) == folders


def test_what_only_its_address_tells_apart_is_not_cached(tmp_path):
    class Rounder:
        def __call__(self, rows, fmt, layer):
            return fake_quantize(rows, fmt)

    with pytest.raises(ValueError, match="only its address tells from others"):
        estimate(cnn(), images(), ["int4"], quantizer=Rounder(), cache=tmp_path)


def test_descriptions_hold_every_number_and_are_the_same_in_every_process():
    @dataclass(frozen=True)
    class Database:
        weights: dict[str, torch.Tensor]

    long = torch.zeros(10**4)
    other = long.clone()
    other[5000] = 1  # where a repr shows dots
    assert description(Database({"a": long})) != description(Database({"a": other}))
    assert description(partial(torch.nn.functional.relu, inplace=True)) != description(torch.nn.functional.relu)
    code = "from mpq.cache import description as d; print(d({'f': lambda x, y=2: {'a', 'b', 'c'} | {x}}))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
