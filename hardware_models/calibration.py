"""Calibration: what a model's predictions have to be multiplied with, and what to add, to agree with measurements.

    affine: minimise over alpha > 0, beta >= 0 the sum of |alpha p_i + beta - t_i| / t_i
    by kind: factor of a kind = argmin over f of the sum over its layers of |f p_i - t_i| / t_i

p are predicted and t measured latencies. The error is relative, since layers and networks differ by orders of
magnitude, and absolute rather than squared, so that one broken measurement does not pull the line. Both are solved
exactly: by weighted medians, one for every line through a measurement (a best line of least absolute errors passes
through two). beta is what a pass costs outside its layers, and so not negative; where the free line would have it so,
the best one that is allowed has beta = 0, the problem being convex. The summed tables of HAWQ-V3 exceed its networks by
factors of 1.3 to 1.6, which is what alpha is for.

Errors are told in-sample and leave-one-out: each measurement predicted by a fit on the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.rank_correlation import kendall

from .cells import Cells
from .device_numbers import Entry, Number, Source
from .device_schema import COMMON
from .prices import CostModel, Prices
from .target import Target

Floats = NDArray[np.float64]

_SOURCE = "calibration-fit"


@dataclass(frozen=True)
class Fit:
    """A calibration and its errors.

    Attributes:
        alpha: factor on predictions; 1 where `factors` holds one a kind.
        beta: seconds added once a pass.
        factors: factor of each kind of layer.
        samples: measurements.
        mape, kendall_tau: mean absolute relative error and rank correlation on what it was fitted on.
        held_out_mape, held_out_tau: the same, leaving one out; NaN where there are too few measurements.
    """

    alpha: float
    beta: float
    factors: Mapping[str, float]
    samples: int
    mape: float
    kendall_tau: float
    held_out_mape: float
    held_out_tau: float


def fit_affine(predicted: ArrayLike, measured: ArrayLike, *, offset: bool = True) -> Fit:
    """The best alpha and beta; without `offset` beta is 0.

    Args:
        predicted: latencies that the uncalibrated model predicts, (samples,), seconds.
        measured: what they are, (samples,), seconds.
        offset: whether to add a constant.

    Raises:
        ValueError: if there are fewer than two measurements, a value is not above 0, or predictions fall as
            measurements rise.

    Example:
        >>> fit = fit_affine([1e-3, 2e-3, 4e-3], [0.7e-3, 1.2e-3, 2.2e-3])
        >>> round(fit.alpha, 9), round(fit.beta, 9), round(fit.mape, 9)
        (0.5, 0.0002, 0.0)
    """
    p, t = _checked(predicted, measured)

    def fitted(rows: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
        alpha, beta = _line(p[rows], t[rows], offset) or (_factor(p[rows], t[rows]), 0.0)
        return lambda values: alpha * values + beta

    if (line := _line(p, t, offset)) is None:
        raise ValueError("predictions fall as measurements rise: this model says nothing about these measurements")
    alpha, beta = line
    held_out = np.array([fitted(np.arange(len(p)) != i)(p[i]) for i in range(len(p))]) if len(p) > 2 else None
    return _fit(alpha * p + beta, held_out, t, alpha=alpha, beta=beta, factors={})


def fit_kinds(kinds: Sequence[str], predicted: ArrayLike, measured: ArrayLike) -> Fit:
    """The best factor of every kind of layer, from layers measured by themselves.

    Args:
        kinds: kind of each layer (`cells.kernel_kind`), (samples,).
        predicted: as for `fit_affine`, of layers.
        measured: as for `fit_affine`, of layers.

    Raises:
        ValueError: as `fit_affine`, or if kinds are not one a measurement.

    Example:
        >>> fit_kinds(["linear", "conv2d", "linear"], [1, 1, 2], [0.5, 3, 1]).factors
        {'linear': 0.5, 'conv2d': 3.0}
    """
    p, t = _checked(predicted, measured)
    if len(kinds) != len(p):
        raise ValueError(f"kinds must be one a measurement, got {len(kinds)} for {len(p)}")
    names = np.array(kinds)
    factors = {kind: _factor(p[names == kind], t[names == kind]) for kind in dict.fromkeys(kinds)}
    in_sample = np.array([factors[kind] for kind in kinds]) * p
    others = [(names == kind) & (np.arange(len(p)) != i) for i, kind in enumerate(kinds)]
    held_out = None
    if all(other.any() for other in others):
        held_out = np.array([_factor(p[other], t[other]) * p[i] for i, other in enumerate(others)])
    return _fit(in_sample, held_out, t, alpha=1.0, beta=0.0, factors=factors)


def calibrated(target: Target, fit: Fit, fitted_on: str, today: str = "") -> Target:
    """The target with its latencies corrected; a calibration that it has is replaced.

    Args:
        target: what made the predictions, uncalibrated.
        fit: of `fit_affine` or `fit_kinds`.
        fitted_on: what was measured, in words.
        today: the date of the fit, today unless given.
    """
    today = today or date.today().isoformat()
    source = Source(_SOURCE, f"fitted on {fitted_on}", "derived", f"{today}: {_method(fit)}")
    values = {
        "fitted_on": fitted_on,
        "method": _method(fit),
        "date": today,
        "alpha": fit.alpha,
        "beta_s": fit.beta,
        "samples": fit.samples,
        "mape": fit.mape,
        "kendall_tau": fit.kendall_tau,
    }
    keys = [key for key in COMMON["calibration"].keys if key.is_number]
    numbers = tuple(Number("calibration", key.name, values[key.name], key.unit, (source,)) for key in keys)  # type: ignore[arg-type]
    entry = Entry("calibration", values, numbers)
    return replace(
        target,
        calibration=entry,
        entries=(*(own for own in target.entries if own.where != "calibration"), entry),
        sources=(*(own for own in target.sources if own.id != _SOURCE), source),
        models=tuple(ByKind(model, fit.factors) for model in target.models) if fit.factors else target.models,
    )


def calibration_text(fit: Fit, fitted_on: str, today: str = "") -> str:
    """The tables [[source]] and [calibration] of an affine fit, to be added to a device file.

    Raises:
        ValueError: for factors by kind, which a device file cannot hold.
    """
    if fit.factors:
        raise ValueError("a device file holds alpha and beta, no factors by kind: use fit_affine, or the target itself")
    today = today or date.today().isoformat()
    numbers = [f"alpha = {fit.alpha:.6g}"] + ([f"beta_s = {fit.beta:.6g}"] if fit.beta else [])
    return "\n".join(
        [
            "[[source]]",
            f'id = "{_SOURCE}"',
            f"title = {json.dumps(f'fitted on {fitted_on}', ensure_ascii=False)}",
            'kind = "derived"',
            f"read = {json.dumps(f'{today}: {_method(fit)}', ensure_ascii=False)}",
            "",
            "[calibration]",
            f"fitted_on = {json.dumps(fitted_on, ensure_ascii=False)}",
            f"method = {json.dumps(_method(fit), ensure_ascii=False)}",
            f'date = "{today}"',
            *numbers,
            f"samples = {fit.samples}",
            f"mape = {max(fit.mape, 1e-9):.4g}",
            f"kendall_tau = {fit.kendall_tau:.4g}",
            f'source = ["{_SOURCE}"]',
            "",
        ]
    )


@dataclass(frozen=True)
class ByKind:
    """A model whose latencies are multiplied by a factor for each kind of layer; kinds without one keep theirs."""

    model: CostModel
    factors: Mapping[str, float]

    @property
    def limits(self) -> Mapping[str, float]:
        """Those of the model."""
        return self.model.limits

    def price(self, cells: Cells, so_far: Prices) -> Prices:
        """The model's prices, latency corrected."""
        prices = self.model.price(cells, so_far)
        if "latency" not in prices.tables:
            return prices
        factor = np.array([self.factors.get(kind, 1.0) for kind in cells.kinds], dtype=np.float64)
        return replace(prices, tables={**prices.tables, "latency": prices.tables["latency"] * factor[:, None]})

    def describe(self) -> list[str]:
        """The model's lines and the factors."""
        return [*self.model.describe(), *(f"{kind}: latency x {factor:.4g}" for kind, factor in self.factors.items())]


