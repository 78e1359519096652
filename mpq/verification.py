"""Verify: a plan measured on the real model, next to what was predicted and to baselines at the same budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mpq.adjuster import Adjust
from mpq.baseline_plans import DRAWS, BaselinePlans
from mpq.batches import Batch, batch_size, batches_of, samples_in
from mpq.limits import Limit
from mpq.options import Option
from mpq.output_figures import SampleFigures, estimates, metric_of, sample_figures
from mpq.plan import Plan, Split, uniform_plan
from mpq.planning import choices_of, predict
from mpq.problem import InfeasibleError
from mpq.progress import track
from mpq.quantizer import Quantizer, RoundToNearest
from mpq.suggestions import did_you_mean
from mpq.surgery import check_model, evaluating, quantized
from mpq.table_entries import entries_of
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, LossFunction, Outputs, Task
from mpq.verification_report import FULL_PRECISION, UNADJUSTED, Measured, QuantityCheck, Verification

if TYPE_CHECKING:
    from mpq.tables import CostTable

BASELINES = ("uniform", *DRAWS)
AFFORDABLE_MACS = 3e12  # what "auto" lets all plans together cost: 1 to 3 CPU minutes, at 6e10 to 1.7e10 a second

Device = Callable[[nn.Module, Plan], Mapping[str, float]]


def verify(
    model: nn.Module,
    data: Any,
    plan: Plan,
    table: CostTable | None = None,
    *,
    task: Task | LossFunction | str | None = None,
    quantizer: Quantizer | None = None,
    adjust: Adjust | None = None,
    baselines: str | Iterable[str] = "auto",
    metric: LossFunction | None = None,
    device: Device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Verification:
    """Measure a plan on data, next to what was predicted and to plans that needed no search.

    Args:
        model: the one the plan is for, in full precision; comes back bit for bit.
        data: best data the plan was not made on.
        plan: what is verified.
        table: where predictions and baselines come from; the plan's own by default, if it still has it. Without one
            the baselines are uniform precisions.
        task: as for `search`.
        quantizer: as for `search`.
        adjust: what is done after quantising, `adjust(model, plan, quantizer) -> Adjustment`, such as
            `mpq.adjuster.Adjuster(["bias-correction"], calibration)`. It is made anew for the plan and for every
            baseline: what an adjustment gains is not what the choice of formats gains, and a plan that alone had one
            would be called better for it. A further row, "plan, not adjusted", shows what it gained on the plan; it
            is no baseline. Make it on other data than `data`, or the figures are too good.
        baselines: names out of "uniform", "protected", "smallest", "sorted", "shuffled", "random"
            (`mpq.baseline_plans`), "all", or "auto": in this order as many as `AFFORDABLE_MACS` allow, counted and not
            timed, so that the same input measures the same; with what making the adjustment takes, where `adjust` has
            a method `macs(plan)`. Uniform precisions are always affordable. The report says what was skipped. Static
            input ranges of the plan are the baselines' too, where a layer's input has the plan's format.
        metric: your own `metric(model, batch)`, one number or one a sample, averaged over samples and reported.
        device: `device(model, plan)` that measures what the plan costs where it runs, {quantity: base units}. Without
            one latency and energy are only predicted.
        seed: of random and shuffled baselines.
        progress: show a bar on a terminal.

    Cost: one pass over the data for full precision, the plan, each uniform precision, three rules, 5 shuffled tables
    and 20 random plans; an adjustment for each of them but full precision. Full precision's outputs are kept.

    Returns:
        A `Verification`; `.plan.plan` is the plan, which names its adjustments (`plan.help`).

    Raises:
        ValueError: if plan and model do not fit, the data is wrong, a baseline is unknown, or there is nothing to
            adjust.
    """
    table, batches = table or plan.table, batches_of(data)
    check_model(model, plan)
    asked = _asked_baselines(baselines)
    groups = {"plan": [plan]}
    if "uniform" in asked:
        groups |= {f"uniform {option}": [uniform_plan(plan, option)] for option in _uniform_options(plan)}
    most = AFFORDABLE_MACS if baselines == "auto" else np.inf
    planner = _Planner(plan, table, seed, _macs_of_adjusting(adjust, plan))
    drawn, skipped = _drawn(planner, [name for name in asked if name != "uniform"], most, batches)
    groups |= drawn
    with evaluating(model), torch.no_grad():
        chosen = choose_task(model, batches[0], task)
        how: dict[str, Any] = {"quantizer": quantizer, "adjust": adjust, "metric": metric}
        judge = _Judge(model=model, batches=batches, task=chosen, plan=plan, table=table, **how)
        rows = [judge.full_precision()]
        with_bars = track([(name, one) for name, plans in groups.items() for one in plans], "plans", shown=progress)
        found: dict[str, list[Measured]] = {}
        for name, candidate in with_bars:
            found.setdefault(name, []).append(judge.row(name, candidate))
            if name == "plan" and adjust is not None:
                found[UNADJUSTED] = [replace(judge, adjust=None, known={}).row(UNADJUSTED, candidate)]
    rows += [_median(several) for several in found.values()]
    return Verification(
        rows=tuple(rows),
        divergence_name=_divergence_name(chosen),
        samples=samples_in(batches),
        metric_name=judge.metric_name or metric_of(rows[1].estimates),
        quantities=_quantities(plan, rows[1], {} if device is None else device(model, plan)),
        skipped=skipped,
        quantizer=repr(quantizer or RoundToNearest()),
        adjustments=judge.adjustments,
    )


def _macs_of_adjusting(adjust: Adjust | None, plan: Plan) -> float:
    count = getattr(adjust, "macs", None)
    return float(count(plan)) if callable(count) else 0.0


def _asked_baselines(baselines: str | Iterable[str]) -> list[str]:
    if isinstance(baselines, str) and baselines in ("auto", "all"):
        return list(BASELINES)
    names = [baselines] if isinstance(baselines, str) else list(baselines)
    for name in names:
        if name not in BASELINES:
            known = f"auto, all or names out of {', '.join(BASELINES)}"
            raise ValueError(f"baselines must be {known}, got {name!r}{did_you_mean(name, BASELINES)}")
    return [name for name in BASELINES if name in names]


def _divergence_name(task: Task) -> str:
    if isinstance(task, CustomLoss):
        return "loss added"
    return "KL" if task.measured_in == "loss" else "rel. error"


def _uniform_options(plan: Plan) -> list[Option]:
    """The options a uniform plan could take: those of the search, else those the plan uses."""
    labels = plan.provenance.get("options") or [str(option) for entry in plan.entries for option in entry.options]
    return [option for label in dict.fromkeys(labels) if (option := Option.parse(label)).weight is not None]


@dataclass(frozen=True)
class _Planner:
    """Makes the plans of a baseline from the table."""

    plan: Plan
    table: CostTable | None
    seed: int
    more_macs: float = 0.0  # for each of them, beside running it

    @property
    def refusal(self) -> str | None:
        """Why there can be no baselines but uniform precision."""
        if self.table is None or "sensitivity" not in self.table.quantities:
            return "they are made from the table of the search"
        if any(budget.quantity == "sensitivity" for budget in self.plan.budgets):
            return "the budget is on the loss, which they do not keep"
        if missing := [b.quantity for b in self.plan.budgets if b.quantity not in self.table.quantities]:
            return f"the table has no {missing[0]}, of which there is a budget"
        return None if self.plan.budgets else "the plan has no budget to keep"

    def maker(self) -> BaselinePlans:
        table, plan = self.table, self.plan
        if table is None:
            raise ValueError("baselines need a table, got none")
        limits = tuple(Limit(b.quantity, b.limit, b.asked, b.meaning) for b in plan.budgets)
        fixed = None
        if "price_of_pins" in plan.provenance:  # solved with pins: they hold for everyone
            pinned = np.array([layer.name in plan.edited for layer in table.layers])[table.layer_index]
            fixed = np.where(pinned, choices_of(table, plan), -1)
        return BaselinePlans(table=table, limits=limits, fixed=fixed, seed=self.seed)

    def plans(self, maker: BaselinePlans, name: str) -> list[Plan]:
        bare = Plan(entries=(), fingerprint=self.plan.fingerprint, outside=self.plan.outside)
        plans = [replace(bare, entries=entries_of(maker.table, choices)) for choices in maker.choices(name)]
        return [_with_ranges(one, self.plan) for one in plans]


def _drawn(
    planner: _Planner, names: list[str], most: float, batches: list[Batch]
) -> tuple[dict[str, list[Plan]], dict[str, str]]:
    """The plans of each baseline that can be afforded, and why the others are skipped."""
    if names and planner.refusal is not None:
        return {}, dict.fromkeys(names, planner.refusal)
    layers = [entry.layer for entry in planner.plan.entries]
    macs = sum(layer.macs / layer.batch for layer in layers) * sum(map(batch_size, batches)) + planner.more_macs
    found: dict[str, list[Plan]] = {}
    skipped: dict[str, str] = {}
    maker = planner.maker() if names else None
    for name in names:
        cost = macs * (DRAWS[name] + sum(map(len, found.values())))
        if maker is None or cost > most:
            skipped[name] = f"beyond {most:.0e} multiply-adds in all; baselines='all' measures them"
            continue
        try:
            found[name] = planner.plans(maker, name)
        except (InfeasibleError, ValueError) as error:
            skipped[name] = str(error)
    return {_row_name(name): plans for name, plans in found.items()}, skipped


def _with_ranges(candidate: Plan, plan: Plan) -> Plan:
    """A candidate with the plan's static input ranges, where a layer's input has the plan's format."""
    known = {entry.layer.name: entry for entry in plan.entries if entry.input_range is not None}
    entries = [known.get(entry.layer.name, entry).with_choice(entry.choice) for entry in candidate.entries]
    return replace(candidate, entries=tuple(entries)) if known else candidate


