"""Refine: the plan of a table improved by measuring plans around it on the real model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq.budgets import format_quantity
from mpq.drops import Metric, metric_name
from mpq.evaluator import Evaluator, Independent
from mpq.layer_levels import LayerLevels, LevelEvaluator
from mpq.limits import Limit, apply_budgets
from mpq.measured_loss import MeasuredLoss
from mpq.measured_search import MeasuredSearch, Settings, Step
from mpq.options import Option, matching
from mpq.paired_test import PairedTest, paired_test
from mpq.plan import AskedBudget, Plan
from mpq.planning import choices_of
from mpq.problem import AllocationProblem
from mpq.shared_evaluator import SharedEvaluator
from mpq.suggestions import did_you_mean
from mpq.table_problem import build_problem
from mpq.tables import CostTable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from mpq.quantizer import Quantizer
    from mpq.tasks import LossFunction, Task

_SURE = 0.95  # a p value above it says that the other one is better
EVALUATIONS = 200  # of the whole data, where neither a number nor a time is asked for


@dataclass(frozen=True)
class Compared:
    """The refined plan and the one it started from, on the same samples.

    Attributes:
        best: mean of the refined plan.
        start: mean of the plan it started from.
        test: of their differences, sample by sample.
        independent: what counts as a sample: "samples" or "batches".
    """

    best: float
    start: float
    test: PairedTest
    independent: Independent = "samples"

    @classmethod
    def of(
        cls, best: NDArray[np.float64], start: NDArray[np.float64], independent: Independent = "samples"
    ) -> Compared:
        """The comparison of two vectors of the same samples."""
        return cls(float(best.mean()), float(start.mean()), paired_test(best, start), independent)

    def facts(self) -> dict[str, float]:
        """The figures as plain data: start, best, p_value, samples."""
        test = self.test
        return {"start": self.start, "best": self.best, "p_value": test.p_value, "samples": test.samples}

    @property
    def gain(self) -> float:
        """Share of the start plan's figure that is gone; 0 where it has none."""
        return 1 - self.best / self.start if self.start else 0.0

    def __str__(self) -> str:
        if self.best == self.start:
            return f"{self.start:.4g}, that of the start plan ({self.test.samples} {self.independent})"
        certainty = f"p = {self.test.p_value:.2g}, {self.test.samples} {self.independent}"
        return f"{self.start:.4g} -> {self.best:.4g} ({-self.gain:+.1%}; {certainty})"


@dataclass(frozen=True, eq=False)
class Refinement:
    """The best plan that was found and confirmed, and how it compares with the plan the search started from.

    Attributes:
        plan: the best; the start plan itself where nothing better was confirmed.
        start: the plan the search started from.
        selection: both on all the data the search had: what it was chosen by, so too good to be true.
        fresh: both on the part that no candidate was chosen by, though several were tested on it.
        heldout: both on data the search never saw, where it was given some.
        history: what became the best, and after how many evaluations.
        evaluations: spent, in measurements of the whole data.
        stopped: why the search ended.
        evaluator: has every measured plan (`evaluator.measured`, `evaluator.frontier("size")`).
    """

    plan: Plan
    start: Plan
    selection: Compared
    fresh: Compared
    heldout: Compared | None
    history: tuple[Step, ...]
    evaluations: float
    stopped: str
    evaluator: Evaluator

    @property
    def is_improved(self) -> bool:
        """Whether another plan than the start plan was confirmed to be better."""
        return self.plan.options != self.start.options

    def __str__(self) -> str:
        what = self.evaluator.provenance["measured"]
        found = "no better plan was confirmed"
        if self.is_improved and self.history:
            found = "a plan was found that was better on samples it was not chosen by, too"
            found += f" (p = {self.history[-1].p_value:.2g} when it was tested)"
            if self.heldout is not None and not self.heldout.best < self.heldout.start:
                how = "WORSE" if self.heldout.test.p_value > _SURE else "no better"
                found += f", but is {how} on the held-out data"
        lines = [
            f"{found}: {self.evaluations:.1f} evaluations, {len(self.evaluator.measured)} plans; {self.stopped}",
            f"  {what}, selection data: {self.selection}",
            f"  {what}, its fresh part: {self.fresh}",
        ]
        if self.heldout is not None:
            lines.append(f"  {what}, held out:       {self.heldout}")
        names = self.plan.options
        changed = [f"{name} {old}->{names[name]}" for name, old in self.start.options.items() if names[name] != old]
        if changed:
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            lines.append(f"  {len(changed)} of {len(names)} layers changed: {', '.join(changed[:8])}{more}")
        return "\n".join(lines)


