"""May a cost table be trusted at a budget? Random plans around it, predicted next to measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpq.batches import batches_of
from mpq.cache import description, fingerprint_of
from mpq.options import Option
from mpq.plan import AskedBudget, Plan, uniform_plan
from mpq.progress import track
from mpq.quantizer import Quantizer
from mpq.random_plans import random_plans
from mpq.rank_correlation import kendall, spearman, spearman_at_top
from mpq.ranks import Ranks
from mpq.surgery import evaluating, quantized
from mpq.table_entries import entries_of
from mpq.task_choice import choose_task
from mpq.tasks import LossFunction, Task, mean_and_error

if TYPE_CHECKING:
    import pandas as pd

    from mpq.tables import CostTable

TRUSTED = 0.8  # Spearman below which measured refinement or interactions should follow
RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """How well a table predicts measured plans around a budget.

    Attributes:
        predicted: (plans,) what the table says.
        measured: (plans,) divergence from full precision on the data.
        spearman: rank correlation of the two, and its standard error over the plans drawn.
        kendall: Kendall's τ-b.
        spearman_top: Spearman's ρ among the half that is predicted to be best.
        slope: of log measured against log predicted; 1 where the table is right up to a factor.
        ratio: geometric mean of measured / predicted; 1 where the scale is right too.
        plan: measured divergence and standard error of the plan the table leads to.
        uniform: name, measured divergence and standard error of the best uniform precision at that budget, if any.
        is_loss: whether the table predicts the loss itself; a mere score has no scale.
        changed: mean share of layers whose option differs when the scores are drawn anew within their standard errors;
            None where the table has none.
    """

    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]
    spearman: float
    spearman_se: float
    kendall: float
    spearman_top: float
    slope: float
    ratio: float
    plan: tuple[float, float]
    uniform: tuple[str, float, float] | None
    is_loss: bool
    changed: float | None

    @property
    def is_trusted(self) -> bool:
        """Whether the ranks agree, and the table's own plan does not lose to uniform precision."""
        return self.spearman >= TRUSTED and not self.loses

    @property
    def loses(self) -> bool:
        """Whether the table's plan is measurably worse than uniform precision at the same budget."""
        if self.uniform is None:
            return False
        _, value, error = self.uniform
        return self.plan[0] - value > 2 * math.hypot(self.plan[1], error)

    @property
    def verdict(self) -> str:
        """In words."""
        ranks = f"Spearman {self.spearman:.3f} ± {self.spearman_se:.3f} over {len(self.predicted)} plans"
        parts = [
            f"The table ranks plans well at this budget ({ranks})."
            if self.spearman >= TRUSTED
            else f"The table does NOT rank plans reliably at this budget ({ranks}): "
            "measure interactions, or re-measure the best plans."
        ]
        if self.is_loss and not 0.5 <= self.ratio <= 2:
            word = "low" if self.ratio > 1 else "high"
            parts.append(f"Its predictions are {max(self.ratio, 1 / self.ratio):.3g} times too {word}.")
        if self.uniform is not None and self.loses:
            parts.append(f"Its plan LOSES to {self.uniform[0]} ({self.plan[0]:.3g} against {self.uniform[1]:.3g}).")
        if self.changed is not None and self.changed > 0.1:
            parts.append(f"{self.changed:.0%} of the layers change option within the scores' noise: use more data.")
        return " ".join(parts)

    def to_frame(self) -> pd.DataFrame:
        """One row a random plan: predicted and measured."""
        import pandas as pd

        return pd.DataFrame({"predicted": self.predicted, "measured": self.measured})

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.3f} ± {self.spearman_se:.3f}, top half {self.spearman_top:.3f}, "
            f"Kendall {self.kendall:.3f}, log-log slope {self.slope:.2f}, measured/predicted {self.ratio:.3g}\n"
            f"{self.verdict}"
        )


