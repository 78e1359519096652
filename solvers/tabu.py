"""Tabu search: the best single change even if it is worse, never straight back, over and under the budgets in turn."""

import time
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .certificates import dense_steps
from .exchange import improve
from .reduction import Core

TENURE = (3, 0.15)  # changes for which an option may not come back: at least, and a share of the groups more
TURN = 5  # changes on one side of the budgets after which their weight is moved
PATIENCE = 1500  # changes without a better plan before the best one is disturbed and taken up again
DENSE = 1500  # groups × options up to which all double changes are tried on the best plan


class Effort(NamedTuple):
    """How long to search: changes made, or `time.monotonic` reached; the seed breaks the regularity of the list."""

    iterations: int
    deadline: float
    seed: int


class _Rows(NamedTuple):
    """Objective and limited rows, and for every group its partners with what the two add to each row."""

    table: FloatArray  # (1 + limited, groups, options)
    limits: FloatArray  # (limited,)
    partners: tuple[IntArray, ...]
    terms: tuple[FloatArray, ...]  # (1 + limited, partners, own options, their options)


def tabu_search(core: Core, start: IntArray, effort: Effort, price: FloatArray | None = None) -> IntArray:
    """A plan no worse than a feasible one.

    Glover (1989, ORSA J. Computing 1), with strategic oscillation: what is above a limit is charged for, by prices that
    rise as long as the plan is over it and fall as long as it is not. The change of every row by every single change
    is kept up to date from one step to the next, so that a step costs a pass over the table. Plans that become the
    best are looked through for a better one that is one change away, or two where groups × options ≤ `DENSE`.
    Nothing is dropped for good: every best plan is feasible by recomputation.

    Args:
        core: with a sum as its objective.
        start: ``(groups,)`` feasible plan.
        effort: when to stop.
        price: of the budgets, (budgets,), to charge by at first.
    """
    rows, rng = _rows(core), np.random.default_rng(effort.seed)
    walk = _Walk(core, rows, start, _first_weights(core, rows, price))
    best, idle = _polished(core, start), 0
    value = core.value(best)
    walk.restart(best)
    least, share = TENURE
    for number in range(effort.iterations):
        if time.monotonic() > effort.deadline:
            break
        tenure = least + int(rng.integers(1 + int(share * len(start))))
        if not walk.step(number, tenure, value):
            break
        idle += 1
        if walk.is_within and walk.value < value and core.is_feasible(walk.choice) and core.value(walk.choice) < value:
            best = _polished(core, walk.choice.copy())
            value, idle = core.value(best), 0
            walk.restart(best)
        elif idle == PATIENCE:
            walk.restart(_disturbed(core, best, rng))
            idle = 0
    return best


class _Walk:
    """A plan, the change of every row by every change of it, and what may not come back yet."""

    def __init__(self, core: Core, rows: _Rows, start: IntArray, weights: FloatArray) -> None:
        self.core, self.rows, self.weights = core, rows, weights
        self.blocked = np.zeros(core.allowed.shape, dtype=np.int64)  # until which step
        self.over = 0
        self.restart(start)

    def restart(self, choice: IntArray) -> None:
        """Go on from a plan."""
        rows, every = self.rows, np.arange(len(choice))
        self.choice = choice.copy()
        self.field = rows.table.copy()
        for group, (partners, terms) in enumerate(zip(rows.partners, rows.terms, strict=True)):
            self.field[:, group] += (
                terms[:, np.arange(len(partners)), :, choice[partners]].sum(0) if len(partners) else 0
            )
        single = rows.table[:, every, choice].sum(1)
        self.sums: FloatArray = (single + self.field[:, every, choice].sum(1)) / 2
        self.counts = np.bincount(choice, minlength=rows.table.shape[2])

    @property
    def value(self) -> float:
        """Objective of the plan."""
        costs = self.core.format_costs
        return float(self.sums[0]) + (0.0 if costs is None else float(costs[self.counts > 0].sum()))

    @property
    def is_within(self) -> bool:
        """Whether every limited row holds, to rounding."""
        return bool((self.sums[1:] <= self.rows.limits).all())

    def step(self, number: int, tenure: int, best: float) -> bool:
        """The best change that is not blocked, or that makes the best plan; False where there is none."""
        every = np.arange(len(self.choice))
        delta = self.field - self.field[:, every, self.choice][:, :, None]
        over = np.maximum(self.sums[1:, None, None] + delta[1:] - self.rows.limits[:, None, None], 0.0)
        now = np.maximum(self.sums[1:] - self.rows.limits, 0.0)
        usable = self.core.allowed.copy()
        usable[every, self.choice] = False
        gain = delta[0]
        if self.core.counts_formats:
            usable, gain = self._with_formats(usable, gain)
        charged = gain + np.tensordot(self.weights, over, 1) - float(self.weights @ now)
        is_best = (over.sum(0) == 0) & (self.value + gain < best)
        charged = np.where(usable & ((self.blocked <= number) | is_best), charged, np.inf)
        group, option = divmod(int(charged.argmin()), charged.shape[1])
        if not charged[group, option] < np.inf:
            return bool(usable.any())
        self.blocked[group, self.choice[group]] = number + 1 + tenure
        self._change(group, option, delta[:, group, option])
        self._turn()
        return True

    def _with_formats(self, usable: BoolArray, gain: FloatArray) -> tuple[BoolArray, FloatArray]:
        """No new option beyond ``max_formats``; first and last uses are charged."""
        is_last = self.counts[self.choice] == 1
        new = self.counts == 0
        if self.core.max_formats is not None:
            count = int((~new).sum())
            usable = usable & ~(new & ((count - is_last[:, None]) >= self.core.max_formats))
        if self.core.format_costs is not None:
            costs = self.core.format_costs
            gain = gain + costs * new - (costs[self.choice] * is_last)[:, None]
        return usable, gain

    def _change(self, group: int, option: int, delta: FloatArray) -> None:
        old, partners, terms = self.choice[group], self.rows.partners[group], self.rows.terms[group]
        if len(partners):
            self.field[:, partners] += terms[:, :, option] - terms[:, :, old]
        self.sums = self.sums + delta
        self.counts[old] -= 1
        self.counts[option] += 1
        self.choice[group] = option

    def _turn(self) -> None:
        """Prices up after some steps over a limit, down after some steps within all."""
        self.over = max(self.over, 0) + 1 if not self.is_within else min(self.over, 0) - 1
        if abs(self.over) >= TURN:
            self.weights = self.weights * (1.3 if self.over > 0 else 1 / 1.3)
            self.over = 0


