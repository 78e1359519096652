"""The k best plans of a core: branch and bound over whole crowds of partial plans at a time."""

import heapq
import itertools
import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import BUDGET_TOLERANCE

from .budget_prices import budget_prices
from .certificates import Certificates, certificates
from .crowd import Growth
from .descent import descend
from .exchange import improve
from .narrowing import Search, minimise
from .reduction import Core

WIDTH = 1024  # partial plans extended together
WORK = 1.5e5  # partial plans looked at in a branch before it is split
FEW = 12  # cheapest deviations from the best priced plan that the first threshold has room for
TIES = 500  # plans equal to the last one to rounding that are kept, to be compared exactly


class Found(NamedTuple):
    """Plans of layers, by objective, and a value that no other plan is below; inf where that is proved of all."""

    plans: list[IntArray]
    bound: float


class _Branch(NamedTuple):
    """Some of the plans: those of the options that the certificates allow."""

    core: Core
    price: FloatArray
    rows: Certificates

    @property
    def bound(self) -> float:
        return float(self.rows.start[self.rows.priced].max())


def best_plans(
    core: Core, k: int, deadline: float, *, known: IntArray | None = None, effort: float = math.inf
) -> Found:
    """The k best plans of a core (all of them where there are fewer), of equal ones the earlier options first.

    Every partial plan carries lower bounds: the Lagrangian one at the best prices of the budgets and at prices around
    them, and the least that every limited sum can come to. Group by group, all partial plans are extended at once and
    those dropped whose bounds exceed the limits or a threshold. The threshold starts low and is raised until k plans
    are below it, which proves them; it falls to the k-th best as plans are found. Where that takes too many partial
    plans, the group whose options differ most in priced usage is branched on, and the budgets priced anew.

    Args:
        core: with a sum as its objective.
        k: how many.
        deadline: of `time.monotonic`; what is found until then comes back with a bound on all the rest.
        known: a feasible plan of groups, if there is a good one; for k = 1 only better ones are looked for.
        effort: partial plans after which to stop, as at the deadline.
    """
    greedy = descend(core)
    plan = known if greedy is None or known is not None else improve(core, greedy.choice)
    root = _branch(core, np.zeros(len(core.limits)) if greedy is None else greedy.price, math.inf, None)
    if root is None:
        return Found([], math.inf)
    search, total = _Enumeration(core, k, root, deadline, effort), _largest(root.rows)
    most = _first_threshold(core, root.rows, plan)
    if plan is not None:
        search.take([(core.value(plan) - root.rows.zero, plan)], root.rows)
    if plan is None:
        now = time.monotonic()
        seconds = max((deadline - now) / 2, 0.01)
        if minimise(core, Search("auto", 0.0, seconds, now + seconds)).status == "infeasible":
            return Found([], math.inf)
    while True:
        most = math.inf if most >= total else most
        below = search.run(most)
        if below >= k or most == math.inf or search.left < math.inf:
            return search.found()
        ratio = math.log(2 * k) / math.log(below + 2)  # the logarithm of their number grows like a square root
        most *= min(max(ratio * ratio, 1.1), 2.0)


def _branch(core: Core, price: FloatArray, most: float, zero: float | None) -> _Branch | None:
    """Priced anew, without the options that no plan below the threshold contains; None if none is left."""
    price = budget_prices(core, price)
    rows = certificates(core, price, zero).within(most)
    return None if rows is None else _Branch(core.without(~rows.allowed), price, rows)


def _first_threshold(core: Core, rows: Certificates, plan: IntArray | None) -> float:
    """A few of the cheapest deviations from the best priced plan, or the objective of a known plan if that is less."""
    rounding = 2 * float(rows.room[rows.priced].max())
    extra = np.sort(rows.unary[1][rows.allowed & (rows.unary[1] > rounding)])
    guesses = [float(extra[min(FEW, len(extra) - 1)])] if len(extra) else []
    if plan is not None:
        guesses.append(core.value(plan) - rows.zero)
    return max(min(guesses, default=math.inf), rounding)


def _largest(rows: Certificates) -> float:
    """Objective above zero that no plan exceeds."""
    pairs = [float(pair.excess[0].max()) for pair in rows.pairs]
    most = np.where(rows.allowed, rows.unary[0], 0.0).max(1)
    return math.fsum([float(rows.start[0]), *most.tolist(), *pairs, *rows.rises.tolist()])


def _coarsest(rows: Certificates) -> int:
    """The undecided group whose options differ most in priced usage; without prices, in the limited sums."""
    sums = (rows.unary[1] - rows.unary[0])[None]
    if not sums.any():
        sums = rows.unary[~rows.priced]
    low, high = np.where(rows.allowed, sums, np.inf).min(2), np.where(rows.allowed, sums, -np.inf).max(2)
    share = ((high - low) / np.maximum((high - low).sum(1, keepdims=True), 1e-300)).sum(0)
    return int(np.where(rows.allowed.sum(1) > 1, share, -1.0).argmax())


