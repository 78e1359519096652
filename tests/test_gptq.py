"""GPTQ against one column at a time with fresh inverses, against brute force, and as the quantiser of a search."""

import copy
import itertools

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.cache import description
from mpq.demo import cnn as digits_cnn
from mpq.demo import digits
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.gptq import GPTQ, input_hessians
from mpq.grids import on_grid
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, Split
from mpq.quantizer import RoundToNearest, quantised_rows
from mpq.weight_view import as_rows

FORMATS = ["int3", "uint3", "int4@group5", "uint2@group4", "int3@tensor", "int3@mse", "nf4@group6", "fp4_e2m1", "mxfp4"]
FORMATS += ["log4", "fixed2.4", "int2@group3@mse", "int4@percentile95"]


def layer_of(rows, columns, groups=1):
    kind = "linear" if groups == 1 else "conv1d"
    return Layer("l", kind, (rows, columns), rows * columns, 1, (1, columns * groups), (1, rows), groups=groups)


def case(rows=6, columns=20, groups=1, seed=0):
    """A weight and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 3 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return weight, 2 * x.mT @ x / (3 * columns)


def error_of(quantised, weight, hessian):
    rows = (quantised - weight).reshape(len(hessian), -1, weight.shape[1])
    return torch.stack([e @ h @ e for block, h in zip(rows, hessian, strict=True) for e in block])


def range_of(group, fmt):
    """The range of one group by its dynamic rounding: found as the one that gives the same levels."""
    rows = group.reshape(1, -1)
    low, high = rows.min(), rows.max()
    kind = str(fmt.range)
    if kind.startswith("percentile"):
        high = torch.quantile(rows.abs(), fmt.range.p / 100)
        low = -high
    if kind == "mse":
        errors = [((on_grid(fmt, rows, low * f, high * f) - rows) ** 2).sum() for f in factors()]
        best = int(torch.stack(errors).argmin())
        low, high = low * factors()[best], high * factors()[best]
    return low.reshape(1, 1), high.reshape(1, 1)


def factors():
    return [10 ** (-step / 39) for step in range(40)]


def dumb_gptq(weight, hessian, fmt, damping=0.01):
    """A row at a time; after every column the rest is solved anew with the inverse of what is left of H."""
    columns = weight.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    kind = fmt.granularity.kind if fmt.granularity else "tensor"
    size = {"tensor": columns, "channel": columns}.get(kind, fmt.granularity.size if fmt.granularity else 0)
    result = weight.clone()
    for row in result:
        for i in range(columns):
            if i % size == 0:
                ends = range_of(weight if kind == "tensor" else row[i : i + size], fmt)
            inverse = torch.linalg.inv(h[i:, i:])
            rounded = on_grid(fmt, row[i].reshape(1, 1), *ends).squeeze()
            row[i:] -= (row[i] - rounded) / inverse[0, 0] * inverse[0]
            row[i] = rounded
    return result


@pytest.mark.parametrize("fmt", FORMATS)
def test_columns_are_those_of_the_dumb_way(fmt, monkeypatch):
    monkeypatch.setattr("mpq.gptq._BLOCK", 3)
    weight, hessian = case(columns=37)
    fmt = parse(fmt).bind("weight")
    found = GPTQ(hessians={"l": hessian})(weight, fmt, layer_of(6, 37))
    expected, rounded = dumb_gptq(weight, hessian[0], fmt), fake_quantize(weight, fmt)
    better = error_of(expected, weight, hessian) <= error_of(rounded, weight, hessian)
    assert better.sum() >= 3
    torch.testing.assert_close(found, torch.where(better[:, None], expected, rounded), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fmt", ["int3", "int4@group5", "uint3@mse"])
def test_order_by_activation_is_the_same_on_sorted_columns(fmt):
    weight, hessian = case()
    fmt = parse(fmt).bind("weight")
    order = hessian[0].diagonal().argsort(descending=True)
    found = GPTQ(hessians={"l": hessian}, order="activation")(weight, fmt, layer_of(6, 20))
    size = fmt.granularity.size or 20
    expected = weight.clone()
    h = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(20, dtype=torch.float64)
    for row, exact in zip(expected, weight, strict=True):
        for at, i in enumerate(order):
            start = int(i) // size * size
            ends = range_of(exact[start : start + size], fmt)
            left = order[at:]
            inverse = torch.linalg.inv(h[left][:, left])
            rounded = on_grid(fmt, row[i].reshape(1, 1), *ends).squeeze()
            row[left] -= (row[i] - rounded) / inverse[0, 0] * inverse[0]
            row[i] = rounded
    rounded = fake_quantize(weight, fmt)
    better = error_of(expected, weight, hessian) <= error_of(rounded, weight, hessian)
    torch.testing.assert_close(found, torch.where(better[:, None], expected, rounded), rtol=1e-6, atol=1e-9)


def test_brute_force_over_three_columns():
    """Never below the best of all codes; with one column left to choose, the best of that column's codes."""
    compensated = 0
    for seed in range(60):
        weight, hessian = case(rows=1, columns=3, seed=seed)
        scale = float((weight.abs().max() / 3).half())
        levels = [code * scale for code in range(-4, 4)]

        def error(values, weight=weight, hessian=hessian):
            return float(error_of(torch.tensor([values], dtype=torch.float64), weight, hessian))

        rounded = fake_quantize(weight, "int3")[0].tolist()
        found = GPTQ(hessians={"l": hessian}, damping=0.0)(weight, parse("int3"), layer_of(1, 3))[0].tolist()
        best = min(error(values) for values in itertools.product(levels, repeat=3))
        assert best - 1e-12 <= error(found) <= error(rounded)
        if found != rounded:
            compensated += 1
            assert error(found) == pytest.approx(min(error((*found[:2], last)) for last in levels))
    assert compensated > 8


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("granularity", ["layer", "rows:2", "groups:8"])
def test_never_worse_than_rounding_on_its_data_and_mostly_better(fmt, granularity):
    if granularity != "layer" and fmt == "int3@tensor":
        pytest.skip("a scale a tensor cannot be split")
    fmt, layer = parse(fmt).bind("weight"), layer_of(24, 20, groups=2)
    weight, hessian = case(rows=24, groups=2, seed=3)
    quantised = quantised_rows(weight, fmt, layer, granularity, GPTQ(hessians={"l": hessian}))
    rounded = quantised_rows(weight, fmt, layer, granularity, RoundToNearest())
    width = 8 if granularity == "groups:8" else 20
    ratios = []
    for first in range(0, 20, width):
        part = slice(first, first + width)
        errors = [error_of(q[:, part], weight[:, part], hessian[:, part, part]) for q in (quantised, rounded)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-12)).all())
        ratios.append(float(errors[0].sum() / errors[1].sum()))
    assert min(ratios) < 0.95


