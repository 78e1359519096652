"""Output Fisher against loops over samples, layers and options, and against the loss it estimates."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.batches import split_batch
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.tasks import Distribution

OPTIONS = ["int2", "int4/int8", "fp32"]


def estimate(model, data, space, **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    return mpq.sensitivity.estimate(model, data, network, space, "output_fisher", progress=False, **settings), network


def slow_scores(model, sample, summed_loss, positions, modules, options):
    """½ Σ (dL/dY ⊙ ΔY)² / T of one sample, by keeping every output and gradient."""
    kept = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept.setdefault(name, []).append((args[0].detach().clone(), output))
            return output * 1  # what follows may overwrite it

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    summed_loss(model, sample).backward()
    for handle in handles:
        handle.remove()
    scores = np.zeros((len(modules), len(options)))
    for row, (name, module) in enumerate(modules.items()):
        for column, (weight, activation) in enumerate(options):
            changed = copy.deepcopy(module)
            changed.weight.data = weight(name, module)
            for given, output in kept[name]:
                with torch.no_grad():
                    new = changed.forward(activation(given))
                    scores[row, column] += 0.5 * float((output.grad * (new - output)).square().sum()) / positions
    return scores


def rows_quantised(fmt):
    def quantise(name, module):
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        if axis == 1:  # (in, out/groups, k, k): each output channel of each group has a scale of its own
            parts = [fake_quantize(part, fmt, axis=1) for part in module.weight.detach().chunk(module.groups)]
            return torch.cat(parts)
        return fake_quantize(module.weight.detach(), fmt, axis=0)

    return quantise


CHOICES = [
    (rows_quantised("int2"), lambda given: given),
    (rows_quantised("int4"), lambda given: fake_quantize(given, "int8@tensor")),
    (lambda name, module: module.weight.detach(), lambda given: given),
]


def test_equals_a_loop_over_samples_with_the_datas_labels():
    model, data = cnn(), images(batches=1, samples=1)
    names = ["first", "depthwise", "up", "head"]
    frame, _ = estimate(model, data, SearchSpace(OPTIONS), labels="data")

    def loss(model, sample):
        return functional.cross_entropy(model(sample[0]), sample[1], reduction="sum")

    slow = slow_scores(model, data[0], loss, 1, {name: model.get_submodule(name) for name in names}, CHOICES)
    fast = frame["sensitivity"].unstack()[OPTIONS].loc[names].to_numpy()
    np.testing.assert_allclose(fast, slow, rtol=2e-5, atol=1e-12)
    assert (fast[:, 2] == 0).all()


def test_mean_and_standard_error_are_over_samples():
    model, data = cnn(), images(batches=2, samples=3)
    frame, network = estimate(model, data, SearchSpace(["int4"]), labels="data")
    singles = [(x[None], y[None]) for inputs, targets in data for x, y in zip(inputs, targets, strict=True)]
    each = np.stack(
        [
            mpq.sensitivity.estimate(
                model, [single], network, SearchSpace(["int4"]), "output_fisher", labels="data", progress=False
            )["sensitivity"].to_numpy()
            for single in singles
        ]
    )
    np.testing.assert_allclose(frame["sensitivity"], each.mean(0), rtol=1e-4)
    np.testing.assert_allclose(frame["sensitivity_se"], each.std(0, ddof=1) / np.sqrt(6), rtol=1e-3)


def test_sequences_sum_positions_and_divide_once_and_tied_weights_count_every_use():
    model, data = decoder(), [{**batch, "labels": batch["input_ids"]} for batch in tokens(batches=1, samples=1)]
    space = SearchSpace(["int2"])
    frame, network = estimate(model, data, space, labels="data", task=Distribution(causal=True))
    assert network.layers[0].name == "embed"
    ids = data[0]["input_ids"]

    def loss(model, sample):
        logits = model(sample)["logits"][:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten(), reduction="sum")

    modules = {name: model.get_submodule(name) for name in ("embed", "lm_head", "q", "k", "v", "o")}
    slow = slow_scores(model, ids, loss, ids.shape[1] - 1, modules, CHOICES[:1])[:, 0]
    expected = {"embed": slow[0] + slow[1], **dict(zip("qkvo", slow[2:], strict=True))}
    for name, value in expected.items():
        assert frame.loc[(name, "int2"), "sensitivity"] == pytest.approx(value, rel=1e-4), name


def test_rows_add_up_to_their_layer():
    model, data, space = cnn(), images(), SearchSpace(["int2", "int4"])
    whole, _ = estimate(model, data, space, labels="data")
    rows, network = estimate(model, data, space, labels="data", granularity="rows:2")
    assert list(network.units("rows:2").labels[:2]) == ["first[0:2]", "first[2:4]"]
    summed = rows["sensitivity"].groupby([rows.index.get_level_values(0).str.split("[").str[0], "option"]).sum()
    for key, value in whole["sensitivity"].items():
        assert summed[key] == pytest.approx(value, rel=1e-6)


def test_with_sampled_labels_a_last_layer_score_is_the_expected_kl_of_a_small_change():
    """For the last layer's output Y = logits, ½ E (g ΔY)² is the diagonal part of the KL's quadratic form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    x = torch.randn(64, 6)
    frame, _ = estimate(model, [x] * 40, SearchSpace(["int8"], ties=None), labels="model", task="classification")
    with torch.no_grad():
        p = model(x).softmax(1)
        change = x @ (fake_quantize(model[0].weight, "int8") - model[0].weight).T
        expected = 0.5 * (p * (1 - p) * change.square()).sum(1).mean()  # E g_i² = p_i (1 - p_i)
    row = frame.iloc[0]
    assert abs(row["sensitivity"] - float(expected)) < 4 * row["sensitivity_se"]
    assert row["sensitivity_se"] < 0.2 * row["sensitivity"]


