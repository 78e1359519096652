"""Plans handed to torchao: as data without it, and applied by it where it is installed."""

import json
import warnings

import numpy as np
import pytest
import torch
from small_models import decoder, tokens
from torch import nn

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, Split


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)
    ).eval()


def plan_for(model, example, **options):
    network = mpq.trace(model, example)
    entries = [Entry(layer, Option.parse(options.get(f"_{layer.name}", "fp32"))) for layer in network.layers]
    return Plan(tuple(entries), network.fingerprint)


def test_the_export_is_plain_data_by_module_name_and_leaves_unquantised_layers_out():
    plan = plan_for(net(), torch.randn(2, 64), _0="int4@group32", _2="int8", _4="int4/uint8@token")
    exported = mpq.export(plan, "torchao")
    assert json.loads(json.dumps(exported)) == exported
    configs = exported["_data"]["fqn_to_config"]
    assert set(configs) == {"0", "2", "4"}
    assert configs["0"]["_data"]["granularity"]["_data"] == {"group_size": 32}
    assert configs["2"]["_data"]["weight_dtype"] == {"_type": "torch.dtype", "_data": "int8"}
    assert configs["4"]["_type"] == "Int8DynamicActivationIntxWeightConfig"


def test_tied_weights_are_exported_under_every_module():
    plan = plan_for(decoder(), tokens()[0], _embed="int4")
    assert set(mpq.export(plan, "torchao")["_data"]["fqn_to_config"]) == {"embed", "lm_head"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("int4@mse", "largest magnitude"),
        ("nf4", "torchao cannot hold nf4"),
        ("uint4", "torchao cannot hold uint4"),
        ("int12", "torchao cannot hold int12"),
        ("int4/int8@token", "torchao cannot hold int4/int8@token"),
        ("int4@tensor", "torchao cannot hold"),
        ("int4@group48", "does not divide 64 inputs of '0'"),
        ("fp6_e2m3", "torchao cannot hold"),
    ],
)
def test_what_torchao_cannot_hold_is_refused_not_mapped(option, message):
    with pytest.raises(ValueError, match=message):
        mpq.export(plan_for(net(), torch.randn(2, 64), _0=option), "torchao")


def test_split_layers_and_weights_used_by_functions_are_refused():
    layer = Layer("fc", "linear", (4, 8), 32, 32, (1, 8), (1, 4), "fc.weight", "fc")
    split = Split("rows:2", (Option("int4"), Option("int8")), np.array([0, 1], np.uint8))
    with pytest.raises(ValueError, match="one format a layer, 'fc' is split"):
        mpq.export(Plan((Entry(layer, split),), ""), "torchao")
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    entries = tuple(Entry(layer, Option("int4")) for layer in mpq.trace(attention, (x, x, x)).layers)
    with pytest.raises(ValueError, match="used by a function"):
        mpq.export(Plan(entries, ""), "torchao")


@pytest.mark.parametrize(
    ("convolution", "option"),
    [
        (nn.Conv2d(4, 8, 3), "int4"),
        (nn.Conv2d(1, 8, 1), "int4"),
        (nn.Conv2d(4, 8, 1), "fp8_e4m3"),
        (nn.Conv2d(32, 8, 1), "int4@group16"),
        (nn.Conv1d(4, 8, 1), "int8"),
        (nn.Conv3d(4, 8, 1), "int8"),
    ],
)
def test_convolutions_whose_scales_torchao_lays_out_otherwise_are_refused(convolution, option):
    example = torch.randn(2, convolution.in_channels, *[5] * len(convolution.kernel_size))
    model = nn.Sequential(convolution)
    with pytest.raises(ValueError, match="every position of a kernel by itself"):
        mpq.export(plan_for(model, example, _0=option), "torchao")


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match=r"'torchoa' is not known.*'torchao'"):
        mpq.export(plan_for(net(), torch.randn(2, 64)), "torchoa")


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao", reason="the extra mpq-search[torchao] is not installed")


def apply(model, plan):
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, config_from_dict(mpq.export(plan, "torchao")), filter_fn=None)
    return model


@pytest.mark.parametrize(
    "option", ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "int4@group32", "int3@group16"]
)
def test_integer_weights_applied_by_torchao_are_on_the_planned_grid(torchao, option):
    """Torchao divides by 2^(b-1) where the largest magnitude is negative, else by 2^(b-1) - 1."""
    model = net()
    weight = model[0].weight.detach().clone()
    apply(model, plan_for(model, torch.randn(2, 64), _0=option))
    assert type(model[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert type(model[2].weight) is nn.Parameter
    bits = int(option[3])
    size = int(option.partition("group")[2] or 64)
    groups = weight.reshape(32, -1, size)
    largest = torch.maximum(groups.amax(-1) / (2 ** (bits - 1) - 1), groups.amin(-1) / -(2 ** (bits - 1)))
    codes = (groups / largest[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    applied = model[0].weight.dequantize()
    torch.testing.assert_close(applied, (codes * largest[..., None]).reshape(32, 64), rtol=1e-4, atol=1e-6)
    assert model[0].weight.qdata.int().min() >= -(2 ** (bits - 1))
    assert model[0].weight.qdata.int().max() < 2 ** (bits - 1)
    simulated = fake_quantize(weight, option)
    assert (applied - weight).norm() <= 1.02 * (simulated - weight).norm()


def test_a_searched_plan_runs_in_torchao_close_to_its_simulation(torchao):
    model, x = net(), torch.randn(256, 64)
    plan = mpq.search(model, [x], options=["int4", "int6", "int8"], budgets={"size": "6 bits values"}, progress=False)
    with torch.no_grad():
        exact = model(x)
        with mpq.quantized(model, plan):
            simulated = model(x)
        deployed = apply(net(), plan)(x)
    error, expected = (deployed - exact).norm(), (simulated - exact).norm()
    assert 0.5 * expected < error < 1.5 * expected
    names = [f"{entry.layer.name}" for entry in plan.entries]
    assert all(type(model.get_submodule(name).weight) is nn.Parameter for name in names)


def test_token_inputs_and_float8_weights_run_in_torchao(torchao):
    model, x = net(), torch.randn(8, 64)
    with torch.no_grad():
        exact = model(x)
        plan = plan_for(model, x, _0="int8/int8@token", _2="fp8_e4m3", _4="int8/uint8@token")
        deployed = apply(net(), plan)
        close = deployed(x)
    assert (close - exact).norm() < 0.05 * exact.norm()
    assert type(deployed[0].weight) is not nn.Parameter
    assert type(deployed[2].weight) is not nn.Parameter


def test_a_pointwise_convolution_applied_by_torchao_has_one_scale_a_channel(torchao):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 1)).eval()
    weight, x = model[0].weight.detach().clone(), torch.randn(2, 16, 5, 5)
    apply(model, plan_for(model, x, _0="int4"))
    assert model[0].weight.scale.numel() == 8
    applied = model[0].weight.dequantize()
    assert (applied - weight).norm() <= 1.02 * (fake_quantize(weight, "int4") - weight).norm()
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, applied, model[0].bias), rtol=1e-4, atol=1e-5)