def test_levels_are_those_of_the_format():
    weight, hessian = case()
    found = GPTQ(hessians={"l": hessian})(weight.float(), parse("int3@scale=fp32"), layer_of(6, 20))
    assert found.dtype == torch.float32
    for row, exact in zip(found, weight, strict=True):
        codes = row / (exact.abs().max() / 3)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
        assert codes.abs().max() <= 4.00001


def test_inputs_that_are_always_zero_are_rounded():
    weight, hessian = case()
    hessian = hessian.clone()
    hessian[0, 4], hessian[0, :, 4] = 0, 0
    found = GPTQ(hessians={"l": hessian})(weight, parse("int4"), layer_of(6, 20))
    assert torch.equal(found[:, 4], fake_quantize(weight, "int4")[:, 4])
    found = GPTQ(hessians={"l": 0 * hessian})(weight, parse("int4"), layer_of(6, 20))
    assert torch.equal(found, fake_quantize(weight, "int4"))


def dumb_hessians(model, batches, network):
    """From outputs alone: a convolution is linear in its weight, so its patches are its Jacobian."""
    found = {}
    for layer in network.layers:
        module, seen = model.get_submodule(layer.module), []
        handle = module.register_forward_hook(lambda m, a, y: seen.append(a[0].clone()))
        with torch.no_grad():
            for batch in batches:
                model(batch[0].clone())
        handle.remove()
        x, double = torch.cat(seen).double(), copy.deepcopy(module).double()
        rows = [_jacobian(double, g * len(module.weight) // layer.groups, x) for g in range(layer.groups)]
        found[layer.name] = torch.stack([2 * row.mT @ row / len(row) for row in rows])
    return found


def _jacobian(module, channel, x):
    """(positions, in) of one output channel."""

    def run(row):
        weight = torch.cat([module.weight[:channel], row[None], module.weight[channel + 1 :]])
        y = torch.func.functional_call(module, {"weight": weight}, (x,))
        return (y[:, channel] if y.ndim > 2 else y[..., channel]).flatten()

    return torch.autograd.functional.jacobian(run, module.weight[channel].detach()).flatten(1)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.b = nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode="reflect")
        self.c = nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2)
        self.d = nn.Linear(6, 3)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)).flatten(2)).mean(2))


