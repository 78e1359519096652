"""Simulation of a plan: the right values inside, the same model outside."""

import copy

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, Split
from mpq.surgery import quantise_activation
from mpq.weight_view import as_rows, from_rows


def plan_for(network, choices, fallback="fp32"):
    entries = tuple(Entry(layer, choices.get(layer.name, Option.parse(fallback))) for layer in network.layers)
    return Plan(entries, network.fingerprint)


def options(**texts):
    return {name: Option.parse(text) for name, text in texts.items()}


def test_weights_inside_are_quantised_and_come_back_bit_for_bit():
    model, data = cnn().train(), images()
    network = mpq.trace(model, data[0][0])
    before = copy.deepcopy(model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with mpq.quantized(model, plan_for(network, options(first="int4", head="int2", up="int3"))) as inside:
        assert inside is model
        assert torch.equal(model.first.weight, fake_quantize(before["first.weight"], "int4"))
        assert torch.equal(model.head.weight, fake_quantize(before["head.weight"], "int2"))
        assert torch.equal(model.depthwise.weight, before["depthwise.weight"])
        by_group = [fake_quantize(part, "int3", axis=1) for part in before["up.weight"].chunk(2)]
        assert torch.equal(model.up.weight, torch.cat(by_group))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert model.training


def test_restored_after_an_error_inside_and_after_an_error_on_the_way_in():
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), mpq.quantized(model, plan_for(network, {}, "int2/int8")):
        raise RuntimeError("inside")
    model.head.weight.data[0, 0] = float("inf")
    before["head.weight"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="head"), mpq.quantized(model, plan_for(network, {}, "int2/int8")):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_are_quantised_on_the_way_in():
    model, data = cnn(), images()
    network = mpq.trace(model, data[0][0])
    x = data[0][0]
    with mpq.quantized(model, plan_for(network, options(first="fp32/int4"))), torch.no_grad():
        inside = model(x)
    with torch.no_grad():
        assert torch.equal(inside, model(fake_quantize(x, "int4@tensor")))


@pytest.mark.parametrize(
    ("kind", "shape", "fmt", "slices"),
    [
        ("linear", (2, 3, 8), "int4@token", lambda x: [x[i, j] for i in range(2) for j in range(3)]),
        ("linear", (2, 3, 8), "int4@channel", lambda x: [x[..., c] for c in range(8)]),
        (
            "linear",
            (2, 3, 8),
            "int4@group4",
            lambda x: [x[i, j, k : k + 4] for i in range(2) for j in range(3) for k in (0, 4)],
        ),
        ("conv2d", (2, 6, 4, 4), "int4@token", lambda x: [x[i] for i in range(2)]),
        ("conv2d", (2, 6, 4, 4), "int4@channel", lambda x: [x[:, c] for c in range(6)]),
        ("conv2d", (2, 6, 4, 4), "int4@tensor", lambda x: [x]),
    ],
)
def test_activation_granularity_slices_share_a_scale(kind, shape, fmt, slices):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = Layer("l", kind, (1,), 1, 1, shape, shape)
    quantised = quantise_activation(x, Option("fp32", fmt).activation, layer)
    assert quantised.shape == x.shape
    for part, exact in zip(slices(quantised), slices(x), strict=True):
        torch.testing.assert_close(part, fake_quantize(exact.reshape(1, -1), "int4@tensor").reshape(exact.shape))


def test_tied_weights_share_the_quantised_values_and_only_the_linear_gets_a_quantised_input():
    model, batch = decoder(), tokens()[0]
    network = mpq.trace(model, batch)
    assert network["embed"].aliases == ("lm_head.weight",)
    with mpq.quantized(model, plan_for(network, options(embed="int2/int8"))):
        assert torch.equal(model.embed.weight, model.lm_head.weight)
        assert len(model.embed.weight.unique()) < 40
        assert not model.embed._forward_pre_hooks
        assert len(model.lm_head._forward_pre_hooks) == 1
        model(**batch)
    assert model.embed.weight is model.lm_head.weight