def _rows(core: Core) -> _Rows:
    steps, groups = core.steps, len(core.allowed)
    limited = np.flatnonzero(steps.limit < np.inf)
    held = dense_steps(core, limited)
    partners: list[list[int]] = [[] for _ in range(groups)]
    terms: list[list[FloatArray]] = [[] for _ in range(groups)]
    nothing = np.zeros((len(limited), *2 * core.allowed.shape[1:]))
    for pair in core.couplings:
        table = np.concatenate([pair.table, nothing])
        partners[pair.first].append(pair.second)
        terms[pair.first].append(table)
        partners[pair.second].append(pair.first)
        terms[pair.second].append(table.transpose(0, 2, 1))
    empty = np.zeros((len(core.table) + len(limited), 0, *2 * core.allowed.shape[1:]))
    return _Rows(
        np.concatenate([core.table, held]),
        np.concatenate([core.limits, steps.limit[limited]]),
        tuple(np.array(part, dtype=np.int64) for part in partners),
        tuple(np.stack(part, axis=1) if part else empty for part in terms),
    )


def _first_weights(core: Core, rows: _Rows, price: FloatArray | None) -> FloatArray:
    """Prices of the limited rows: those given, or what the objective spans per what the row does."""
    masked = np.where(core.allowed, rows.table, 0.0)
    spans = (
        np.where(core.allowed, rows.table, -np.inf).max(2) - np.where(core.allowed, rows.table, np.inf).min(2)
    ).sum(1)
    weights = np.divide(spans[0], spans[1:], out=np.zeros(len(spans) - 1), where=spans[1:] > 0)
    if price is not None:
        weights[: len(price)] = np.where(price > 0, price, 0.1 * weights[: len(price)])
    least: FloatArray = np.maximum(weights, 1e-9 * float(np.abs(masked[0]).max()))
    return least


def _disturbed(core: Core, best: IntArray, rng: np.random.Generator) -> IntArray:
    """The best plan with a tenth of its groups changed at random; formats stay those in use."""
    choice = best.copy()
    for group in rng.choice(len(best), 1 + len(best) // 10, replace=False):
        usable = core.allowed[group] & (np.isin(np.arange(core.allowed.shape[1]), best) | (not core.counts_formats))
        choice[group] = rng.choice(np.flatnonzero(usable))
    return choice


def _polished(core: Core, choice: IntArray) -> IntArray:
    """Single changes, then double ones, as long as they help."""
    current = improve(core, choice)
    is_small = core.allowed.size <= DENSE and not (len(core.steps.limit) or core.counts_formats)
    while is_small and (changed := _best_double(core, current)) is not None:
        current = improve(core, changed)
    return current


def _best_double(core: Core, choice: IntArray) -> IntArray | None:
    """The plan with the best two changes that help together; every two groups and options are looked at."""
    walk = _Walk(core, _rows(core), choice, np.zeros(len(core.limits)))
    every, options = np.arange(len(choice)), core.allowed.shape[1]
    delta = walk.field - walk.field[:, every, choice][:, :, None]
    flat = delta.reshape(len(delta), -1)
    usable, group = core.allowed.ravel(), np.repeat(every, options)
    both = usable[:, None] & usable & (group[:, None] < group)
    total = [row[:, None] + row for row in flat]
    for pair in core.couplings:
        one, two = (
            slice(pair.first * options, (pair.first + 1) * options),
            slice(pair.second * options, (pair.second + 1) * options),
        )
        first, second = choice[pair.first], choice[pair.second]
        terms = (
            pair.table
            - pair.table[:, [first]]
            - pair.table[:, :, [second]]
            + pair.table[:, [first], [second]][:, :, None]
        )
        for row, more in zip(total, terms, strict=True):
            row[one, two] += more
            row[two, one] += more.T
    for row, limit, now in zip(total[1:], core.limits, walk.sums[1:], strict=True):
        both &= row <= limit - now
    gain = np.where(both, total[0], 0.0)
    first, second = divmod(int(gain.argmin()), gain.shape[1])
    changed = choice.copy()
    changed[group[[first, second]]] = np.array([first, second]) % options
    better = gain[first, second] < 0 and core.is_feasible(changed) and core.value(changed) < core.value(choice)
    return changed if better else None
