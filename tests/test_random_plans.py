"""Random plans: inside the range, tied, allowed, and of all kinds."""

import numpy as np
import pytest

from mpq.random_plans import random_plans


def table(layers=12, options=5, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(10 ** rng.uniform(2, 5, (layers, 1)) * np.arange(1.0, options + 1), axis=1)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_inside_the_range_and_allowed(share):
    cost = table()
    cost[3, 1] = cost[5, 4] = np.inf
    groups = np.array([0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    finite = np.where(np.isfinite(cost), cost, 0)
    least, most = np.where(np.isfinite(cost), cost, np.inf).min(1).sum(), finite.max(1).sum()
    middle = least + share * (most - least)
    plans = random_plans(cost, groups, low=0.95 * middle, high=1.05 * middle, count=40, rng=np.random.default_rng(1))
    used = cost[np.arange(12), plans].sum(1)
    assert plans.shape == (40, 12)
    assert ((used >= 0.95 * middle) & (used <= 1.05 * middle)).all()
    assert (plans[:, 2] == plans[:, 3]).all()
    assert len(np.unique(plans, axis=0)) > 20


def test_every_layer_takes_every_option():
    cost = np.outer(np.arange(10.0, 22.0), np.arange(1, 6))
    plans = random_plans(cost, np.arange(12), low=480, high=560, count=200, rng=np.random.default_rng(2))
    assert all(len(np.unique(plans[:, layer])) == 5 for layer in range(12))


def test_the_same_seed_gives_the_same_plans():
    first, second = (
        random_plans(table(), np.arange(12), low=2.5e5, high=4e5, count=5, rng=np.random.default_rng(3))
        for _ in range(2)
    )
    assert (first == second).all()


def test_a_range_out_of_reach_says_what_is():
    with pytest.raises(ValueError, match="plans cost from 6 to 24: none costs from 30 to 40"):
        random_plans(np.array([[1.0, 4.0]] * 6), np.arange(6), low=30, high=40, count=1, rng=np.random.default_rng(0))
