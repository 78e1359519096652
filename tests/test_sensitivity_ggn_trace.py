"""Gauss-Newton traces from Gram matrices against dense Jacobians, with every label and every sign enumerated."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from small_models import SmallDecoder, cnn, images
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import mpq
from mpq.batches import split_batch
from mpq.cache import Pieces
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import Measurement, gradient_grams, layer_traces, weight_gradients
from mpq.sensitivity.gauss_newton import SignProbes, gauss_newton_draws, input_norms
from mpq.sensitivity.gradient_grams import squared_norms
from mpq.sensitivity.gradient_pass import captures
from mpq.sensitivity.trace_estimators import StoppingRule
from mpq.tasks import Distribution, Features


class Sequence(nn.Module):
    """(samples, positions, 3) to logits of 2 classes a position: a grouped 1-D convolution, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        hidden = torch.tanh(self.conv(self.embed(ids).mT)).mT
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


class Pixels(nn.Module):
    """Many positions a sample, one output: dense, grouped, depthwise, strided and circular convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding="same", padding_mode="circular")
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=2)
        self.depthwise = nn.Conv2d(6, 6, (2, 1), groups=6)
        self.wide = nn.Conv2d(6, 40, 1)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        hidden = self.depthwise(torch.tanh(self.grouped(torch.tanh(self.first(x)))))
        return self.head(torch.tanh(self.wide(hidden)).mean((2, 3)))


def made(kind, *arguments):
    torch.manual_seed(0)
    return kind(*arguments).double().eval()


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def measured(model, data, task=None, seed=0):
    return Measurement(
        model=model, batches=data, network=mpq.trace(model, split_batch(data[0])[0]), options=(), candidates={},
        granularity="layer", task=task or Distribution(), quantizer=RoundToNearest(), seed=seed,
        pieces=Pieces(), progress=False,
    )  # fmt: skip


def dense_traces(model, network, logits, mask=None):
    """{layer: Tr of JᵀH_out J of the mean loss}, from dense Jacobians of (samples, positions, classes)."""
    parameters = {layer.weight_name: model.get_parameter(layer.weight_name).detach() for layer in network.layers}
    with sdpa_kernel(SDPBackend.MATH):
        values = logits(parameters).detach()
        jacobians = jacrev(logits)(parameters)
    samples, positions, classes = values.shape
    mask = torch.ones(samples, positions) if mask is None else mask
    p = values.softmax(-1)
    found = {}
    for layer in network.layers:
        j = jacobians[layer.weight_name].reshape(samples, positions, classes, -1).detach()
        each = torch.zeros(samples).double()
        for n, t in itertools.product(range(samples), range(positions)):
            if mask[n, t]:
                h_out = torch.diag(p[n, t]) - torch.outer(p[n, t], p[n, t])
                each[n] += (j[n, t].T @ h_out @ j[n, t]).trace() / mask[n].sum()
        found[layer.name] = float(each.mean())
    return found


@dataclass(frozen=True)
class Given(Distribution):
    """Draws replaced by what a test enumerates: the same labels or signs, position by position, for every sample."""

    labels: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()

    def sampled_losses(self, outputs, generator):
        if self.signs:
            signs = torch.tensor(self.signs).reshape(1, *outputs.values.shape[1:]).double()
            p = outputs.values.detach().softmax(-1)
            vector = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
        else:
            labels = torch.tensor(self.labels).reshape(outputs.values.shape[1:-1])
            labels = labels.expand(outputs.values.shape[:-1])
            one_hot = functional.one_hot(labels, outputs.values.shape[-1])
            vector = outputs.values.detach().softmax(-1) - one_hot
        terms = (outputs.values * vector).sum(-1)
        terms = terms if outputs.mask is None else terms * outputs.mask
        return terms.reshape(len(terms), -1).sum(1)


def norms(measurement, task):
    """(layers, samples) of ||G||² / T for one set of probes."""
    found = {}

    def receive(capture):
        found[capture.layer.name] = squared_norms(capture) / capture.positions

    captures(replace(measurement, task=task), 0, "model", receive, functional=True)
    return torch.stack([found[layer.name] for layer in measurement.network.layers])


def enumerated_by_labels(measurement, positions, classes):
    """Mean over samples of the expectation over every combination of labels."""
    outputs = measurement.task.run(measurement.model, measurement.batches[0])
    p = outputs.values.detach().softmax(-1).reshape(len(outputs.values), positions, classes)
    total = 0
    for labels in itertools.product(range(classes), repeat=positions):
        weight = torch.stack([p[:, t, label] for t, label in enumerate(labels)]).prod(0)
        total += weight * norms(measurement, Given(measurement.task.causal, labels=labels))
    return total.mean(1)


def assert_equal(measurement, values, truth):
    for layer, value in zip(measurement.network.layers, values.tolist(), strict=True):
        assert value == pytest.approx(truth[layer.name], rel=1e-10), layer.name


def sequence():
    model, ids = made(Sequence), torch.tensor([[0, 3, 3], [4, 1, 2]])
    measurement = measured(model, [ids])
    truth = dense_traces(model, measurement.network, lambda p: functional_call(model, p, (ids,)))
    return measurement, truth


def test_labels_of_a_sequence_enumerated():
    measurement, truth = sequence()
    assert_equal(measurement, enumerated_by_labels(measurement, positions=3, classes=2), truth)


def test_signs_of_a_sequence_enumerated():
    measurement, truth = sequence()
    total = sum(norms(measurement, Given(signs=signs)) for signs in itertools.product((-1, 1), repeat=6)) / 2**6
    assert_equal(measurement, total.mean(1), truth)


def test_sign_probes_are_drawn_through_that_root():
    measurement, _ = sequence()
    outputs = measurement.task.run(measurement.model, measurement.batches[0])
    logits = outputs.values.detach().requires_grad_()
    p = logits.detach().softmax(-1)[0, 0]
    probes = []
    for seed in range(400):
        loss = SignProbes(Distribution()).sampled_losses(replace(outputs, values=logits), generator(seed))
        probes.append(torch.autograd.grad(loss.sum(), logits)[0].flatten())
    covariance = torch.stack(probes).T @ torch.stack(probes) / 400
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(covariance[:2, :2], expected, rtol=0, atol=0.04)  # of about .24
    assert covariance[:2, 2:].abs().max() < 0.05  # positions are independent


def test_grouped_and_depthwise_convolutions_with_enumerated_labels():
    model = made(Pixels)
    x = torch.randn(3, 1, 7, 6, generator=generator()).double()
    measurement = measured(model, [x])
    truth = dense_traces(model, measurement.network, lambda p: functional_call(model, p, (x,))[:, None])
    assert_equal(measurement, enumerated_by_labels(measurement, positions=1, classes=3), truth)


def test_transposed_convolutions_and_overwritten_inputs_with_enumerated_labels():
    model, x = cnn().double(), images(batches=1)[0][0].double()
    measurement = measured(model, [x])
    truth = dense_traces(model, measurement.network, lambda p: functional_call(model, p, (x,))[:, None])
    assert_equal(measurement, enumerated_by_labels(measurement, positions=1, classes=5), truth)


def test_attention_with_tied_embedding_and_padding_with_enumerated_labels():
    model, ids = made(SmallDecoder, 3, 4), torch.tensor([[0, 2, 2, 1], [1, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    measurement = measured(model, [{"input_ids": ids, "attention_mask": mask}], Distribution(causal=True))

    def logits(p):
        p = {**p, "lm_head.weight": p["embed.weight"]}
        return functional_call(model, p, (ids,), tie_weights=False)["logits"][:, :-1]

    truth = dense_traces(model, measurement.network, logits, mask[:, 1:])
    assert_equal(measurement, enumerated_by_labels(measurement, positions=3, classes=3), truth)


def test_grams_are_the_norms_of_gradients_that_are_formed():
    """Layers of many sizes, so that Grams, products and fallbacks are all met."""
    met = set()

    def receive(capture):
        formed = capture.sample_gradients().flatten(1).square().sum(1)
        torch.testing.assert_close(squared_norms(capture), formed, rtol=1e-10, atol=1e-14)
        met.add(capture.layer.name)

    long = torch.randint(0, 5, (2, 40), generator=generator())
    flattened = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2), nn.Unflatten(0, (2, 6)))
    for model, data in [
        (made(Sequence), long),
        (made(Pixels), torch.randn(3, 1, 9, 9, generator=generator()).double()),
        (made(lambda: flattened), torch.randn(2, 6, 3, generator=generator()).double()),
        (made(nn.TransformerEncoderLayer, 4, 2, 4, 0.0, "relu"), torch.randn(3, 2, 4, generator=generator()).double()),
    ]:
        captures(measured(model, [data]), 0, "model", receive, functional=True)
    assert {"embed", "twice", "depthwise", "wide", "1", "linear1"} <= met
    assert any("in_proj" in name for name in met)


class PaddedAfterwards(nn.Conv2d):
    """A convolution of a class of its own, which pads at one end."""

    def forward(self, x):
        return self._conv_forward(functional.pad(x, (0, 2, 0, 1)), self.weight, self.bias)


class CalledTwice(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(torch.tanh(self.conv(x)))


def slow_gradients(module, inputs, gradient):
    """(samples, weight's shape): by the definition, place by place, the input padded by zeros where it is left."""
    if isinstance(module, PaddedAfterwards):
        inputs = functional.pad(inputs, (0, 2, 0, 1))
    axes, weight = inputs.ndim - 2, module.weight
    found = np.zeros((len(inputs), *weight.shape))
    x, g = inputs.numpy(), gradient.numpy()
    kernel_places = list(itertools.product(*map(range, weight.shape[2:])))
    for at in itertools.product(*map(range, gradient.shape[2:])):
        for k in kernel_places:
            place = [at[i] * module.stride[i] - module.padding[i] + k[i] * module.dilation[i] for i in range(axes)]
            if not all(0 <= p < size for p, size in zip(place, inputs.shape[2:], strict=True)):
                continue
            for row, column in itertools.product(*map(range, weight.shape[:2])):
                channel = row // (weight.shape[0] // module.groups) * weight.shape[1] + column
                found[(slice(None), row, column, *k)] += g[(slice(None), row, *at)] * x[(slice(None), channel, *place)]
    return found


CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3), (5, 4)),
    "one by one": (nn.Conv2d(3, 4, 1), (3, 3)),
    "padded": (nn.Conv2d(2, 3, (3, 2), padding=(2, 1)), (4, 4)),
    "strided": (nn.Conv2d(2, 3, 3, stride=(2, 3), padding=1), (6, 7)),
    "dilated": (nn.Conv2d(2, 3, 2, dilation=(2, 1), padding=(0, 1)), (5, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (5, 4)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 4)),
    "depthwise, strided": (nn.Conv2d(3, 3, 3, groups=3, stride=2, dilation=(1, 2), padding=(1, 2)), (6, 7)),
    "depthwise, two rows a channel": (nn.Conv2d(3, 6, (2, 3), groups=3, stride=(2, 1)), (6, 5)),
    "1-d": (nn.Conv1d(2, 3, 3, stride=2, padding=2), (9,)),
    "1-d depthwise": (nn.Conv1d(3, 3, 4, groups=3, dilation=2, padding=3), (9,)),
    "of another class": (PaddedAfterwards(4, 4, 3, groups=2), (4, 4)),
    "called twice": (CalledTwice(nn.Conv2d(2, 2, 3, padding=1)), (4, 3)),
    "depthwise, called twice": (CalledTwice(nn.Conv2d(2, 2, 3, padding=1, groups=2)), (4, 3)),
}


