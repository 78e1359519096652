"""Slopes against loops, half the Hessian trace of a quadratic, and a second range of noise; scores against errors."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.batches import split_batch
from mpq.cache import Pieces
from mpq.fake_quantize import fake_quantize
from mpq.layers import Network
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import Measurement
from mpq.sensitivity.linearity import Linearity, fit_through_zero, with_noise
from mpq.sensitivity.random_inputs import random_batch
from mpq.surgery import evaluating
from mpq.task_choice import choose_task


def measurement_of(model, data, options=("int4",), granularity="layer", task=None, seed=0):
    network, space = mpq.trace(model, split_batch(data[0])[0]), SearchSpace(list(options), ties=None)
    return Measurement(
        model=model,
        batches=data,
        network=network,
        options=space.all_options,
        candidates=space.candidates(network),
        granularity=granularity,
        task=choose_task(model, data[0], task),
        quantizer=RoundToNearest(),
        seed=seed,
        pieces=Pieces(),
        progress=False,
    )


def slopes(model, data, task=None, seed=0, **settings):
    with evaluating(model):
        return Linearity(**settings).slopes(measurement_of(model, data, task=task, seed=seed))


def estimate(model, data, options, **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    space = SearchSpace(options, ties=None)
    return mpq.sensitivity.estimate(model, data, network, space, "linearity", progress=False, **settings)


def regression(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5)).double().eval()
    x = torch.randn(40, 6).double() * torch.linspace(0.1, 3, 6).double()
    return model, [(x, torch.randn(40, 5).double())]


@torch.no_grad()
def test_equals_a_loop_over_copies():
    model, data = cnn(), images()
    levels, draws = (0.05, 0.2), 2
    alpha, error = slopes(model, data, levels=levels, draws=draws)
    x = torch.cat([x for x, _ in data])
    for index, name in enumerate(("first", "depthwise", "up", "head")):
        weight, squares, kls = model.get_submodule(name).weight.detach(), [], []
        generator = torch.Generator().manual_seed(hash((0, index)))
        for level in np.repeat(levels, draws):
            changed = copy.deepcopy(model)
            noise = torch.randn(weight.shape, generator=generator)
            changed.get_submodule(name).weight.data = weight + noise / noise.norm() * weight.norm() * level
            p, q = model(x).double().log_softmax(1), changed(x).double().log_softmax(1)
            squares.append(level**2)
            kls.append((p.exp() * (p - q)).sum(1).numpy())
        t2, table = np.array(squares), np.array(kls)
        slope = np.linalg.lstsq(t2[:, None], table.mean(1), rcond=None)[0].item()
        assert alpha[index] == pytest.approx(slope, rel=1e-3)
        residual = table.mean(1) - slope * t2
        of_draws = (residual**2 * t2**2).sum() * 4 / 3 / (t2**2).sum() ** 2
        per_sample = np.linalg.lstsq(t2[:, None], table, rcond=None)[0].ravel()
        assert error[index] == pytest.approx((of_draws + per_sample.var(ddof=1) / 6) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("objective", ["loss", "divergence"])
def test_half_the_mean_trace_times_the_squared_norm_on_a_quadratic(objective):
    """L = mean (W x - y)²: Hessian 2/5 E x xᵀ for each of the 5 rows. Relative squared error: 2 E x xᵀ / ||z||²."""
    model, data = regression()
    x, weight = data[0][0], model[0].weight.detach()
    with torch.no_grad():
        factor = 0.4 if objective == "loss" else 2 / model(x).square().sum(1)
    trace = float((factor * x.square().sum(1)).mean()) * 5  # of the whole layer's Hessian
    expected = 0.5 * trace / weight.numel() * float(weight.square().sum())
    found = [slopes(model, data, seed=seed, levels=(0.1, 0.2), draws=300, objective=objective) for seed in range(2)]
    for alpha, error in found:
        of_draws = np.sqrt(max(float(error[0]) ** 2 - sample_variance(model, data, objective), 0)) + 0.03 * expected
        assert abs(alpha[0] - expected) < 4 * of_draws


def sample_variance(model, data, objective):
    """Of the mean over samples, on a quadratic: each sample has its own trace."""
    x, weight = data[0][0], model[0].weight.detach()
    with torch.no_grad():
        factor = 0.4 if objective == "loss" else 2 / model(x).square().sum(1)
    each = 0.5 * factor * x.square().sum(1) * 5 / weight.numel() * float(weight.square().sum())
    return float(each.var()) / len(x)


@torch.no_grad()
def test_two_ranges_of_noise_agree_within_a_fifth():
    model, data = cnn(), images(batches=1, samples=16)
    small, _ = slopes(model, data, levels=(0.01, 0.02, 0.03), draws=10)
    large, _ = slopes(model, data, levels=(0.08, 0.1, 0.12), draws=10)  # the same noise, larger
    np.testing.assert_allclose(large, small, rtol=0.2)


def test_standard_errors_cover_draws_and_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    x = torch.randn(4000, 4)
    settings = {"levels": (0.05, 0.1, 0.15), "draws": 5, "task": "classification"}
    truth = slopes(model, [x], levels=(0.05, 0.1, 0.15), draws=100, task="classification")[0][0]
    inside = []
    for part in range(100):
        alpha, error = slopes(model, [x[40 * part : 40 * part + 40]], seed=part, **settings)
        inside.append(abs(alpha[0] - truth) < 2 * error[0])
    assert 0.88 <= np.mean(inside) <= 0.99


def test_scores_are_slopes_times_relative_errors_of_every_unit():
    model, data = cnn(), images()
    alpha, error = slopes(model, data, levels=(0.1,), draws=2)
    for granularity in ("layer", "rows:3", "groups:2"):
        frame = estimate(model, data, ["int3", "fp32"], levels=(0.1,), draws=2, granularity=granularity)
        network = mpq.trace(model, data[0][0])
        weight = model.first.weight.detach().reshape(4, 9)
        for unit in network.units(granularity):
            if unit.layer.name == "first":
                block = weight[unit.rows, unit.columns]
                share = float((fake_quantize(block, "int3") - block).square().sum() / weight.square().sum())
                row = frame.loc[(unit.label, "int3")]
                assert row["sensitivity"] == pytest.approx(alpha[0] * share, rel=1e-4)
                assert row["sensitivity_se"] == pytest.approx(error[0] * share, rel=1e-4)
        assert (frame.xs("fp32", level=1)["sensitivity"] == 0).all()
        assert frame.attrs["measure"] == "loss"


def test_options_that_are_no_candidates_stay_out():
    model, data = cnn(), images()
    frame = estimate(model, data, {"*": ["int4", "int8"], "head": ["int8"]}, levels=(0.1,), granularity="rows:2")
    missing = frame["sensitivity"].isna()
    assert missing.sum() == 3
    assert all(label.startswith("head") and option == "int4" for label, option in frame.index[missing])


def test_noise_has_the_norm_that_was_asked_for_and_zeros_stay():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 40)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        given = weight.to(dtype)
        noise = with_noise(given, 0.1, generator).double() - given.double()
        assert float(noise.norm() / given.double().norm()) == pytest.approx(0.1, rel=tolerance)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    model[1].weight.data.zero_()
    frame = estimate(model, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))], ["int4"], levels=(0.1, 0.2))
    assert (frame.to_numpy() == 0).all()  # a head of zeros hides the other layer as well


def test_random_inputs_have_the_form_of_the_data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(40).reshape(2, 20) % 9
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "position_ids": ids}
    network = mpq.trace(decoder(), ids)
    drawn = random_batch(batch, network, generator)
    assert drawn["input_ids"].shape == ids.shape
    assert 9 <= int(drawn["input_ids"].max()) < 11  # up to the vocabulary, not to what was seen
    assert not torch.equal(drawn["input_ids"], ids)
    for name in ("attention_mask", "labels", "position_ids"):
        assert torch.equal(drawn[name], batch[name])
    assert int(random_batch(ids, Network(()), generator).max()) == 8
    x, y = torch.randn(500, 4) * 3 + 7, torch.arange(500)
    drawn_x, drawn_y = random_batch((x, y), network, generator)
    assert torch.equal(drawn_y, y)
    assert float(drawn_x.mean()) == pytest.approx(7, abs=0.3)
    assert float(drawn_x.std()) == pytest.approx(3, abs=0.3)
    assert drawn_x.dtype == x.dtype


def test_without_data_slopes_depend_on_its_form_alone():
    model, data = decoder(), tokens()
    other = [{"input_ids": batch["input_ids"].roll(1, 1)} for batch in data]
    settings = {"data_free": True, "levels": (0.1, 0.2), "task": "causal-lm"}
    first, again, real = (
        slopes(model, data, **settings)[0],
        slopes(model, other, **settings)[0],
        slopes(model, data, **{**settings, "data_free": False})[0],
    )
    np.testing.assert_array_equal(first, again)
    assert (first > 0).all()
    assert not np.array_equal(first, real)
    assert np.corrcoef(np.log(first), np.log(real))[0, 1] > 0.5


def test_a_killed_fit_goes_on(tmp_path, monkeypatch):
    model, data = cnn(), images()
    original, made = Linearity._layer, []

    def dies(self, on_batch, index):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(index)
        return original(self, on_batch, index)

    monkeypatch.setattr(Linearity, "_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        estimate(model, data, ["int4"], cache=tmp_path)
    made[:] = [None] * 100
    resumed = estimate(model, data, ["int4"], cache=tmp_path)
    assert len(made) == 100 + 8 - 5
    monkeypatch.undo()
    assert resumed.equals(estimate(model, data, ["int4"]))


def test_the_fit_is_least_squares():
    generator = np.random.default_rng(0)
    squares, increases = generator.random(7), generator.random((3, 7))
    slope, _ = fit_through_zero(squares, increases)
    expected = np.linalg.lstsq(squares[:, None], increases.T, rcond=None)[0].ravel()
    np.testing.assert_allclose(slope, expected, rtol=1e-12)
    assert fit_through_zero(np.zeros(3), np.zeros(3)) == (0.0, 0.0)


def test_settings_are_checked():
    model, data = cnn(), images()
    for settings, message in (
        ({"levels": ()}, "levels must be relative errors above 0"),
        ({"levels": (0.1, -0.1)}, "levels must be relative errors above 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"objective": "kl"}, "objective must be one of divergence, loss"),
        ({"data_free": True, "objective": "loss"}, "random inputs have no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(model, data, ["int4"], **settings)
    with pytest.raises(ValueError, match="linearity scores weights alone, int4/int8 quantises inputs"):
        estimate(model, data, ["int4/int8"])
    with pytest.raises(ValueError, match="use kl"):
        estimate(model, [x for x, _ in data], ["int4"], objective="loss")


def test_functional_is_what_the_loss_is():
    model, data = cnn(), images(batches=1)
    (alpha, _), (x, y) = slopes(model, data, levels=(0.3,), objective="loss"), data[0]
    with torch.no_grad():
        changed = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(hash((0, 3)))
        changed.head.weight.data = with_noise(model.head.weight, 0.3, generator)
        growth = functional.cross_entropy(changed(x), y) - functional.cross_entropy(model(x), y)
    assert alpha[3] == pytest.approx(float(growth) / 0.09, rel=1e-3)
