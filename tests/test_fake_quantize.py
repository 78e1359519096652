"""Every family against the slow reference in slow_grids.py; shapes, dtypes, ranges and edges of `fake_quantize`."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_grids import minifloat_levels, nearest, slow_fake_quantize, stored
from torch import Tensor

import mpq.fake_quantize as module
from mpq.fake_quantize import SHRINK_FACTORS, fake_quantize
from mpq.formats import Minifloat, parse
from mpq.grids import NF4_LEVELS, on_grid

MINIFLOATS = [f"fp{1 + e + m}_e{e}m{m}" for e in range(1, 7) for m in range(6) if 3 <= 1 + e + m <= 8]
MX = ["mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"]
GGUF = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0"]
SCALED = ["int2", "int3", "int4", "int8", "uint2", "uint4", "uint8", "nf4", "log2", "log4", "log8", *MINIFLOATS]
SCALED += ["ulog2", "ulog4", "ulogsqrt3", "ulogsqrt6"]
EVERY = [*SCALED, *MX, *GGUF, "int16", "uint16", "nvfp4", "fixed3.4", "fp16", "bf16", "fp32", "bcq1", "bcq3", "tq2_0"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("suffix", ["@tensor", "@channel", "@group8"])
@pytest.mark.parametrize(
    "text", [*SCALED, "int4@scale=e8m0", "uint3@scale=fp32", "fp4_e2m1@scale=bf16", "nf4@scale=fp32"]
)
def test_levels_are_the_nearest_of_the_enumerated_grid(text: str, suffix: str) -> None:
    fmt = parse(text.replace("@", f"{suffix}@", 1) if "@" in text else text + suffix)
    for seed in range(3):
        w = normal(3, 19, seed=seed) * torch.tensor([[1.0], [0.01], [30.0]])
        expected = torch.tensor(slow_fake_quantize(w.tolist(), fmt), dtype=torch.float64)
        torch.testing.assert_close(fake_quantize(w, fmt), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", [*MX, "nvfp4", "fixed1.3", "fixed4.4", "fixed2.0"])
def test_formats_with_their_own_blocks_equal_the_enumerated_grid(text: str) -> None:
    w = normal(3, 75) * torch.tensor([[1.0], [0.02], [30.0]])
    expected = torch.tensor(slow_fake_quantize(w.tolist(), parse(text)), dtype=torch.float64)
    torch.testing.assert_close(fake_quantize(w, text), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", EVERY)
def test_float32_agrees_with_float64(text: str) -> None:
    w = normal(8, 96).float()
    single, double = fake_quantize(w, text).double(), fake_quantize(w.double(), text)
    assert (torch.isclose(single, double, rtol=1e-5).double().mean()) > 0.97  # codes differ only next to a midpoint
    assert (single - double).abs().max() <= 2 * (double - w).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_float_casts_saturate(kind: str, dtype: torch.dtype) -> None:
    w = torch.cat([normal(1000), torch.tensor([1e300, -1e300, 1e-300], dtype=torch.float64)])
    limit = torch.finfo(dtype).max
    expected = [float(torch.tensor(value, dtype=torch.float64).to(dtype)) for value in w[:-3].tolist()]
    assert fake_quantize(w, kind).tolist() == [*expected, limit, -limit, 0.0]


def test_fp64_keeps_every_value() -> None:
    w = torch.cat([normal(100), torch.tensor([1e300, -1e300, 1e-300, 0.0], dtype=torch.float64)])
    for exact in (w, w.clamp(-1e30, 1e30).float(), w.clamp(-1e4, 1e4).half()):
        assert torch.equal(fake_quantize(exact, "fp64"), exact)


@pytest.mark.parametrize(
    ("text", "levels"),
    [*[(f"int{b}", 2**b - 1) for b in (2, 3, 4, 8)], *[(f"uint{b}", 2**b) for b in (2, 4)], ("nf4", 16)]
    + [(text, 2 ** parse(text).bits - 1) for text in MINIFLOATS if text not in ("fp8_e4m3", "fp8_e5m2")]
    + [("fp8_e4m3", 253), ("fp8_e5m2", 247), ("fixed2.4", 64), ("log2", 3), ("log4", 15)],
)  # fmt: skip
def test_number_of_levels(text: str, levels: int) -> None:
    spread = torch.logspace(-25, 0, 400001, base=10, dtype=torch.float64)
    x = torch.cat([torch.linspace(-2, 2, 200001, dtype=torch.float64), 2 * spread, -2 * spread])
    suffix = "@scale=fp32" if text.startswith("fp") else ""
    tensor = "" if text.startswith("fixed") else "@tensor"
    assert len(torch.unique(fake_quantize(x, text + tensor + suffix) + 0.0)) == levels


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """As bitsandbytes makes them: 8 of one half and 7 of the other at equal steps of probability, and zero."""
    tail = 0.9677083
    positive = [NormalDist().inv_cdf(tail + (0.5 - tail) * k / 8) for k in range(8)]
    negative = [-NormalDist().inv_cdf(tail + (0.5 - tail) * k / 7) for k in range(7)]
    expected = sorted([0.0, *positive, *negative])
    assert [level * positive[0] for level in NF4_LEVELS] == pytest.approx(expected, abs=2e-6)


def test_largest_values() -> None:
    largest = {"fp4_e2m1": 6, "fp6_e2m3": 7.5, "fp6_e3m2": 28, "fp8_e4m3": 448, "fp8_e5m2": 57344}
    for text, value in largest.items():
        every = torch.tensor(minifloat_levels(parse(text).exponent_bits, parse(text).mantissa_bits))  # type: ignore[attr-defined]
        assert every.max() == value
        assert equal(fake_quantize(every, text), every)  # amax is the largest value: the scale is 1
    for text, value in {"mxfp4": 6, "mxfp6_e2m3": 7.5, "mxfp8_e4m3": 448, "mxint8": 127 / 64}.items():
        top = 2.0 ** (math.floor(math.log2(value)) + 1) * (1 - 2**-20)  # just below the next power of two: saturates
        assert fake_quantize(torch.tensor([[top, 0.0]]), text).tolist() == [[value, 0.0]]
    assert fake_quantize(torch.tensor([[-1.999, 1.999]]), "mxint8").tolist() == [[-2.0, 127 / 64]]
    assert fake_quantize(torch.tensor([100.0, -100.0]), "fixed4.4").tolist() == [8 - 1 / 16, -8.0]


@pytest.mark.parametrize(
    ("text", "x", "expected"),
    [
        ("int4", [7, 0.5, 1.5, 2.5, -0.5, -2.5, -6.5], [7, 0, 2, 2, 0, -2, -6]),
        ("uint4", [15, 0, 0.5, 1.5, 2.5, 14.5], [15, 0, 0, 2, 2, 14]),
        ("uint2", [-1, 2, 0.5, -0.5, 1.5], [-1, 2, 0, 0, 2]),
        ("fp4_e2m1", [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5], [6, 0, 1, 1, 2, 2, 4, -4]),
        ("mxfp4", [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5], [6, 0, 1, 1, 2, 2, 4, -4]),
        ("mxint8", [1, 0.5 / 64, 1.5 / 64, -2.5 / 64], [1, 0, 2 / 64, -2 / 64]),
        ("fixed4.1", [0.25, 0.75, -1.25, 1.75], [0, 1, -1, 2]),
        ("fp4_e3m0", [16, 6, 12, 0.375, 0.125], [16, 8, 16, 0.5, 0]),  # no mantissa: the larger, as IEEE 754-2019 says
        ("log4", [8, 6, -3, 1.5, 0.0625, 0.0624], [8, 8, -4, 2, 0.125, 0]),  # halves away from 0
        ("ulog3", [8, 6, 1.51, -3, 0.0625, 0.0626], [8, 4, 2, 0, 0, 0.125]),  # the lower one
    ],
)
def test_ties(text: str, x: list[float], expected: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert fake_quantize(torch.tensor(x, dtype=dtype), text).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_bit_decides_next_to_a_tie(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for text, tie, below, above in (
        ("log4", 3.0, 2, 4),
        ("int4", 1.5, 1, 2),
        ("fp4_e2m1", 5.0, 4, 6),
        ("mxfp4", 5.0, 4, 6),
    ):
        top = {"log4": 8.0, "int4": 7.0}.get(text, 6.0)
        x = torch.tensor([top, tie * (1 - eps), tie * (1 + eps), -tie * (1 - eps)], dtype=dtype)
        assert fake_quantize(x, text).tolist() == [top, below, above, -below]


@pytest.mark.parametrize("bits", range(2, 12))
def test_integer_error_is_at_most_half_a_step(bits: int) -> None:
    w = normal(50, 64)
    step = stored_steps(w, 2 ** (bits - 1) - 1)
    assert ((fake_quantize(w, f"int{bits}") - w).abs() <= step / 2 * (1 + 1e-9)).all()


def stored_steps(w: Tensor, codes: int) -> Tensor:
    return torch.tensor([[stored(float(row.abs().max()) / codes, "fp16")] for row in w], dtype=torch.float64)


@pytest.mark.parametrize("text", [text for text in MINIFLOATS if parse(text).exponent_bits > 1])  # type: ignore[attr-defined]
def test_minifloat_error_is_relative_down_to_the_subnormals(text: str) -> None:
    fmt = parse(text)
    assert isinstance(fmt, Minifloat)
    w = normal(50, 64)
    amax = w.abs().amax(1, keepdim=True)
    subnormal = amax / fmt.largest * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    bound = torch.maximum(w.abs() * 2.0 ** -(fmt.mantissa_bits + 1), subnormal / 2)
    error = (fake_quantize(w, parse(f"{text}@scale=fp32")) - w).abs()
    assert (error <= bound * (1 + 1e-5)).all()


IDEMPOTENT = ["int2", "int4", "int8", "int8@scale=bf16", "int4@group7", "int8@scale=e8m0", *MINIFLOATS, "fp16", "bf16"]
IDEMPOTENT += ["fixed2.5", "nf4", "log2", "log4", "log8", *(text for text in MX if text != "mxint8")]


@pytest.mark.parametrize("text", IDEMPOTENT)
def test_quantising_twice_equals_quantising_once(text: str) -> None:
    w = (normal(200, 70) * torch.logspace(0, 1, 200)[:, None]).float()
    once = fake_quantize(w, text)
    assert equal(fake_quantize(once, text), once)


@pytest.mark.parametrize("text", ["int8@scale=fp32", "fp4_e2m1@scale=fp32", "fp8_e4m3@scale=fp32", "nvfp4"])
def test_quantising_twice_with_a_float_scale_moves_its_last_bit_at_most(text: str) -> None:
    once = fake_quantize(normal(200, 70).float(), text)
    torch.testing.assert_close(fake_quantize(once, text), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("text", [text for text in EVERY if not text.startswith(("fixed", "fp16", "bf16", "fp32"))])
def test_powers_of_two_scale_through(text: str) -> None:
    w = normal(6, 80).float() * 4
    assert equal(fake_quantize(w * 8, text), fake_quantize(w, text) * 8)


@pytest.mark.parametrize("text", EVERY)
def test_edges_stay_finite(text: str) -> None:
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(3, 40, dtype=dtype)
        assert equal(fake_quantize(zero, text) + 0.0, zero)
        for x in (
            zero + 1.5,
            zero - 1e30,
            zero + 1e-42,
            normal(3, 40).to(dtype) * 1e30,
            normal(3, 40).to(dtype) * 1e-40,
        ):
            assert torch.isfinite(fake_quantize(x, text)).all()
    largest = torch.tensor([[3.4e38, -3.4e38, 3e38, 1.0]])
    assert torch.isfinite(fake_quantize(largest, text)).all()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.isfinite(fake_quantize(largest.clamp(-6e4, 65504).to(dtype), text)).all()


@pytest.mark.parametrize("text", ["int4", "int8", "uint4", "fp8_e4m3", "nf4", "nvfp4", "bcq2", "q4_0", "q4_1", "q6_k"])
def test_a_constant_comes_back_to_the_precision_of_its_scale(text: str) -> None:
    x = torch.full((2, 64), -0.7371)
    torch.testing.assert_close(fake_quantize(x, text), x, rtol=2e-3, atol=0)


def test_scales_saturate_and_underflow_as_their_format_does() -> None:
    assert fake_quantize(torch.tensor([1e30, -1e30]), "int4").tolist() == [7 * 65504.0, -8 * 65504.0]
    assert fake_quantize(torch.tensor([1e-9, -1e-9]), "int4").tolist() == [0, 0]
    tiny = torch.tensor([1e-9, -1e-9])
    torch.testing.assert_close(fake_quantize(tiny, "int4@scale=fp32"), tiny)
    torch.testing.assert_close(fake_quantize(tiny, "fp8_e5m2"), tiny, rtol=0.005, atol=0)  # bf16 scale
    assert fake_quantize(torch.tensor([2.0**-140, 0.0]), "mxfp4").tolist() == [0, 0]  # below 2^-127 · 0.25
    assert fake_quantize(torch.tensor([2.0**-128, 0.0]), "mxfp4").tolist() == [2.0**-128, 0]


@pytest.mark.parametrize("text", EVERY)
def test_shapes_and_layouts(text: str) -> None:
    w = normal(6, 4, 3, 5).float()
    before = w.clone()
    expected = fake_quantize(w.reshape(6, 60), text).reshape(w.shape)
    assert equal(fake_quantize(w, text), expected)
    assert equal(fake_quantize(w.movedim(0, 1).contiguous(), text, axis=1), expected.movedim(0, 1))
    assert equal(fake_quantize(w.movedim(0, -1), text, axis=-1), expected.movedim(0, -1))  # not contiguous
    assert equal(fake_quantize(w.to(memory_format=torch.channels_last), text), expected)
    assert equal(fake_quantize(w[0, 0, 0], text), fake_quantize(w[:1, :1, :1].reshape(1, 5), text)[0])
    assert fake_quantize(w[0, 0, 0, 0], text).shape == ()
    assert fake_quantize(w[:0], text).shape == (0, 4, 3, 5)
    assert equal(w, before)
    expanded = torch.ones(1, 1).expand(4, 64)
    assert fake_quantize(expanded, text).shape == (4, 64)


@pytest.mark.parametrize("text", ["int4@channel", "int4@group7", "uint4@group7", "bcq2@group7", "nf4@group7"])
def test_a_short_last_group_is_a_group_of_its_own(text: str) -> None:
    w, alone = normal(5, 16).float(), text.split("@", maxsplit=1)[0]
    groups = [w] if "channel" in text else [w[:, :7], w[:, 7:14], w[:, 14:]]
    expected = torch.cat([fake_quantize(group.contiguous(), alone) for group in groups], dim=1)
    assert equal(fake_quantize(w, text), expected)


@pytest.mark.parametrize("text", ["int8", "uint8", "fp8_e4m3", "nf4", "bcq2", "log4", "int4@mse"])
def test_a_scale_a_token(text: str) -> None:
    x = normal(2, 3, 9).float()
    name, _, suffix = text.partition("@")
    token = parse(f"{name}@token" + (f"@{suffix}" if suffix else ""))
    expected = torch.stack([torch.stack([fake_quantize(vector, text) for vector in sample]) for sample in x])
    assert equal(fake_quantize(x, token), expected)
    assert equal(fake_quantize(x, token, axis=1), expected)
    assert equal(fake_quantize(x[0, 0], token), expected[0, 0])


@pytest.mark.parametrize(
    "text", ["int4", "uint4", "bcq2", "nf4", "int4@mse", "uint4@percentile99", "int4@percentile90"]
)
def test_a_scale_a_tensor_is_a_scale_of_one_row(text: str) -> None:
    w, (name, _, suffix) = normal(6, 4, 5).float(), text.partition("@")
    tensor = f"{name}@tensor" + (f"@{suffix}" if suffix else "")
    assert equal(fake_quantize(w, tensor).flatten(), fake_quantize(w.flatten(), text))
    assert equal(fake_quantize(w.transpose(0, 2), tensor, axis=1), fake_quantize(w, tensor).transpose(0, 2))


@pytest.mark.parametrize(
    "text", [*EVERY, "int4@tensor@mse", "int4@tensor", "int4@token", "int4@group32", "bcq2@tensor"]
)
def test_chunks_do_not_show(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(7, 300).float()
    whole = fake_quantize(w, text)
    monkeypatch.setattr(module, "_CHUNK", 600)
    assert equal(fake_quantize(w, text), whole)


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(text: str, dtype: torch.dtype) -> None:
    w = normal(4, 64).to(dtype)
    assert equal(fake_quantize(w, text), fake_quantize(w.float(), text).to(dtype))


def test_parameters_come_back_as_tensors_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    quantised = fake_quantize(weight, "int4")
    assert not quantised.requires_grad
    assert not isinstance(quantised, torch.nn.Parameter)
    assert fake_quantize(weight, "fp32").data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("text", ["int3", "uint3", "fp4_e2m1", "nf4", "log4", "int3@scale=e8m0"])
@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("channel", [(slice(r, r + 1), slice(None)) for r in range(4)]),
        ("group10", [(slice(r, r + 1), slice(c, c + 10)) for r in range(4) for c in range(0, 32, 10)]),
        ("tensor", [(slice(None), slice(None))]),
    ],
)
def test_mse_range_is_the_best_of_the_grid(text: str, granularity: str, groups: list[tuple[slice, slice]]) -> None:
    name, _, scale = text.partition("@")
    w = normal(4, 32) ** 3
    suffix = f"@{scale}" if scale else ""
    chosen = fake_quantize(w, f"{name}@{granularity}@mse{suffix}")
    plain = fake_quantize(w, f"{name}@{granularity}{suffix}")
    assert (chosen - w).square().sum() <= (plain - w).square().sum()
    for group in groups:
        x, errors = w[group].reshape(1, -1), []
        for factor in SHRINK_FACTORS:
            rounded = on_grid(parse(text), x, x.min()[None, None] * factor, x.max()[None, None] * factor)
            errors.append(float((rounded - x).square().sum()))
        assert float((chosen[group] - w[group]).square().sum()) == pytest.approx(min(errors), rel=1e-9)


def test_mse_range_clips_outliers_that_are_not_worth_their_step() -> None:
    w = normal(4, 2000)
    for text, gain in {"int2": 4, "int3": 1.5, "int4": 1.2, "uint3": 1.5, "int8": 1}.items():
        noise, plain = ((fake_quantize(w, text + suffix) - w).square().mean() for suffix in ("@mse", ""))
        assert gain * noise <= plain
    huge = (w.float() * 2.0**70, "int3@mse@scale=fp32")  # squares beyond float32
    assert equal(fake_quantize(*huge), fake_quantize(w.float(), huge[1]) * 2.0**70)


def test_percentile_range_equals_clipping_at_numpys_percentile() -> None:
    w = normal(4, 101)
    for p in (60, 90, 99.9, 100):
        q = np.percentile(w.abs().numpy(), p, axis=1, keepdims=True)
        steps = torch.tensor([[stored(float(top) / 7, "fp16")] for top in q[:, 0]], dtype=torch.float64)
        expected = (w / steps).round().clamp(-8, 7) * steps
        torch.testing.assert_close(fake_quantize(w, f"int4@percentile{p}"), expected, rtol=1e-12, atol=0)
    skewed = w.abs() + 0.5
    low, high = np.percentile(-skewed.numpy(), [1, 99], axis=1)
    for row, a, b in zip(-skewed, low, high, strict=True):
        scale = stored((max(b, 0) - min(a, 0)) / 15, "fp16")
        zero = min(max(round(-min(a, 0) / scale), 0), 15)
        levels = [(code - zero) * scale for code in range(16)]
        expected = torch.tensor([nearest(value, levels) for value in row.tolist()], dtype=torch.float64)
        torch.testing.assert_close(fake_quantize(row, "uint4@percentile99"), expected, rtol=1e-12, atol=0)
    assert equal(fake_quantize(w, "int4@percentile100"), fake_quantize(w, "int4"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    w = torch.ones(3, 4)
    w[1, 2] = value
    with pytest.raises(ValueError, match=r"weight of fc must be finite to be quantised, got 1 NaN or infinite of 12"):
        fake_quantize(w, "int4", name="weight of fc")
    with pytest.raises(ValueError, match="tensor must be finite"):
        fake_quantize(w.half(), "fp32")


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ids must be float16.*got torch.int64"):
        fake_quantize(torch.arange(3), "int4", name="ids")
    with pytest.raises(ValueError, match="axis of tensor must be one of its 2 axes, got 2"):
        fake_quantize(torch.ones(2, 2), "int4", axis=2)
    with pytest.raises(ValueError, match=r"cannot simulate iq2_xxs.*can simulate are q4_0, .*iq4_xs"):
        fake_quantize(torch.ones(2, 256), "iq2_xxs")
    with pytest.raises(ValueError, match="unknown format"):
        fake_quantize(torch.ones(2, 2), "int4bit")


def test_more_bits_mean_less_noise() -> None:
    w = normal(64, 512)
    for family in ("int{}", "uint{}", "bcq{}", "fixed3.{}"):
        noise = [float((fake_quantize(w, family.format(b)) - w).square().mean()) for b in (2, 3, 4)]
        assert noise[0] > 2 * noise[1] > 4 * noise[2]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.sampled_from(["", "@group3", "@tensor"]),
)
def test_any_values_come_back_finite_within_the_range(text: str, values: list[float], suffix: str) -> None:
    fmt = parse(text + suffix) if "granularity" in parse(text).takes else parse(text)
    x = torch.tensor(values, dtype=torch.float64)
    q = fake_quantize(x, fmt)
    assert torch.isfinite(q).all()
    assert q.abs().max() <= 2 * x.abs().max() + 1e-3  # −2^(b−1) of int2 is twice the largest code


@pytest.mark.parametrize(("text", "root"), [("ulog3", 1), ("ulog4", 1), ("ulogsqrt4", 2)])
def test_unsigned_logarithms_keep_their_powers_and_zero(text: str, root: int) -> None:
    powers = torch.tensor([0.0, *(2.0 ** (-k / root) for k in range(2 ** int(text[-1]) - 1))], dtype=torch.float64)
    assert torch.equal(fake_quantize(powers, text), powers)
    assert fake_quantize(torch.tensor([-1.0, -0.5]), text).tolist() == [0.0, 0.0]


def test_unsigned_logarithms_suit_softmax_outputs() -> None:
    """Relative errors of what a softmax gives, weighed by its own values: powers beat even steps."""
    p = (3 * normal(50, 64)).softmax(1)
    error = {
        t: float(((fake_quantize(p, t) - p).abs() / p).mean()) for t in ("uint4@tensor", "ulog4@tensor", "log4@tensor")
    }
    assert error["ulog4@tensor"] < 0.4 * error["uint4@tensor"]
    assert error["ulog4@tensor"] < error["log4@tensor"]