def agreement(
    model: nn.Module,
    data: Any,
    table: CostTable,
    budgets: Mapping[str, float | str],
    *,
    plans: int = 50,
    width: float = 0.08,
    bootstraps: int = 20,
    task: Task | LossFunction | str | None = None,
    quantizer: Quantizer | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Agreement:
    """Measure random plans around a budget, and say how far the table's predictions may be trusted there.

    Args:
        model: in full precision; comes back bit for bit.
        data: to measure on; best data the table was not made on.
        table: whose `sensitivity` is tried.
        budgets: as for `search`. Random plans cost within `width` of the first one and keep none of the others.
        plans: how many random plans. The standard error of Spearman's ρ falls as 1/√plans.
        width: half width of the range of costs, relative to the budget.
        bootstraps: tables drawn within the standard errors, for `changed`; 0 leaves it out.
        task: as for `search`.
        quantizer: as for `search`.
        seed: of plans and resamples.
        progress: show a bar on a terminal.

    Cost: one pass over the data a plan, and a few more. The ranks of `torch.distributed` share the plans, as in
    `estimate`.

    Raises:
        ValueError: if the table has no sensitivity or layers, or no plan costs as asked.
    """
    rng = np.random.default_rng(seed)
    best = table.solve(budgets)
    choices = plans_around(table, best.budgets[0], width=width, count=plans, rng=rng)
    predicted = np.array([predicted_by(table, choice) for choice in choices])
    candidates = [replace(best, entries=entries_of(table, choice)) for choice in choices]
    uniform_plans = {str(option): uniform_plan(best, option) for option in fitting_options(table, best)}
    batches, ranks = batches_of(data), Ranks.current()
    _check_alike(ranks, model, batches, choices)
    asked = [*candidates, best, *uniform_plans.values()]
    with divergences(model, batches, task=task, quantizer=quantizer) as divergence:
        shared = ranks.shared(asked, lambda plan: np.array(divergence(plan)))
        shown = track(range(len(asked)), "plans", shown=progress and ranks.rank == 0)
        figures = [(float(found[0]), float(found[1])) for _, found in zip(shown, shared, strict=True)]
    measured = np.array([value for value, _ in figures[: len(candidates)]])
    own, *others = figures[len(candidates) :]
    fitting = ((name, *found) for name, found in zip(uniform_plans, others, strict=True))
    uniform = min(fitting, key=lambda row: row[1], default=None)
    slope, ratio = _log_fit(predicted, measured)
    return Agreement(
        predicted=predicted,
        measured=measured,
        spearman=spearman(predicted, measured),
        spearman_se=rank_error(predicted, measured, rng),
        kendall=kendall(predicted, measured),
        spearman_top=spearman_at_top(predicted, measured),
        slope=slope,
        ratio=ratio,
        plan=own,
        uniform=uniform,
        is_loss=table.measures["sensitivity"] == "loss",
        changed=_changed(table, budgets, bootstraps, rng),
    )


@contextmanager
def divergences(
    model: nn.Module, data: Any, *, task: Task | LossFunction | str | None = None, quantizer: Quantizer | None = None
) -> Iterator[Callable[[Plan], tuple[float, float]]]:
    """A function that measures a plan's divergence from full precision and its standard error on the data."""
    batches = batches_of(data)
    with evaluating(model), torch.no_grad():
        chosen = choose_task(model, batches[0], task)
        reference = [chosen.run(model, batch) for batch in batches]

        def divergence(plan: Plan) -> tuple[float, float]:
            with quantized(model, plan, quantizer=quantizer):
                outputs = (chosen.run(model, batch) for batch in batches)
                parts = [chosen.divergence(exact, found).cpu() for exact, found in zip(reference, outputs, strict=True)]
            return mean_and_error(torch.cat(parts))

        yield divergence


def _check_alike(ranks: Ranks, model: nn.Module, batches: list[Any], choices: NDArray[np.int64]) -> None:
    """Check that all ranks try the same plans of the same model on the same data."""
    if ranks.world > 1:
        for what, part in (("model", model), ("data", batches), ("plans", choices)):
            ranks.agree(what, fingerprint_of([], description(part)))


def plans_around(
    table: CostTable, budget: AskedBudget, *, width: float, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(plans, units): random plans that cost within `width` of a budget, relatively.

    Raises:
        ValueError: if no plan does.
    """
    cost = np.where(table.allowed, table.quantity(budget.quantity), np.inf)
    limit = budget.limit - table.offsets.get(budget.quantity, 0.0)
    problem = table.problem({})
    return random_plans(cost, problem.groups, low=limit * (1 - width), high=limit * (1 + width), count=count, rng=rng)


def predicted_by(table: CostTable, choice: NDArray[np.int64]) -> float:
    """The sum of the scores of one option a unit, and of the terms for pairs where there are any."""
    total = float(table.quantity("sensitivity")[np.arange(len(choice)), choice].sum())
    return total + sum(float(terms[choice[i], choice[j]]) for (i, j), terms in table.pairs.items())


def fitting_options(table: CostTable, plan: Plan) -> list[Option]:
    """The options that keep every budget of a plan when all layers take them."""
    found = []
    for column, label in enumerate(table.options):
        everywhere = np.where(table.allowed[:, column], column, table.allowed.argmax(1))
        usage = table.problem({}).evaluate(everywhere)[1]
        if all(usage[budget.quantity] <= budget.limit * (1 + 1e-9) for budget in plan.budgets):
            found.append(Option.parse(label))
    return found


def _log_fit(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of log measured against log predicted, and the geometric mean of their ratio; NaN where one is not > 0."""
    usable = (predicted > 0) & (measured > 0)
    if usable.sum() < 2:
        return float("nan"), float("nan")
    x, y = np.log(predicted[usable]), np.log(measured[usable])
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else float("nan")
    return slope, float(np.exp((y - x).mean()))


def rank_error(predicted: NDArray[np.float64], measured: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Standard error of Spearman's ρ by drawing the plans anew, with replacement."""
    draws = rng.integers(0, len(predicted), (RESAMPLES, len(predicted)))
    values = np.array([spearman(predicted[draw], measured[draw]) for draw in draws])
    return float(np.nanstd(values))


def _changed(
    table: CostTable, budgets: Mapping[str, float | str], bootstraps: int, rng: np.random.Generator
) -> float | None:
    """Mean share of layers whose option changes when the scores are drawn within their standard errors."""
    errors = table.quantities.get("sensitivity_se")
    if errors is None or not bootstraps:
        return None
    scores, nominal = table.quantity("sensitivity"), table.solve(budgets)
    shares = []
    for _ in range(bootstraps):
        drawn = scores + np.nan_to_num(errors) * rng.standard_normal(scores.shape)
        again = replace(table, quantities={**table.quantities, "sensitivity": drawn}).solve(budgets)
        shares.append(np.mean([mine != theirs for mine, theirs in zip(again.entries, nominal.entries, strict=True)]))
    return float(np.mean(shares))