@pytest.mark.parametrize("side", ["gradient", "grams", "chosen"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_both_sides_of_every_convolution_equal_the_loop(kind, side, monkeypatch):
    """A few samples at a time; the modules are never run backward on their own."""
    monkeypatch.setattr(gradient_grams, "BLOCK", 300)
    monkeypatch.setattr(weight_gradients, "_by_autograd", None)
    if side != "chosen":
        monkeypatch.setattr(gradient_grams, "gradient_is_cheaper", lambda call, capture: side == "gradient")
    module, places = CONVOLUTIONS[kind]
    torch.manual_seed(3)
    channels = next(module.parameters()).shape[1] * getattr(module, "conv", module).groups
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
    x = torch.randn(5, channels, *places).double()
    model(x)
    seen = []

    def receive(capture):
        if capture.position == 0:
            slow = sum(slow_gradients(call.module, call.inputs, call.gradient) for call in capture.calls)
            expected = np.square(slow).reshape(5, -1).sum(1)
            np.testing.assert_allclose(squared_norms(capture).numpy(), expected, rtol=1e-10, atol=0)
            np.testing.assert_allclose(capture.sample_gradients().numpy(), slow, rtol=1e-9, atol=1e-12)
            seen.append(len(capture.calls))

    captures(measured(model, [x]), 0, "model", receive)
    assert seen == [1 + ("twice" in kind)]


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds"),
    [  # of the gradient, of the Grams: multiply-adds of one sample
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 4, 4), (6 * 16 * 9, 6 * 16**2 * 10)),
        (nn.Conv2d(3, 4, 1), (3, 8, 8), (64 * 12, 64**2 * 7)),
        (nn.Conv2d(20, 30, 3), (20, 4, 4), (4 * 30 * 180, 4**2 * 210)),
        (nn.Conv2d(16, 32, 3, groups=2), (16, 4, 4), (2 * 4 * 16 * 72, 2 * 4**2 * 88)),
        (nn.Linear(40, 30), (2, 40), (2 * 1200, 2**2 * 70)),
        (nn.Linear(2, 3), (9, 2), (9 * 6, 9**2 * 5)),
    ],
    ids=str,
)
def test_the_side_with_fewer_multiply_adds_is_taken(layer, shape, multiply_adds):
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(2, *shape)
    model(x)
    chosen = []

    def receive(capture):
        chosen.append(gradient_grams.gradient_is_cheaper(capture.calls[0], capture))

    captures(measured(model, [x]), 0, "model", receive)
    assert chosen[-1] == (multiply_adds[0] <= multiply_adds[1])  # the last layer comes first


