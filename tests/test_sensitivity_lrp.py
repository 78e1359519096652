"""LRP scores against loops over samples, layers and options, and their standard errors against repeats."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.batches import split_batch
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.sensitivity.layer_relevance import relevance
from mpq.sensitivity.lrp import LRP, moments, product_of_shares

OPTIONS = ["int2", "int4/int8", "fp32"]


def estimate(model, data, options=OPTIONS, granularity="layer", method=None, task=None, **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    space = SearchSpace(options, ties=None)
    method = method or LRP(**settings)
    return mpq.sensitivity.estimate(
        model, data, network, space, method, granularity=granularity, task=task, progress=False
    )


def slow_errors(model, sample, weight_bits, activation_bits):
    """||ΔY||² / ||Y||² of every layer's output for one sample."""
    found = {}

    def compare(name):
        def hook(module, args, output):
            changed = copy.deepcopy(module)
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            if axis:
                parts = [fake_quantize(part, weight_bits, axis=1) for part in module.weight.detach().chunk(2)]
                changed.weight.data = torch.cat(parts)
            else:
                changed.weight.data = fake_quantize(module.weight.detach(), weight_bits)
            given = args[0] if activation_bits is None else fake_quantize(args[0], f"{activation_bits}@tensor")
            error = changed.forward(given).detach() - output
            found[name] = float(error.square().sum() / output.square().sum())

        return hook

    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    handles = [module.register_forward_hook(compare(name)) for name, module in layers.items()]
    with torch.no_grad():
        model(sample[0])
    for handle in handles:
        handle.remove()
    return found


def test_scores_are_the_share_of_relevance_times_the_relative_error_of_the_output():
    model, data = cnn(), images(batches=2, samples=1)
    frame = estimate(model, data, rule="z")
    share = relevance(model, data, rule="z")["input"]
    for option, formats in {"int2": ("int2", None), "int4/int8": ("int4", "int8")}.items():
        errors = [slow_errors(model, sample, *formats) for sample in data]
        for name in share.index:
            expected = share[name] * np.mean([error[name] for error in errors])
            assert frame.loc[(name, option), "sensitivity"] == pytest.approx(expected, rel=1e-4), (name, option)
    assert (frame.xs("fp32", level="option") == 0).all(axis=None)
    assert frame.attrs["measure"] == "score"


def test_the_linear_form_is_relevance_times_the_bits_that_are_saved():
    model, data = cnn(), images()
    frame = estimate(model, data, mode="linear")["sensitivity"].unstack()
    share = relevance(model, data)["input"]
    for option, saved in {"int2": 30, "int4/int8": 28 + 24, "fp32": 0}.items():
        np.testing.assert_allclose(frame[option][share.index], share * saved, rtol=1e-9)


def test_in_the_linear_form_only_relevance_is_uncertain():
    frame = estimate(cnn(), images(), mode="linear", options=["int4", "int8"])
    error = relevance(cnn(), images())["input_se"]
    for option, saved in {"int4": 28, "int8": 24}.items():
        found = frame["sensitivity_se"].unstack()[option][error.index]
        np.testing.assert_allclose(found, error * saved, rtol=1e-6)


def test_rows_have_the_relevance_and_the_error_of_their_own_outputs():
    model, data = cnn(), images(batches=1, samples=1)
    frame = estimate(model, data, ["int2"], granularity="rows:2")["sensitivity"]
    channels = relevance(model, data, per="channel")["output"]
    changed = copy.deepcopy(model.first)
    changed.weight.data = fake_quantize(changed.weight.detach(), "int2")
    with torch.no_grad():
        exact, other = model.first(data[0][0])[:, 2:4], changed(data[0][0])[:, 2:4]
    expected = channels.loc["first"].iloc[2:4].sum() * float((other - exact).square().sum() / exact.square().sum())
    assert frame[("first[2:4]", "int2")] == pytest.approx(expected, rel=1e-5)


