"""AdaQuant: gradients against differences, no layer worse than rounding, and a trained network repaired."""

import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.adaquant import Calibration, adaquant, straight_through
from mpq.demo import cnn as digits_cnn
from mpq.demo import digits
from mpq.fake_quantize import fake_quantize, group_limits
from mpq.formats import parse
from mpq.options import Option
from mpq.plan import Entry, Plan
from mpq.tasks import Distribution
from mpq.weight_view import as_rows

QUICK = Calibration(steps=40, samples=8)


def uniform(network, text):
    return Plan(tuple(Entry(layer, Option.parse(text)) for layer in network.layers), network.fingerprint)


@pytest.mark.parametrize("fmt", ["int3", "uint3", "int4@group3", "nf4", "int4@tensor", "fp4_e2m1@mse"])
def test_without_change_the_levels_are_those_of_rounding(fmt):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    fmt = parse(fmt).bind("weight")
    found = straight_through(weight, fmt, group_limits(weight, fmt), torch.ones(4, 8))
    torch.testing.assert_close(found, fake_quantize(weight, fmt), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", ["int3@scale=fp32", "uint3@scale=fp32", "nf4@scale=fp32"])
def test_gradients(fmt):
    """Of c: where the codes stay, the levels move in proportion, so the part besides the weight's is a difference."""
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fmt, limits = parse(fmt), group_limits(weight, parse(fmt).bind("weight"))
    clip = torch.full((5, 9), 0.6, dtype=torch.float64, requires_grad=True)
    leaf = weight.clone().requires_grad_(True)
    levels = straight_through(leaf, fmt, limits, clip)
    levels.sum().backward()
    low, high = limits[0] * 0.6, limits[1] * 0.6
    amax = torch.maximum(-low, high)
    inside = (weight >= low) & (weight <= high) if fmt.name == "uint3" else weight.abs() <= amax
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(leaf.grad, inside.double())
    step = 0.01  # weights and ranges grow alike, so the codes stay and the levels grow in proportion
    wider = straight_through(weight * (1 + step / 0.6), fmt, limits, clip.detach() + step)
    moved = (wider - levels.detach()) / step  # q / c
    torch.testing.assert_close(clip.grad, moved - weight * inside / 0.6, rtol=1e-3, atol=1e-3)


def layer_error(model, network, batches, plan, tensors):
    """{layer: squared error of its outputs, fed with full precision's inputs}, by plain hooks."""
    found = {}
    for entry in plan.entries:
        module, calls = model.get_submodule(entry.layer.module), []
        handle = module.register_forward_hook(lambda m, a, y, calls=calls: calls.append((a[0].clone(), y.clone())))
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch[0].clone())
        handle.remove()
        rows = fake_quantize(as_rows(module.weight.detach(), entry.layer), entry.options[0].weight)
        with torch.no_grad():
            plain = mpq.weight_view.from_rows(rows, entry.layer) if tensors is None else None
            weight = plain if plain is not None else tensors[f"{entry.layer.module}.weight"]
            bias = module.bias if tensors is None else tensors.get(f"{entry.layer.module}.bias", module.bias)
            replaced = {"weight": weight, "bias": bias}
            errors = []
            for x, y in calls:
                fmt = entry.activation
                x = x if fmt is None else fake_quantize(x, fmt)
                errors.append((torch.func.functional_call(module, replaced, (x,)) - y).square().sum())
        found[entry.layer.name] = float(sum(errors))
    return found


@pytest.mark.parametrize("option", ["int2", "uint3/uint4", "int3@group4"])
def test_no_layer_gets_worse_and_one_much_better(option):
    model, batches = cnn(), images(batches=3, samples=5)
    network = mpq.trace(model, batches[0][0])
    plan = uniform(network, option)
    found = adaquant(model, batches, plan, calibration=QUICK)
    assert set(found.tensors) == {
        f"{name}.{kind}" for name in ("first", "depthwise", "up", "head") for kind in ("weight", "bias")
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    before = layer_error(model, network, batches, plan, None)
    after = layer_error(model, network, batches, plan, found.tensors)
    assert all(after[name] <= before[name] * (1 + 1e-5) for name in before)
    assert min(after[name] / before[name] for name in before) < 0.5


@pytest.mark.parametrize(("option", "most"), [("int2", 0.7), ("uint3/int8@token", 0.6), ("int3@group5", 0.6)])
def test_weights_make_up_for_each_other_where_inputs_are_alike(option, most):
    """Inputs of four dimensions in twenty: what one column loses another can give."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6))
    model[0].weight.data = torch.randn(6, 20, generator=generator)
    data = torch.randn(64, 4, generator=generator) @ torch.randn(4, 20, generator=generator)
    network = mpq.trace(model, data)
    plan = uniform(network, option)
    errors = []
    for calibration in (Calibration(steps=1, weight_rate=0.0, range_rate=0.0), Calibration(steps=150)):
        tensors = adaquant(model, data, plan, calibration=calibration).tensors
        errors.append(layer_error(model, network, [(data,)], plan, tensors)["0"])
    assert errors[1] < most * errors[0]


def test_weights_are_levels_of_their_format():
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    tensors = adaquant(model, batches, uniform(network, "int2"), calibration=QUICK).tensors
    for layer in network.layers:
        rows = as_rows(tensors[layer.weight_name], layer)
        assert all(len(row.unique()) <= 4 for row in rows)
        assert all(bool(((row / row.abs().max() * 2).round(decimals=4) % 1 == 0).all()) for row in rows if row.any())


def test_same_seed_same_answer_and_the_model_comes_back():
    model, batches = decoder().train(), tokens()
    plan = uniform(mpq.trace(model, batches[0]), "int2/int8@token")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    one = adaquant(model, batches, plan, calibration=QUICK)
    state = torch.random.get_rng_state()
    two = adaquant(model, batches, plan, calibration=QUICK)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(one.tensors) == set(two.tensors) >= {"embed.weight", "lm_head.bias", "q.weight", "q.bias"}
    assert all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    with mpq.quantized(model, plan), one.applied(model):
        assert torch.equal(model.lm_head.weight, model.embed.weight)


def test_what_cannot_be_calibrated_is_left():
    model, x = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 32)), torch.randn(4, 32)
    network = mpq.trace(model, x)
    assert adaquant(model, x, uniform(network, "fp16"), calibration=QUICK).tensors == {}
    assert set(adaquant(model, x, uniform(network, "q4_0"), calibration=QUICK).tensors) == set()
    with pytest.raises(ValueError, match="steps and samples must be at least 1, got 0"):
        Calibration(steps=0)


def test_it_repairs_a_trained_network_at_two_bits():
    model, data, task = digits_cnn(), digits(), Distribution()
    plan = uniform(mpq.trace(model, data.calibration[0][0]), "int2")
    found = adaquant(model, data.calibration[:2], plan, calibration=Calibration(steps=40, samples=16))
    batch = data.holdout[0]
    with torch.no_grad():
        exact = task.run(model, batch)
        with mpq.quantized(model, plan):
            before = task.divergence(exact, task.run(model, batch)).mean()
            with found.applied(model):
                after = task.divergence(exact, task.run(model, batch)).mean()
    assert after < before / 2
