"""Scores made of per-sample gradients against loops over samples, options and units, and against exact quadratics."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.batches import batches_of, split_batch
from mpq.cache import Pieces
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest, quantised_rows
from mpq.sensitivity import (
    ChannelSalience,
    FirstOrder,
    Fisher,
    FisherFull,
    Measurement,
    OutputFisher,
    estimate,
    estimate_together,
)
from mpq.sensitivity.one_pass import run_together
from mpq.surgery import layer_parameters, quantise_activation
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, Distribution
from mpq.weight_view import as_rows, from_rows

OPTIONS = ["int2", "int4@group4", "fp32"]


def run(model, data, methods, options=OPTIONS, granularity="layer", **settings):
    network = mpq.trace(model, split_batch(batches_of(data)[0])[0])
    space = SearchSpace(options, ties=None)
    settings = {"granularity": granularity, "progress": False} | settings
    return estimate_together(model, data, network, space, methods, **settings), network


def slow_gradients(model, data, network, task=None):
    """(layer: (samples, out, in...)) gradients of the loss summed over positions, and T, one sample at a time."""
    batches = batches_of(data)
    task = choose_task(model, batches[0], task)
    model = copy.deepcopy(model).requires_grad_(True)
    found, positions = {layer.name: [] for layer in network.layers}, []
    for inputs, labels in map(split_batch, batches):
        for number in range(len(labels)):
            part = slice(number, number + 1)
            mapping = not isinstance(inputs, torch.Tensor)
            batch = {k: v[part] for k, v in inputs.items()} | {"labels": labels[part]} if mapping else None
            model.zero_grad()
            outputs = task.run(model, batch or (inputs[part], labels[part]))
            (task.losses(outputs) * outputs.positions()).sum().backward()
            positions.append(float(outputs.positions()))
            for layer in network.layers:
                found[layer.name].append(as_rows(model.get_parameter(layer.weight_name).grad, layer).clone())
    return {name: torch.stack(parts).double() for name, parts in found.items()}, positions


def slow_scores(formulas, model, data, network, options, granularity, task=None):
    """{formula: {(unit, option): (mean, standard error)}} of formula(gradient and change of the unit, T)."""
    gradients, positions = slow_gradients(model, data, network, task)
    changes = {}
    for layer in network.layers:
        exact = as_rows(layer_parameters(model, layer)[0].detach(), layer)
        for option in SearchSpace(options).all_options:
            quantised = quantised_rows(exact, option.weight, layer, granularity, RoundToNearest())
            changes[layer.name, str(option)] = (quantised - exact).double().flatten(1)
    result = {name: {} for name in formulas}
    for unit in network.units(granularity):
        for option in map(str, SearchSpace(options).all_options):
            change = changes[unit.layer.name, option][unit.rows, unit.columns]
            units = [sample.flatten(1)[unit.rows, unit.columns] for sample in gradients[unit.layer.name]]
            for name, formula in formulas.items():
                each = [formula(gradient, change, count) for gradient, count in zip(units, positions, strict=True)]
                result[name][unit.label, option] = np.mean(each), np.std(each, ddof=1) / len(each) ** 0.5
    return result


def salience(first_order, diagonal):
    def formula(gradient, change, count):
        s = (gradient * change).sum(1) / count
        second = 0.5 * ((gradient * change / count).square().sum(1) if diagonal else s.square())
        return float(((s + second).abs() if first_order else second).sum())

    return formula


FORMULAS = {
    Fisher(labels="data"): lambda g, d, t: float(0.5 * (g * d).square().sum() / t),
    FisherFull(labels="data"): lambda g, d, t: float(0.5 * (g * d).sum().square() / t),
    FirstOrder(): lambda g, d, t: float((g * d).abs().sum() / t),
    FirstOrder(mode="llm-mq"): lambda g, d, t: float((g * d).sum() / t),
    ChannelSalience(labels="data"): salience(True, False),
    ChannelSalience(labels="data", first_order=False): salience(False, False),
    ChannelSalience(labels="data", diagonal=True): salience(True, True),
}


def language():
    data = [dict(batch) for batch in tokens(batches=2, samples=3)]
    for batch in data:
        batch["labels"] = batch["input_ids"].clone()
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    data[0]["attention_mask"][1, 3:] = 0
    return decoder(), data, Distribution(causal=True)


@pytest.mark.parametrize("granularity", ["layer", "rows:1", "rows:3", "groups:3"])
@pytest.mark.parametrize("kind", ["cnn", "language"])
def test_equal_loops_over_samples_units_and_options(kind, granularity):
    model, data, task = (cnn(), images(), None) if kind == "cnn" else language()
    frames, network = run(model, data, list(FORMULAS), granularity=granularity, task=task)
    for estimator, slow in slow_scores(FORMULAS, model, data, network, OPTIONS, granularity, task).items():
        frame = frames[repr(estimator)].loc[list(slow)]
        mean, error = np.array(list(slow.values())).T
        mean = np.abs(mean)
        np.testing.assert_allclose(frame["sensitivity"], mean, rtol=1e-3, atol=1e-5 * mean.max(), err_msg=estimator)
        np.testing.assert_allclose(frame["sensitivity_se"], error, rtol=1e-3, atol=1e-5 * error.max())
        assert (frame.xs("fp32", level=1)["sensitivity"] == 0).all()


def test_together_is_the_same_as_alone_whatever_is_kept_and_however_rows_are_cut(monkeypatch):
    model, data = cnn(), images()
    named = ["fisher", "fisher_full", "output_fisher", "first_order", "channel_salience", "weight_error"]
    together, network = run(model, data, named, seed=5, settings={"fisher_full": {"labels": "data"}})
    assert list(together) == named
    monkeypatch.setattr("mpq.sensitivity.products.BLOCK", 1)
    for name in named:
        fields = {} if name == "weight_error" else {"keep_bytes": 0}
        fields |= {"labels": "data"} if name == "fisher_full" else {}
        space = SearchSpace(OPTIONS, ties=None)
        alone = estimate(model, data, network, space, name, seed=5, progress=False, **fields)
        np.testing.assert_allclose(together[name], alone, rtol=1e-4, atol=1e-9, err_msg=name)
        measure = "loss" if "fisher" in name else "score"
        assert together[name].attrs["measure"] == alone.attrs["measure"] == measure


def test_weights_are_quantised_once_for_all_estimators():
    asked = []

    class Counts:
        def __call__(self, rows, fmt, layer):
            asked.append((layer.name, fmt))
            return fake_quantize(rows, fmt)

    model, data = cnn(), images(batches=1)
    run(model, data, ["fisher", "first_order", "output_fisher"], ["int2", "int4", "int4/int8"], quantizer=Counts())
    assert len(asked) == len(set(asked)) == 8
    asked.clear()
    run(model, images(batches=3), ["fisher", "output_fisher"], ["int2", "int4"], quantizer=Counts())
    assert len(asked) == 8
    asked.clear()
    encoder = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
    ).eval()
    run(encoder, (torch.randn(4, 5, 4), torch.tensor([0, 2, 1, 1])), ["fisher"], ["int4"], quantizer=Counts())
    assert len(asked) == 5  # although its samples are run one at a time


def test_true_fisher_is_the_gauss_newton_quadratic():
    """Softmax regression: the Hessian is (diag p - ppᵀ) ⊗ xxᵀ; Fisher sees its diagonal, full Fisher all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).eval()
    x = torch.randn(1, 5).repeat(40, 1)
    frames, _ = run(model, [x] * 100, [Fisher(), FisherFull()], ["int2"], task="classification")
    weight = model[0].weight.detach()
    change = fake_quantize(weight, "int2") - weight
    p, moved = model(x).softmax(1).detach(), x @ change.T
    full = 0.5 * ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean()
    diagonal = 0.5 * ((p * (1 - p)) @ change.square() * x.square()).sum(1).mean()
    for estimator, exact in ((Fisher(), diagonal), (FisherFull(), full)):
        score, error = frames[repr(estimator)].iloc[0]
        assert abs(score - float(exact)) < 4 * error
        assert error < 0.05 * score
    assert abs(float(full) / float(diagonal) - 1) > 0.2