def refine(
    model: nn.Module,
    data: Any,
    plan_or_table: Plan | CostTable,
    budgets: Mapping[str, float | str] | None = None,
    *,
    holdout: Any = None,
    pins: Mapping[str, Option | str] | None = None,
    task: Task | LossFunction | str | None = None,
    quantizer: Quantizer | None = None,
    metric: Metric = "divergence",
    independent: Independent = "samples",
    evaluations: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    storage: Any = None,
    study: str = "refine",
    evaluator: Evaluator | None = None,
    progress: bool = True,
    **settings: Any,
) -> Refinement:
    """Improve a plan by measuring others on the real model; every one keeps the budgets exactly.

    Sums of scores mislead where errors interact, below some 3 bits above all. So plans are measured: the best of the
    table, steps along a gradient at the best measured plan (`mpq.slope_steps`), level switches around it (EvoPress,
    Sieberling et al. 2024), and the optima of tables drawn from what is known after those measurements
    (`mpq.learned_scores`). A candidate is chosen on one half of the data and becomes the result only when a paired
    one-sided t test on the other half says that it is better; where nothing more is found the amount of data doubles,
    so that the fresh half joins the data that chooses. The method in full: `mpq.measured_search`.

    Args:
        model: in full precision; comes back bit for bit.
        data: what is measured on: more than the search can learn by heart, some hundred samples.
        plan_or_table: a plan with its table (`plan.table`), or the table, whose best plan is the start. What a plan was
            solved under holds for the result: its budgets, pins, options set by hand, number of formats.
        budgets: as for `search`; those of the plan by default.
        holdout: data the search shall not see, for the figures of the result.
        pins: name patterns and the option those layers take.
        task: as for `search`.
        quantizer: as for `search`.
        metric: what is made small, as for `Evaluator`: "divergence", a drop of "accuracy" or "agreement", the rise of
            "loss", or the drop of a function.
        independent: as for `Evaluator`: "batches" where samples of one batch belong together.
        evaluations: measurements of the whole data, parts counting as parts; 200 where no seconds are given either.
        seconds: no measurement is begun later.
        seed: of everything random.
        cache: a folder for finished measurements: a search that was killed goes on there, and ends where it would have.
        storage: where workers share their measurements: a path of a journal file, a URL such as
            ``sqlite:///study.db``, or an Optuna storage. Make the same call in as many processes as there are machines
            for: they measure the plans of one search together and end with the same plan; one that dies loses nothing
            (`mpq.shared_evaluator`).
        study: its name there.
        evaluator: an `Evaluator` to go on with; then data, task, quantizer, metric, limits and cache are its own.
        progress: show a bar on a terminal.
        **settings: fields of `mpq.measured_search.Settings`: offspring, patience, level, kbest, draws, ...

    Returns:
        A `Refinement`; its plan is never worse than the start plan on the selection data.

    Raises:
        InfeasibleError: if no plan keeps the budgets.
        ValueError: if the plan has no table or does not keep the budgets, or a name, a unit or the data is wrong.

    Example:
        >>> import torch, mpq
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> table = mpq.measure(model, data, ["int2", "int4", "int8"], sensitivity="weight_error", progress=False)
        >>> found = refine(model, data, table, {"size": "4 bits values"}, evaluations=5)
        >>> found.selection.best <= found.selection.start, found.plan.value_bytes <= 4 * 56 / 8
        (True, True)
    """
    asked = _settings(settings)
    table, limits, start = _asked(plan_or_table, budgets)
    labels = {pattern: str(option) for pattern, option in (pins or {}).items()}
    names = [layer.name for layer in table.layers]
    pinned = [name for pattern in labels for name in matching(pattern, names, "pins")]
    problem = build_problem(table, limits, "sensitivity", labels, {})
    if start is not None and isinstance(plan_or_table, Plan):
        problem = _as_solved(problem, plan_or_table, start, pinned)
        start = None if pinned and not problem.is_feasible(start) else start
    if evaluator is None:
        most = EVALUATIONS if evaluations is None and seconds is None else evaluations
        how: dict[str, Any] = {"task": task, "quantizer": quantizer, "metric": metric}
        how |= {"cache": cache, "seconds": seconds, "seed": seed, "independent": independent}
        if storage is None:
            evaluator = Evaluator(model, data, table, evaluations=most, **how)
        else:
            evaluator = SharedEvaluator(model, data, table, evaluations=most, storage=storage, study=study, **how)
    if start is None:
        start = import_module("mpq.solvers").solve(problem, "auto").choices
    if not problem.is_feasible(start):
        raise ValueError(_infeasible(table, problem.violations(start)))
    rng = np.random.default_rng(seed)
    levels, index = None, np.asarray(table.layer_index)
    if table.granularity != "layer" and LayerLevels.fit(problem, index):
        levels = LayerLevels(problem, index, np.asarray(start), names=tuple(names))
        search = MeasuredSearch(LevelEvaluator(evaluator, levels), levels.problem, asked, rng)
    else:
        search = MeasuredSearch(evaluator, problem, asked, rng)
    judge = None if holdout is None else evaluator.elsewhere(holdout, start)
    with evaluator.watched("refine", shown=progress):
        best, stopped = search.run(start if levels is None else levels.middle)
    best = best if levels is None else levels.expanded(best)
    found = _result(evaluator, search, (best, np.asarray(start)), limits, (judge, stopped))
    how_asked = _how_asked(evaluator, seed, asked)
    return replace(found, plan=_as_asked(found.plan, plan_or_table, pinned, how_asked))