def test_single_precision_is_as_good_as_its_rounding():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 5, groups=8, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.Flatten(), nn.Linear(12 * 144, 4)
    )
    x = torch.randn(4, 8, 12, 12, generator=generator())
    found = []
    for kind in (model, made(lambda: model)):
        values = []
        captures(
            measured(kind, [x.to(next(kind.parameters()).dtype)]), 0, "model",
            lambda capture, values=values: values.append(squared_norms(capture)),
        )  # fmt: skip
        found.append(torch.stack(values))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_input_norms_are_the_gradients_at_the_inputs():
    """Against hooks on the module's inputs; both calls of a module, none of an embedding."""
    measurement, _ = sequence()
    model, found = measurement.model, {}
    given = Given(labels=(0, 1, 1))
    captures(
        replace(measurement, task=given), 0, "model",
        lambda capture: found.update({capture.layer.name: input_norms(capture)}),
    )  # fmt: skip
    seen = {}

    def alias(name, module, args):
        seen.setdefault(name, []).append(args[0] * 1)
        return (seen[name][-1],)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: alias(name, m, a))
        for name in ("conv", "twice", "head")
    ]
    outputs = given.run(model, measurement.batches[0])
    loss = given.sampled_losses(outputs, None).sum()
    for name, inputs in seen.items():
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        squares = sum(g.flatten(1).square().sum(1) for g in gradients)
        expected = squares / sum(g[0].numel() for g in gradients)
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=0)
    for handle in handles:
        handle.remove()
    assert (found["embed"] == 0).all()


