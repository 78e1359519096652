"""Entropy against counting with dictionaries, published-style numerical checks, and QuantMCU's trade-off."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.batches import split_batch
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.options import SearchSpace
from mpq.sensitivity.entropy import Entropy
from mpq.sensitivity.quantised_levels import codes_of_activation, codes_of_rows, entropy_of_levels
from mpq.surgery import quantise_activation


def estimate(model, data, options, granularity="layer", **settings):
    network = mpq.trace(model, split_batch(data[0])[0])
    frame = mpq.sensitivity.estimate(
        model,
        data,
        network,
        SearchSpace(options, ties=None),
        Entropy(**settings),
        granularity=granularity,
        progress=False,
    )
    return frame, network


def counted(values):
    """H in bits of a list of anything, by a dictionary."""
    counts = Counter(values)
    return -sum(n / len(values) * math.log2(n / len(values)) for n in counts.values())


def cumulative(x):
    return (1 + math.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize(("bits", "uniform", "gaussian"), [(2, 1.919, 1.008), (4, 3.974, 2.751), (8, 7.998, 6.758)])
def test_entropy_of_known_distributions(bits, uniform, gaussian):
    """Rounding to 2^b levels from the least to the greatest of 10^6 samples; the end levels are half as wide."""
    generator = torch.Generator().manual_seed(0)
    fmt, last = parse(f"uint{bits}@tensor@scale=fp32"), 2**bits - 1
    for name, expected, slack in (("rand", uniform, 0.002), ("randn", gaussian, 0.1)):  # a normal's ends are random
        values = getattr(torch, name)(10**6, generator=generator)
        low, step = float(values.min()), float(values.max() - values.min()) / last
        shifted = values - low  # so that the zero point is the least code, and not rounded
        codes = codes_of_rows(fake_quantize(shifted, fmt).reshape(1, -1), fmt)
        found = float(entropy_of_levels(codes.flatten()))
        assert found == pytest.approx(expected, abs=slack)
        assert found <= bits
        below = cumulative if name == "randn" else lambda x: min(max(x, 0.0), 1.0)
        edges = [0.0, *(below(low + (k + 0.5) * step) for k in range(last)), 1.0]
        shares = [b - a for a, b in pairwise(edges) if b > a]
        assert found == pytest.approx(-sum(share * math.log2(share) for share in shares), abs=0.004)


FORMATS = ["int2", "int4", "int8", "uint4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "log4", "nf4", "mxfp4", "mxint8"]
FORMATS += ["nvfp4", "fixed4.4", "int4@group8", "uint4@group7", "int4@tensor", "int12"]


@pytest.mark.parametrize("name", FORMATS)
def test_levels_are_told_apart_and_no_more_than_the_format_has(name):
    fmt = parse(name).bind("weight")
    rows = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 6)[:, None]
    quantised = fake_quantize(rows, fmt)
    codes = codes_of_rows(quantised, fmt)
    assert len(codes.unique()) <= 2**fmt.bits
    for values, levels in zip(quantised.tolist(), codes.tolist(), strict=True):
        size = fmt.granularity.size if fmt.granularity is not None and fmt.granularity.size else len(values)
        for start in range(0, len(values), size):  # within a scale codes and values are one to one
            pairs = set(zip(values[start : start + size], levels[start : start + size], strict=True))
            assert len(pairs) == len({value for value, _ in pairs}) == len({code for _, code in pairs})


@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "nf4", "log4", "mxfp6_e2m3", "uint4"])
def test_levels_do_not_depend_on_the_scale(name):
    fmt = parse(name).bind("weight")
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    quantised = fake_quantize(torch.stack([row, 4 * row]), fmt)
    codes = codes_of_rows(quantised, fmt)
    assert torch.equal(codes[0], codes[1])


def test_integer_codes_are_the_codes():
    rows = torch.tensor([[7.0, -3.0, 0.4], [14.0, 5.1, 1.0], [0.0, 0.0, 0.0]])
    fmt = parse("int4").bind("weight")
    assert codes_of_rows(fake_quantize(rows, fmt), fmt).tolist() == [[7, -3, 0], [7, 3, 0], [0, 0, 0]]
    fmt = parse("uint2").bind("weight")
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert codes_of_rows(fake_quantize(rows, fmt), fmt).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("apart", [1, 10**9])
def test_entropy_of_owners_equals_counting(apart):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-3, 4, (500,), generator=generator) * apart
    owner = torch.randint(0, 7, (500,), generator=generator)
    found = entropy_of_levels(codes, owner)
    slow = [counted(codes[owner == n].tolist()) for n in range(7)]
    np.testing.assert_allclose(found, slow, rtol=1e-12)


@pytest.mark.parametrize("granularity", ["layer", "rows:3", "rows:1", "groups:4"])
def test_weight_entropy_lost_equals_counting_codes(granularity):
    model = cnn()
    frame, network = estimate(model, images(), ["int2", "int4", "int8", "fp16"], granularity, kind="weight")
    weight = model.head.weight.detach()
    for unit in network.units(granularity):
        if unit.layer.name != "head":
            continue
        found = {}
        for bits in (2, 4, 8):
            codes = []
            for row in weight[unit.rows, unit.columns]:
                scale = float((row.abs().max() / (2 ** (bits - 1) - 1)).half())
                codes += [round(float(value) / scale) for value in row]
            found[bits] = counted(codes)
        for bits in (2, 4, 8):
            expected = max(found[8] - found[bits], 0)
            assert frame.loc[(unit.label, f"int{bits}"), "sensitivity"] == pytest.approx(expected, abs=1e-9)
        assert frame.loc[(unit.label, "fp16"), "sensitivity"] == 0
    assert (frame["sensitivity_se"] == 0).all()
    assert frame.attrs["measure"] == "score"


def slow_input_entropy(values, bits):
    """H of the codes of every sample's part of a batch, the batch with one scale."""
    scale = float((values.abs().max() / (2 ** (bits - 1) - 1)).half())
    return [counted([round(float(value) / scale) for value in sample.flatten()]) for sample in values]


