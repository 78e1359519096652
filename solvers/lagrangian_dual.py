"""Prices of the budgets: the Lagrangian dual of a core, by cutting planes, near-linear in its groups."""

import math
from typing import NamedTuple

import numpy as np

from mpq.arrays import FloatArray, IntArray

from .reduction import ROUNDING, Core

ROUNDS = 400  # plans that are priced at most; a dual of three budgets takes about thirty
SAMPLE = 20_000  # groups whose dual says where that of many more lies
BOXES = (0.02, 0.04, 0.08, 0.16, 0.32)  # half-widths around the sample's prices, the next where the best is at an edge
WIDEST = 1e9  # scaled usage of a budget with hardly any room, where float64 still tells prices apart
SUMMATION = 2e-14  # relative rounding of pairwise sums of up to 2**60 terms, with room


class Dual(NamedTuple):
    """The best prices found, a value that no plan is below, and the plan that is least at these prices."""

    price: FloatArray  # (budgets,)
    bound: float
    choice: IntArray  # (groups,); it may exceed budgets


class _Cut(NamedTuple):
    """A priced plan: its score, and its usage beyond the limits; scaled. The dual is below this line."""

    score: float
    excess: FloatArray  # (budgets,)

    def at(self, price: FloatArray) -> float:
        return self.score + float(price @ self.excess)


def maximise(core: Core) -> Dual | None:
    """The prices with the largest Lagrangian bound; None where that shows that no plan meets all budgets.

    The dual function L(λ) = Σ_g min_k (score_gk + λ · usage_gk) − λ · limits is concave and piecewise linear. Cutting
    planes (Kelley 1960, J. SIAM 8): the plan that is least at a price gives a line above L; the next price is the
    highest point below all lines, drawn half-way to the best one yet. Its program has one row a budget (`_Master`).

    With very many groups, the dual of a sample says first where the prices lie. Groups that take the same option
    wherever the prices are near that are then decided, so that only the few others are priced again and again. Peak
    budgets, couplings and formats are not looked at: what they add is not in the bound.

    Cost: a few passes over the table, and about thirty over the undecided part.
    """
    units = _Units.of(core)
    if units is None:
        return None
    price, value = _located(units)
    if value > units.worst * (1 + 1e-9):
        return None
    return _finished(core, price * units.score_unit / units.use_unit)


def _finished(core: Core, price: FloatArray) -> Dual:
    """The bound at a price, Σ_g min_k (score + λ · usage) − λ · limits, less the rounding of the sums."""
    price = np.where(np.isfinite(price), price, 0.0)
    choice, total, size = np.empty(len(core.allowed), dtype=np.int64), 0.0, 0.0
    for start in range(0, len(choice), 1 << 18):
        part = slice(start, start + (1 << 18))
        table = core.table[:, part].transpose(0, 2, 1)
        priced, sizes = table[0].copy(), np.abs(table[0])
        for amount, row in zip(price, table[1:], strict=True):
            priced += amount * row
            sizes += amount * np.abs(row)
        priced[~core.allowed[part].T] = np.inf
        best = priced.argmin(0)
        choice[part] = best
        total += float(_picked(priced, best).sum())
        size += float(_picked(sizes, best).sum())
    if not price.any():
        return Dual(price, math.fsum(core.table[0, np.arange(len(choice)), choice].tolist()), choice)
    terms = (-price * core.limits).tolist()
    rounding = SUMMATION * (size + math.fsum(abs(term) for term in terms))
    return Dual(price, math.fsum([total, *terms]) - rounding, choice)


def _picked(rows: FloatArray, choice: IntArray) -> FloatArray:
    """Entry ``choice[g]`` of column g of (options, groups)."""
    picked: FloatArray = rows.ravel()[choice * rows.shape[1] + np.arange(rows.shape[1])]
    return picked