def _row_name(name: str) -> str:
    titles = {"protected": "ends protected", "smallest": "small first", "sorted": "sorted by score"}
    return titles.get(name, f"{name} (of {DRAWS[name]})")


def _median(rows: list[Measured]) -> Measured:
    """The row with the median divergence, the lower one of two, with what all of them came to."""
    tries = tuple(pair for row in rows for pair in row.tries)
    ranked = sorted(rows, key=lambda row: np.nan_to_num(row.divergence, nan=np.inf))
    return replace(ranked[(len(rows) - 1) // 2], tries=tries)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """What outputs are judged by: the task, the plan and its budgets, the table, full precision's outputs."""

    model: nn.Module
    batches: list[Batch]
    task: Task
    plan: Plan
    table: CostTable | None
    metric: LossFunction | None
    quantizer: Quantizer | None
    adjust: Adjust | None
    reference: list[Outputs] = field(default_factory=list)
    full: list[SampleFigures] = field(default_factory=list)
    known: dict[Any, tuple[Measured, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def adjustments(self) -> tuple[str, ...]:
        """What was done after quantising, by its names."""
        return tuple(dict.fromkeys(step for _, steps in self.known.values() for step in steps))

    @property
    def metric_name(self) -> str | None:
        """What the caller's metric is called."""
        return None if self.metric is None else getattr(self.metric, "__name__", type(self.metric).__name__)

    def full_precision(self) -> Measured:
        """Run the model as it is, and keep what it said to judge others by."""
        self.reference.extend(self.task.run(self.model, batch) for batch in self.batches)
        self.full.append(self._figures(self.reference))
        return Measured(
            name=FULL_PRECISION,
            size_bytes=self.plan.full_bytes,
            average_bits=self.plan.full_bits,
            estimates=estimates(self.full[0], self.full[0], self.task, self.metric_name or ""),
            per_sample=self.full[0].divergence,
        )

    def row(self, name: str, candidate: Plan) -> Measured:
        """The figures of the model under a plan; a plan that was measured before is not run again."""
        key = tuple((_key(entry.choice), entry.input_range) for entry in candidate.entries)
        costs = self._prediction(candidate)
        if key not in self.known:
            figures, steps = self._under(candidate)
            measured = Measured(
                name=name,
                size_bytes=candidate.size_bytes,
                average_bits=candidate.average_bits,
                estimates=estimates(figures, self.full[0], self.task, self.metric_name or ""),
                per_sample=figures.divergence,
            )
            self.known[key] = measured, steps
        same, steps = self.known[key]
        tries = ((costs.get("sensitivity"), same.divergence),)
        fits = _fits(self.plan, candidate, costs)
        if new := [step for step in steps if step not in candidate.help]:
            candidate = candidate.with_help(*new)
        return replace(same, name=name, costs=costs, fits=fits, tries=tries, plan=candidate)

    def _under(self, candidate: Plan) -> tuple[SampleFigures, tuple[str, ...]]:
        """The figures of the model under a plan and its adjustment, and what that is called."""
        adjustment = None if self.adjust is None else self.adjust(self.model, candidate, self.quantizer)
        with ExitStack() as stack:
            stack.enter_context(quantized(self.model, candidate, quantizer=self.quantizer))
            if adjustment is not None:
                stack.enter_context(adjustment.applied(self.model))
            figures = self._figures(self.task.run(self.model, batch) for batch in self.batches)
        return figures, () if adjustment is None else adjustment.steps

    def _figures(self, outputs: Iterable[Outputs]) -> SampleFigures:
        figures = sample_figures(self.task, self.reference, outputs)
        if self.metric is None:
            return figures
        return replace(figures, metric=np.concatenate(list(self._metric_values(self.metric))))

    def _metric_values(self, metric: LossFunction) -> Iterator[Any]:
        for batch in self.batches:
            yield CustomLoss(metric).run(self.model, batch).values[:, 0].detach().cpu().double().numpy()

    def _prediction(self, candidate: Plan) -> Mapping[str, float]:
        if self.table is None:
            return self.plan.predicted if candidate is self.plan else {}
        try:
            return predict(self.table, candidate)
        except ValueError:  # an option that this table does not price has no prediction
            return {}


def _key(choice: Option | Split) -> Any:
    return choice if isinstance(choice, Option) else (choice.granularity, choice.options, choice.codes.tobytes())


def _fits(plan: Plan, candidate: Plan, predicted: Mapping[str, float]) -> bool | None:
    known = {"value_size": candidate.value_bytes, **predicted, "size": candidate.size_bytes}
    kept = [known[b.quantity] <= b.limit * (1 + 1e-9) if b.quantity in known else None for b in plan.budgets]
    return False if False in kept else None if None in kept else True


def _quantities(plan: Plan, row: Measured, on_device: Mapping[str, float]) -> tuple[QuantityCheck, ...]:
    """Every budgeted quantity and the sensitivity: what was predicted, and what it is."""
    counted = {"size": plan.size_bytes, "value_size": plan.value_bytes}
    limits = {budget.quantity: budget for budget in reversed(plan.budgets)}
    measures = {name: budget.measure for name, budget in limits.items()}
    checks = []
    for name in dict.fromkeys([*limits, *on_device, "sensitivity"]):
        found, how = None, "not measured"
        if name in counted:
            found, how = counted[name], "counted"
        elif name in on_device:
            found, how = on_device[name], "measured"
        elif name == "sensitivity":
            found, how = row.divergence, "measured"
        checks.append(
            QuantityCheck(
                quantity=name,
                measure=measures.get(name, plan.measures.get(name, "")),
                limit=limits[name].limit if name in limits else None,
                predicted=row.costs.get(name),
                found=found,
                how=how,
            )
        )
    return tuple(checks)
