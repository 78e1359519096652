"""Loss, output MSE and SQNR against copies of the model with layers replaced, on full precision and on a base."""

import copy
from functools import partial

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

NAMES = ("first", "depthwise", "up", "head")
OPTIONS = ["int2", "int4/int8", "fp32"]


def estimate(model, data, method, options=OPTIONS, **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    return mpq.sensitivity.estimate(model, data, network, SearchSpace(options), method, progress=False, **settings)


def quantised(model, choices):
    """A copy of the model with layers replaced, (weight format, input format) by name."""
    changed = copy.deepcopy(model)
    for name, choice in choices.items():
        weight, _, activation = choice.partition("/")
        layer = changed.get_submodule(name)
        if isinstance(layer, nn.ConvTranspose2d):
            parts = [fake_quantize(part, weight, axis=1) for part in layer.weight.detach().chunk(layer.groups)]
            layer.weight.data = torch.cat(parts)
        else:
            layer.weight.data = fake_quantize(layer.weight.detach(), weight)
        if activation:
            hook = partial(lambda fmt, module, args: fake_quantize(args[0], fmt), f"{activation}@tensor")
            layer.register_forward_pre_hook(hook)
    return changed


def outputs_of(model, data):
    return torch.cat([model(x) for x, _ in data])  # batch by batch: inputs have a range a batch


def cross_entropy(exact, logits, targets):
    return functional.cross_entropy(logits, targets, reduction="none")


def squared_error(exact, logits, targets):
    return (logits - exact).square().mean(1)


def noise_to_signal(exact, logits, targets):
    return (logits - exact).square().sum(1) / exact.square().sum(1)


def divergence(exact, logits, targets):
    p, q = exact.double().log_softmax(1), logits.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


DISTANCES = {"loss": cross_entropy, "output_mse": squared_error, "sqnr": noise_to_signal, "kl": divergence}


@pytest.mark.parametrize("base", ["full", "int8", "int4/int8"])
@pytest.mark.parametrize("method", DISTANCES)
@torch.no_grad()
def test_equals_copied_models(method, base):
    model, data, distance = cnn(), images(), DISTANCES[method]
    options = OPTIONS if base == "full" else [*OPTIONS, base]
    frame = estimate(model, data, method, list(dict.fromkeys(options)), base=base)
    targets = torch.cat([y for _, y in data])
    exact = outputs_of(model, data)
    at_base = {} if base == "full" else dict.fromkeys(NAMES, base)
    before = distance(exact, outputs_of(quantised(model, at_base), data), targets)
    for name in NAMES:
        for option in frame.loc[name].index:
            outputs = outputs_of(quantised(model, at_base | {name: option}), data)
            each = (distance(exact, outputs, targets) - before).double()
            row = frame.loc[(name, option)]
            assert row["sensitivity"] == pytest.approx(float(each.mean()), rel=1e-4, abs=1e-7), (name, option)
            assert row["sensitivity_se"] == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-4, abs=1e-7)
    as_is = "fp32" if base == "full" else base
    assert (frame.xs(as_is, level=1)["sensitivity"] == 0).all()
    assert frame.attrs["measure"] == ("loss" if method in ("loss", "kl") else "score")
    assert (frame["sensitivity"] < 0).any() == (method == "loss" or base != "full")


@pytest.mark.parametrize("keep_bytes", [0, 300, 2**30])
def test_what_is_kept_changes_no_score(keep_bytes):
    model, data = decoder(), [{**batch, "labels": batch["input_ids"]} for batch in tokens()]
    frames = [estimate(model, data, method, ["int2", "int4"], task="causal-lm", keep_bytes=keep_bytes)
              for method in ("kl", "loss")]  # fmt: skip
    kept = [estimate(model, data, method, ["int2", "int4"], task="causal-lm") for method in ("kl", "loss")]
    assert all(one.equals(other) for one, other in zip(frames, kept, strict=True))


