"""What the GGUF block types do to weights: quantise and dequantise in the layouts of ggml, scales included.

The types with one scale a block (q4_0 … q8_0, tq1_0, tq2_0) round as ggml's reference quantisers do, to the bit. For
the K types, iq4_nl and iq4_xs ggml searches for scales, weighted by importance; here every scale spans its values and
codes round to nearest, so a GGUF file made with a search shows less error than this.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.rounding import amax_of_groups, divide, float_cast, nearest

IQ4_LEVELS = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
"""`kvalues_iq4nl` of ggml."""


def _signed(x: Tensor, half: int) -> Tensor:
    """q4_0, q5_0: scale = value of largest magnitude / −half, codes −half … half − 1, halves upwards."""
    scale = _extreme(x) / -half
    code = (x * _inverse(scale)).add_(half + 0.5).trunc_().clamp_(0, 2 * half - 1).sub_(half)
    return code.mul_(float_cast(scale, "fp16"))


def _with_minimum(x: Tensor, largest: int) -> Tensor:
    """q4_1, q5_1: value = minimum + scale · code, codes 0 … largest, halves upwards; both in fp16."""
    low = x.amin(1, keepdim=True)
    scale = ((x.amax(1, keepdim=True) - low) / largest).clamp_(max=torch.finfo(x.dtype).max)
    code = (x - low).mul_(_inverse(scale)).add_(0.5).trunc_().clamp_(0, largest)
    return code.mul_(float_cast(scale, "fp16")).add_(float_cast(low, "fp16"))


def _symmetric(x: Tensor, largest: int) -> Tensor:
    """q8_0, tq1_0, tq2_0: scale = amax / largest, codes −largest … largest, halves away from 0."""
    scale = amax_of_groups(x) / largest
    scaled = x * _inverse(scale)
    whole = scaled.trunc()
    code = whole.add_(scaled.sub_(whole).mul_(2).trunc_())
    return code.mul_(float_cast(scale, "fp16"))


def _signed_scales(blocks: Tensor, half: int, half_scale: int) -> Tensor:
    """q3_k, q6_k: value = fp16 scale · sub-block's code −half_scale … half_scale − 1 · code −half … half − 1."""
    scale = _super_scaled(_extreme(blocks) / -half, half_scale)
    return divide(blocks, scale).round_().clamp_(-half, half - 1).mul_(scale)


def _scales_and_minima(blocks: Tensor, largest: int, largest_scale: int) -> Tensor:
    """q2_k, q4_k, q5_k: value = scale · code − minimum, both an fp16 times the sub-block's code 0 … largest_scale."""
    low = blocks.amin(-1, keepdim=True).clamp_(max=0)
    scale = (blocks.amax(-1, keepdim=True) - low).div_(largest)
    minimum = low.neg_()
    super_scale, super_minimum = (float_cast(y.amax(1, keepdim=True) / largest_scale, "fp16") for y in (scale, minimum))
    scale = divide(scale, super_scale).round_().clamp_(0, largest_scale).mul_(super_scale)
    minimum = divide(minimum, super_minimum).round_().clamp_(0, largest_scale).mul_(super_minimum)
    return divide(blocks + minimum, scale).round_().clamp_(0, largest).mul_(scale).sub_(minimum)


def _codebook(blocks: Tensor, scale: Tensor) -> Tensor:
    """iq4_nl: value = scale · one of 16 uneven levels."""
    return nearest(divide(blocks, scale), IQ4_LEVELS).mul_(scale)


def _codebook_with_scales(blocks: Tensor) -> Tensor:
    """iq4_xs: iq4_nl's levels, the scale a code −32 … 31 times an fp16."""
    return _codebook(blocks, _super_scaled(_extreme(blocks) / IQ4_LEVELS[0], 32))


def _super_scaled(scale: Tensor, half_scale: int) -> Tensor:
    """Scales (blocks, sub-blocks, 1) as codes −half_scale … half_scale − 1 of one fp16 a super-block."""
    super_scale = float_cast(_extreme(scale[..., 0])[..., None] / -half_scale, "fp16")
    return divide(scale, super_scale).round_().clamp_(-half_scale, half_scale - 1).mul_(super_scale)


def _extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude along the last axis with its sign, the first of equals; the axis stays."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for scales that fp16 stores as 0, whose codes do not matter."""
    return torch.where(float_cast(scale, "fp16") == 0, 0, 1 / scale)


def _in_sub_blocks(x: Tensor, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply to super-blocks as (blocks, sub-blocks, size); a short one is filled up with zeros for the time."""
    missing = -x.shape[1] % size
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return rounded(padded.reshape(x.shape[0], -1, size)).reshape(x.shape[0], -1)[:, : x.shape[1]]


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": lambda x: _signed(x, 8),
    "q4_1": lambda x: _with_minimum(x, 15),
    "q5_0": lambda x: _signed(x, 16),
    "q5_1": lambda x: _with_minimum(x, 31),
    "q8_0": lambda x: _symmetric(x, 127),
    "tq1_0": lambda x: _symmetric(x, 1),
    "tq2_0": lambda x: _symmetric(x, 1),
    "q2_k": lambda x: _in_sub_blocks(x, 16, lambda blocks: _scales_and_minima(blocks, 3, 15)),
    "q3_k": lambda x: _in_sub_blocks(x, 16, lambda blocks: _signed_scales(blocks, 4, 32)),
    "q4_k": lambda x: _in_sub_blocks(x, 32, lambda blocks: _scales_and_minima(blocks, 15, 63)),
    "q5_k": lambda x: _in_sub_blocks(x, 32, lambda blocks: _scales_and_minima(blocks, 31, 63)),
    "q6_k": lambda x: _in_sub_blocks(x, 16, lambda blocks: _signed_scales(blocks, 32, 128)),
    "iq4_nl": lambda x: _codebook(x, float_cast(_extreme(x) / IQ4_LEVELS[0], "fp16")),
    "iq4_xs": lambda x: _in_sub_blocks(x, 32, _codebook_with_scales),
}
SIMULATED = tuple(_ROUNDED)
"""The types that `gguf_rounded` knows: those without a codebook grid."""


def gguf_rounded(x: Tensor, name: str) -> Tensor:
    """Values on the grid of a GGUF type.

    Args:
        x: ``(blocks, n)``, n at most the type's block; the values that a shorter block lacks count as zeros.
        name: the type's lower-case name.

    Raises:
        ValueError: if the type takes its codes from a codebook grid (iq1, iq2, iq3).

    Example:
        >>> gguf_rounded(torch.tensor([[-8.0, 3.2, 0.4, 7.9]]), "q4_0")  # scale 1, codes -8 … 7
        tensor([[-8.,  3.,  0.,  7.]])
    """
    if name not in _ROUNDED:
        raise ValueError(
            f"fake_quantize cannot simulate {name}, whose values lie on a codebook grid: "
            f"it can price it; GGUF types it can simulate are {', '.join(SIMULATED)}"
        )
    return _ROUNDED[name](x)