@pytest.mark.parametrize("trade_off", [None, 0.0, 0.6, 1.0])
def test_input_entropy_and_the_value_driven_score_equal_counting(trade_off):
    model, data = cnn(), images(batches=2, samples=3)
    kind = {"kind": "activation"} if trade_off is None else {"trade_off": trade_off}
    frame, network = estimate(model, data, ["int8/int2", "int4/int4", "int8/int8", "int8"], **kind)
    seen = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, args, name=layer.name: seen.setdefault(name, []).append(args[0].clone())
        )
        for layer in network.layers
    ]
    with torch.no_grad():
        for inputs, _ in data:
            model(inputs)
    for hook in hooks:
        hook.remove()
    largest = max(layer.macs for layer in network.layers)
    for layer in network.layers:
        entropy = {bits: np.concatenate([slow_input_entropy(v, bits) for v in seen[layer.name]]) for bits in (2, 4, 8)}
        for option, weight, bits in (("int8/int2", 8, 2), ("int4/int4", 4, 4), ("int8/int8", 8, 8)):
            lost = entropy[8] - entropy[bits]
            phi = layer.macs * (64 - weight * bits) / (64 * largest)
            scores = lost.clip(0) if trade_off is None else trade_off * lost / entropy[8] - (1 - trade_off) * phi
            found = frame.loc[(layer.name, option)]
            assert found["sensitivity"] == pytest.approx(scores.mean(), rel=1e-6, abs=1e-9)
            assert found["sensitivity_se"] == pytest.approx(scores.std(ddof=1) / 6**0.5, rel=1e-5, abs=1e-9)
        if trade_off is None:
            assert frame.loc[(layer.name, "int8"), "sensitivity"] == 0


def test_computation_alone_takes_the_fewest_bits_and_entropy_alone_takes_eight():
    options = ["int8/int2", "int8/int4", "int8/int8"]
    best = {}
    for trade_off in (0.0, 1.0):
        scores = estimate(cnn(), images(), options, trade_off=trade_off)[0]["sensitivity"].unstack()
        best[trade_off] = set(scores.idxmin(axis=1))
        assert (scores["int8/int8"] == 0).all()
    assert best == {0.0: {"int8/int2"}, 1.0: {"int8/int8"}}


def test_full_precision_inputs_lose_no_entropy_but_cost_computation():
    scores = estimate(cnn(), images(), ["int8/int8", "int8"], trade_off=1.0)[0]["sensitivity"].unstack()
    assert (scores["int8"] == 0).all()
    scores = estimate(cnn(), images(), ["int8/int8", "int8"], trade_off=0.0)[0]["sensitivity"].unstack()
    assert scores["int8"].max() == pytest.approx(32 / 8 - 1)


@pytest.mark.parametrize("name", ["int4@token", "int4@channel", "mxfp4", "int4@group2"])
@pytest.mark.parametrize("layer_name", ["depthwise", "head"])
def test_levels_of_inputs_follow_their_scales(name, layer_name):
    network = mpq.trace(cnn(), images()[0][0])
    layer, fmt = network[layer_name], parse(name)
    shape = (3, 4, 6, 6) if layer_name == "depthwise" else (3, 6)
    given = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    codes = codes_of_activation(quantise_activation(given, fmt, layer), fmt, layer)
    assert codes.shape[0] == 3
    assert codes.numel() == given.numel()
    assert len(codes.unique()) <= 2**fmt.bits
    tensor = parse("int4@tensor")
    assert torch.equal(
        codes_of_activation(quantise_activation(given, tensor, layer), tensor, layer),
        (given / (given.abs().max() / 7).half().float()).round().long().clamp(-8, 7),
    )


def test_embeddings_have_no_input_and_half_precision_counts_alike():
    frame, _ = estimate(decoder(), tokens(), ["int4/int4"], kind="activation")
    half, _ = estimate(decoder().bfloat16(), tokens(), ["int4/int4"], kind="activation")
    np.testing.assert_allclose(frame["sensitivity"], half["sensitivity"], atol=0.1)
    model = decoder()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    frame, _ = estimate(model, tokens(), ["int4/int4"], kind="activation")
    assert frame.loc[("embed", "int4/int4"), "sensitivity"] == 0
    assert (frame.drop(index="embed", level=0)["sensitivity"] > 0).all()


def test_what_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="use granularity='layer' or kind='weight'"):
        estimate(cnn(), images(), ["int4/int4"], "rows:2")
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(ValueError, match="used by a function: use kind='weight'"):
        estimate(model, [torch.randn(2, 3, 8)], ["int4/int4"])
    frame, _ = estimate(model, [torch.randn(2, 3, 8)], ["int4"], kind="weight")
    assert (frame["sensitivity"] > 0).all()
    with pytest.raises(ValueError, match="those of bcq2@channel differ: score it by weight_error"):
        estimate(cnn(), images(), ["bcq2"], kind="weight")
    with pytest.raises(ValueError, match="kind must be one of value-driven"):
        Entropy(kind="values")
    with pytest.raises(ValueError, match=r"trade_off must lie in \[0, 1\], got 2"):
        Entropy(trade_off=2)


def test_entropy_has_a_name():
    network = mpq.trace(cnn(), images()[0][0])
    space = SearchSpace(["int4/int4"], ties=None)
    named = mpq.sensitivity.estimate(cnn(), images(), network, space, "entropy", progress=False)
    assert named.equals(estimate(cnn(), images(), ["int4/int4"])[0])
