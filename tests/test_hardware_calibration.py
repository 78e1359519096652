"""Calibration: the best line by brute force over pairs, robustness, held-out errors, and what a target makes of it."""

from itertools import combinations

import numpy as np
import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.calibration import calibrated, calibration_text, fit_affine, fit_kinds, weighted_median
from mpq.hardware_models.device_file import parse_target
from mpq.layers import Layer, Network
from mpq.options import SearchSpace


def error(alpha, beta, p, t):
    return np.mean(np.abs(alpha * p + beta - t) / t)


def brute_force(p, t):
    """Every line through two points, and every line through one and the origin, that is allowed."""
    lines = [(t[i] / p[i], 0.0) for i in range(len(p))]
    for i, j in combinations(range(len(p)), 2):
        if p[i] != p[j]:
            alpha = (t[i] - t[j]) / (p[i] - p[j])
            lines.append((alpha, t[i] - alpha * p[i]))
    return min((error(alpha, beta, p, t), alpha) for alpha, beta in lines if beta >= 0)


@pytest.mark.parametrize("seed", range(40))
def test_no_line_is_better(seed):
    random = np.random.default_rng(seed)
    p = np.exp(random.normal(size=random.integers(2, 12)))
    p[random.integers(len(p))] = p[0]  # equal predictions
    t = (0.7 * p + random.choice([0.0, 0.3, -0.05])) * np.exp(0.3 * random.normal(size=len(p)))
    t = np.abs(t) + 1e-3
    least, slope = brute_force(p, t)
    if slope <= 0:
        with pytest.raises(ValueError, match="predictions fall"):
            fit_affine(p, t)
        return
    fit = fit_affine(p, t)
    assert fit.alpha > 0
    assert fit.beta >= 0
    assert fit.mape == pytest.approx(error(fit.alpha, fit.beta, p, t), rel=1e-12)
    assert fit.mape == pytest.approx(least, rel=1e-9)


def test_a_free_line_below_zero_gives_a_factor():
    p = np.array([1.0, 2, 3, 4])
    fit = fit_affine(p, p - 0.5)
    assert fit.beta == 0
    assert fit.alpha == pytest.approx(fit_affine(p, p - 0.5, offset=False).alpha)


def test_scales_do_not_matter():
    random = np.random.default_rng(0)
    p = np.exp(random.normal(size=15))
    t = (0.6 * p + 0.2) * np.exp(0.1 * random.normal(size=15))
    fit, small = fit_affine(p, t), fit_affine(1e-6 * p, 1e-6 * t)
    assert (small.alpha, small.beta, small.mape) == pytest.approx((fit.alpha, 1e-6 * fit.beta, fit.mape), rel=1e-9)


def test_one_broken_measurement_does_not_pull_the_line():
    p = np.linspace(1, 10, 15)
    t = 0.7 * p + 0.5
    t[7] *= 40
    fit = fit_affine(p, t)
    assert (fit.alpha, fit.beta) == pytest.approx((0.7, 0.5))


def test_leave_one_out_is_what_a_loop_says():
    random = np.random.default_rng(1)
    p = np.exp(random.normal(size=8))
    t = (0.7 * p + 0.2) * np.exp(0.2 * random.normal(size=8))
    fit = fit_affine(p, t)
    predicted = []
    for i in range(8):
        others = fit_affine(np.delete(p, i), np.delete(t, i))
        predicted.append(others.alpha * p[i] + others.beta)
    assert fit.held_out_mape == pytest.approx(np.mean(np.abs(np.array(predicted) / t - 1)))
    assert fit.held_out_mape > fit.mape
    assert np.isnan(fit_affine([1.0, 2], [1.0, 3]).held_out_mape)


def test_factors_by_kind_are_each_the_best():
    random = np.random.default_rng(2)
    kinds = ["linear"] * 9 + ["conv2d"] * 7
    p = np.exp(random.normal(size=16))
    t = p * np.where(np.array(kinds) == "linear", 0.5, 2.0) * np.exp(0.2 * random.normal(size=16))
    fit = fit_kinds(kinds, p, t)
    total = 0.0
    for kind in ("linear", "conv2d"):
        own = np.array(kinds) == kind
        total += min(np.sum(np.abs(factor * p[own] - t[own]) / t[own]) for factor in t[own] / p[own])
    assert 16 * fit.mape == pytest.approx(total)
    assert fit.held_out_mape >= fit.mape
    assert fit.mape < fit_affine(p, t).mape


