"""GGUF block types: equal to ggml's reference quantisers where there are some, else on the grid of their layout."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.fake_quantize import fake_quantize
from mpq.formats import GGUF_BLOCKS
from mpq.gguf_blocks import IQ4_LEVELS, SIMULATED, gguf_rounded

LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"]
SEARCHED = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_round_trip(x: Tensor, name: str) -> Tensor:
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), kind), kind))


def test_every_type_is_simulated_or_refused() -> None:
    assert set(LEGACY + SEARCHED) == set(SIMULATED)
    for name in GGUF_BLOCKS.keys() - SIMULATED:
        with pytest.raises(ValueError, match=f"cannot simulate {name}"):
            gguf_rounded(torch.ones(1, 256), name)


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_types_equal_ggmls_reference_to_the_bit(name: str) -> None:
    for seed in range(5):
        x = weights(64, 512, seed=seed) * torch.logspace(-4, 2, 64)[:, None]
        assert torch.equal(fake_quantize(x, name), reference_round_trip(x, name))


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_types_equal_ggmls_reference_on_ties_constants_and_signs(name: str) -> None:
    halves = torch.arange(-128, 128).reshape(1, 256) / 16  # every midpoint of a unit step
    rows = [halves, -halves, halves.abs(), torch.full((1, 256), 0.7), torch.full((1, 256), -3.0), torch.zeros(1, 256)]
    rows += [torch.tensor([-2.0, 2.0] * 128)[None], torch.tensor([2.0, -2.0] * 128)[None], weights(1, 256).abs()]
    x = torch.cat(rows)
    assert torch.equal(fake_quantize(x, name), reference_round_trip(x, name))


def signed_code(value: float, half: int) -> int:
    return min(max(round(value), -half), half - 1)


def extreme(values: list[float]) -> float:
    return max(values, key=abs)


def fp16(value: float) -> float:
    return float(np.float16(value))


def slow_signed_scales(x: list[float], size: int, half: int, half_scale: int) -> list[float]:
    blocks = [x[start : start + size] for start in range(0, 256, size)]
    scales = [extreme(block) / -half for block in blocks]
    d = fp16(extreme(scales) / -half_scale)
    result = []
    for block, scale in zip(blocks, scales, strict=True):
        step = d * signed_code(scale / d, half_scale)
        result += [step * signed_code(value / step, half) if step else 0.0 for value in block]
    return result


def slow_scales_and_minima(x: list[float], size: int, largest: int, largest_scale: int) -> list[float]:
    blocks = [x[start : start + size] for start in range(0, 256, size)]
    lows = [min(*block, 0.0) for block in blocks]
    scales = [(max(block) - low) / largest for block, low in zip(blocks, lows, strict=True)]
    d, d_min = fp16(max(scales) / largest_scale), fp16(max(-low for low in lows) / largest_scale)
    result = []
    for block, scale, low in zip(blocks, scales, lows, strict=True):
        step = d * min(round(scale / d), largest_scale)
        minimum = d_min * min(round(-low / d_min), largest_scale) if d_min else 0.0
        result += [
            step * min(max(round((v + minimum) / step), 0), largest) - minimum if step else -minimum for v in block
        ]
    return result


def nearest_iq4(value: float) -> float:
    return min(IQ4_LEVELS, key=lambda level: abs(level - value))


def slow_iq4_nl(x: list[float]) -> list[float]:
    result = []
    for start in range(0, 256, 32):
        block = x[start : start + 32]
        d = fp16(extreme(block) / -127)
        result += [d * nearest_iq4(value / d) for value in block]
    return result


def slow_iq4_xs(x: list[float]) -> list[float]:
    blocks = [x[start : start + 32] for start in range(0, 256, 32)]
    scales = [extreme(block) / -127 for block in blocks]
    d = fp16(extreme(scales) / -32)
    steps = [d * signed_code(scale / d, 32) for scale in scales]
    return [
        step * nearest_iq4(v / step) if step else 0.0 for block, step in zip(blocks, steps, strict=True) for v in block
    ]


SLOW = {
    "q2_k": lambda x: slow_scales_and_minima(x, 16, 3, 15),
    "q3_k": lambda x: slow_signed_scales(x, 16, 4, 32),
    "q4_k": lambda x: slow_scales_and_minima(x, 32, 15, 63),
    "q5_k": lambda x: slow_scales_and_minima(x, 32, 31, 63),
    "q6_k": lambda x: slow_signed_scales(x, 16, 32, 128),
    "iq4_nl": slow_iq4_nl,
    "iq4_xs": slow_iq4_xs,
}


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_types_lie_on_the_grid_of_their_layout(name: str) -> None:
    spread = torch.logspace(-2, 0, 256, dtype=torch.float64)
    for x in (weights(3, 256).double(), weights(3, 256).double() * spread, weights(3, 256).double().abs() + 0.5):
        expected = torch.tensor([SLOW[name](row) for row in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(fake_quantize(x, name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "scale_at", "minimum_at", "size", "low", "high", "largest_minimum"),
    [
        ("q2_k", 80, 82, 16, 0, 3 * 15, 15),
        ("q3_k", 108, None, 16, -31 * 4, 32 * 4, 0),
        ("q4_k", 0, 2, 32, 0, 15 * 63, 63),
        ("q5_k", 0, 2, 32, 0, 31 * 63, 63),
        ("q6_k", 208, None, 16, -127 * 32, 128 * 32, 0),
        ("iq4_nl", 0, None, 32, -127, 113, 0),
        ("iq4_xs", 0, None, 32, -31 * 127, 32 * 127, 0),
    ],
)
def test_the_layouts_are_those_that_ggml_decodes(
    name: str, scale_at: int, minimum_at: int | None, size: int, low: int, high: int, largest_minimum: int
) -> None:
    """Random blocks with fp16 scales of 1 or 0: the range of scale times code, of minima, the size of sub-blocks."""
    quants = pytest.importorskip("gguf.quants")
    data = np.random.default_rng(0).integers(0, 256, (20000, GGUF_BLOCKS[name][1]), dtype=np.uint8)

    def decoded(scale: float, minimum: float) -> np.ndarray:
        for at, value in ((scale_at, scale), (minimum_at, minimum)):
            if at is not None:
                data[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
        return np.asarray(quants.dequantize(data, quants.GGMLQuantizationType[name.upper()])).reshape(len(data), -1)

    scaled = decoded(1.0, 0.0)
    assert (scaled.min(), scaled.max()) == (low, high)
    assert decoded(0.0, 1.0).min() == -largest_minimum
    if scaled.shape[1] > size:  # a scale code of 0 empties a whole sub-block, and hardly ever half of one or two
        halves = (scaled.reshape(-1, 2, size // 2) == 0).all(2)
        pairs = (scaled.reshape(-1, 2, size) == 0).all(2)
        assert (halves[:, 0] != halves[:, 1]).mean() < 1e-3 < (pairs[:, 0] != pairs[:, 1]).mean()


@pytest.mark.parametrize(
    ("name", "least_db"),
    [("tq2_0", 1.5), ("q2_k", 9), ("q3_k", 15.5), ("q4_0", 21), ("iq4_nl", 21.5), ("iq4_xs", 21.5), ("q4_1", 21.5),
     ("q4_k", 21.5), ("q5_0", 27), ("q5_1", 28), ("q5_k", 28), ("q6_k", 34), ("q8_0", 45)],
)  # fmt: skip
def test_signal_to_noise_on_normal_weights(name: str, least_db: float) -> None:
    x = weights(256, 1024)
    noise = (fake_quantize(x, name) - x).square().mean()
    assert 10 * torch.log10(x.square().mean() / noise) > least_db


@pytest.mark.parametrize(
    ("name", "size", "largest", "scale_codes"), [("q2_k", 16, 3, 15), ("q4_k", 32, 15, 63), ("q5_k", 32, 31, 63)]
)
def test_error_is_half_a_step_and_the_rounding_of_scale_and_minimum(
    name: str, size: int, largest: int, scale_codes: int
) -> None:
    x = weights(64, 256).double()
    blocks = x.reshape(64, -1, size)
    low = blocks.amin(2).clamp(max=0)
    scale = (blocks.amax(2) - low) / largest
    d, d_min = scale.amax(1, keepdim=True) / scale_codes, (-low).amax(1, keepdim=True) / scale_codes
    bound = (scale + d / 2) / 2 + largest * d / 2 + d_min / 2
    error = (fake_quantize(x, name).reshape(blocks.shape) - blocks).abs().amax(2)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("name", SIMULATED)
def test_a_short_last_block_counts_missing_values_as_zeros(name: str) -> None:
    block = GGUF_BLOCKS[name][0]
    x = weights(5, block + 21)
    x[:, block] = -1  # the types with a minimum of their own must see one below zero to be the same with zeros added
    x[:, block + 1] = 1
    filled = torch.nn.functional.pad(x, (0, block - 21))
    torch.testing.assert_close(fake_quantize(x, name), fake_quantize(filled, name)[:, : block + 21])