def test_standard_errors_cover_the_mean():
    """Of 200 data sets from one population, the population's mean is within two standard errors in 90 to 98 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(4000, 6), torch.randint(0, 3, (4000,))
    methods = [Fisher(), Fisher(labels="data"), FirstOrder(mode="llm-mq"), ChannelSalience(), OutputFisher()]
    network, space = mpq.trace(model, x[:1]), SearchSpace(["int3"])

    def scores(which, seed):
        measured = Measurement(
            model, [(x[which], y[which])], network, space.all_options, space.candidates(network), "layer",
            Distribution(), RoundToNearest(), seed, Pieces(), False,
        )  # fmt: skip
        found = run_together(methods, measured)
        return np.array([[each.mean[-1, 0], each.standard_error[-1, 0]] for each in found]).T

    true, _ = scores(slice(None), 10**6)
    found = np.array([scores(torch.randint(0, 4000, (60,)), seed) for seed in range(200)])
    inside = (np.abs(found[:, 0] - true) < 2 * found[:, 1]).sum(0)
    assert ((inside >= 180) & (inside <= 197)).all(), inside


def test_rows_and_groups_add_up_to_their_layer():
    model, data = cnn(), images()
    methods = [Fisher(labels="data"), FirstOrder(), ChannelSalience(labels="data")]
    whole, network = run(model, data, methods, ["int4/int8"])
    parts, _ = run(model, data, methods, ["int4/int8"], "rows:2")
    owner = [unit.layer.name for unit in network.units("rows:2")]
    for name in map(repr, methods):
        summed = parts[name]["sensitivity"].groupby(owner).sum()
        expected = whole[name]["sensitivity"].droplevel("option").loc[summed.index]
        np.testing.assert_allclose(summed, expected, rtol=1e-5)


def test_groups_share_what_the_quantised_input_does():
    model, data = cnn(), images()
    methods = [Fisher(labels="data"), FirstOrder()]
    by_input = {}
    for granularity in ("layer", "groups:2"):
        plain, network = run(model, data, methods, ["int4"], granularity)
        both, _ = run(model, data, methods, ["int4/int4"], granularity)
        owner = [unit.layer.name for unit in network.units(granularity)]
        for name in map(repr, methods):
            extra = both[name]["sensitivity"].to_numpy() - plain[name]["sensitivity"].to_numpy()
            assert (extra >= -1e-9).all()
            totals = np.array([extra[np.array(owner) == layer.name].sum() for layer in network.layers])
            by_input.setdefault(name, []).append(totals)
    for one, other in by_input.values():
        np.testing.assert_allclose(one, other, rtol=1e-3)
        assert (one > 0).all()


def test_inputs_that_are_quantised_count_on_top():
    """Dense: y = Wx; the output's change by the input alone is W Δx, the input's gradient is Wᵀg."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    methods = [*FORMULAS]
    plain, network = run(model, (x, y), methods, ["int4"])
    both, _ = run(model, (x, y), methods, ["int4/int4"])
    hidden = model[:2](x).detach()
    layer, weight = network["2"], model[2].weight.detach()
    logits = model[2](hidden).detach().requires_grad_()
    functional.cross_entropy(logits, y, reduction="sum").backward()
    g, moved = (
        logits.grad,
        quantise_activation(hidden, SearchSpace(["int4/int4"]).all_options[0].activation, layer) - hidden,
    )
    by_input = g * (moved @ weight.T)  # (samples, rows)
    change = fake_quantize(weight, "int4") - weight
    by_weight = g * (hidden @ change.T)
    both_rows = by_input + by_weight
    extra = {
        Fisher(labels="data"): (0.5 * by_input.square().sum(1)).mean(),
        FirstOrder(): ((g @ weight) * moved).abs().sum(1).mean(),
        FisherFull(labels="data"): (0.5 * (both_rows.sum(1).square() - by_weight.sum(1).square())).mean(),
        FirstOrder(mode="llm-mq"): both_rows.sum(1).mean().abs() - by_weight.sum(1).mean().abs(),
        ChannelSalience(labels="data", first_order=False): 0.5
        * (both_rows.square() - by_weight.square()).sum(1).mean(),
    }
    for estimator, expected in extra.items():
        found = both[repr(estimator)].iloc[-1, 0] - plain[repr(estimator)].iloc[-1, 0]
        assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-8), estimator