def test_two_standard_errors_hold_the_truth():
    measurement, truth = sequence()
    inside = []
    for probe in ("signs", "labels"):
        for seed in range(30):
            measurement = replace(measurement, seed=seed)
            draws = gauss_newton_draws(measurement, StoppingRule(probes=12, tolerance=0.0), probe=probe)
            for layer, found in zip(measurement.network.layers, draws.traces(), strict=True):
                inside.append(abs(found.trace - truth[layer.name]) <= 2 * found.standard_error)
    assert 0.90 <= np.mean(inside) <= 0.985  # 240 traces


def test_draws_stop_at_the_error_that_was_asked_for_and_errors_over_samples_are_theirs():
    model, data = cnn(), [(torch.randn(32, 1, 6, 6, generator=generator()), torch.zeros(32).long())] * 2
    network = mpq.trace(model, data[0][0])
    loose, tight = (
        layer_traces(model, data, network, curvature="ggn", tolerance=tolerance, progress=False)
        for tolerance in (0.3, 0.02)
    )
    assert (loose["probes"] == 2).all()
    assert (tight["probes"] > 10).all()
    assert (tight["standard_error"] <= 0.02 * tight["trace"]).all()
    hessian = layer_traces(model, data, network, labels="model", tolerance=0.02, probes=4000, progress=False)
    error = np.hypot(tight["standard_error"], hessian["standard_error"])
    assert (np.abs(tight["trace"] - hessian["trace"]) < 4 * error).all()