@pytest.mark.parametrize(("granularity", "fmt"), [("rows:3", "int2"), ("groups:4", "int2"), ("groups:4", "nf4")])
def test_units_of_a_linear_take_their_own_formats(granularity, fmt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7))
    network = mpq.trace(model, torch.randn(2, 10))
    units = network.units(granularity)
    codes = np.arange(len(units)) % 3
    split = Split(granularity, tuple(map(Option.parse, (fmt, "int8", "fp32"))), codes.astype(np.uint8))
    weight = model[0].weight.detach().clone()
    with mpq.quantized(model, plan_for(network, {"0": split})):
        for unit, code in zip(units, codes, strict=True):
            block = weight[unit.rows, unit.columns]
            expected = fake_quantize(block, (fmt, "int8", "fp32")[code])
            torch.testing.assert_close(model[0].weight[unit.rows, unit.columns], expected)
    assert torch.equal(model[0].weight, weight)


def test_formats_with_a_scale_a_tensor_cannot_be_split():
    model = nn.Sequential(nn.Linear(8, 4))
    network = mpq.trace(model, torch.randn(2, 8))
    for fmt in ("int4@tensor", "nvfp4"):
        split = Split("rows:2", (Option(fmt),), np.zeros(2, np.uint8))
        with (
            pytest.raises(ValueError, match="scale shared between rows"),
            mpq.quantized(model, plan_for(network, {"0": split})),
        ):
            pass


def test_a_plan_for_another_model_is_refused():
    network = mpq.trace(cnn(), images()[0][0])
    plan = plan_for(network, {})
    with pytest.raises(ValueError, match="no parameter 'first.weight'"), mpq.quantized(nn.Linear(2, 2), plan):
        pass
    other = cnn()
    other.head = nn.Linear(6, 9)
    with pytest.raises(ValueError, match="'head'.*another model"), mpq.quantized(other, plan):
        pass
    with pytest.raises(ValueError, match="meta device"), mpq.quantized(cnn().to("meta"), plan):
        pass


def test_inputs_of_weights_used_by_functions_cannot_be_quantised():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    network = mpq.trace(model, (x, x, x))
    plan = plan_for(network, {}, "int4/int8")
    with pytest.raises(ValueError, match="used by a function"), mpq.quantized(model, plan):
        pass
    with mpq.quantized(model, plan_for(network, {}, "int4")):
        assert len(model.in_proj_weight[0].unique()) <= 16


@pytest.mark.parametrize(
    ("layer", "stored"),
    [
        (Layer("l", "linear", (5, 3), 15, 0, (), ()), (5, 3)),
        (Layer("l", "linear", (5, 3), 15, 0, (), (), channel_axis=1), (3, 5)),
        (Layer("l", "conv_transpose2d", (6, 4, 3, 3), 216, 0, (), (), groups=2), (8, 3, 3, 3)),
        (Layer("l", "experts", (10, 3), 30, 0, (), (), experts=2, channel_axis=1), (2, 5, 3)),
        (Layer("l", "experts", (10, 3), 30, 0, (), (), experts=2, channel_axis=2), (2, 3, 5)),
    ],
)
def test_the_row_view_of_every_layout_goes_both_ways(layer, stored):
    weight = torch.arange(float(np.prod(stored))).reshape(stored)
    rows = as_rows(weight, layer)
    assert tuple(rows.shape) == layer.weight_shape
    assert torch.equal(from_rows(rows, layer), weight)


def test_rows_of_a_grouped_transposed_convolution_are_its_output_channels():
    conv = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    layer = mpq.trace(conv, torch.randn(1, 4, 3, 3)).layers[0]
    rows = as_rows(conv.weight.detach(), layer)
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        before = conv(x)
        for channel in range(6):
            changed = rows.clone()
            changed[channel] += 1
            conv.weight.data = from_rows(changed, layer)
            moved = (conv(x) - before).abs().amax((0, 2, 3)) > 0
            assert moved.nonzero().flatten().tolist() == [channel]


def test_a_weight_of_the_same_size_and_another_shape_is_refused():
    plan = plan_for(mpq.trace(nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 8)), {})
    with pytest.raises(ValueError, match="'0'.*another model"), mpq.quantized(nn.Sequential(nn.Linear(6, 8)), plan):
        pass


def test_a_model_with_a_layer_more_is_refused_and_a_copy_in_half_precision_is_not():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(2, 8)
    plan = plan_for(mpq.trace(model, x), {}, "int4")
    longer = nn.Sequential(*model, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"another model.*'2\.weight'"), mpq.quantized(longer, plan):
        pass
    with mpq.quantized(copy.deepcopy(model).bfloat16(), plan) as half:
        assert half[0].weight.dtype == torch.bfloat16
