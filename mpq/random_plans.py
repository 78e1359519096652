"""Random plans around a budget: what a search must beat, and what a table's predictions are tried on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 60  # bisection steps on the tilt
MOVES = 20  # repairing moves a group at most


def random_plans(
    cost: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    low: float,
    high: float,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Options of every unit in `count` plans that cost from `low` to `high`.

    A group's options are drawn with probability ∝ exp(-θ c / c̄), c̄ the group's mean cost and θ such that a plan costs
    the middle of the range on average; a plan outside the range is moved into it by random single changes. Groups are
    drawn independently, so every mixture of options comes up, large and small groups alike.

    Args:
        cost: (units, options), +inf where an option is not allowed.
        groups: (units,) number of the tie group of each unit; a group takes one option.
        low: least cost of a plan.
        high: most.
        count: how many plans.
        rng: where the randomness comes from.

    Returns:
        (plans, units) option indices; fewer plans than asked for where the range is too narrow to be hit.

    Raises:
        ValueError: if no plan at all costs as much, or as little.

    Example:
        >>> cost = np.array([[1.0, 2.0, 4.0]] * 6)
        >>> plans = random_plans(cost, np.arange(6), low=11, high=13, count=5, rng=np.random.default_rng(0))
        >>> [bool(11 <= cost[range(6), plan].sum() <= 13) for plan in plans]
        [True, True, True, True, True]
    """
    table = np.zeros((int(groups.max()) + 1, cost.shape[1]))
    np.add.at(table, groups, cost)
    allowed = np.isfinite(table)
    least = float(np.where(allowed, table, np.inf).min(1).sum())
    most = float(np.where(allowed, table, -np.inf).max(1).sum())
    if high < least or low > most:
        raise ValueError(f"plans cost from {least:.6g} to {most:.6g}: none costs from {low:.6g} to {high:.6g}")
    chance = _chances(table, allowed, (max(low, least) + min(high, most)) / 2)
    plans = []
    for _ in range(4 * count):
        choice = _moved(_drawn(chance, rng), table, allowed, (low, high), rng)
        if choice is not None:
            plans.append(choice[groups])
        if len(plans) == count:
            break
    return np.array(plans, dtype=np.int64).reshape(len(plans), len(groups))


def _chances(table: NDArray[np.float64], allowed: NDArray[np.bool_], target: float) -> NDArray[np.float64]:
    """(groups, options) probabilities under which a plan costs the target on average."""
    finite = np.where(allowed, table, 0.0)
    scale = np.abs(finite).sum(1, keepdims=True) / allowed.sum(1, keepdims=True)
    unit = finite / np.where(scale > 0, scale, 1.0)

    def tilted(theta: float) -> NDArray[np.float64]:
        power = np.where(allowed, -theta * unit, -np.inf)
        weight = np.exp(power - power.max(1, keepdims=True))
        chance: NDArray[np.float64] = weight / weight.sum(1, keepdims=True)
        return chance

    low, high = -60.0, 60.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if float((tilted(middle) * finite).sum()) > target:
            low = middle
        else:
            high = middle
    return tilted((low + high) / 2)


def _drawn(chance: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    edges = np.cumsum(chance, axis=1)
    passed = (rng.random((len(chance), 1)) * edges[:, -1:] > edges).sum(1, dtype=np.int64)
    options: NDArray[np.int64] = np.minimum(passed, chance.shape[1] - 1)
    return options


def _moved(
    choice: NDArray[np.int64],
    table: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    span: tuple[float, float],
    rng: np.random.Generator,
) -> NDArray[np.int64] | None:
    """The plan, after random changes towards the range; None where they do not lead into it."""
    rows, (low, high) = np.arange(len(choice)), span
    for _ in range(MOVES * len(choice)):
        used = float(table[rows, choice].sum())
        if low <= used <= high:
            return choice
        change = np.where(allowed, table, np.nan) - table[rows, choice][:, None]
        towards = (change < 0) & (used + change >= low) if used > high else (change > 0) & (used + change <= high)
        if not towards.any():  # every single change overshoots: take any in the right direction
            towards = change < 0 if used > high else change > 0
        moves = np.argwhere(towards)
        if not len(moves):
            return None
        group, option = moves[rng.integers(len(moves))]
        choice[group] = option
    return None