@pytest.mark.parametrize("granularity", ["layer", "rows:2"])
def test_dense_and_convolution_agree_where_they_are_the_same_map(granularity):
    """A 1 × 1 convolution on one pixel, called twice: fast products and calls of the module give one answer."""
    torch.manual_seed(0)

    class Pixel(nn.Module):
        def __init__(self, dense):
            super().__init__()
            self.dense, self.conv = dense, nn.Conv2d(4, 4, 1)
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            for _ in range(2):
                x = (self.fc(x) if self.dense else self.conv(x[:, :, None, None])[:, :, 0, 0]).tanh()
            return self.head(x)

    fc, conv = Pixel(True).eval(), Pixel(False).eval()
    conv.load_state_dict(fc.state_dict())
    conv.conv.weight.data = fc.fc.weight.data[:, :, None, None]
    conv.conv.bias.data = fc.fc.bias.data
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    methods = [*FORMULAS, OutputFisher()]
    a, _ = run(fc, data, methods, ["int3/int4", "int8"], granularity)
    b, _ = run(conv, data, methods, ["int3/int4", "int8"], granularity)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-9, err_msg=name)


def test_linear_losses_are_exact_and_absolute_scores_bound_them():
    """For L = c . W x the inner product is the change itself; |.| is at least that, equal where no terms cancel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval()
    c, x = torch.randn(3), torch.randn(5, 4)
    task = CustomLoss(lambda model, batch: model(batch[0]) @ c)
    inner, absolute = FirstOrder(mode="llm-mq"), FirstOrder()
    frames, _ = run(model, (x, torch.zeros(5)), [inner, absolute], ["int2"], task=task)
    change = fake_quantize(model[0].weight.detach(), "int2") - model[0].weight.detach()
    exact = float((x @ change.T @ c).mean())
    assert frames[repr(inner)].iloc[0, 0] == pytest.approx(abs(exact), rel=1e-4)
    assert frames[repr(absolute)].iloc[0, 0] > abs(exact)

    class Outwards:
        def __call__(self, rows, fmt, layer):  # all terms of c ΔW x have one sign
            return rows + 0.1 * torch.outer(c.sign(), x[0].sign())

    frames, _ = run(model, (x[:1], torch.zeros(1)), [inner, absolute], ["int2"], task=task, quantizer=Outwards())
    assert frames[repr(inner)].iloc[0, 0] == pytest.approx(frames[repr(absolute)].iloc[0, 0], rel=1e-5)


def test_saliences_of_channels_that_are_doubled_or_swapped():
    """Two equal channels that the next layer halves keep the function; each has half the gradient of the one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).eval()
    order = torch.tensor([2, 0, 1])
    swapped = copy.deepcopy(model)
    swapped[0].weight.data, swapped[2].weight.data = model[0].weight.data[order], model[2].weight.data[:, order]
    doubled = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).eval()
    doubled[0].weight.data = model[0].weight.data[[0, 1, 2, 2]]
    doubled[2].weight.data = model[2].weight.data[:, [0, 1, 2, 2]] * torch.tensor([1, 1, 0.5, 0.5])
    doubled[2].bias.data = model[2].bias.data
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))

    def rows(which, count):
        return (
            run(which, data, ["channel_salience"], ["int2"], "rows:1")[0]["channel_salience"].iloc[:count, 0].to_numpy()
        )

    one, other, more = rows(model, 3), rows(swapped, 3), rows(doubled, 4)
    np.testing.assert_allclose(other, one[order.numpy()], rtol=1e-5)
    assert more[2] == pytest.approx(more[3], rel=1e-6)
    np.testing.assert_allclose(more[:2], one[:2], rtol=1e-5)
    second = ChannelSalience(first_order=False)
    halves = [run(which, data, [second], ["int2"], "rows:1")[0][repr(second)].iloc[2, 0] for which in (model, doubled)]
    assert halves[1] == pytest.approx(halves[0] / 4, rel=1e-4)