def _settings(given: Mapping[str, Any]) -> Settings:
    """The settings of the search.

    Raises:
        TypeError: for a name that is none of them.
    """
    known = [one.name for one in fields(Settings)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, [*known, "evaluations", "seconds", "seed", "storage", "holdout", "metric"])
            raise TypeError(f"refine has no setting {name!r}{hint}")
    return Settings(**given)


def _as_solved(
    problem: AllocationProblem, plan: Plan, start: NDArray[np.int64], pinned: Sequence[str]
) -> AllocationProblem:
    """The problem with what the plan was solved under: what was pinned or set by hand stays, and so few formats.

    Layers that are pinned anew are left to their pins.
    """
    held = [name for name in plan.edited if name not in pinned]
    if held and plan.table is not None:
        stays = np.array([layer.name in held for layer in plan.table.layers])[plan.table.layer_index]
        others = stays[:, None] & (np.arange(problem.objective.shape[1]) != start[:, None])
        problem = replace(problem, objective=np.where(others, np.inf, problem.objective))
    return replace(problem, max_formats=plan.provenance.get("max_formats"))


def _how_asked(evaluator: Evaluator, seed: int, settings: Settings) -> dict[str, Any]:
    """What `refine` was asked for: its limits and seed, and what else is not its default."""
    asked: dict[str, Any] = {"evaluations": evaluator.evaluations, "seconds": evaluator.seconds, "seed": seed}
    if evaluator.metric != "divergence":
        asked["metric"] = metric_name(evaluator.metric)
    if evaluator.independent != "samples":
        asked["independent"] = evaluator.independent
    own = {one.name: getattr(settings, one.name) for one in fields(Settings)}
    own = {name: value for name, value in own.items() if value != getattr(Settings, name)}
    return {name: value for name, value in asked.items() if value is not None} | own


def _as_asked(refined: Plan, given: Plan | CostTable, pinned: Sequence[str], how_asked: Mapping[str, Any]) -> Plan:
    """The refined plan with the pins and the number of formats that it was found under, and how it was asked for."""
    edited = given.edited if isinstance(given, Plan) else ()
    asked: dict[str, Any] = {"refined": {**refined.provenance["refined"], "asked": dict(how_asked)}}
    before = given.provenance if isinstance(given, Plan) else {}
    if "max_formats" in before:
        asked["max_formats"] = before["max_formats"]
    if edited := tuple(dict.fromkeys([*edited, *pinned])):
        asked["price_of_pins"] = before.get("price_of_pins", {})
    return replace(refined, edited=edited, provenance={**refined.provenance, **asked})