def test_methods_of_one_base_share_the_runs_of_the_model():
    model, data = cnn(), images()
    space, network = SearchSpace(OPTIONS), mpq.trace(model, data[0][0])
    names = ["kl", "loss", "output_mse", "sqnr"]
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))

    def together(names, **settings):
        runs.clear()
        frames = mpq.sensitivity.estimate_together(
            model, data, network, space, names, progress=False, settings=settings
        )
        return frames, len(runs)

    frames, shared = together(names)
    for name in names:
        alone = estimate(model, data, name)
        assert (frames[name].fillna(-1) == alone.fillna(-1)).all(axis=None)
        assert frames[name].attrs["measure"] == alone.attrs["measure"]
    assert together(["kl"])[1] == shared
    frames, apart = together(["kl", "loss"], loss={"base": "int8"})
    assert apart > 1.8 * shared
    assert (frames["loss"].fillna(-1) == estimate(model, data, "loss", base="int8").fillna(-1)).all(axis=None)


def test_the_model_comes_back_with_a_base_too():
    model = cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    estimate(model, images(), "sqnr", base="int4/int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert model.training
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_padding_does_not_count_in_output_errors():
    model, batch = decoder(), tokens(batches=1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 4:] = 0
    for method in ("output_mse", "sqnr"):
        padded = estimate(model, [{**batch, "attention_mask": mask}], method, ["int2"], task="classification")
        short = estimate(model, [{"input_ids": batch["input_ids"][:, :4]}], method, ["int2"], task="classification")
        np.testing.assert_allclose(padded["sensitivity"], short["sensitivity"], rtol=1e-4)


def test_errors_of_layers_add_up_on_an_affine_model_of_the_last_layer():
    """One linear layer: the output error is that of the weight times the input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(4, 6)
    frame = estimate(model, [x], "output_mse", ["int3"], task="features")
    change = x @ (fake_quantize(model[0].weight.detach(), "int3") - model[0].weight.detach()).T
    assert frame["sensitivity"].iloc[0] == pytest.approx(float(change.square().mean()), rel=1e-5)


def test_standard_errors_cover_the_mean_of_many_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(4000, 4), torch.randint(0, 3, (4000,))
    truth = estimate(model, [(x, y)], "loss", ["int3"])["sensitivity"].to_numpy()
    inside = []
    for part in range(100):
        rows = slice(40 * part, 40 * part + 40)
        frame = estimate(model, [(x[rows], y[rows])], "loss", ["int3"])
        inside += list(abs(frame["sensitivity"] - truth) < 2 * frame["sensitivity_se"])
    assert 0.9 <= np.mean(inside) <= 0.985


def test_one_sample_one_number_weights_and_weights_of_zeros():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3), nn.Linear(3, 2)).eval()
    model[1].weight.data.zero_()
    for method in DISTANCES:
        frame = estimate(model, [(torch.ones(1, 1), torch.tensor([1]))], method, ["int4"])
        assert np.isfinite(frame.to_numpy()).all()
        assert (frame.loc[["0", "1"], "sensitivity"].abs() < 1e-4).all()


def test_half_precision_models_are_measured():
    for dtype in (torch.bfloat16, torch.float16):
        frame = estimate(cnn().to(dtype), [(x.to(dtype), y) for x, y in images()], "kl", ["int2", "int8"])
        scores = frame["sensitivity"].unstack()
        assert (scores["int2"] > scores["int8"]).all()


def test_what_cannot_be_measured_is_refused_with_a_way_out():
    model, inputs = cnn(), [x for x, _ in images()]
    with pytest.raises(ValueError, match="loss needs data with labels.*use kl"):
        estimate(model, inputs, "loss")

    def own(model, batch):
        return model(batch[0]).square().mean()

    for method in ("output_mse", "sqnr"):
        with pytest.raises(ValueError, match=f"{method} compares outputs.*use loss or kl"):
            estimate(model, images(), method, task=own)
    with pytest.raises(ValueError, match="base must be 'full' or an option with a weight format"):
        estimate(model, images(), "kl", base="-/int8")
    with pytest.raises(ValueError, match="keep_bytes must be at least 0"):
        estimate(model, images(), "kl", keep_bytes=-1)
    with pytest.raises(ValueError, match="SQNR measures whole layers"):
        estimate(model, images(), "sqnr", granularity="rows:2")


def test_a_loss_of_the_users_own_is_its_increase():
    model, data = cnn(), images()

    def own(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    given = estimate(model, data, "loss", task=own)
    np.testing.assert_allclose(given["sensitivity"], estimate(model, data, "loss")["sensitivity"], atol=1e-7)
    np.testing.assert_allclose(given["sensitivity"], estimate(model, data, "kl", task=own)["sensitivity"], atol=1e-7)
