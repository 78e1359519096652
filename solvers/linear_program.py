"""A core as an integer program, in numbers an integer-programming code can tell apart, with a bound of our own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpq.arrays import BoolArray, FloatArray, IntArray

from .cover_cut import Cut
from .reduction import Core, Floors, row_sums

SCALE = 1e4  # of rows and objective: the codes' tolerances are absolute
ROOM = 1e-9  # relative widening of a row, beyond those tolerances: no plan is lost, and plans found are checked


class Row(NamedTuple):
    """Σ values · columns ≤ rhs, or = rhs."""

    columns: IntArray
    values: FloatArray
    rhs: float
    is_equality: bool


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Minimise cost · v with 0 ≤ v ≤ upper, some v integer, under rows.

    Attributes:
        names: of the columns: ``x_{i}_{k}`` for layer i in option k, ``y_{i}_{k}_{j}_{l}`` products, ``u_{k}``, ``t``.
        cost: objective, scaled.
        upper: upper limits.
        integer: which columns are integer.
        simplex: set of every column whose members sum to 1, -1 for columns in no set.
        one_hot: the rows that say so for the options of a group.
        rows: all others.
        column: ``(groups, options)`` column of x, -1 where there is none.
    """

    names: tuple[str, ...]
    cost: FloatArray
    upper: FloatArray
    integer: BoolArray
    simplex: IntArray
    one_hot: tuple[Row, ...]
    rows: tuple[Row, ...]
    column: IntArray

    def bound(self, duals: FloatArray) -> tuple[float, FloatArray]:
        """A bound on the optimum from any prices of the rows, and what every column adds to it at least.

        Lagrangian relaxation: with prices z (≤ 0 for inequalities) of the rows and reduced costs r = cost − zᵀA,
        no point is below z · rhs + Σ over simplices of min r + Σ over other columns of min(0, r · upper), whatever
        code the prices come from and however rough they are; rounding is subtracted. A column above the least
        of its simplex raises the bound by the difference (Neumaier and Shcherbina 2004, Math. Program. 99).
        """
        equal = np.array([row.is_equality for row in self.rows], dtype=bool)
        prices = np.where(equal, duals, np.minimum(duals, 0.0))
        reduced = self.cost.copy()
        if self.rows:
            columns = np.concatenate([row.columns for row in self.rows])
            terms = np.concatenate([row.values for row in self.rows])
            terms *= np.repeat(prices, [len(row.columns) for row in self.rows])
            reduced -= np.bincount(columns, weights=terms, minlength=len(reduced))
        inside = self.simplex >= 0
        least = np.full(int(self.simplex.max(initial=-1)) + 1, np.inf)
        np.minimum.at(least, self.simplex[inside], reduced[inside])
        loose = np.minimum(0.0, reduced[~inside] * self.upper[~inside])
        rhs = prices * np.array([row.rhs for row in self.rows])
        parts = np.concatenate([rhs, least, loose])
        extra = np.zeros_like(reduced)
        extra[inside] = reduced[inside] - least[self.simplex[inside]]
        return math.fsum(parts.tolist()) - 1e-13 * math.fsum(np.abs(parts).tolist()), extra

    def choice(self, values: FloatArray, core: Core) -> IntArray:
        """The options with the largest values; of decided groups the only one."""
        weight = np.where(self.column >= 0, values[self.column], np.where(core.allowed, 0.5, -1.0))
        choice: IntArray = np.where(core.allowed, weight, -1.0).argmax(1).astype(np.int64)
        return choice


class _Draft:
    """Columns and rows as they are added."""

    def __init__(self, room: float) -> None:
        self.room = room
        self.names: list[str] = []
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.simplex: list[int] = []
        self.one_hot: list[Row] = []
        self.rows: list[Row] = []
        self.simplices = 0

    def add_columns(
        self, names: Sequence[str], cost: FloatArray, *, upper: float = 1.0, integer: bool, simplex: bool
    ) -> IntArray:
        start = len(self.names)
        self.names += names
        self.cost += cost.tolist()
        self.upper += [upper] * len(names)
        self.integer += [integer] * len(names)
        self.simplex += [self.simplices if simplex else -1] * len(names)
        self.simplices += simplex
        return np.arange(start, len(self.names))

    def add_row(self, columns: IntArray, values: FloatArray, rhs: float, *, equality: bool = False) -> None:
        self.rows.append(Row(columns, values, rhs, equality))