def test_rows_of_an_embedding_are_its_entries():
    model, data = decoder(), [{"input_ids": torch.tensor([[1, 1, 4]])}]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    frame = estimate(model, data, ["int2"], granularity="rows:1")["sensitivity"].xs("int2", level=1)
    entries = frame[[f"embed[{n}:{n + 1}]" for n in range(11)]]
    assert np.flatnonzero(entries).tolist() == [1, 4]
    row = model.embed.weight.detach()[1]
    error = float((fake_quantize(row, "int2") - row).square().sum() / row.square().sum())
    share = relevance(model, data, per="channel").loc[("embed", 1), "output"]
    assert entries.iloc[1] == pytest.approx(share * error, rel=1e-5)


def test_batches_of_one_or_many_give_the_same_scores():
    model = cnn()
    (x, y) = images(batches=1, samples=6)[0]
    singles = [(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    whole, each = (estimate(model, data, ["int2"]) for data in ([(x, y)], singles))
    np.testing.assert_allclose(whole, each, rtol=1e-4)
    text, model = tokens(batches=1, samples=4)[0]["input_ids"], decoder()
    whole, each = (estimate(model, [{"input_ids": ids} for ids in text.split(size)], ["int2"]) for size in (4, 1))
    np.testing.assert_allclose(whole, each, rtol=1e-4)


def test_standard_errors_equal_those_of_each_samples_influence():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    e = torch.rand(9, 3, 2, generator=generator, dtype=torch.float64) + a[..., None]
    mean, error = product_of_shares(moments(a, e).numpy(), 9)
    share = (a.mean(0) / a.mean(0).sum())[:, None]
    np.testing.assert_allclose(mean, share * e.mean(0), rtol=1e-12)
    whole = a.sum(1)[:, None, None]
    influence = e.mean(0) * (a[..., None] - share * whole) / whole.mean() + share * e
    np.testing.assert_allclose(error, influence.std(0) / 3, rtol=1e-9)


def test_the_truth_lies_within_two_standard_errors():
    generator = torch.Generator().manual_seed(1)
    within = 0
    for _ in range(300):
        common = torch.rand(40, 1, generator=generator, dtype=torch.float64)
        a = common * torch.rand(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 2, 5])
        e = (common + torch.rand(40, 3, generator=generator, dtype=torch.float64))[..., None]
        mean, error = product_of_shares(moments(a, e).numpy(), 40)
        within += int(abs(mean[1, 0] - 2 / 8 * 1.0) < 2 * error[1, 0])
    assert 0.9 < within / 300 < 0.98


def test_weights_used_by_functions_have_the_error_of_the_weight():
    torch.manual_seed(0)
    model, data = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), [torch.randn(3, 5, 8)]
    frame = estimate(model, data, ["int4"], task="features")["sensitivity"].xs("int4", level=1)
    weight = model.self_attn.in_proj_weight.detach()
    error = float((fake_quantize(weight, "int4") - weight).square().sum() / weight.square().sum())
    share = relevance(model, data, task="features")["input"]["self_attn.in_proj_weight"]
    assert frame["self_attn.in_proj_weight"] == pytest.approx(share * error, rel=1e-5)
    with pytest.raises(ValueError, match="rows of 'self_attn.in_proj_weight' are used by a function"):
        estimate(model, data, ["int4"], granularity="rows:4", task="features")


def test_groups_and_settings_that_do_not_fit_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="got granularity 'groups:4': use granularity='rows:1', or fisher"):
        estimate(cnn(), images(), ["int4"], granularity="groups:4")
    with pytest.raises(ValueError, match="mode must be 'error' or 'linear', got 'paper'"):
        LRP(mode="paper")
    with pytest.raises(ValueError, match="rule 'zz' is not known"):
        LRP(rule="zz")


def test_lrp_has_a_name_and_the_model_comes_back(tmp_path):
    model, data = cnn().train(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = estimate(model, data, method="lrp")
    assert first.equals(estimate(model, data))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_an_all_zero_layer_has_no_score():
    model, data = cnn(), images()
    model.depthwise.weight.data.zero_()
    model.depthwise.bias.data.zero_()
    frame = estimate(model, data, ["int4"])["sensitivity"].xs("int4", level=1)
    assert frame["depthwise"] == 0
    assert (frame[["first", "up", "head"]] > 0).all()
