"""Rank correlations against their definitions in plain loops."""

import itertools
import math

import numpy as np
import pytest

from mpq.rank_correlation import kendall, ranks, spearman, spearman_at_top


def samples():
    rng = np.random.default_rng(0)
    for _ in range(30):
        yield rng.integers(0, 6, 9).astype(float), rng.normal(size=9)
        yield rng.integers(0, 4, 9).astype(float), rng.integers(0, 4, 9).astype(float)


@pytest.mark.parametrize(("x", "y"), list(samples()))
def test_against_loops(x, y):
    slow = [sum(other < value for other in x) + (sum(other == value for other in x) - 1) / 2 for value in x]
    assert ranks(x).tolist() == slow
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    score = tied_x = tied_y = pairs = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        score += np.sign(a - c) * np.sign(b - d)
        tied_x, tied_y, pairs = tied_x + (a == c), tied_y + (b == d), pairs + 1
    assert kendall(x, y) == pytest.approx(score / math.sqrt((pairs - tied_x) * (pairs - tied_y)))


def test_bounds_and_constants():
    x = np.arange(7.0)
    assert spearman(x, x**3) == kendall(x, x**3) == 1
    assert spearman(x, -x) == kendall(x, -x) == -1
    assert math.isnan(spearman(x, np.ones(7)))
    assert math.isnan(kendall(x, np.ones(7)))


def test_the_top_is_where_predictions_are_lowest():
    predicted, measured = [1, 2, 3, 4, 5, 6, 7, 8], [3, 2, 1, 0, 5, 6, 7, 8]
    assert spearman_at_top(predicted, measured) == -1
    assert spearman_at_top(predicted, measured, share=1) == spearman(predicted, measured) > 0
