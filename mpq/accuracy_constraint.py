"""Accuracy as a constraint: the smallest plan that is measured to lose no more than allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpq.budgets import format_quantity
from mpq.drops import Metric
from mpq.evaluator import Evaluator, Exhausted, Independent
from mpq.limits import Limit, apply_budgets
from mpq.measured_loss import MeasuredLoss
from mpq.options import Option, matching
from mpq.paired_test import PairedTest, paired_test
from mpq.plan import AskedBudget, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from mpq.frontier import Frontier
    from mpq.quantizer import Quantizer
    from mpq.tables import CostTable
    from mpq.tasks import LossFunction, Task

EVALUATIONS = 60


@dataclass(frozen=True, eq=False)
class Smallest:
    """The smallest plan of a frontier that keeps the drop, and how sure that is.

    Attributes:
        plan: the smallest one that the test confirmed, or None.
        resource: what it takes of the resource, in base units.
        drop: its measured drop; a share where the metric is accuracy or agreement.
        limit: the drop that was allowed.
        test: that the drop is below the limit; `test.p_value` is the chance to see this if it were not.
        level: of the test.
        resource_name: "size", "latency", ...
        stopped: why the search ended before it was through; empty if it was.
        heldout: of the plan, on data the search never saw, where it was given some.
        unsure: the smallest plan whose measured drop is within the limit, confirmed or not: what more data may buy.
        history: (resource, drop, p) of every plan measured, in that order.
        evaluator: has the measurements.
    """

    plan: Plan | None
    resource: float
    drop: float
    limit: float
    test: PairedTest | None
    level: float
    unsure: Plan | None
    history: tuple[tuple[float, float, float], ...]
    evaluator: Evaluator
    resource_name: str = "size"
    stopped: str = ""
    heldout: MeasuredLoss | None = None

    def facts(self) -> dict[str, Any]:
        """The figures as plain data."""
        held, names = self.heldout, ("drop", "standard_error", "samples")
        return {
            "resource": self.resource_name,
            "drop": self.drop,
            "limit": self.limit,
            "p_value": None if self.test is None else self.test.p_value,
            "plans": len(self.history),
            "heldout": held and dict(zip(names, (held.divergence, held.standard_error, held.samples), strict=True)),
        }

    def __str__(self) -> str:
        name = self.evaluator.provenance["measured"]
        if self.plan is None or self.test is None:
            way_out = "allow more of them" if self.stopped else "allow a larger drop, finer options, or more data"
            ended = f"{self.stopped}, before the search was through: " if self.stopped else ""
            return (
                f"no plan of the frontier was confirmed to have {name} of at most {self.limit:g} in "
                f"{len(self.history)} measured: {ended}{way_out}"
            )
        bound = self.limit + self.test.upper(self.level)
        sure = f"{1 - self.level:.0%} sure that it is below {bound:.4g}, p = {self.test.p_value:.2g}"
        measure = self.evaluator.table.measures.get(self.resource_name, "")
        ended = f"; {self.stopped}: a smaller one may do" if self.stopped else ""
        cost = f"{self.resource_name} {format_quantity(self.resource, measure)}"
        unit = self.evaluator.independent
        found = f"{name} {self.drop:.4g} of {self.limit:g} allowed on {self.evaluator.samples} {unit}"
        line = f"{cost}: {found} ({sure}; {len(self.history)} plans measured{ended})"
        if self.heldout is None:
            return line
        judged, error = f"{self.heldout.divergence:.4g}", f"{self.heldout.standard_error:.2g}"
        return f"{line}\n  held out: {judged} ± {error} (standard error) on {self.heldout.samples} {unit}"


def smallest(
    model: nn.Module,
    data: Any,
    table: CostTable,
    *,
    resource: str = "size",
    drop: float = 0.01,
    metric: Metric = "accuracy",
    holdout: Any = None,
    budgets: Mapping[str, float | str] | None = None,
    pins: Mapping[str, Option | str] | None = None,
    level: float = 0.05,
    independent: Independent = "samples",
    task: Task | LossFunction | str | None = None,
    quantizer: Quantizer | None = None,
    evaluations: float | None = EVALUATIONS,
    seconds: float | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> Smallest:
    """The smallest plan that loses at most `drop`, by measurement.

    The plans tried are those of the table's frontier between resource and predicted loss. Bisection finds the smallest
    whose measured drop is within the limit (the drop falls along the frontier but for noise); then the plans from there
    on are tested, smallest first, until a one-sided paired t test says that the drop is below the limit.

    Formula, with d the drop a sample (for accuracy: 1 where only full precision is right, -1 where only the plan is):

        H0: mean d ≥ drop,   t = (mean d - drop) / (std d / √n),   confirmed where p = P(T ≤ t) < level

    Few flips say little: 12 samples without any would have no variance and be "certain". So for accuracy and agreement
    one more sample, wholly lost, is added to the test; without a flip it then takes 265 samples to confirm a drop of at
    most 0.01, where the rule of three asks for 300.

    Testing stops at the first plan that passes, so that the level is nearly that of the search where the drop falls
    along the frontier; noise lets a plan just above the limit pass a little more often. `level` is per test.

    Args:
        model: in full precision; comes back bit for bit.
        data: with labels for "accuracy"; what the table was not made on says more.
        table: with layers.
        resource: the quantity to make small.
        drop: the most that may be lost on average: 0.01 is one point of accuracy.
        metric: "accuracy", "agreement", "loss", "divergence", or a function of `Outputs` that is (samples,).
        holdout: data the search shall not see, for the drop of the result.
        budgets: what every plan must keep besides.
        pins: name patterns and the option those layers take.
        level: of the test.
        independent: as for `Evaluator`: "batches" where samples of one batch belong together.
        task: as for `search`.
        quantizer: as for `search`.
        evaluations: plans that may be measured.
        seconds: no measurement is begun later.
        seed: of the order of samples.
        cache: a folder for finished measurements.
        evaluator: one to go on with; it must measure this metric.
        progress: show a bar on a terminal.

    Returns:
        A `Smallest`; its plan is None where none was confirmed.

    Raises:
        InfeasibleError: if no plan keeps the budgets.
        ValueError: if the drop or level is no positive number, the metric is not the evaluator's, or the data is wrong.

    Example:
        >>> import torch, mpq
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> table = mpq.measure(model, data, ["int2", "int4", "int8"], sensitivity="weight_error", progress=False)
        >>> found = smallest(model, data, table, drop=0.2, metric="divergence")
        >>> found.drop < 0.2, found.test.p_value < 0.05, found.plan.average_bits < 8.5
        (True, True, True)
    """
    if not (isinstance(drop, Real) and 0 < drop < math.inf):
        raise ValueError(f"drop must be a positive number, got {drop!r}")
    if not (isinstance(level, Real) and 0 < level < 1):
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    if not hasattr(table, "pareto"):
        raise TypeError(f"table must be a CostTable, such as plan.table, got {type(table).__name__}")
    if evaluator is None:
        evaluator = Evaluator(
            model, data, table, task=task, quantizer=quantizer, metric=metric, cache=cache, independent=independent,
            evaluations=evaluations, seconds=seconds, seed=seed,
        )  # fmt: skip
    elif evaluator.metric != metric:
        raise ValueError(f"the evaluator measures {evaluator.metric!r}, metric is {metric!r}: make them the same")
    front = table.pareto(resource, budgets, pins=pins, epsilon=1e-3)
    judge = None if holdout is None else evaluator.elsewhere(holdout, front[-1].choices)
    with evaluator.watched("smallest", shown=progress):
        found = replace(_Bisection(evaluator, front, drop, level).run(), resource_name=resource)
    if found.plan is None:
        return found
    found = found if judge is None else replace(found, heldout=judge.measure(found.plan))
    return replace(found, plan=_as_asked(found, apply_budgets(table, budgets or {}), pins or {}))


def _as_asked(found: Smallest, limits: Sequence[Limit], pins: Mapping[str, Option | str]) -> Plan:
    """The plan with the budgets and pins that it was found under, and what was measured of it."""
    plan, measures = cast(Plan, found.plan), found.evaluator.table.measures
    names = [layer.name for layer in found.evaluator.table.layers]
    pinned = tuple(dict.fromkeys(name for pattern in pins for name in matching(pattern, names, "pins")))
    kept: dict[str, Any] = {"smallest": found.evaluator.provenance | found.facts()}
    if pinned:
        kept["price_of_pins"] = {}
    return replace(
        plan,
        budgets=tuple(AskedBudget(x.resource, x.asked, x.value, measures[x.resource], x.meaning) for x in limits),
        edited=pinned,
        provenance={**plan.provenance, **kept},
    )


class _Bisection:
    """Measurements along a frontier, each made once."""

    def __init__(self, evaluator: Evaluator, front: Frontier, drop: float, level: float) -> None:
        self.evaluator, self.front, self.drop, self.level = evaluator, front, drop, level
        self.tests: dict[int, PairedTest] = {}

    def run(self) -> Smallest:
        within = len(self.front)
        confirmed: int | None = None
        stopped = ""
        try:
            within = self._first_within()
            confirmed = next((k for k in self._upwards(within) if self._test(k).p_value < self.level), None)
        except Exhausted as end:
            stopped = str(end)
            passed = [k for k, test in self.tests.items() if test.p_value < self.level]
            confirmed = min(passed, default=None)
        hopeful = [k for k in self.tests if self._drop(k) <= self.drop]
        test = None if confirmed is None else self.tests[confirmed]
        return Smallest(
            plan=None if confirmed is None else self._plan(confirmed),
            resource=float("nan") if confirmed is None else float(np.ravel(self.front[confirmed].resource)[0]),
            drop=float("nan") if confirmed is None else self._drop(confirmed),
            limit=self.drop,
            test=test,
            level=self.level,
            unsure=self._plan(min(hopeful)) if hopeful else None,
            history=tuple(
                (float(np.ravel(self.front[k].resource)[0]), self._drop(k), found.p_value)
                for k, found in self.tests.items()
            ),
            evaluator=self.evaluator,
            stopped=stopped,
        )

    def _first_within(self) -> int:
        """The first point whose measured drop is within the limit, as far as bisection can tell."""
        low, high = 0, len(self.front) - 1
        while low < high:
            middle = (low + high) // 2
            self._test(middle)
            low, high = (low, middle) if self._drop(middle) <= self.drop else (middle + 1, high)
        return low

    def _upwards(self, first: int) -> list[int]:
        """Points from the first on, with growing strides: neighbours differ in little, and so do their tests."""
        points, stride = [], 1
        while first < len(self.front):
            points.append(first)
            first, stride = first + stride, stride + max(1, stride // 2)
        last = len(self.front) - 1
        return [*points, *([last] if points and points[-1] != last else [])]

    def _test(self, point: int) -> PairedTest:
        if point not in self.tests:
            values = self.evaluator.measure(self._choices(point)).per_sample
            self.tests[point] = paired_test(_with_one_lost(values, self.evaluator.metric), self.drop)
        return self.tests[point]

    def _drop(self, point: int) -> float:
        """The measured drop of a point that was tested."""
        return self.evaluator.measure(self._choices(point)).divergence

    def _choices(self, point: int) -> NDArray[np.int64]:
        return self.front[point].choices.astype(np.int64)

    def _plan(self, point: int) -> Plan:
        return self.evaluator.plan(self._choices(point))


def _with_one_lost(values: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """Values a sample, and where they are shares, one more that is 1."""
    return np.append(values, 1.0) if metric in ("accuracy", "agreement") else values
