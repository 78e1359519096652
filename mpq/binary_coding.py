"""Binary coding: a group of weights as a sum of a few scales with signs, w ≈ Σ αₖ bₖ, bₖ = ±1."""

import torch
from torch import Tensor

from mpq.rounding import stored_scale

ROUNDS = 15


def binary_coded(x: Tensor, bits: int, scale_format: str) -> Tensor:
    """The best binary code found of every group, greedy first, then alternating.

    Greedy: bₖ = sign(r), αₖ = mean |r|, r ← r − αₖ bₖ. Then `ROUNDS` times in turn: every weight takes the nearest of
    the 2^bits sums ±α₁ ± … ± α_bits, and the scales solve the least squares problem (BᵀB) α = Bᵀw (Xu et al. 2018,
    arXiv:1802.00150; ShiftAddLLM, You et al. 2024, arXiv:2406.05981). Of all rounds the scales with the least squared
    error after rounding to their format are kept, so the result is never worse than the greedy one.

    A sum owns an interval of the sorted weights, so a round needs their prefix sums only: the cost is one sort, plus
    `ROUNDS` times 2^bits binary searches a group.

    Args:
        x: weights, (groups, n).
        bits: number of scales, 1 to 4.
        scale_format: what the scales are rounded to.

    Example:
        >>> binary_coded(torch.tensor([[3.0, -3.0, 1.0, -1.0]]), 2, "fp16")  # 2 ± 1: exact
        tensor([[ 3., -3.,  1., -1.]])
    """
    ascending = x.sort(1).values
    sums = torch.nn.functional.pad(ascending.double().cumsum(1), (1, 0))
    signs = _sign_patterns(bits, x.device)
    scales = _greedy_scales(x, bits)
    best, best_error = stored_scale(scales, scale_format), torch.full_like(x[:, :1], torch.inf, dtype=torch.float64)
    for _ in range(ROUNDS + 1):
        stored = stored_scale(scales, scale_format)
        levels, order = (stored @ signs.T.to(stored)).sort(1)
        count, total = _interval_sums(ascending, sums, levels)
        error = (levels.double().square() * count - 2 * levels.double() * total).sum(1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, stored, best), torch.where(better, error, best_error)
        count, total = (torch.empty_like(y).scatter_(1, order, y) for y in (count, total))
        scales = _least_squares(signs, count, total, scales.double()).to(x.dtype).abs()
    levels = (best @ signs.T.to(best)).sort(1).values
    return levels.gather(1, torch.searchsorted(_midpoints(levels), x))


def _sign_patterns(bits: int, device: torch.device) -> Tensor:
    """All combinations of signs, (2^bits, bits)."""
    codes = torch.arange(2**bits, device=device)[:, None] >> torch.arange(bits, device=device)
    return (codes & 1).double() * 2 - 1


def _greedy_scales(x: Tensor, bits: int) -> Tensor:
    """(groups, bits)."""
    scales, residual = [], x
    for _ in range(bits):
        scales.append(residual.abs().mean(1, keepdim=True, dtype=torch.float64).to(x.dtype))
        residual = residual - torch.where(residual < 0, -scales[-1], scales[-1])
    return torch.cat(scales, 1)


def _midpoints(levels: Tensor) -> Tensor:
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def _interval_sums(ascending: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """How many weights are nearest to each level, and their sum, both (groups, levels) in float64."""
    ends = torch.searchsorted(ascending, _midpoints(levels), right=True)
    ends = torch.nn.functional.pad(ends, (1, 0))
    ends = torch.nn.functional.pad(ends, (0, 1), value=ascending.shape[1])
    return ends.diff(dim=1).double(), sums.gather(1, ends).diff(dim=1)


def _least_squares(signs: Tensor, count: Tensor, total: Tensor, scales: Tensor) -> Tensor:
    """Solve (BᵀB) α = Bᵀw by `bits` steps of conjugate gradients, from `scales`; singular systems are consistent.

    Args:
        signs: of every sum, (2^bits, bits).
        count: how many weights take every sum, (groups, 2^bits).
        total: the sum of those weights.
        scales: where to start, (groups, bits).
    """
    products = (signs[:, :, None] * signs[:, None, :]).flatten(1)
    gram = (count @ products).view(-1, *signs.shape[1:], signs.shape[1])
    residual = total @ signs - (gram @ scales[..., None])[..., 0]
    direction, power = residual, residual.square().sum(1, keepdim=True)
    floor = power * 1e-24
    for _ in range(scales.shape[1]):
        image = (gram @ direction[..., None])[..., 0]
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where((curvature > 0) & (power > floor), power / curvature, 0)
        scales, residual = scales + step * direction, residual - step * image
        before, power = power, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(before > 0, power / before, 0) * direction
    return scales
