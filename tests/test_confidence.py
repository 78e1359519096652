"""Intervals against figures computed by hand, by loops and by simulation of their coverage."""

import math

import numpy as np
import pytest

from mpq.confidence import mean_estimate, quantile_estimate, share_estimate, student_t

T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 10: 2.2281, 30: 2.0423, 1000: 1.9623}  # printed tables


@pytest.mark.parametrize(("degrees", "value"), T_975.items())
def test_student_t_is_that_of_printed_tables(degrees, value):
    assert student_t(0.975, degrees) == pytest.approx(value, rel=5e-3)
    assert student_t(0.025, degrees) == pytest.approx(-value, rel=5e-3)


def test_a_mean_by_hand():
    # mean 3, squares of deviations 4 + 1 + 9 = 14, variance 7, standard error √(7/3)
    found = mean_estimate([1.0, 2.0, 6.0])
    assert found.value == 3
    assert found.margin == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)


def test_one_sample_bounds_nothing():
    found = mean_estimate([2.0])
    assert (found.value, found.low, found.high) == (2.0, -math.inf, math.inf)


def test_weights_are_positions_of_samples_drawn_whole():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=400), rng.integers(1, 9, 400)
    found = mean_estimate(values, weights)
    assert found.value == pytest.approx(np.repeat(values, weights).mean())
    draws = rng.integers(0, 400, (4000, 400))
    resampled = [(values[d] * weights[d]).sum() / weights[d].sum() for d in draws]
    assert found.margin / 1.966 == pytest.approx(np.std(resampled), rel=0.06)
    assert mean_estimate(values, np.full(400, 7)).margin == pytest.approx(mean_estimate(values).margin)


def test_wilson_by_hand():
    # 3 of 10 at 95 %: the interval printed in textbooks
    found = share_estimate([True] * 3 + [False] * 7)
    assert (found.value, round(found.low, 3), round(found.high, 3)) == (0.3, 0.108, 0.603)
    assert share_estimate([True] * 5).high == 1


def coverage(interval, truth, runs=1500):
    return np.mean([found.low <= truth <= found.high for found in (interval() for _ in range(runs))])


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("samples", [3, 40])
def test_means_are_covered_as_often_as_promised(level, samples):
    rng = np.random.default_rng(1)
    covered = coverage(lambda: mean_estimate(rng.normal(5, 2, samples), level=level), 5.0)
    assert covered == pytest.approx(level, abs=0.03)


def test_means_of_skewed_divergences_are_covered_nearly_so():
    rng = np.random.default_rng(2)
    covered = coverage(lambda: mean_estimate(rng.exponential(size=100)), 1.0)
    assert covered == pytest.approx(0.945, abs=0.02)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_shares_are_covered_as_often_as_promised(share):
    rng = np.random.default_rng(3)
    assert coverage(lambda: share_estimate(rng.random(100) < share), share) == pytest.approx(0.95, abs=0.03)


def test_quantiles_are_covered_where_samples_are_tokens_that_go_together():
    rng = np.random.default_rng(4)
    owner = np.repeat(np.arange(100), 20)
    truth = np.quantile(rng.normal(size=1_000_000) * math.sqrt(2), 0.9)

    def interval(whose):
        values = rng.normal(size=100)[owner] + rng.normal(size=2000)
        return quantile_estimate(values, whose, quantile=0.9)

    assert coverage(lambda: interval(owner), truth, 400) == pytest.approx(0.94, abs=0.03)
    assert coverage(lambda: interval(None), truth, 400) < 0.8  # tokens taken for independent promise too much


def test_the_99th_percentile_is_covered_or_left_open():
    rng = np.random.default_rng(5)
    truth = -math.log(0.01)
    assert coverage(lambda: quantile_estimate(rng.exponential(size=512)), truth, 800) >= 0.92
    assert quantile_estimate(rng.exponential(size=200)).high == math.inf


def test_a_quantile_is_the_least_value_with_that_share_at_or_below():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    for quantile in (0.1, 0.2, 0.5, 0.8, 0.81, 1.0):
        dumb = min(v for v in values if sum(u <= v for u in values) / 5 >= quantile)
        assert quantile_estimate(values, quantile=quantile).value == dumb