def weighted_median(values: Floats, weights: Floats) -> Floats:
    """The least of the values that half of the weight does not exceed, along the last axis.

    Example:
        >>> weighted_median(np.array([1.0, 2.0, 10.0]), np.array([1.0, 1.0, 5.0]))
        np.float64(10.0)
    """
    order = np.argsort(values, axis=-1, kind="stable")
    heaped = np.cumsum(np.take_along_axis(weights, order, axis=-1), axis=-1)
    first = np.argmax(heaped >= heaped[..., -1:] / 2, axis=-1)
    at = np.take_along_axis(order, first[..., None], axis=-1)
    return np.asarray(np.take_along_axis(values, at, axis=-1)[..., 0])[()]


def _line(p: Floats, t: Floats, offset: bool) -> tuple[float, float] | None:
    """The best alpha and beta, None for falling lines. Residual j of lines through i: slope[i, j] alpha - rise."""
    if not offset or len(p) < 2:
        return _factor(p, t), 0.0
    a, b = p / t, 1 / t
    slope, rise = a - a[:, None] * b / b[:, None], 1 - b / b[:, None]
    is_steep = np.abs(slope) > 1e-12 * np.abs(a)
    steps = np.where(is_steep, rise / np.where(is_steep, slope, 1), 0.0)
    alphas = weighted_median(steps, np.where(is_steep, np.abs(slope), 0.0))
    betas = (1 - alphas * a) / b
    errors = np.abs(alphas[:, None] * a + betas[:, None] * b - 1).sum(axis=1)
    best = int(np.argmin(errors))
    alpha, beta = float(alphas[best]), float(betas[best])
    if beta < 0 or not is_steep.any():
        return _factor(p, t), 0.0
    return (alpha, beta) if alpha > 0 else None