def test_scores_are_half_the_average_trace_times_the_squared_error_with_errors_over_samples():
    model, data = cnn(), [images(batches=1, samples=8)[0], images(batches=2, samples=5)[1]]
    network = mpq.trace(model, data[0][0])
    frame = mpq.sensitivity.estimate(
        model, data, network, SearchSpace(["int3", "int3/int4", "fp32"], ties=None), "ggn_trace",
        draws=3, tolerance=0.0, progress=False,
    )  # fmt: skip
    draws = gauss_newton_draws(measured(model, data), StoppingRule(probes=3, tolerance=0.0), inputs=range(4))
    for at, layer in enumerate(network.layers):
        if layer.name == "up":
            continue
        weight = model.get_submodule(layer.name).weight.detach()
        scale = 0.5 * float((fake_quantize(weight, "int3") - weight).square().sum()) / weight.numel()
        each = draws.weights[:, at].mean(0)
        row = frame.loc[layer.name, "int3"]
        assert row["sensitivity"] == pytest.approx(scale * each.mean(), rel=1e-5)
        assert row["sensitivity_se"] == pytest.approx(scale * each.std(ddof=1) / np.sqrt(13), rel=1e-5)
    given = [x for x, _ in data]
    change = sum(float((fake_quantize(x, "int4@tensor") - x).square().sum()) for x in given) / 13
    weight = model.first.weight.detach()
    scale = 0.5 * float((fake_quantize(weight, "int3") - weight).square().sum()) / weight.numel()
    each = scale * draws.weights[:, 0].mean(0) + 0.5 * change * draws.inputs[:, 0].mean(0)
    row = frame.loc["first", "int3/int4"]
    assert row["sensitivity"] == pytest.approx(each.mean(), rel=1e-5)
    assert row["sensitivity_se"] == pytest.approx(each.std(ddof=1) / np.sqrt(13), rel=1e-4)
    assert (frame.xs("fp32", level=1) == 0).all(axis=None)


def test_features_and_a_single_sample():
    model, data = made(lambda: nn.Sequential(nn.Linear(3, 4))), torch.randn(1, 3, generator=generator()).double()
    y = model(data).detach()
    expected = 2 * 4 * float(data.square().sum()) / float(y.square().sum())  # Hessian 2 JᵀJ / ||y||²
    frame = layer_traces(
        model, data, mpq.trace(model, data), task=Features(), curvature="ggn", probes=40, tolerance=0.0, progress=False
    )
    assert frame["trace"].item() == pytest.approx(expected, rel=1e-6)  # ||zxᵀ||² is the same for all signs z
    assert frame["standard_error"].item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, data = cnn().to(dtype), [x.to(dtype) for x, _ in images(batches=1, samples=16)]
    network = mpq.trace(model, data[0])
    half = layer_traces(model, data, network, curvature="ggn", tolerance=0.0, probes=8, progress=False)
    full = layer_traces(
        model.float(), [x.float() for x in data], network, curvature="ggn", tolerance=0.0, probes=8, progress=False
    )
    np.testing.assert_allclose(half["trace"], full["trace"], rtol=0.1)


def test_same_seed_same_traces_and_the_model_comes_back():
    model, data = cnn().train(), images()
    network = mpq.trace(model, data[0][0])
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    runs = [layer_traces(model, data, network, curvature="ggn", seed=seed, progress=False) for seed in (1, 1, 2)]
    assert runs[0].equals(runs[1])
    assert not runs[0].equals(runs[2])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_what_does_not_fit_is_named():
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    with pytest.raises(ValueError, match="the task is a loss function.*curvature='hessian'"):
        layer_traces(model, data, network, lambda model, batch: model(batch[0]).sum(), curvature="ggn", progress=False)
    for settings, message in [
        ({"draws": 1}, "draws must be a whole number of at least 2.*got 1"),
        ({"probe": "ones"}, "probe must be one of signs, labels, got 'ones'"),
        ({"tolerance": -1}, "tolerance must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            mpq.sensitivity.estimate(model, data, network, SearchSpace(["int4"]), "ggn_trace", **settings)
    model.head.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 'head'"):
        layer_traces(model, data, network, curvature="ggn", progress=False)
