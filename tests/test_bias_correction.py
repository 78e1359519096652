"""Bias correction: means of full precision come back; the formula of the paper."""

import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.activation_ranges import calibrate_ranges
from mpq.bias_correction import correct_biases
from mpq.fake_quantize import fake_quantize
from mpq.gptq import GPTQ, input_hessians
from mpq.options import Option
from mpq.plan import Entry, Plan


def uniform(network, text):
    return Plan(tuple(Entry(layer, Option.parse(text)) for layer in network.layers), network.fingerprint)


def outputs_of(model, batches, names):
    """{module: all its outputs}, channels last."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen[name].append(y.clone()))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch[0].clone())
    for handle in handles:
        handle.remove()
    conv = {name: isinstance(model.get_submodule(name), nn.modules.conv._ConvNd) for name in names}
    return {n: torch.cat([(y.movedim(1, -1) if conv[n] else y).flatten(0, -2) for y in ys]) for n, ys in seen.items()}


def test_with_quantised_weights_alone_it_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    batches = [torch.rand(7, 5), torch.rand(2, 5)]
    found = correct_biases(model, batches, uniform(mpq.trace(model, batches[0]), "int2"), method="expected").tensors
    x = torch.cat(batches)
    error = fake_quantize(model[0].weight, "int2") - model[0].weight
    torch.testing.assert_close(found["0.bias"], model[0].bias - error @ x.mean(0))
    hidden = model[:2](x).detach()
    error = fake_quantize(model[2].weight, "int2") - model[2].weight
    torch.testing.assert_close(found["2.bias"], -error @ hidden.mean(0))


@pytest.mark.parametrize("option", ["int2", "int3/uint3"])
def test_observed_gives_every_layer_the_mean_outputs_of_full_precision(option):
    model, batches = cnn(), images(batches=3)
    network = mpq.trace(model, batches[0][0])
    plan, names = uniform(network, option), [layer.name for layer in network.layers]
    exact = outputs_of(model, batches, names)
    correction = correct_biases(model, batches, plan, method="observed")
    with mpq.quantized(model, plan):
        before = outputs_of(model, batches, names)
        with correction.applied(model):
            after = outputs_of(model, batches, names)
    for name in names:
        wanted = exact[name].mean(0)
        torch.testing.assert_close(after[name].mean(0), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[name].mean(0), wanted, rtol=1e-3, atol=1e-4)


def test_expected_counts_quantised_inputs_padding_and_the_quantiser():
    """The first layer reads the same in both networks: there both methods must agree."""
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    plan = calibrate_ranges(model, batches, uniform(network, "int2/int3"))
    quantizer = GPTQ(hessians=input_hessians(model, batches, network.layers[:1]), otherwise=lambda rows, *_: rows)
    both = [
        correct_biases(model, batches, plan, quantizer=quantizer, method=m).tensors for m in ("expected", "observed")
    ]
    torch.testing.assert_close(both[0]["first.bias"], both[1]["first.bias"])
    plain = correct_biases(model, batches, uniform(network, "int2/int3"), method="expected").tensors
    assert not torch.allclose(both[0]["first.bias"], plain["first.bias"])


@pytest.mark.parametrize("method", ["expected", "observed"])
def test_tied_and_missing_biases_and_keywords(method):
    model, batches = decoder(), tokens()
    plan = uniform(mpq.trace(model, batches[0]), "int2/int4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    correction = correct_biases(model, batches, plan, method=method)
    assert set(correction.tensors) == {f"{name}.bias" for name in ("q", "k", "v", "o", "lm_head")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with mpq.quantized(model, plan), torch.no_grad():
        quantised = model(**batches[0])["logits"]
        with correction.applied(model):
            corrected = model(**batches[0])["logits"]
        assert not torch.equal(quantised, corrected)
        assert torch.equal(quantised, model(**batches[0])["logits"])
    assert plan.with_help(correction.name).help == ("bias correction",)


def test_unknown_method():
    with pytest.raises(ValueError, match="'expected' or 'observed', got 'x'"):
        correct_biases(nn.Linear(1, 1), torch.ones(1, 1), Plan((), ""), method="x")