def test_hessians_are_second_moments_of_patches():
    torch.manual_seed(0)
    model = Convolutions().eval()
    batches = [(torch.randn(2, 2, 7, 6),) for _ in range(2)]
    network = mpq.trace(model, batches[0][0])
    found = input_hessians(model, batches, network.layers)
    expected = dumb_hessians(model, batches, network)
    assert set(found) == {"a", "b", "c", "d"}
    for name, hessian in found.items():
        torch.testing.assert_close(hessian.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_layers_without_hessian():
    model, batches = cnn(), images()
    network = mpq.trace(model, batches[0][0])
    hessians = input_hessians(model, batches, network.layers)
    assert set(hessians) == {"first", "depthwise", "head"}  # the transposed convolution is left out
    up = as_rows(model.up.weight.detach(), network["up"])
    with pytest.raises(ValueError, match="GPTQ cannot quantise 'up' in int4@channel: there is no Hessian"):
        GPTQ(hessians=hessians)(up, parse("int4"), network["up"])
    otherwise = GPTQ(hessians=hessians, otherwise=RoundToNearest())
    assert torch.equal(otherwise(up, parse("int4"), network["up"]), fake_quantize(up, "int4"))
    head = model.head.weight.detach()
    with pytest.raises(ValueError, match="the levels of q4_0 do not follow from a range"):
        GPTQ(hessians=hessians)(head, parse("q4_0"), network["head"])
    assert torch.equal(GPTQ(hessians={})(head, parse("fp16"), network["head"]), head.half().float())
    with pytest.raises(ValueError, match=r"must be \(1, 6, 6\)"):
        GPTQ(hessians={"head": torch.eye(4)[None]})(head, parse("int4"), network["head"])
    with pytest.raises(ValueError, match="singular: take a larger damping"):
        GPTQ(hessians={"head": torch.ones(1, 6, 6)}, damping=0.0)(head, parse("int4"), network["head"])
    for wrong in ({"damping": -1.0}, {"order": "act"}):
        with pytest.raises(ValueError, match="must be"):
            GPTQ(hessians={}, **wrong)


def test_tied_embeddings_take_the_inputs_of_the_head_and_lookups_are_rounded():
    model, batches = decoder(), tokens()
    network = mpq.trace(model, batches[0])
    hessians = input_hessians(model, batches, network.layers)
    assert hessians["embed"].shape == (1, 8, 8)
    lookup = Layer("e", "embedding", (11, 8), 88, 0, (1, 7), (1, 7, 8))
    weight = model.embed.weight.detach()
    assert torch.equal(GPTQ(hessians={})(weight, parse("int2"), lookup), fake_quantize(weight, "int2"))


def test_two_quantisers_differ_in_caches_by_their_data():
    one, two = (GPTQ(hessians={"l": case(seed=seed)[1]}) for seed in (0, 1))
    assert repr(one) != repr(two)
    assert "0x" not in repr(one)
    assert description(one) != description(two)
    assert description(one) == description(GPTQ(hessians={"l": case(seed=0)[1]}))


def test_simulated_split_and_as_the_quantiser_of_measure_search_and_verify():
    model, data = digits_cnn(), digits()
    network = mpq.trace(model, data.calibration[0][0])
    gptq = GPTQ(hessians=input_hessians(model, data.calibration, network.layers))
    plan = Plan(tuple(Entry(layer, Option.parse("int2")) for layer in network.layers), network.fingerprint)
    figures = {name: mpq.verify(model, data.holdout, plan, quantizer=q) for name, q in (("gptq", gptq), ("rtn", None))}
    assert figures["gptq"].plan.divergence < 0.6 * figures["rtn"].plan.divergence
    tables = [
        mpq.measure(model, data.calibration[:1], ["int2", "int4"], quantizer=q, sensitivity="kl", progress=False)
        for q in (gptq, None)
    ]
    own, other = (table.frame["sensitivity"].xs("int2", level="option") for table in tables)
    assert own.sum() < other.sum()
    first = network.layers[0]
    codes = np.arange(first.weight_shape[0], dtype=np.uint8) % 2
    split = Split("rows", (Option("int2"), Option("int4")), codes)
    whole = {fmt: gptq(model.get_parameter(first.weight_name).detach(), parse(fmt), first) for fmt in ("int2", "int4")}
    with mpq.quantized(model, Plan((Entry(first, split),), network.fingerprint), quantizer=gptq):
        weight = model.get_parameter(first.weight_name)
        assert torch.equal(weight[0::2], whole["int2"][0::2])
        assert torch.equal(weight[1::2], whole["int4"][1::2])
