"""The search behind `refine`: a walk on selection data, and a test on fresh data before anything is believed."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mpq.evaluator import SLOPES_COST, Exhausted
from mpq.learned_scores import LearnedScores, Posterior
from mpq.level_switches import LevelSwitches
from mpq.paired_test import Test, best_of_several
from mpq.plan_keys import choices_of_key, key_of
from mpq.problem import AllocationProblem
from mpq.quick_solver import QuickSolver, optimum_of
from mpq.shrunk_errors import errors_of
from mpq.slope_steps import TRUSTS, Slopes, slope_steps

if TYPE_CHECKING:
    from mpq.measured_loss import MeasuredLoss

Choices = NDArray[np.int64]

FEW = 50  # units up to which switches alone find what slopes would
MANY = 2000  # units above which the table's runners-up are not enumerated: they differ in next to nothing


class Measures(Protocol):
    """What the search asks: an `Evaluator`, or one of levels of layers."""

    measured: dict[bytes, MeasuredLoss]

    @property
    def samples(self) -> int:
        """How many there are."""

    @property
    def spent(self) -> float:
        """Evaluations of the whole data so far."""

    @property
    def left(self) -> float:
        """Evaluations of the whole data that may still be made."""

    def measure(self, choices: Choices, samples: int | None = None) -> MeasuredLoss:
        """What a plan loses on the first samples."""

    def measure_all(self, plans: Sequence[Choices], samples: int | None = None) -> list[MeasuredLoss]:
        """The same for several plans."""

    def slopes(self, choices: Choices, samples: int | None = None) -> Slopes | None:
        """How the divergence changes around a plan, from a gradient; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the search goes about it.

    Attributes:
        kbest: best plans of the table measured first.
        draws: optima of tables drawn within the scores' standard errors measured first.
        offspring: children a generation.
        pool: level switches drawn for each child that is measured; the most promising by a drawn table is.
        survivors: children measured on all the selection data, after a quarter of it.
        patience: generations without a better plan after which the amount of data doubles, or the search ends.
        first: share of the data used at first.
        fresh: share of the data in use that no candidate is chosen by.
        finalists: plans that are tested at the end.
        level: of the test that a new best plan must pass.
        test: "t" or "sign".
        slopes: whether a gradient at the walk's plan is asked which others are better; by default where there are more
            than 50 units: of fewer, the switches of a few generations try most.
    """

    kbest: int = 16
    draws: int = 20
    offspring: int = 12
    pool: int = 8
    survivors: int = 4
    patience: int = 6
    first: float = 0.5
    fresh: float = 0.5
    finalists: int = 8
    level: float = 0.2
    test: Test = "t"
    slopes: bool | None = None

    def __post_init__(self) -> None:
        for name in ("kbest", "offspring", "pool", "survivors", "patience", "finalists"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("first", "fresh", "level"):
            if not 0 < getattr(self, name) <= 1 or (name != "first" and getattr(self, name) == 1):
                most = "at most 1" if name == "first" else "below 1"
                raise ValueError(f"{name} must be above 0 and {most}, got {getattr(self, name)}")
        if self.draws < 0:
            raise ValueError(f"draws must be at least 0, got {self.draws}")


@dataclass(frozen=True)
class Step:
    """A plan that became the best: after how many evaluations, its figure, and how sure it is on fresh samples."""

    evaluations: float
    divergence: float
    samples: int
    p_value: float


@dataclass(eq=False)
class MeasuredSearch:
    """One search.

    Of the data in use, the first half chooses (selection), the rest confirms (fresh):

        1  The table's k best plans and optima of tables drawn within its standard errors are measured on a part of the
           selection data, the better ones on more; the best is where the walk starts.
        2  One gradient at the walk's plan says which changes are better to first order; steps of several lengths are
           measured (`mpq.slope_steps`). Where one is better the walk goes there, and this is done again.
        3  A generation: a third of the children are optima of tables drawn from the posterior of the scores
           (`LearnedScores`), the others level switches of the walk's plan (`LevelSwitches`), each the most promising of
           a pool by a drawn table. They are measured on a quarter of the selection data; the survivors on all of it,
           where the parent competes as well. The walk goes to the best.
        4  When the walk has not moved for `patience` generations, its plan is tested against the best one known so far
           (the incumbent) on the fresh samples, one by one. Only if that is significant it becomes the incumbent.
        5  Then the data in use doubles: what was fresh now helps to choose, and new samples are fresh. With all of it
           in use the search ends, or earlier, when the budget is only enough for the test: the finalists, the best on
           the selection data, are tested together against the start plan on all other samples, and the best of those
           that pass is the result, if it is no worse than the incumbent.

    The level is that of all finalists together (`mpq.paired_test.best_of_several`), and of each earlier test. It is 0.2
    because a plan costs nothing to change before it is deployed: some hundred samples show gains of a tenth at no
    stricter level, and those that are accepted by chance lose little. 0.05 where a change must be sure; at 0.5 whatever
    is better on fresh samples is taken.
    """

    evaluator: Measures
    problem: AllocationProblem
    settings: Settings
    rng: np.random.Generator
    history: list[Step] = field(default_factory=list)
    tried: set[bytes] = field(default_factory=set)
    incumbent: Choices = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    fresh_from: int = 0

    def run(self, start: Choices) -> tuple[Choices, str]:
        """The best plan that was confirmed, and why the search ended."""
        self.start = self.incumbent = self.walker = np.asarray(start, dtype=np.int64)
        self.switches = LevelSwitches(self.problem)
        self.prior = LearnedScores.of(self.problem)
        try:
            why = self._searched()
        except Exhausted as end:
            why = str(end)
        if self.fresh_from:  # else the budget was over before the start plan was measured
            self.amount = self.evaluator.samples
            with contextlib.suppress(Exhausted):
                self._confirm(self._finalists(), self.start)
            self._revoke()
        return self.incumbent, why

    def _searched(self) -> str:
        """Walks on more and more data; why they ended."""
        amounts = self._amounts()
        self._use(amounts[0])
        self.kept = min(self.settings.finalists + 2, self.evaluator.left / 3)  # evaluations for the test at the end
        self._select([self.start, *islice(self._first_plans(), self._affordable())])
        for amount in amounts:
            self._use(amount)
            self._settle()
            self._walk()
            if self._affordable() < self.settings.offspring:
                return "the budget is spent, its last part on the test"
            if amount < amounts[-1]:
                self._confirm([self.walker], self.incumbent)
        return "no progress on all the data"

    def _affordable(self, more: float = 0.0) -> int:
        """How many plans `_select` may be given, and `more` measurements made, with enough left for the test."""
        share = self.chosen_by / self.evaluator.samples
        left = self.evaluator.left - self.kept * (1 - share) - share * (self.settings.survivors + more)
        return int(min(max(0.0, 4 * left / share), sys.maxsize))

    def _amounts(self) -> list[int]:
        total, amounts = self.evaluator.samples, []
        amount = total
        while amount > self.settings.first * total and amount >= 2:
            amounts.append(amount)
            amount //= 2
        return [amount, *amounts[::-1]] if amount >= 2 and amounts else amounts[::-1] or [total]

    def _use(self, amount: int) -> None:
        self.amount, self.chosen_by = amount, max(1, round(amount * (1 - self.settings.fresh)))
        found = self.evaluator.measure(self.start, self.chosen_by)
        if not math.isfinite(found.divergence):
            raise ValueError("the start plan's outputs must be finite to be refined, they are not: take a finer plan")
        if found.samples >= self.evaluator.samples:
            if self.fresh_from:  # the last piece is too large to be halved: what was fresh stays so
                self.chosen_by = self.fresh_from
                return
            raise ValueError(
                "data must be of parts that are measured apart, to choose a plan by one and to test it on another: "
                "give more samples, or with a loss of your own more batches"
            )
        self.fresh_from = found.samples

    # -- the walk ----------------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        while self._descended():
            pass
        stale = 0
        while stale < self.settings.patience and self._affordable() >= self.settings.offspring:
            before = self.walker
            children = self._children()
            if not children:
                return
            self._select(children)
            stale = stale + 1 if np.array_equal(before, self.walker) else 0

    def _descended(self) -> bool:
        """Whether a step along the slopes at the walk's plan is better."""
        before, wanted = self.walker, self.settings.slopes
        predicted = float(self.problem.objective[np.arange(len(before)), before].sum())
        if self.problem.norm != 1 or predicted <= 0 or not (len(before) > FEW if wanted is None else wanted):
            return False
        if self._affordable(SLOPES_COST) < len(TRUSTS):
            return False
        slopes = self.evaluator.slopes(before, self.chosen_by)
        if slopes is None:
            return False
        steps = slope_steps(self.problem, slopes, before, predicted)
        self._select([step for step in steps if step.tobytes() not in self.tried])
        return not np.array_equal(before, self.walker)

    def _settle(self) -> None:
        """The best of the plans known from less data, on what is in use now, is where the walk goes on."""
        self.walker = self._best([self.walker, self.incumbent, *self._leaders(2 * self.settings.survivors)])

    def _select(self, children: Sequence[Choices]) -> None:
        """Children on a quarter of the selection data, survivors and the parent on all of it."""
        for child in children:
            self.tried.add(child.tobytes())
        few = max(1, self.chosen_by // 4)
        ranked = self._ranked(children, few)
        self.walker = self._best([self.walker, *ranked[: self.settings.survivors]])

    def _best(self, plans: Sequence[Choices]) -> Choices:
        """The plan with the least mean on the selection data; the first of equal ones."""
        return self._ranked(plans, self.chosen_by)[0]

    def _ranked(self, plans: Sequence[Choices], samples: int | None) -> list[Choices]:
        """Plans by their means on so many samples; equal ones in the order given."""
        measured = [one.divergence for one in self.evaluator.measure_all(plans, samples)]
        found = [divergence if math.isfinite(divergence) else math.inf for divergence in measured]
        return [plans[position] for position in sorted(range(len(plans)), key=found.__getitem__)]

    def _leaders(self, count: int) -> list[Choices]:
        """The best of the plans that were measured on most of the data so far: less is too noisy to compare."""
        measured = self._finite
        most = sorted((found.samples for found in measured.values()), reverse=True)[: 2 * count]
        known = [key for key, found in measured.items() if found.samples >= most[-1] and self._is_ours(key)]
        known.sort(key=self._relative)
        return [choices_of_key(key) for key in known[:count]]

    @property
    def _finite(self) -> dict[bytes, MeasuredLoss]:
        """What was measured, without plans of which a sample came out as no number."""
        return {key: found for key, found in self.evaluator.measured.items() if math.isfinite(found.divergence)}

    def _is_ours(self, key: bytes) -> bool:
        """Whether a measured plan keeps the budgets; the evaluator may have served others."""
        return self.problem.is_feasible(choices_of_key(key))

    # -- candidates --------------------------------------------------------------------------------------------------

    def _first_plans(self) -> Iterator[Choices]:
        """The best plans of the table, then optima of tables drawn within its errors; none of them twice."""
        seen = {self.start.tobytes()}
        for plan in self._table_plans():
            if plan.tobytes() not in seen and self.problem.is_feasible(plan):
                seen.add(plan.tobytes())
                yield plan

    def _table_plans(self) -> Iterator[Choices]:
        settings, problem = self.settings, self.problem
        if len(problem.objective) <= MANY:
            with contextlib.suppress(TimeoutError):
                k_best = import_module("mpq.solvers.ranked_plans").k_best
                yield from (found.choices for found in k_best(problem, settings.kbest, time_limit=10.0))
        if problem.objective_se is not None and settings.draws:
            near_optimal_plans = import_module("mpq.solvers.bootstrap").near_optimal_plans
            seed = int(self.rng.integers(2**31))
            yield from near_optimal_plans(problem, draws=settings.draws, seed=seed, solver=QuickSolver()).choices

    def _children(self) -> list[Choices]:
        """New plans: optima of drawn tables, and level switches that drawn tables find promising."""
        settings, posterior = self.settings, self._posterior()
        children: dict[bytes, Choices] = {}
        for position in range(3 * settings.offspring):
            if len(children) >= settings.offspring:
                break
            drawn = posterior.explored(self.rng)
            child = optimum_of(self.problem, drawn) if position % 3 == 0 else self._switched(drawn)
            if child is not None and child.tobytes() not in self.tried:
                children[child.tobytes()] = child
        return list(children.values())

    def _switched(self, scores: NDArray[np.float64]) -> Choices | None:
        rows, best = np.arange(len(scores)), None
        least = np.inf
        for _ in range(self.settings.pool):
            child = self.switches.child(self.walker, self.rng, scores)
            if child is None or child.tobytes() in self.tried:
                continue
            value = float(scores[rows, child].sum())
            if value < least:
                least, best = value, child
        return best

    def _posterior(self) -> Posterior:
        keys = list(self._finite)
        differences = [self._difference(key) for key in keys]
        start = self.evaluator.measured[key_of(self.start)].divergence
        values = np.array([start + found.mean() for found in differences])
        return self.prior.learned([choices_of_key(key) for key in keys], values, errors_of(differences))

    def _relative(self, key: bytes) -> float:
        """A plan's figure as it would be on all that the start plan was measured on."""
        return float(self.evaluator.measured[key_of(self.start)].divergence + self._difference(key).mean())

    def _difference(self, key: bytes) -> NDArray[np.float64]:
        """Of a plan and the start plan on the samples both have: samples differ in how hard they are."""
        mine, start = self.evaluator.measured[key], self.evaluator.measured[key_of(self.start)]
        count = min(mine.samples, start.samples, self.fresh_from)
        return mine.per_sample[:count] - start.per_sample[:count]

    # -- what is believed --------------------------------------------------------------------------------------------

    def _finalists(self) -> list[Choices]:
        """The walk's plan, and others that are best on the selection data; nothing is measured."""
        known = [key for key in self._finite if self._samples_of(key) >= self.fresh_from]
        known = sorted((key for key in known if self._is_ours(key)), key=self._relative)
        return [self.walker, *map(choices_of_key, known[: self.settings.finalists])]

    def _confirm(self, plans: Sequence[Choices], rival: Choices) -> None:
        """The best of some plans is the new incumbent if fresh samples say, significantly, that it beats a rival.

        It must not be worse than the incumbent either, on all the data in use and on its fresh part. Where the budget
        ends before all are measured, those that are count.
        """
        plans = list({plan.tobytes(): plan for plan in (rival, self.incumbent, *plans)}.values())
        try:
            self.evaluator.measure_all(plans, self.amount)
        finally:
            known = [plan for plan in plans if self._samples_of(key_of(plan)) >= self.amount]
            if len(known) > 1 and known[0] is plans[0]:
                self._tested(known)

    def _samples_of(self, key: bytes) -> int:
        found = self.evaluator.measured.get(key)
        return 0 if found is None else found.samples

    def _revoke(self) -> None:
        """An incumbent that an earlier test believed in, and that the last fresh samples find worse, is none."""
        keys = key_of(self.incumbent), key_of(self.start)
        if min(map(self._samples_of, keys)) >= self.amount:
            new, old = (self.evaluator.measured[key].per_sample[self.fresh_from :].mean() for key in keys)
            if not new <= old:
                self.incumbent = self.start

    def _tested(self, plans: Sequence[Choices]) -> None:
        """The first plan is the rival."""
        measured = [(plan, self.evaluator.measure(plan, self.amount)) for plan in plans]
        if not math.isfinite(measured[0][1].divergence):
            return
        plans = [plan for plan, found in measured if math.isfinite(found.divergence)]
        old, *new = (found for _, found in measured if math.isfinite(found.divergence))
        cut, now = self.fresh_from, self.evaluator.measure(self.incumbent, self.amount)
        fresh = np.array([found.per_sample[cut:] for found in new])
        if not fresh.size:
            return
        p_values = best_of_several(fresh, old.per_sample[cut:], test=self.settings.test)
        for place in np.argsort([found.divergence for found in new], kind="stable"):
            found, is_worse = new[place], fresh[place].mean() > now.per_sample[cut:].mean()
            is_better = not now.divergence <= found.divergence
            if p_values[place] < self.settings.level and is_better and not is_worse:
                self.incumbent = plans[place + 1]
                self.history.append(Step(self.evaluator.spent, found.divergence, found.samples, float(p_values[place])))
                return