def test_weighted_median_is_where_half_of_the_weight_lies():
    random = np.random.default_rng(3)
    for _ in range(50):
        values, weights = random.normal(size=7), random.integers(1, 9, size=7).astype(float)
        long = np.sort(np.repeat(values, weights.astype(int)))
        assert weighted_median(values, weights) == long[(len(long) - 1) // 2]


@pytest.mark.parametrize(
    ("predicted", "measured", "message"),
    [
        ([1.0], [1.0], "lists of one length, at least 2"),
        ([1.0, 2], [1.0, 2, 3], "lists of one length"),
        ([1.0, 0], [1.0, 2], "predicted latencies must be finite and above 0, got 0.0"),
        ([1.0, 2], [1.0, np.nan], "measured latencies must be finite and above 0, got nan"),
        ([1.0, 2, 3], [3.0, 2, 1], "predictions fall as measurements rise"),
    ],
)
def test_what_cannot_be_fitted_is_told(predicted, measured, message):
    with pytest.raises(ValueError, match=message):
        fit_affine(predicted, measured)


DEVICE = """\
schema = 1

[target]
name = "small"
kind = "cpu"
runtime = "kernels"

[[source]]
id = "sheet"
title = "data sheet"
kind = "datasheet"
read = "2026"

[memory.dram]
bandwidth_Bps = 1e9
efficiency = 0.5
source = ["sheet"]

[[compute]]
unit = "unit"
weight = ["int8", "fp32"]
activation = "fp32"
ops_per_s = 1e9
efficiency = 0.25
launch_overhead_s = 1e-6
source = ["sheet"]
"""


def network():
    fc = Layer("fc", "linear", (32, 8), 256, 3072, (1, 12, 8), (1, 12, 32), weight_bytes=1024)
    shape = (1, 8, 4, 4)
    conv = Layer("c", "conv2d", (8, 8, 3, 3), 576, 576 * 16, shape, shape, kernel=(3, 3), weight_bytes=2304)
    return Network((fc, conv))


def test_a_calibrated_target_predicts_corrected_latencies():
    target = parse_target(DEVICE)
    raw = target.costs(network(), SearchSpace(["int8"]))
    fit = fit_affine([1e-3, 2e-3, 4e-3], [0.7e-3, 1.2e-3, 2.2e-3])
    costs = calibrated(target, fit, "three networks", "2026-11").costs(network(), SearchSpace(["int8"]))
    assert costs["latency"].to_numpy() == pytest.approx(0.5 * raw["latency"].to_numpy())
    assert costs.attrs["offsets"]["latency"] == pytest.approx(2e-4)
    assert costs.attrs["reference"]["latency"] == pytest.approx(0.5 * raw.attrs["reference"]["latency"] + 2e-4)


def test_calibrating_twice_replaces_the_first():
    target = parse_target(DEVICE)
    first, second = fit_affine([1.0, 2, 3], [2.0, 4, 6]), fit_affine([1.0, 2, 3], [3.0, 6, 9])
    once = calibrated(target, second, "b", "2026-11")
    twice = calibrated(calibrated(target, first, "a", "2026-11"), second, "b", "2026-11")
    assert twice.calibration["alpha"] == pytest.approx(3)
    assert len(twice.entries) == len(once.entries)
    assert [source.id for source in twice.sources] == ["sheet", "calibration-fit"]


def test_the_text_makes_the_same_target():
    random = np.random.default_rng(4)
    p = np.exp(random.normal(size=9))
    fit = fit_affine(p, (0.6 * p + 0.1) * np.exp(0.1 * random.normal(size=9)))
    read = parse_target(DEVICE + "\n" + calibration_text(fit, 'ResNet-18 "small"', "2026-11"))
    made = calibrated(parse_target(DEVICE), fit, 'ResNet-18 "small"', "2026-11")
    for key in ("fitted_on", "method", "date", "samples"):
        assert read.calibration[key] == made.calibration[key]
    for key in ("alpha", "beta_s", "mape", "kendall_tau"):
        assert read.calibration[key] == pytest.approx(made.calibration[key], rel=1e-3)
    assert read.describe().count("calibration") == made.describe().count("calibration")


def test_a_text_without_offset_is_read():
    fit = fit_affine([1.0, 2, 3], [2.0, 4, 6])
    assert "beta_s" not in parse_target(DEVICE + "\n" + calibration_text(fit, "x", "2026-11")).calibration


def test_factors_by_kind_reach_the_costs():
    target = parse_target(DEVICE)
    raw = target.costs(network(), SearchSpace(["int8"]))
    fit = fit_kinds(["linear", "conv2d"], [1.0, 1], [0.5, 3])
    costs = calibrated(target, fit, "two layers", "2026-11").costs(network(), SearchSpace(["int8"]))
    assert costs["latency"].to_numpy() == pytest.approx(raw["latency"].to_numpy() * [0.5, 3])
    with pytest.raises(ValueError, match="no factors by kind"):
        calibration_text(fit, "two layers")


def test_the_shipped_calibration_is_kept_apart():
    target = hardware.load("nvidia-t4")
    again = calibrated(target, fit_affine([1.0, 2, 3], [2.0, 4, 6]), "x", "2026-11")
    assert sum(entry.where == "calibration" for entry in again.entries) == 1