def linear_program(core: Core, scale: float, cuts: Sequence[Cut] = (), *, room: float = ROOM) -> LinearProgram:
    """The program of a core; its objective is scale × (objective − the core's floor).

    Formulation: one binary column for every option of every undecided group, one-hot rows; for every coupling the
    product columns y_kl with Σ_l y_kl = x_ik and Σ_k y_kl = x_jl, whose linear relaxation is the tightest of the pair;
    formats u_k ≥ x_ik; a maximum as t above every row it covers. From every row the least of each group is taken
    away, what is left of the budget becomes `SCALE`, wider by ``room``; rows that cannot bind are left out.
    """
    draft, floors = _Draft(room), core.floors()
    column = _option_columns(draft, core, scale)
    products = [_product_columns(draft, core, pair, column, scale) for pair in range(len(core.couplings))]
    slack, step_slack = core.slack(floors, None)
    for row in range(1, len(slack)):
        columns, values, most = _row_terms(core, row, column, products)
        _limit(draft, columns, values, float(slack[row]), most)
    _step_rows(draft, core, column, floors, step_slack)
    if core.has_goal:
        _maximum(draft, core, column, floors, scale)
    if core.counts_formats:
        _formats(draft, core, column, scale)
    for cut in cuts:
        columns = column[cut.members & (column >= 0)]
        decided = int((cut.members & (column < 0) & core.allowed).sum())
        draft.add_row(columns, np.ones(len(columns)), cut.most - decided)
    return LinearProgram(
        names=tuple(draft.names),
        cost=np.array(draft.cost),
        upper=np.array(draft.upper),
        integer=np.array(draft.integer, dtype=bool),
        simplex=np.array(draft.simplex, dtype=np.int64),
        one_hot=tuple(draft.one_hot),
        rows=tuple(draft.rows),
        column=column,
    )


def _option_columns(draft: _Draft, core: Core, scale: float) -> IntArray:
    column = np.full(core.allowed.shape, -1, dtype=np.int64)
    layer = np.unique(core.problem.groups, return_index=True)[1].tolist()
    for group in np.flatnonzero(core.allowed.sum(1) > 1).tolist():
        options = np.flatnonzero(core.allowed[group])
        scores = core.table[0, group, options]
        names = [f"x_{layer[group]}_{k}" for k in options.tolist()]
        new = draft.add_columns(names, scale * (scores - scores.min()), integer=True, simplex=True)
        column[group, options] = new
        draft.one_hot.append(Row(new, np.ones(len(new)), 1.0, True))
    return column


def _product_columns(draft: _Draft, core: Core, index: int, column: IntArray, scale: float) -> IntArray:
    """Columns of a coupling, (options, options), -1 where an option is out of play."""
    pair = core.couplings[index]
    first, second = (np.flatnonzero(core.allowed[group]) for group in (pair.first, pair.second))
    scores = pair.table[0][np.ix_(first, second)]
    i, j = (int(np.argmax(core.problem.groups == group)) for group in (pair.first, pair.second))
    names = [f"y_{i}_{k}_{j}_{m}" for k in first.tolist() for m in second.tolist()]
    new = draft.add_columns(names, scale * (scores - scores.min()).ravel(), integer=False, simplex=True)
    columns = np.full(pair.table.shape[1:], -1, dtype=np.int64)
    columns[np.ix_(first, second)] = block = new.reshape(scores.shape)
    sides = [(pair.first, first, block), (pair.second, second, block.T)]
    lines = [(x, line) for group, own, side in sides for x, line in zip(column[group, own], side, strict=True)]
    for k, line in lines:
        draft.add_row(np.append(line, k), np.append(np.ones(len(line)), -1.0), 0.0, equality=True)
    return columns