def _infeasible(table: CostTable, violations: Mapping[str, float]) -> str:
    """Why a plan cannot be refined."""
    over = [f"{name} by {format_quantity(excess, table.measures.get(name, ''))}" for name, excess in violations.items()]
    what = f"exceeds {', '.join(over)}" if over else "does not keep ties, or the number of formats it was solved with"
    return f"the plan to refine {what}: pass its table, `plan.table`, and the budgets to start from their best plan"


def _asked(
    given: Plan | CostTable, budgets: Mapping[str, float | str] | None
) -> tuple[CostTable, tuple[Limit, ...], NDArray[np.int64] | None]:
    """The table, the budgets on it, and the plan to start from."""
    if isinstance(given, CostTable):
        if budgets is None:
            raise ValueError("budgets must be given with a table: without them the finest plan is the best")
        return given, apply_budgets(given, budgets), None
    if given.table is None:
        raise ValueError(
            "the plan must have its table, which is not saved with it: pass the table and the budgets to start from "
            "their best plan, or dataclasses.replace(plan, table=mpq.CostTable.load(...)) to start from this one"
        )
    if any(entry.input_range is not None for entry in given.entries):
        raise ValueError(
            "the plan has static input ranges, which hold for its own formats: refine it before "
            "mpq.activation_ranges.calibrate_ranges, and calibrate what comes out"
        )
    table = given.table
    start = choices_of(table, given)
    if budgets is not None:
        return table, apply_budgets(table, budgets), start
    if not given.budgets:
        raise ValueError("the plan was made without budgets: pass some")
    for budget in given.budgets:
        table.quantity(budget.quantity)
    return table, tuple(Limit(b.quantity, b.limit, b.asked, b.meaning) for b in given.budgets), start


def _result(
    evaluator: Evaluator,
    search: MeasuredSearch,
    plans: tuple[NDArray[np.int64], NDArray[np.int64]],
    limits: tuple[Limit, ...],
    rest: tuple[Evaluator | None, str],
) -> Refinement:
    """The refinement, with both plans measured on all the data and on the held-out data, whatever that costs."""
    judge, stopped = rest
    spent = evaluator.spent
    best, start = (_whole(evaluator, choices) for choices in plans)
    if not best.divergence <= start.divergence:
        plans, best = (plans[1], plans[1]), start
    heldout = None
    if judge is not None:
        judged = [judge.measure(choices).per_sample for choices in plans]
        heldout = Compared.of(judged[0], judged[1], judge.independent)
    cut, unit = search.fresh_from, evaluator.independent
    selection = Compared.of(best.per_sample, start.per_sample, unit)
    fresh = Compared.of(best.per_sample[cut:], start.per_sample[cut:], unit)
    table = evaluator.table
    budgets = tuple(AskedBudget(x.resource, x.asked, x.value, table.measures[x.resource], x.meaning) for x in limits)
    refined, first = (replace(evaluator.plan(choices), budgets=budgets) for choices in plans)
    how = evaluator.provenance | {"evaluations": spent, "plans": len(evaluator.measured), "stopped": stopped}
    how |= {"selection": selection.facts(), "fresh": fresh.facts(), "heldout": heldout and heldout.facts()}
    return Refinement(
        plan=replace(refined, provenance={**refined.provenance, "refined": how}),
        start=first,
        selection=selection,
        fresh=fresh,
        heldout=heldout,
        history=tuple(search.history),
        evaluations=spent,
        stopped=stopped,
        evaluator=evaluator,
    )


def _whole(evaluator: Evaluator, choices: NDArray[np.int64]) -> MeasuredLoss:
    """A plan on all the data, beyond the budget if need be."""
    limits, evaluator.evaluations, evaluator.seconds = (evaluator.evaluations, evaluator.seconds), None, None
    try:
        return evaluator.measure(choices)
    finally:
        evaluator.evaluations, evaluator.seconds = limits