def test_labels_of_data_without_labels_are_an_error_and_auto_samples():
    model, data = cnn(), [x for x, _ in images()]
    with pytest.raises(ValueError, match="labels='model'"):
        estimate(model, data, SearchSpace(["int4"]), labels="data")
    frame, _ = estimate(model, data, SearchSpace(["int4"]))
    assert (frame["sensitivity"] > 0).all()


def test_same_seed_same_scores_and_the_model_comes_back():
    model, data = cnn().train(), [x for x, _ in images()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, _ = estimate(model, data, SearchSpace(["int4"]), seed=3)
    again, _ = estimate(model, data, SearchSpace(["int4"]), seed=3)
    other, _ = estimate(model, data, SearchSpace(["int4"]), seed=4)
    assert first.equals(again)
    assert not first.equals(other)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_an_input_that_the_model_overwrites_after_the_layer_does_not_spoil_the_score():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = x * 1.0
            y = self.fc(x)
            x += y.detach()
            return self.head(y)

    class Keeps(Overwrites):
        def forward(self, x):
            return self.head(self.fc(x * 1.0))

    torch.manual_seed(0)
    overwrites, keeps = Overwrites().eval(), Keeps().eval()
    keeps.load_state_dict(overwrites.state_dict())
    data = [(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    a, _ = estimate(overwrites, data, SearchSpace(["int2"]), labels="data")
    b, _ = estimate(keeps, data, SearchSpace(["int2"]), labels="data")
    np.testing.assert_allclose(a["sensitivity"], b["sensitivity"], rtol=1e-5)


def test_weights_used_by_functions_are_refused_with_a_way_out():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(ValueError, match="used by a function: use kl"):
        estimate(model, [torch.randn(2, 3, 8)], SearchSpace(["int4"]), task="features")


def test_scores_of_features_estimate_the_relative_squared_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40)).eval()
    data = [torch.randn(32, 6) for _ in range(60)]
    frame, network = estimate(model, data, SearchSpace(["int4"]), task="features")
    measured = mpq.sensitivity.estimate(
        model, data, network, SearchSpace(["int4"]), "kl", task="features", progress=False
    )
    assert frame.attrs["measure"] == measured.attrs["measure"] == "score"
    assert frame["sensitivity"].iloc[0] == pytest.approx(measured["sensitivity"].iloc[0], rel=1e-3)


def test_arguments_beside_the_input_reach_the_module():
    class Resizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(output_size=x.shape[-2:], input=self.down(x)).mean((2, 3))

    torch.manual_seed(0)
    model, data = Resizes().eval(), [(torch.randn(1, 1, 6, 6), torch.tensor([2]))]
    frame, _ = estimate(model, data, SearchSpace(["int2"]), labels="data")
    with torch.no_grad():
        hidden, logits = model.down(data[0][0]), model(data[0][0]).requires_grad_()
        change = -model.up(hidden, output_size=(6, 6))
        model.up.weight.copy_(fake_quantize(model.up.weight, "int2", axis=1))
        change += model.up(hidden, output_size=(6, 6))
    functional.cross_entropy(logits, data[0][1]).backward()
    expected = 0.5 * (logits.grad[:, :, None, None] / 36 * change).square().sum()
    assert frame.loc[("up", "int2"), "sensitivity"] == pytest.approx(float(expected), rel=1e-4)


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match="labels must be one of auto, data, model, got 'modle'"):
        estimate(cnn(), images(), SearchSpace(["int4"]), labels="modle")