def _row_terms(core: Core, row: int, column: IntArray, products: list[IntArray]) -> tuple[IntArray, FloatArray, float]:
    """Columns and values of a budget above its least, and the most they can add up to."""
    excess = np.where(core.allowed, core.table[row], np.inf)
    excess -= excess.min(1, keepdims=True)
    parts, most = [(column, excess)], float(np.where(core.allowed, excess, 0.0).max(1).sum())
    for at, pair in zip(products, core.couplings, strict=True):
        terms = np.where(at >= 0, pair.table[row], np.inf)
        parts.append((at, terms - terms.min()))
        most += float(pair.table[row][at >= 0].max() - terms.min())
    columns = [at[(at >= 0) & (terms > 0)] for at, terms in parts]
    values = [terms[(at >= 0) & (terms > 0)] for at, terms in parts]
    return np.concatenate(columns), np.concatenate(values), most


def _limit(draft: _Draft, columns: IntArray, values: FloatArray, slack: float, most: float) -> None:
    """A scaled row, unless it cannot bind."""
    if most > slack:
        unit = SCALE / (slack if slack > 0 else most)
        draft.add_row(columns, values * unit, slack * unit + draft.room * SCALE)


def _step_rows(draft: _Draft, core: Core, column: IntArray, floors: Floors, slack: FloatArray) -> None:
    most = _most(core, column, floors)
    members = _blocks_by_row(core)
    for row in np.flatnonzero((most > slack) & ~core.steps.goal).tolist():
        columns, values = _block_terms(core, column, floors, members[row])
        _limit(draft, columns, values, float(slack[row]), float(most[row]))


def _maximum(draft: _Draft, core: Core, column: IntArray, floors: Floors, scale: float) -> None:
    """Column t ≥ every goal row, counted from the largest of their floors."""
    goal, base = core.steps.goal, floors.step_base
    floor, most = float(base[goal].max()), base + _most(core, column, floors)
    top = scale * (float(most[goal].max()) - floor)
    t = draft.add_columns(["t"], np.ones(1), upper=1.001 * top, integer=False, simplex=False)
    members = _blocks_by_row(core)
    for row in np.flatnonzero(goal & (most > floor)).tolist():
        columns, values = _block_terms(core, column, floors, members[row])
        draft.add_row(np.append(columns, t), np.append(scale * values, -1.0), scale * (floor - float(base[row])))


def _most(core: Core, column: IntArray, floors: Floors) -> FloatArray:
    """How far every step row can rise above its least, (rows,)."""
    rise = np.where(column[core.steps.group] >= 0, floors.step_excess, 0.0).max(1, initial=0.0)
    return row_sums(core.steps.row, rise, len(core.steps.limit))


def _blocks_by_row(core: Core) -> list[IntArray]:
    order = np.argsort(core.steps.row, kind="stable")
    return np.split(order, np.searchsorted(core.steps.row[order], np.arange(1, len(core.steps.limit))))


def _block_terms(core: Core, column: IntArray, floors: Floors, blocks: IntArray) -> tuple[IntArray, FloatArray]:
    columns, excess = column[core.steps.group[blocks]], floors.step_excess[blocks]
    taken = (columns >= 0) & (excess > 0)
    return columns[taken], excess[taken]


def _formats(draft: _Draft, core: Core, column: IntArray, scale: float) -> None:
    """Columns u_k, 1 where option k is in use anywhere; those of decided groups are."""
    count = core.allowed.shape[1]
    used = core.allowed[core.allowed.sum(1) == 1].any(0)
    costs = np.zeros(count) if core.format_costs is None else core.format_costs
    new = draft.add_columns([f"u_{k}" for k in range(count)], scale * costs, integer=True, simplex=False)
    for group, option in np.argwhere(column >= 0):
        draft.add_row(np.array([column[group, option], new[option]]), np.array([1.0, -1.0]), 0.0)
    for option in np.flatnonzero(used):
        draft.add_row(new[[option]], np.array([1.0]), 1.0, equality=True)
    if core.max_formats is not None:
        draft.add_row(new, np.ones(count), float(core.max_formats))