def _factor(p: Floats, t: Floats) -> float:
    return float(weighted_median(t / p, p / t))


def _fit(
    in_sample: Floats, held_out: Floats | None, t: Floats, *, alpha: float, beta: float, factors: Mapping[str, float]
) -> Fit:
    nothing = float("nan")
    return Fit(
        alpha=alpha,
        beta=beta,
        factors=factors,
        samples=len(t),
        mape=float(np.mean(np.abs(in_sample / t - 1))),
        kendall_tau=kendall(in_sample, t),
        held_out_mape=nothing if held_out is None else float(np.mean(np.abs(held_out / t - 1))),
        held_out_tau=nothing if held_out is None else kendall(held_out, t),
    )


def _checked(predicted: ArrayLike, measured: ArrayLike) -> tuple[Floats, Floats]:
    p, t = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if p.ndim != 1 or p.shape != t.shape or len(p) < 2:
        raise ValueError(f"predicted and measured must be lists of one length, at least 2, got {p.shape} and {t.shape}")
    for name, values in (("predicted", p), ("measured", t)):
        if not (np.isfinite(values) & (values > 0)).all():
            wrong = values[~(np.isfinite(values) & (values > 0))][0]
            raise ValueError(f"{name} latencies must be finite and above 0, got {wrong}")
    return p, t


def _method(fit: Fit) -> str:
    what = "a factor a kind of layer" if fit.factors else "alpha and beta" if fit.beta else "alpha"
    text = f"{what} of least absolute relative error, {fit.mape:.1%} in-sample"
    if np.isfinite(fit.held_out_mape):
        text += f", {fit.held_out_mape:.1%} leaving one out (rank correlation {fit.held_out_tau:.3f})"
    return text