class _Enumeration:
    """Plans below a threshold; the k best of them so far, and those equal to the last to rounding."""

    def __init__(self, core: Core, k: int, root: _Branch, deadline: float, effort: float) -> None:
        self.core, self.k, self.root, self.deadline, self.effort = core, k, root, deadline, effort
        self.zero = root.rows.zero
        budgets = [abs(core.problem.budgets[name]) for name in core.names]
        self.slack = BUDGET_TOLERANCE * float(root.price @ budgets)  # what rounding of the budgets is worth
        self.most = math.inf  # threshold, above zero
        self.left = math.inf  # least bound of the plans below it that were not looked at in time
        self.value = np.zeros(0)
        self.plans = np.zeros((0, len(core.allowed)), dtype=np.int64)
        self.known: set[bytes] = set()

    @property
    def _is_over(self) -> bool:
        return self.effort <= 0 or time.monotonic() > self.deadline

    def run(self, most: float) -> int:
        """Look at all plans below a threshold, the branch with the least bound first; how many are known then."""
        self.most = min(most, float(self.value[self.k - 1])) if len(self.value) >= self.k else most
        number = itertools.count()
        branches = [(self.root.bound, next(number), self.root)]
        while branches and not self._is_over:
            bound, _, branch = heapq.heappop(branches)
            if bound > self.most + branch.rows.room[0] or self._is_finished(branch):
                continue
            for part in self._split(branch):
                heapq.heappush(branches, (part.bound, next(number), part))
        self.left = min((bound for bound, _, _ in branches), default=math.inf)
        return int((self.value <= most + 2 * self.root.rows.room[0]).sum())

    def found(self) -> Found:
        """In order of their exact objectives; equal ones in the order of their options."""
        plans = [self.core.expand(plan) for plan in self.plans]
        plans.sort(key=lambda plan: (self.core.problem.evaluate(plan)[0], plan.tolist()))
        return Found(plans[: self.k], self.zero + self.left)

    def _is_finished(self, branch: _Branch) -> bool:
        """Grow a branch's plans; too large a crowd is divided and its more promising part goes first."""
        rows = branch.rows.within(self.most)
        if rows is None:
            return True
        growth = Growth(branch.core, rows, self.k)
        width, is_diving = max(WIDTH, 2 * self.k), True
        stack, work = [growth.empty()], 0
        is_splittable = len(growth.order) > 1
        while stack:
            crowd = growth.within(stack.pop(), self.most)
            while crowd.stage < len(growth.order) and len(crowd.choices):
                crowd = growth.extended(crowd, self.most)
                work += len(crowd.choices)
                self.effort -= len(crowd.choices)
                if (work > WORK and is_splittable and not is_diving) or self._is_over:
                    return False
                if len(crowd.choices) > width:
                    order = np.argsort(growth.bound(crowd), kind="stable")
                    stack.append(crowd.pick(np.sort(order[width:])))
                    crowd = crowd.pick(np.sort(order[:width]))
            is_diving = False
            if len(crowd.choices):
                self.take(growth.finished(crowd), rows)
        return True

    def _split(self, branch: _Branch) -> list[_Branch]:
        """A branch for every option of the group whose options differ most in priced usage."""
        rows = branch.rows.within(self.most)
        if rows is None:
            return []
        group, parts = _coarsest(rows), []
        for option in np.flatnonzero(rows.allowed[group]):
            others = ~rows.allowed
            others[group] = np.arange(others.shape[1]) != option
            part = _branch(branch.core.without(others), branch.price, self.most, self.zero)
            parts += [] if part is None else [part]
        return parts

    def take(self, finished: Iterable[tuple[float, IntArray]], rows: Certificates) -> None:
        """Take plans over, best first, and lower the threshold."""
        room = 2 * float(rows.room[0])
        value: list[float] = []
        plans: list[IntArray] = []
        last = math.inf if len(self.value) < self.k else float(self.value[self.k - 1])
        for reached, plan in finished:
            if reached > last + room or len(value) >= self.k + TIES:
                break
            if (key := plan.tobytes()) not in self.known:
                self.known.add(key)
                value.append(reached)
                plans.append(plan)
                last = reached if len(value) == self.k else last
        if value:
            self._keep(np.array(value), np.array(plans), room)

    def _keep(self, value: FloatArray, plans: IntArray, room: float) -> None:
        value, plans = np.concatenate([self.value, value]), np.concatenate([self.plans, plans])
        order = np.argsort(value, kind="stable")[: self.k + TIES]
        self.value, self.plans = value[order], plans[order]
        if len(order) >= self.k:
            last = float(self.value[self.k - 1])
            is_crowded = len(order) == self.k + TIES and self.value[-1] <= last + room
            self.most = min(self.most, last - room - self.slack if is_crowded else last)