def test_weights_of_functions_and_positions_that_samples_share():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(20, 3)).eval()
    data = (torch.randn(4, 5, 4), torch.tensor([0, 2, 1, 1]))
    for granularity in ("layer", "groups:2"):
        frames, network = run(model, data, list(FORMULAS), granularity=granularity)
        assert any(layer.module is None for layer in network.layers)
        for estimator, slow in slow_scores(FORMULAS, model, data, network, OPTIONS, granularity).items():
            mean = np.abs([value for value, _ in slow.values()])
            found = frames[repr(estimator)].loc[list(slow), "sensitivity"]
            np.testing.assert_allclose(found, mean, rtol=1e-3, atol=1e-5 * mean.max())
    with pytest.raises(ValueError, match="whose weight a function uses"):
        run(model, data, ["fisher"], ["int4/int8"])
    with pytest.raises(ValueError, match="used by a function: use kl or fisher"):
        run(model, data, ["output_fisher"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, data = cnn(), images()
    exact, _ = run(model, data, ["fisher", "output_fisher"], ["int2"], seed=1, settings={"fisher": {"labels": "data"}})
    half, _ = run(
        cnn().to(dtype), [(x.to(dtype), y) for x, y in data], ["fisher", "output_fisher"], ["int2"],
        settings={"fisher": {"labels": "data"}},
    )  # fmt: skip
    for name in exact:
        np.testing.assert_allclose(half[name]["sensitivity"], exact[name]["sensitivity"], rtol=0.1)


def test_degenerate_layers_and_single_samples():
    torch.manual_seed(0)

    class Degenerate(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.zero, self.head = nn.Linear(1, 1), nn.Linear(1, 4), nn.Linear(4, 2)
            self.zero.weight.data.zero_()

        def forward(self, x):
            return self.head(self.zero(self.one(x)))

    data = (torch.randn(1, 1), torch.tensor([1]))
    methods = [*FORMULAS, Fisher(), OutputFisher()]
    for granularity in ("layer", "rows:1"):
        frames, _ = run(Degenerate().eval(), data, methods, ["int2/int4"], granularity)
        for frame in frames.values():
            assert np.isfinite(frame.to_numpy()).all()
            assert (frame["sensitivity_se"] == 0).all()


def test_candidates_settings_and_finished_pieces(tmp_path):
    model, data = cnn().train(), images()
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    options = {"*": ["int2", "int4"], "head": ["int8"]}
    frames, _ = run(model, data, ["fisher", "kl", "auto"], options, cache=tmp_path)
    again, _ = run(model, data, ["fisher", "kl", "auto"], options, cache=tmp_path)
    pieces = sorted(tmp_path.rglob("*.npy"))
    assert len(pieces) == 2 + 4 + 4  # a batch of Fisher, a layer of KL, which is what "auto" is here
    for name in frames:
        assert frames[name].equals(again[name])
        missing = frames[name]["sensitivity"].isna()
        assert missing[missing].index.tolist() == [
            *((layer, "int8") for layer in ("first", "depthwise", "up")), ("head", "int2"), ("head", "int4")
        ]  # fmt: skip
    changed, _ = run(model, data, ["fisher"], options, cache=tmp_path, seed=1)
    assert not changed["fisher"].equals(frames["fisher"])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        ([], {}, "at least one"),
        (["fisher", "fisher"], {}, "each another"),
        (["fishr"], {}, "did you mean 'fisher'"),
        (["fisher"], {"kl": {}}, "settings must be for methods given by name"),
        (["fisher"], {"fisher": {"labels": "modle"}}, "labels must be one of auto, data, model, got 'modle'"),
        (["first_order"], {"first_order": {"mode": "x"}}, "mode must be one of absolute, llm-mq, got 'x'"),
        (["first_order"], {"first_order": {"mode": "llm-mq", "labels": "model"}}, "labels must be 'data'"),
    ],
)
def test_settings_that_do_not_fit_are_named(methods, settings, message):
    with pytest.raises(ValueError, match=message):
        run(cnn(), images(), methods, settings=settings)


def test_output_scores_of_groups_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="granularity must be 'layer' or 'rows'.*use fisher or weight_error"):
        run(cnn(), images(), ["fisher", "output_fisher"], granularity="groups:2")


