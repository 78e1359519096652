"""Layer traces and Hessian-trace scores against dense Hessians in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import mpq
from mpq.batches import split_batch
from mpq.cache import Pieces
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import Measurement, layer_traces
from mpq.sensitivity.hessian_products import HessianProducts
from mpq.sensitivity.layer_probes import probed_traces
from mpq.sensitivity.trace_estimators import SKEWNESS, StoppingRule, exact
from mpq.tasks import CustomLoss, Distribution, Features


class Smooth(nn.Module):
    """A convolution, a module called twice and a head, with curved activations: the Hessian is not Gauss-Newton."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        hidden = functional.gelu(self.conv(images)).flatten(1)
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


def smooth():
    torch.manual_seed(0)
    return Smooth().double().eval()


def pictures():
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 2)
    return [
        (torch.randn(n, 1, 4, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def measured(model, data, task=None, seed=0):
    return Measurement(
        model=model, batches=data, network=mpq.trace(model, split_batch(data[0])[0]), options=(), candidates={},
        granularity="layer", task=task or Distribution(), quantizer=RoundToNearest(), seed=seed,
        pieces=Pieces(), progress=False,
    )  # fmt: skip


def weights_of(model, network):
    return {layer.weight_name: model.get_parameter(layer.weight_name).detach() for layer in network.layers}


def dense_hessian(loss, parameters):
    """{(name, name): matrix} of a function of named tensors."""
    with sdpa_kernel(SDPBackend.MATH):
        blocks = hessian(loss)(parameters)
    return {
        (a, b): block.detach().reshape(parameters[a].numel(), parameters[b].numel())
        for a, row in blocks.items()
        for b, block in row.items()
    }


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def smooth_hessian(model, data, network):
    x, y = whole(data)
    return dense_hessian(
        lambda p: functional.cross_entropy(functional_call(model, p, (x,)), y), weights_of(model, network)
    )


def exact_traces(measurement, labels="auto"):
    """The trace of each layer from a product with every unit vector."""
    layers = measurement.network.layers
    with HessianProducts(measurement, labels, "weights", range(len(layers))) as products:
        return {
            layer.weight_name: exact(lambda v, at=at: products.product(at, v), products.size(at)).trace
            for at, layer in enumerate(layers)
        }


def dense_products(measurement, labels="auto"):
    layers = measurement.network.layers
    with HessianProducts(measurement, labels, "weights", range(len(layers))) as products:
        return {
            layer.weight_name: products.product(at, torch.eye(products.size(at)).double())
            for at, layer in enumerate(layers)
        }


def test_products_are_the_dense_hessian_of_the_mean_over_all_samples():
    model, data = smooth(), pictures()
    measurement = measured(model, data)
    truth = smooth_hessian(model, data, measurement.network)
    for name, block in dense_products(measurement).items():
        torch.testing.assert_close(block, truth[name, name], rtol=1e-9, atol=1e-12)
    gauss_newton = dense_products(measurement, "model")
    assert any((gauss_newton[n] - truth[n, n]).abs().max() > 1e-3 for n in gauss_newton)
    assert all(torch.linalg.eigvalsh(block).min() > -1e-10 for block in gauss_newton.values())


@pytest.mark.parametrize("method", ["auto", "joint", "block", "hutch++", "xtrace"])
def test_traces_are_within_their_errors(method):
    model, data = smooth(), pictures()
    network = mpq.trace(model, data[0][0])
    truth = smooth_hessian(model, data, network)
    frame = layer_traces(model, data, network, algorithm=method, probes=400, tolerance=0.05, seed=3, progress=False)
    assert list(frame.index) == ["conv", "twice", "head"]
    for name, row in frame.iterrows():
        expected = float(truth[f"{name}.weight", f"{name}.weight"].trace())
        assert abs(row["trace"] - expected) <= 4 * row["standard_error"] + 1e-9, name
        assert row["standard_error"] <= 0.05 * abs(row["trace"]) or row["probes"] >= 396
        assert row["standard_error"] < (0.5 if method != "joint" else 1) * abs(expected)


def test_mean_and_variance_of_a_joint_probe():
    model, data = smooth(), pictures()[:1]
    measurement = measured(model, data)
    names = [layer.weight_name for layer in measurement.network.layers]
    truth = smooth_hessian(model, data, measurement.network)
    with HessianProducts(measurement, "data", "weights", range(3)) as products:
        rule = StoppingRule(probes=900, tolerance=0.0)
        for kind in ("joint", "block"):
            found = probed_traces(products, rule, kind)
            for at, name in enumerate(names):
                own = truth[name, name]
                variance = 2 * float(own.square().sum() - own.diagonal().square().sum())
                across = sum(float(truth[name, other].square().sum()) for other in names if other != name)
                assert across > 0.3 * variance  # else the two kinds could not be told apart
                variance += across if kind == "joint" else 0
                error = found[at].standard_error / SKEWNESS
                assert error**2 * found[at].probes == pytest.approx(variance, rel=0.3), (kind, name)
                assert abs(found[at].trace - float(own.trace())) < 4 * error


def test_two_standard_errors_hold_the_truth():
    model, data = smooth(), pictures()[:1]
    measurement = measured(model, data)
    truth = smooth_hessian(model, data, measurement.network)
    expected = np.array([float(truth[n.weight_name, n.weight_name].trace()) for n in measurement.network.layers])
    inside = []
    with HessianProducts(measurement, "data", "weights", range(3)) as products:
        for seed in range(40):
            products.measurement = replace(measurement, seed=seed)
            found = probed_traces(products, StoppingRule(probes=40, tolerance=0.2), "auto")
            values = np.array([(f.trace, f.standard_error) for f in (found[at] for at in range(3))])
            inside.append(np.abs(values[:, 0] - expected) <= 2 * values[:, 1] + 1e-12)
    assert 0.90 <= np.mean(inside) <= 0.99  # 120 layers


def test_linear_softmax_regression_has_the_gauss_newton_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double().eval()
    data = [(torch.randn(9, 5).double(), torch.randint(0, 4, (9,)))]
    p = model(data[0][0]).softmax(1).detach()
    expected = float(((p * (1 - p)).sum(1) * data[0][0].square().sum(1)).mean())
    for labels in ("data", "model"):
        assert exact_traces(measured(model, data), labels)["0.weight"] == pytest.approx(expected, rel=1e-12)


def test_piecewise_linear_networks_have_gauss_newton_blocks():
    model, data = cnn().double(), [(x.double(), y) for x, y in images()]
    hessian_of_data = exact_traces(measured(model, data), "data")
    assert hessian_of_data == pytest.approx(exact_traces(measured(model, data), "model"), rel=1e-9)


def test_attention_tied_weights_and_padding():
    model, batch = decoder().double(), tokens(batches=1, samples=2, positions=4)[0]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    data = [{**batch, "attention_mask": mask, "labels": batch["input_ids"]}]
    measurement = measured(model, data, Distribution(causal=True))

    def loss(p):
        p = {**p, "lm_head.weight": p["embed.weight"]}
        logits = functional_call(model, p, (batch["input_ids"],), tie_weights=False)["logits"][:, :-1]
        each = functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        return ((each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).mean()

    truth = dense_hessian(loss, weights_of(model, measurement.network))
    for name, block in dense_products(measurement).items():
        torch.testing.assert_close(block, truth[name, name], rtol=1e-8, atol=1e-11)


def test_weights_used_by_functions():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, dropout=0.0).double().eval()
    data = [torch.randn(2, 3, 4).double()]
    measurement = measured(model, data, Features())
    reference = model(data[0]).detach()

    def loss(p):
        return (
            (functional_call(model, p, (data[0],)) - reference).square().sum((1, 2)) / reference.square().sum((1, 2))
        ).mean()

    truth = dense_hessian(loss, weights_of(model, measurement.network))
    assert any(layer.module is None for layer in measurement.network.layers)
    for name, trace in exact_traces(measurement).items():
        assert trace == pytest.approx(float(truth[name, name].trace()), rel=1e-8), name


def test_regression_and_losses_of_the_users_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    data = [(torch.randn(5, 3).double(), torch.randn(5, 2).double())]
    network = mpq.trace(model, data[0][0])

    def own(model, batch):
        return functional.mse_loss(model(batch[0]), batch[1])

    truth = dense_hessian(
        lambda p: functional.mse_loss(functional_call(model, p, (data[0][0],)), data[0][1]), weights_of(model, network)
    )
    for task in (Features(), CustomLoss(own)):
        for name, trace in exact_traces(measured(model, data, task)).items():
            assert trace == pytest.approx(float(truth[name, name].trace()), rel=1e-10)


def test_same_seed_same_traces_and_the_model_comes_back():
    model, data = cnn().train(), images()
    model.head.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    network = mpq.trace(model, data[0][0])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    runs = [layer_traces(model, data, network, tolerance=0.3, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert runs[0].equals(runs[1])
    assert not runs[0].equals(runs[2])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in (model.first.weight, model.head.weight)] == [True, False]
    assert torch.equal(model.first.weight.grad, torch.ones_like(model.first.weight))
    assert model.head.weight.grad is None
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_precision(dtype):
    model, data = cnn().to(dtype), [(x.to(dtype), y) for x, y in images()]
    network = mpq.trace(model, data[0][0])
    before = copy.deepcopy(model.state_dict())
    half = layer_traces(model, data, network, algorithm="block", tolerance=0.3, progress=False)
    single = copy.deepcopy(model).float()
    full = layer_traces(
        single, [(x.float(), y) for x, y in data], network, algorithm="block", tolerance=0.3, progress=False
    )
    np.testing.assert_allclose(half["trace"], full["trace"], rtol=1e-5)
    assert all(value.dtype == dtype and torch.equal(value, before[n]) for n, value in model.state_dict().items())


class Odd(nn.Module):
    """A layer of one weight, a layer that the loss does not see, and one whose weight is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.zero, self.head, self.unseen = (
            nn.Linear(1, 1, bias=False), nn.Linear(1, 2), nn.Linear(2, 3), nn.Linear(3, 3),
        )  # fmt: skip
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        logits = self.head(torch.tanh(self.zero(torch.tanh(self.one(x)))))
        return logits + 0 * self.unseen(logits.detach()).detach()


@pytest.mark.parametrize("method", ["auto", "joint", "block", "hutch++", "xtrace"])
def test_small_zero_and_unseen_layers_of_a_single_sample(method):
    torch.manual_seed(0)
    model = Odd().double().eval()
    data = [(torch.randn(1, 1).double(), torch.tensor([1]))]
    network = mpq.trace(model, data[0][0])
    truth = smooth_hessian(model, data, network)
    frame = layer_traces(model, data, network, algorithm=method, probes=100, progress=False)
    for name, row in frame.iterrows():
        expected = float(truth[f"{name}.weight", f"{name}.weight"].trace())
        assert abs(row["trace"] - expected) <= 4 * row["standard_error"] + 1e-12, name
    assert frame.loc["unseen", "trace"] == frame.loc["unseen", "standard_error"] == 0


def test_what_cannot_be_differentiated_twice_and_what_is_not_finite_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    class Model(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.fc, self.function = nn.Linear(3, 3), function

        def forward(self, x):
            return self.function(self.fc(x))

    data = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    model = Model(Once.apply).eval()
    with pytest.raises(ValueError, match=r"differentiable twice.*curvature='ggn'"):
        layer_traces(model, data, mpq.trace(model, data[0][0]), progress=False)
    model = Model(lambda x: (x - x).sqrt() + x).eval()
    with pytest.raises(ValueError, match="Hessian at layer 'fc' holds NaN or infinity"):
        layer_traces(model, data, mpq.trace(model, data[0][0]), progress=False)
    model = Model(lambda x: x).eval()
    network = mpq.trace(model, data[0][0])
    for settings, message in [
        ({"algorithm": "lanczos"}, "algorithm must be one of auto, joint.*got 'lanczos'"),
        ({"curvature": "fisher"}, "curvature must be one of hessian, ggn, got 'fisher'"),
        ({"labels": "modle"}, "labels must be one of auto, data, model, got 'modle'"),
        ({"probes": 1}, "probes must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_traces(model, data, network, progress=False, **settings)
    with pytest.raises(ValueError, match="labels='model'"):
        layer_traces(model, [data[0][0]], network, task="classification", labels="data", progress=False)


def test_finished_pieces_are_found_again(tmp_path, monkeypatch):
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    settings = {"tolerance": 0.2, "cache": tmp_path, "progress": False}
    frames = {m: layer_traces(model, data, network, algorithm=m, **settings) for m in ("auto", "xtrace")}
    frames["ggn"] = layer_traces(model, data, network, curvature="ggn", **settings)
    from mpq.sensitivity import gauss_newton

    monkeypatch.setattr(HessianProducts, "graph", None)
    monkeypatch.setattr(gauss_newton, "captures", None)
    for method in ("auto", "xtrace"):
        assert layer_traces(model, data, network, algorithm=method, **settings).equals(frames[method])
    assert layer_traces(model, data, network, curvature="ggn", **settings).equals(frames["ggn"])
    model.head.bias.data.add_(0.1)
    with pytest.raises(TypeError):
        layer_traces(model, data, network, **settings)


def estimate(model, data, options, **settings):
    network = mpq.trace(model, data[0][0])
    space = SearchSpace(options, ties=None)
    return mpq.sensitivity.estimate(
        model, data, network, space, "hessian_trace", progress=False, **({"tolerance": 0.05} | settings)
    )


def test_scores_are_half_the_average_trace_times_the_squared_error():
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    traces = layer_traces(model, data, network, progress=False)
    frame = estimate(model, data, ["int2", "int4", "fp32"])
    assert frame.attrs["measure"] == "loss"
    for name in ("first", "head"):
        weight = model.get_submodule(name).weight.detach()
        for option in ("int2", "int4"):
            error = float((fake_quantize(weight, option) - weight).square().sum())
            scale = 0.5 * error / weight.numel()
            row = frame.loc[name, option]
            assert row["sensitivity"] == pytest.approx(scale * traces.loc[name, "trace"], rel=1e-5)
            assert row["sensitivity_se"] == pytest.approx(scale * traces.loc[name, "standard_error"], rel=1e-5)
    assert (frame.xs("fp32", level=1) == 0).all(axis=None)


@pytest.mark.parametrize("granularity", ["rows:2", "groups:3"])
def test_units_add_up_to_their_layer(granularity):
    model, data = cnn(), images()
    whole_layers = estimate(model, data, ["int3@channel", "int8/int4"], tolerance=0.3)
    units = estimate(model, data, ["int3@channel", "int8/int4"], tolerance=0.3, granularity=granularity)
    if granularity == "rows:2":
        names = units.index.get_level_values(0).str.split("[").str[0]
        summed = units["sensitivity"].groupby([names, units.index.get_level_values(1)]).sum()
        for key, value in whole_layers["sensitivity"].items():
            assert summed[key] == pytest.approx(value, rel=1e-5)
    weight = model.head.weight.detach()
    network = mpq.trace(model, data[0][0])
    trace = layer_traces(model, data, network, tolerance=0.3, progress=False).loc["head", "trace"]
    unit = next(u for u in network.units(granularity) if u.layer.name == "head")
    block = weight[unit.rows, unit.columns]
    block = fake_quantize(block, "int3") - block
    expected = 0.5 * trace / weight.numel() * float(block.square().sum())
    assert units.loc[unit.label, "int3"]["sensitivity"] == pytest.approx(expected, rel=1e-4)


def test_negative_traces_are_shown_and_count_as_zero():
    class Concave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1, bias=False)

        def forward(self, x):
            return self.fc(x)

    torch.manual_seed(0)
    model, data = Concave().eval(), [(torch.randn(4, 2), torch.randn(4, 1))]
    network = mpq.trace(model, data[0][0])
    loss = lambda model, batch: -model(batch[0]).square().mean()  # noqa: E731
    frame = layer_traces(model, data, network, task=loss, progress=False)
    expected = -2 * float(data[0][0].square().sum(1).mean())
    assert frame["trace"].item() == pytest.approx(expected, rel=0.2)
    assert frame["trace"].item() < 0
    scores = mpq.sensitivity.estimate(
        model, data, network, SearchSpace(["int2"]), "hessian_trace", task=loss, progress=False
    )
    assert scores["sensitivity"].item() == 0
    assert scores["sensitivity_se"].item() > 0


def test_quantised_inputs_take_the_curvature_of_the_inputs():
    """Against the dense Hessian of each sample's own loss in the module's input, both calls at once."""
    torch.manual_seed(0)
    model, data = smooth(), pictures()
    frame = estimate(model, data, ["fp32/int4"], tolerance=0.08, probes=600)
    traces, errors = [], []
    for x, y in ((a[None], b[None]) for inputs, targets in data for a, b in zip(inputs, targets, strict=True)):
        hidden = functional.gelu(model.conv(x)).flatten(1).detach()
        second = torch.tanh(model.twice(hidden)).detach()

        def loss(shift, hidden=hidden, y=y):
            again = torch.tanh(model.twice(hidden + shift[:, :8]))
            return functional.cross_entropy(model.head(torch.tanh(model.twice(again + shift[:, 8:]))), y)

        block = hessian(loss)(torch.zeros(1, 16).double()).reshape(16, 16)
        traces.append(float(block.trace()) / 16)
        errors.append([hidden, second])
    change = 0.0
    for start, stop in ((0, 4), (4, 6)):  # a scale a tensor is one a batch
        for call in range(2):
            given = torch.cat([e[call] for e in errors[start:stop]])
            change += float((fake_quantize(given, "int4@tensor") - given).square().sum())
    expected = 0.5 * max(np.mean(traces), 0) * change / 6
    row = frame.loc["twice", "fp32/int4"]
    assert abs(row["sensitivity"] - expected) <= 4 * row["sensitivity_se"]
    assert 0 < row["sensitivity_se"] < 0.15 * expected


def test_inputs_of_functions_are_refused():
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    data = [torch.randn(2, 3, 4)]
    network = mpq.trace(model, data[0])
    for method in ("hessian_trace", "ggn_trace"):
        with pytest.raises(ValueError, match="used by a function"):
            mpq.sensitivity.estimate(model, data, network, SearchSpace(["int8/int8"]), method, progress=False)
