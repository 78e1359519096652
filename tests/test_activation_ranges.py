"""Calibrated input ranges against ranges recomputed from all inputs at once; static plans simulated and saved."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.activation_ranges import Running, calibrate_ranges, method_of
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.input_range import InputRange, has_static_range
from mpq.options import Option
from mpq.plan import Entry, Plan, Split, uniform_plan
from mpq.surgery import limits_of, quantise_activation

METHODS = ["minmax", "mse", "percentile90", "percentile99.7", "percentile100"]


def uniform(network, text):
    return Plan(tuple(Entry(layer, Option.parse(text)) for layer in network.layers), network.fingerprint)


def inputs_of(model, batches, modules):
    """{module name: all its inputs, one after the other}, by plain hooks."""
    seen = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen[name].append(a[0].clone()))
        for name in modules
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch[0].clone())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def channel_rows(x, layer):
    """(channels, values) in float64 lists."""
    axis = 1 if layer.kind.startswith("conv") else -1
    return x.double().movedim(axis, 0).flatten(1).numpy()


def dumb_range(values, fmt, method):
    """Ends of the range of a list of values, by NumPy; mse by trying every factor."""
    low, high = values.min(), values.max()
    unsigned = fmt.name.startswith("uint")
    if method.startswith("percentile"):
        p = float(method.removeprefix("percentile"))
        if unsigned:
            return np.percentile(values, 100 - p), np.percentile(values, p)
        return -np.percentile(abs(values), p), np.percentile(abs(values), p)
    if method == "minmax":
        return low, high
    errors = []
    for step in range(40):
        f = 10 ** (-step / 39)
        if unsigned:
            b, t = min(low, 0) * f, max(high, 0) * f
            scale = float(torch.tensor((t - b) / (2**fmt.bits - 1)).half())
            zero = round(-b / scale)
            rounded = (np.clip(np.round(values / scale) + zero, 0, 2**fmt.bits - 1) - zero) * scale
        else:
            most = 2 ** (fmt.bits - 1) - 1
            scale = float(torch.tensor(max(-low, high) * f / most).half())
            rounded = np.clip(np.round(values / scale), -most - 1, most) * scale
        errors.append(((rounded - values) ** 2).sum())
    f = 10 ** (-int(np.argmin(errors)) / 39)
    return low * f, high * f


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fmt", ["int4@tensor", "uint4@tensor", "int3@channel", "uint5@channel"])
def test_ranges_are_those_of_all_inputs_at_once(method, fmt):
    model, batches = cnn(), images(batches=3, samples=4)
    network = mpq.trace(model, batches[0][0])
    plan = calibrate_ranges(model, batches, uniform(network, f"int8/{fmt}"), method)
    inputs = inputs_of(model, batches, [layer.name for layer in network.layers])
    for entry in plan.entries:
        x, found = inputs[entry.layer.name], entry.input_range
        rows = channel_rows(x, entry.layer)
        rows = rows.reshape(1, -1) if "tensor" in fmt else rows
        expected = np.array([dumb_range(row, parse(fmt), method) for row in rows])
        np.testing.assert_allclose(np.stack([found.low, found.high], 1), expected, rtol=2e-6, atol=1e-7)
        assert found.method == method
        static = quantise_activation(x, parse(fmt), entry.layer, limits_of(found))
        dynamic = quantise_activation(x, parse(f"{fmt}@{method}"), entry.layer)
        torch.testing.assert_close(static, dynamic, rtol=1e-6, atol=1e-6)


def test_running_is_a_moving_average_in_order():
    model = nn.Sequential(nn.Linear(2, 2))
    batches = [torch.tensor([[0.0, 1.0]]), torch.tensor([[-4.0, 3.0]]), torch.tensor([[2.0, 8.0]])]
    plan = uniform(mpq.trace(model, batches[0]), "int8/int8")
    found = calibrate_ranges(model, batches, plan, "running0.75").entries[0].input_range
    low = 0.75 * (0.75 * 0.0 + 0.25 * -4.0) + 0.25 * 2.0
    high = 0.75 * (0.75 * 1.0 + 0.25 * 3.0) + 0.25 * 8.0
    assert (found.low, found.high) == (pytest.approx((low,)), pytest.approx((high,)))
    assert found.method == "running0.75"
    last = calibrate_ranges(model, batches, plan, Running(0.0)).entries[0].input_range
    assert (last.low, last.high) == ((2.0,), (8.0,))


def test_static_ranges_are_used_and_clip():
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.tensor([[0.5, -1.0, 2.0]])
    plan = calibrate_ranges(model, x, uniform(mpq.trace(model, x), "fp32/int4"))
    far = 10 * x
    with mpq.quantized(model, plan), torch.no_grad():
        inside = model(far)
    scale = float(torch.tensor(2 / 7).half())
    by_hand = (far / scale).round().clamp(-8, 7) * scale
    with torch.no_grad():
        assert torch.equal(inside, model(by_hand))
        assert not torch.equal(inside, model(fake_quantize(far, "int4@tensor")))


@pytest.mark.parametrize("option", ["int4/uint4", "int4/int4@channel", "int4/int8@token"])
def test_reloaded_plans_simulate_bit_for_bit(tmp_path, option):
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    plan = calibrate_ranges(model, batches, uniform(network, option), "mse")
    assert all((e.input_range is None) == option.endswith("token") for e in plan.entries)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    outputs = []
    for each in (plan, loaded):
        with mpq.quantized(model, each), torch.no_grad():
            outputs.append(model(batches[0][0]))
    assert torch.equal(*outputs)


def test_a_format_that_names_its_range_keeps_to_it_and_others_stay_dynamic():
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    options = ["int8/int4@mse", "int8/mxfp4", "int8/int8@token", "int8"]
    entries = tuple(Entry(layer, Option.parse(o)) for layer, o in zip(network.layers, options, strict=True))
    plan = calibrate_ranges(model, batches, Plan(entries, network.fingerprint), "percentile99")
    assert [e.input_range and e.input_range.method for e in plan.entries] == ["mse", None, None, None]


def test_a_plan_without_inputs_to_calibrate_stays_as_it_is():
    model, batches = cnn(), images()
    plan = uniform(mpq.trace(model, batches[0][0]), "int8")
    assert calibrate_ranges(model, batches, plan) is plan


def test_tied_weights_are_calibrated_on_the_linear_that_multiplies():
    model, batches = decoder(), tokens()
    network = mpq.trace(model, batches[0])
    plan = calibrate_ranges(model, batches, uniform(network, "int8/int8"))
    x = inputs_of(model, batches, ["lm_head"])["lm_head"]
    found = next(e for e in plan.entries if e.layer.name == "embed").input_range
    assert (found.low, found.high) == ((float(x.min()),), (float(x.max()),))


def test_ranges_follow_the_options_of_edited_plans():
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    plan = calibrate_ranges(model, batches, uniform(network, "int8/int8"))
    edited = plan.with_options({"head": "int4/int8", "first": "int8/int4", "up": "int4"})
    kept = {e.layer.name: e.input_range for e in edited.entries}
    assert kept["head"] == plan.entries[-1].input_range
    assert kept["first"] is None
    assert kept["up"] is None
    assert all(e.input_range for e in uniform_plan(plan, Option("int2", "int8")).entries)
    with pytest.raises(ValueError, match="calibrated for int8@tensor, the layer takes int4@tensor"):
        replace(plan.entries[0], choice=Option("int8", "int4"))


def test_model_and_random_state_come_back():
    model, batches = cnn().train(), images()
    network = mpq.trace(model, batches[0][0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_ranges(model, batches, uniform(network, "int8/int8"), "mse")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x) if x.shape[0] == 1 else self.unused(self.used(x))


def test_errors_name_layer_rule_and_way_out():
    model = Skips()
    network = mpq.trace(model, torch.ones(2, 2))
    plan = uniform(network, "int8/int8")
    with pytest.raises(ValueError, match="no data reaches 'unused'"):
        calibrate_ranges(model, torch.ones(1, 2), plan)
    for wrong in ("token", "percentil", "runningx", "running1"):
        with pytest.raises(ValueError, match=r"method must be|momentum must be"):
            method_of(wrong)
    with pytest.raises(ValueError, match="int8@token has no static range"):
        InputRange(parse("int8@token"), (0.0,), (1.0,), "minmax")
    with pytest.raises(ValueError, match="go upwards, got 2 to 1"):
        InputRange(parse("int8@tensor"), (2.0,), (1.0,), "minmax")
    with pytest.raises(ValueError, match="must have 2 channels.*got 3"):
        Entry(
            network.layers[0],
            Option("int8", "int8@channel"),
            InputRange(parse("int8@channel"), (0.0,) * 3, (1.0,) * 3, "m"),
        )
    split = Split("rows:1", (Option("int8", "int8"), Option("int8", "int4")), np.array([0, 1], np.uint8))
    with pytest.raises(ValueError, match="must share one activation format"):
        calibrate_ranges(model, torch.ones(2, 2), Plan((Entry(network.layers[0], split),), ""))
    model.used.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="input of 'unused' must be finite"):
        calibrate_ranges(model, torch.ones(2, 2), plan)


def test_limits_must_fit_the_format():
    x = torch.randn(3, 4)
    one, three = torch.ones(1), torch.ones(3)
    assert not has_static_range(parse("int8@group4"))
    for fmt, ends in (("int8@channel", one), ("int8@tensor", three)):
        with pytest.raises(ValueError, match="limits of int8.* must be"):
            fake_quantize(x, fmt, limits=(-ends, ends))
    for fmt in ("int8@token", "mxfp4", "fp16", "int8@group2"):
        with pytest.raises(ValueError, match="limits must come with"):
            fake_quantize(x, fmt, limits=(-one, one))


def test_channel_limits_are_cut_with_the_rows():
    """More values than one chunk holds: every row keeps its own limits."""
    x = torch.randn(5, 2**17, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0])
    found = fake_quantize(x, "int4@channel", limits=(-ends, ends))
    for row, end, got in zip(x, ends, found, strict=True):
        scale = (end / 7).half().float()
        assert torch.equal(got, (row / scale).round().clamp(-8, 7) * scale)