@pytest.mark.parametrize("granularity", ["layer", "rows:3", "groups:3"])
@pytest.mark.parametrize("kind", ["cnn", "language"])
def test_first_order_at_a_base_takes_the_gradient_there_and_the_change_from_full_precision(kind, granularity):
    model, data, task = (cnn(), images(), None) if kind == "cnn" else language()
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    methods = [FirstOrder(base="int2"), FirstOrder(mode="llm-mq", base="int2"), FirstOrder(), Fisher()]
    frames, network = run(model, data, methods, granularity=granularity, task=task)
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())
    at_base = copy.deepcopy(model)
    for layer in network.layers:
        parameter = layer_parameters(at_base, layer)[0]
        rows = quantised_rows(as_rows(parameter.detach(), layer), SearchSpace(["int2"]).all_options[0].weight,
                              layer, granularity, RoundToNearest())  # fmt: skip
        parameter.data.copy_(from_rows(rows, layer))
    gradients, positions = slow_gradients(at_base, data, network, task)
    for unit in network.units(granularity):
        weight = as_rows(layer_parameters(model, unit.layer)[0].detach(), unit.layer)
        for option in SearchSpace(OPTIONS).all_options:
            quantised = quantised_rows(weight, option.weight, unit.layer, granularity, RoundToNearest())
            change = (quantised - weight).double().flatten(1)[unit.rows, unit.columns]
            parts = [g.flatten(1)[unit.rows, unit.columns] * change for g in gradients[unit.layer.name]]
            absolute = np.mean([float(p.abs().sum()) / t for p, t in zip(parts, positions, strict=True)])
            signed = abs(np.mean([float(p.sum()) / t for p, t in zip(parts, positions, strict=True)]))
            for method, expected in zip(methods, (absolute, signed), strict=False):
                found = frames[repr(method)]["sensitivity"].loc[unit.label, str(option)]
                assert found == pytest.approx(expected, rel=2e-3, abs=2e-5 * absolute + 1e-9)
    for method in methods[2:]:
        alone = estimate(model, data, network, SearchSpace(OPTIONS, ties=None), method, task=task,
                         granularity=granularity, progress=False)  # fmt: skip
        np.testing.assert_allclose(frames[repr(method)], alone, rtol=1e-5, atol=1e-12)
    other = frames[repr(methods[0])]["sensitivity"] - frames[repr(methods[2])]["sensitivity"]
    assert other.abs().max() > 1e-2 * frames[repr(methods[2])]["sensitivity"].max()


def test_first_order_at_a_base_in_half_precision_does_not_round_the_change():
    linear = nn.Linear(16, 1, bias=False).bfloat16()
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear.weight.data = weight
    x = torch.ones(3, 16).bfloat16()  # the loss is the output: its gradient is 1 everywhere
    task = CustomLoss(lambda model, batch: model(batch[0]).float())
    frames, _ = run(linear, (x, torch.zeros(3)), [FirstOrder(base="int2")], ["int8"], task=task)
    expected = (fake_quantize(weight, "int8").float() - weight.float()).abs().sum().item()
    assert next(iter(frames.values()))["sensitivity"].item() == pytest.approx(expected, rel=1e-4)


def test_first_order_takes_no_base_that_quantises_inputs():
    with pytest.raises(ValueError, match="base must quantise weights alone, got 'int4/int8': .* use 'int4'"):
        FirstOrder(base="int4/int8")
    with pytest.raises(ValueError, match="base must be 'full' or an option"):
        FirstOrder(base="-/int8")
