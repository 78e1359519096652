"""Scales moved into layer norms: nothing changes in full precision, one scale does what one a channel did."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq
from mpq.activation_ranges import calibrate_ranges
from mpq.layer_norm_scales import move_scales_into_layer_norms
from mpq.options import Option
from mpq.plan import Entry, Plan


class Block(nn.Module):
    """A pre-norm transformer block with channels of very different ranges; `read_twice` adds the norm to the skip."""

    def __init__(self, norm=nn.LayerNorm, width=12, read_twice=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.read_twice = read_twice
        for module in (self.norm1, self.norm2):
            module.weight.data = torch.logspace(-1, 1.3, width)[torch.randperm(width)]
            if getattr(module, "bias", None) is not None:
                module.bias.data = torch.randn(width) * module.weight.data

    def forward(self, x):
        y = self.norm1(x)
        x = x + functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        y = self.norm2(x)
        return (y if self.read_twice else x) + self.down(functional.gelu(self.up(y)))


def setting(option, **kwargs):
    model = Block(**kwargs).eval()
    x = [torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    network = mpq.trace(model, x[0])
    return model, x, Plan(tuple(Entry(layer, Option.parse(option)) for layer in network.layers), network.fingerprint)


@pytest.mark.parametrize("option", ["int8/uint4", "int8/int4", "int8/fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_unchanged(option, dtype):
    model, x, plan = setting(option)
    model, x = model.to(dtype), [part.to(dtype) for part in x]
    scales = move_scales_into_layer_norms(model, x, plan)
    assert scales.moved == {"norm1": ("q", "k", "v"), "norm2": ("up",)}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        exact = [model(part) for part in x], [model.up(model.norm2(part)) for part in x]
        with scales.adjustment.applied(model):
            moved = [model(part) for part in x], [model.up(model.norm2(part)) for part in x]
            assert not torch.allclose(model.norm1.weight, before["norm1.weight"], rtol=0.1)
    most = 1e-6 if dtype == torch.float32 else 1e-13
    for a, b in zip([*exact[0], *exact[1]], [*moved[0], *moved[1]], strict=True):
        assert float((a - b).norm() / a.norm()) < most
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fmt", ["uint4", "int4"])
def test_one_scale_rounds_as_one_a_channel_did(fmt):
    """What the norm writes, quantised with the plan's one range and moved back, against a range a channel."""
    model, x, plan = setting(f"fp32/{fmt}")
    scales = move_scales_into_layer_norms(model, x, plan, "minmax")
    channel = calibrate_ranges(
        model,
        x,
        Plan(tuple(Entry(e.layer, Option.parse(f"fp32/{fmt}@channel")) for e in plan.entries), plan.fingerprint),
    )
    read = []
    handle = model.norm2.register_forward_hook(lambda m, a, y: read.append(a[0].clone()))
    with torch.no_grad():
        model(x[0])
    handle.remove()
    inside = []
    for chosen, adjusted in ((channel, False), (scales.plan, True), (calibrate_ranges(model, x, plan), False)):
        only = Plan(tuple(e for e in chosen.entries if e.layer.name == "up"), chosen.fingerprint)
        with torch.no_grad():
            exact = model.up(model.norm2(read[0]))
            with scales.adjustment.applied(model) if adjusted else torch.no_grad(), mpq.quantized(model, only):
                inside.append(float((model.up(model.norm2(read[0])) - exact).square().mean()))
    by_channel, moved, by_tensor = inside
    assert moved < 0.3 * by_tensor
    assert moved < 1.5 * by_channel


def test_the_range_of_the_plan_is_that_of_what_the_norm_then_writes():
    model, x, plan = setting("int8/uint8")
    scales = move_scales_into_layer_norms(model, x, plan, "minmax")
    found = {entry.layer.name: entry.input_range for entry in scales.plan.entries}
    with torch.no_grad(), scales.adjustment.applied(model):
        written = torch.cat([model.norm1(part) for part in x]).flatten(0, 1)
    step = (found["q"].high[0] - found["q"].low[0]) / 255
    torch.testing.assert_close(written.amin(0), torch.full((12,), found["q"].low[0]), rtol=0, atol=1.01 * step)
    torch.testing.assert_close(written.amax(0), torch.full((12,), found["q"].high[0]), rtol=0, atol=1.01 * step)
    assert abs(found["q"].low[0] / step - round(found["q"].low[0] / step)) < 1e-9  # the zero point is a code
    assert found["q"] == found["v"]
    assert found["down"] is None
    assert scales.plan.help == ("layer-norm scales",)


def test_static_plan_beats_one_scale_a_tensor_on_the_outputs():
    model, x, plan = setting("fp32/uint4")
    scales = move_scales_into_layer_norms(model, x, plan, "minmax")
    with torch.no_grad():
        exact = model(x[0])
        with mpq.quantized(model, plan):
            before = (model(x[0]) - exact).square().mean()
        with scales.adjustment.applied(model), mpq.quantized(model, scales.plan):
            after = (model(x[0]) - exact).square().mean()
    assert after < before / 2


def test_a_norm_that_others_read_is_skipped():
    model, x, plan = setting("int8/uint4", read_twice=True)
    scales = move_scales_into_layer_norms(model, x, plan)
    assert scales.moved == {"norm1": ("q", "k", "v")}
    assert scales.skipped == {"norm2": "something besides planned linears reads it"}
    assert not {name for name in scales.adjustment.tensors if name.startswith(("norm2", "up"))}


def test_what_cannot_be_moved_says_why():
    model, x, plan = setting("int8/uint4", norm=nn.RMSNorm)
    with pytest.raises(ValueError, match="no layer norm's scales can be moved.*the norm or a layer behind it has none"):
        move_scales_into_layer_norms(model, x, plan)
    model, x, plan = setting("int8/uint4", bias=False)
    assert set(move_scales_into_layer_norms(model, x, plan).moved) == {"norm2"}
    model, x, plan = setting("int8/int4@token")
    with pytest.raises(ValueError, match="must be in one format with a scale a tensor"):
        move_scales_into_layer_norms(model, x, plan)
    model, x, plan = setting("int8/int4")
    mixed = Plan((plan.entries[0].with_choice(Option("int8", "int8")), *plan.entries[1:]), plan.fingerprint)
    assert set(move_scales_into_layer_norms(model, x, mixed).moved) == {"norm2"}


def test_root_mean_square_norms_move_without_offset():
    model, x, plan = setting("int8/int4", norm=nn.RMSNorm, bias=False)
    scales = move_scales_into_layer_norms(model, x, plan)
    assert set(scales.moved) == {"norm1", "norm2"}
    with torch.no_grad():
        exact = model(x[0])
        with scales.adjustment.applied(model):
            assert float((model(x[0]) - exact).norm() / exact.norm()) < 1e-6


def test_channels_that_are_always_zero():
    model, x, plan = setting("int8/uint4")
    model.norm1.weight.data[3], model.norm1.bias.data[3] = 0, 0
    scales = move_scales_into_layer_norms(model, x, plan)
    assert all(bool(value.isfinite().all()) for value in scales.adjustment.tensors.values())
    with torch.no_grad():
        exact = model(x[0])
        with scales.adjustment.applied(model):
            assert float((model(x[0]) - exact).norm() / exact.norm()) < 1e-6