class _Units(NamedTuple):
    """Groups above their least score and usage, option by option, in units in which prices are about 1."""

    score: FloatArray  # (options, groups), +inf where forbidden
    use: FloatArray  # (budgets, options, groups)
    room: FloatArray  # (budgets,), limits
    base: float  # score of the groups that are decided
    worst: float  # no plan has a higher score
    score_unit: float
    use_unit: FloatArray  # (budgets,)

    @classmethod
    def of(cls, core: Core) -> "_Units | None":
        """The groups of a core; None where a budget is below its least usage."""
        allowed = core.allowed.T
        parts, least, most, size = [], [], [], []
        for row in core.table:
            part = row.T.copy()
            size.append(float(np.abs(part).max(0).sum()))  # zero where forbidden
            part[~allowed] = np.inf
            low = part.min(0)
            least.append(float(low.sum()))
            part -= low
            part[~allowed] = 0.0
            most.append(float(part.max(0).sum()))
            parts.append(part)
        slack = core.limits - np.array(least[1:]) + ROUNDING * np.array(size[1:])
        if (slack < 0).any():
            return None
        score_unit = most[0] or 1.0
        use_unit = np.maximum(slack, np.array(most[1:]) / WIDEST)
        use_unit[use_unit == 0] = 1.0
        score = parts[0] / score_unit
        score[~allowed] = np.inf
        use = np.stack(parts[1:]) if len(parts) > 1 else np.zeros((0, *score.shape))
        use /= use_unit[:, None, None]
        return cls(score, use, slack / use_unit, 0.0, 1.0 if most[0] else 0.0, score_unit, use_unit)

    def cut(self, price: FloatArray) -> _Cut:
        """The plan that is least at a price."""
        priced = self.score
        for amount, use in zip(price, self.use, strict=True):
            priced = priced + amount * use
        choice = priced.argmin(0)
        used = np.array([_picked(use, choice).sum() for use in self.use])
        return _Cut(self.base + float(_picked(self.score, choice).sum()), used - self.room)

    def sample(self, count: int) -> "_Units":
        """Some of the groups, with as much room in proportion."""
        total = self.score.shape[1]
        some = np.sort(np.random.default_rng(0).choice(total, count, replace=False))
        part = count / total
        return self._replace(
            score=self.score.take(some, 1), use=self.use.take(some, 2), room=self.room * part, worst=self.worst * part
        )

    def undecided(self, low: FloatArray, high: FloatArray) -> "_Units":
        """The groups whose least option is not the same at all prices between two."""
        middle, half = (low + high) / 2, (high - low) / 2
        priced = self.score + np.einsum("b,bkg->kg", middle, self.use)
        choice = priced.argmin(0)
        flat = choice * priced.shape[1] + np.arange(priced.shape[1])
        rival = priced - priced.ravel()[flat]
        for amount, use in zip(half, self.use, strict=True):
            rival -= amount * np.abs(use - use.ravel()[flat])
        rival.ravel()[flat] = np.inf
        is_open = rival.min(0) < 1e-12 * np.abs(priced.ravel()[flat])
        some, done = np.flatnonzero(is_open), flat[~is_open]
        return self._replace(
            score=self.score.take(some, 1),
            use=self.use.take(some, 2),
            room=self.room - np.array([use.ravel()[done].sum() for use in self.use]),
            base=self.base + float(self.score.ravel()[done].sum()),
        )


def _located(units: _Units) -> tuple[FloatArray, float]:
    """The best price and its value; of very many groups by a sample and a box around its price."""
    budgets = len(units.use)
    if not budgets:
        return np.zeros(0), units.cut(np.zeros(0)).score
    count = units.score.shape[1]
    if count > 2 * SAMPLE:
        part = units.sample(max(SAMPLE, count // 16))
        near, value = _located(part)
        for width in BOXES if value <= part.worst and near.any() else ():
            half = width * (near + float(near.max()))
            low, high = np.maximum(near - half, 0.0), near + half
            near, value = _climb(units.undecided(low, high), low, high)
            if ((near < high) & ((near > low) | (low == 0))).all():
                return near, value
    high = np.ones(budgets)
    for _ in range(16):
        price, value = _climb(units, np.zeros(budgets), high)
        at_edge = price >= high
        if value > units.worst * (1 + 1e-9) or not at_edge.any():
            break
        high = np.where(at_edge, 16 * high, high)
    return price, value


def _climb(units: _Units, low: FloatArray, high: FloatArray) -> tuple[FloatArray, float]:
    """The best price in a box and its value."""
    best = low.copy() if not low.any() else (low + high) / 2
    cut = units.cut(best)
    value, master = cut.at(best), _Master(cut, low, high)
    for _ in range(ROUNDS):
        top, ceiling = master.solve()
        if ceiling - value <= 1e-13 * abs(ceiling):
            break
        is_new = False
        for price in ((best + top) / 2, top):
            cut = units.cut(price)
            if cut.at(price) > value:
                best, value = price, cut.at(price)
            is_new = cut.at(top) < ceiling - 1e-14 * abs(ceiling)
            master.add(cut)
            if is_new:
                break
        if not is_new:
            break
    return best, value


class _Master:
    """The highest point below all cuts in a box of prices, by the simplex method on its dual.

    minimise Σ_j w_j score_j + high · s − low · t  subject to  Σ_j w_j excess_j − s + t = 0,  Σ_j w_j = 1,  all ≥ 0:
    a mixture of plans that meets the limits. A new cut is a new column, so the last basis goes on.
    """

    def __init__(self, cut: _Cut, low: FloatArray, high: FloatArray) -> None:
        size = len(low)
        unit = np.vstack([np.eye(size), np.zeros(size)])
        self.columns = np.hstack([-unit, unit, np.append(cut.excess, 1.0)[:, None]])
        self.costs = np.concatenate([high, -low, [cut.score]])
        self.basis = np.append(np.where(cut.excess > 0, np.arange(size), size + np.arange(size)), 2 * size)
        self.limits = low, high

    def add(self, cut: _Cut) -> None:
        self.columns = np.hstack([self.columns, np.append(cut.excess, 1.0)[:, None]])
        self.costs = np.append(self.costs, cut.score)

    def solve(self) -> tuple[FloatArray, float]:
        """Price and height of the point."""
        for pivot in range(100):
            inverse = np.linalg.inv(self.columns[:, self.basis])
            dual = self.costs[self.basis] @ inverse
            reduced = self.costs - dual @ self.columns
            reduced[self.basis] = 0.0
            entering = int(reduced.argmin() if pivot < 50 else (reduced < -1e-12).argmax())
            if reduced[entering] >= -1e-15:
                break
            column, weights = inverse @ self.columns[:, entering], np.maximum(inverse[:, -1], 0.0)
            ratio = np.divide(weights, column, out=np.full(len(column), np.inf), where=column > 1e-12)
            if not np.isfinite(ratio.min()):
                break
            self.basis[ratio.argmin()] = entering
        return np.clip(-dual[:-1], *self.limits), float(dual[-1])
