"""Verify: a plan measured on the real model, next to what was predicted and to uniform precision at the same budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpq.batches import batches_of, samples_in
from mpq.options import Option
from mpq.plan import Plan, uniform_plan
from mpq.planning import predict
from mpq.quantizer import Quantizer
from mpq.surgery import evaluating, quantized
from mpq.task_choice import choose_task
from mpq.tasks import CustomLoss, LossFunction, Outputs, Task, mean_and_error

if TYPE_CHECKING:
    import pandas as pd

    from mpq.tables import CostTable

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class Measured:
    """One model on the data: means over samples, standard errors, and what was predicted where a table says so.

    `divergence` is the KL divergence from full precision in nats, or for features the relative squared error. Size is
    counted, not measured. None: the task has no such figure, or whether the budgets are kept is not known.
    """

    name: str
    size_bytes: float
    average_bits: float
    divergence: float
    divergence_se: float
    loss: float | None
    agreement: float | None
    predicted: float | None
    fits: bool | None


@dataclass(frozen=True)
class Verification:
    """The plan, uniform precisions and full precision on the same data."""

    rows: tuple[Measured, ...]
    divergence_name: str
    samples: int

    @property
    def plan(self) -> Measured:
        """The plan's own row."""
        return next(row for row in self.rows if row.name == "plan")

    @property
    def uniform(self) -> Measured | None:
        """The best uniform precision that keeps the plan's budgets, or None if none does."""
        fitting = [row for row in self.rows if row.name.startswith("uniform") and row.fits]
        return min(fitting, key=lambda row: row.divergence, default=None)

    @property
    def measured(self) -> dict[str, float]:
        """The plan's measured figures by name."""
        row = self.plan
        figures = {self.divergence_name: row.divergence, f"{self.divergence_name}_se": row.divergence_se}
        figures |= {"loss": row.loss} if row.loss is not None else {}
        figures |= {"agreement": row.agreement} if row.agreement is not None else {}
        return figures

    @property
    def verdict(self) -> str:
        """One sentence: what the plan gained over uniform precision at the same budget."""
        plan, uniform = self.plan, self.uniform
        if plan.fits is False:
            return "The plan does not keep its budgets: it cannot be compared at them."
        if uniform is None and any(row.fits is None for row in self.rows if row.name != FULL_PRECISION):
            return "Which uniform precision keeps these budgets is not known without the table of the search."
        if uniform is None:
            return "No uniform precision keeps these budgets; the plan does."
        if self.samples == 1:
            return f"One sample cannot tell the plan from {uniform.name}: measure on more data."
        noise = 2 * (plan.divergence_se**2 + uniform.divergence_se**2) ** 0.5
        figures = f"{self.divergence_name} {plan.divergence:.3g} against {uniform.divergence:.3g}"
        if abs(plan.divergence - uniform.divergence) <= noise:
            return f"The plan and {uniform.name} are equal within the noise of this data ({figures})."
        word = "better" if plan.divergence < uniform.divergence else "WORSE"
        return f"The plan is {word} than {uniform.name} at the same budget ({figures})."

    def to_frame(self) -> pd.DataFrame:
        """One row a model."""
        import pandas as pd

        frame = pd.DataFrame([vars(row) for row in self.rows]).set_index("name")
        names = {"divergence": self.divergence_name, "divergence_se": f"{self.divergence_name}_se"}
        return frame.rename(columns=names)

    def __str__(self) -> str:
        name, wide = self.divergence_name, max(len(row.name) for row in self.rows) + 2
        header = f"{'':{wide}}{'size [MB]':>10}{'bits':>8}{name:>12}{'+-':>10}{'predicted':>11}{'loss':>9}{'agree':>8}"
        lines = [header]
        for row in self.rows:
            lines.append(
                f"{row.name:{wide}}{row.size_bytes / 1e6:10.4f}{row.average_bits:8.3f}{row.divergence:12.3g}"
                f"{row.divergence_se:10.1g}{_text(row.predicted, '11.3g')}{_text(row.loss, '9.4f')}"
                f"{_text(row.agreement, '8.3f')}" + ("  over budget" if row.fits is False else "")
            )
        footer = f"measured on {self.samples} samples; sizes are counted, predictions come from the table"
        return "\n".join([*lines, footer, self.verdict])


def verify(
    model: nn.Module,
    data: Any,
    plan: Plan,
    table: CostTable | None = None,
    *,
    task: Task | LossFunction | str | None = None,
    quantizer: Quantizer | None = None,
) -> Verification:
    """Measure a plan on data, next to what was predicted and to uniform precision.

    Args:
        model: the one the plan is for, in full precision; comes back bit for bit.
        data: best data the plan was not made on.
        plan: what is verified.
        table: where predictions come from; the plan's own by default, if it still has it.
        task: as for `search`.
        quantizer: as for `search`.

    Raises:
        ValueError: if plan and model do not fit or the data is wrong.
    """
    batches = batches_of(data)
    plans = {"plan": plan} | {f"uniform {option}": uniform_plan(plan, option) for option in _uniform_options(plan)}
    with evaluating(model), torch.no_grad():
        chosen = choose_task(model, batches[0], task)
        reference = [chosen.run(model, batch) for batch in batches]
        judge = _Judge(chosen, plan, table or plan.table, reference)
        rows = [judge.row(FULL_PRECISION, None, reference)]
        for name, candidate in plans.items():
            with quantized(model, candidate, quantizer=quantizer):
                rows.append(judge.row(name, candidate, (chosen.run(model, batch) for batch in batches)))
    return Verification(tuple(rows), _divergence_name(chosen), samples_in(batches))


def _divergence_name(task: Task) -> str:
    if isinstance(task, CustomLoss):
        return "loss added"
    return "KL" if task.measured_in == "loss" else "rel. error"


def _uniform_options(plan: Plan) -> list[Option]:
    """The options a uniform plan could take: those of the search, else those the plan uses."""
    labels = plan.provenance.get("options") or [str(option) for entry in plan.entries for option in entry.options]
    return [option for label in dict.fromkeys(labels) if (option := Option.parse(label)).weight is not None]


@dataclass(frozen=True)
class _Judge:
    """What outputs are judged by: the task, the plan and its budgets, the table, full precision's outputs."""

    task: Task
    plan: Plan
    table: CostTable | None
    reference: list[Outputs]

    def row(self, name: str, candidate: Plan | None, outputs: Iterable[Outputs]) -> Measured:
        """The figures of one model, batch by batch; `candidate` None is full precision."""
        figures: dict[str, list[torch.Tensor]] = {"divergence": [], "loss": [], "agreement": []}
        for exact, output in zip(self.reference, outputs, strict=True):
            figures["divergence"].append(self.task.divergence(exact, output))
            optional = {"loss": self.task.losses(output), "agreement": self.task.agreement(exact, output)}
            for figure, values in optional.items():
                figures[figure] += [] if values is None else [values]
        means = {figure: mean_and_error(_joined(parts)) for figure, parts in figures.items() if parts}
        predicted = self._prediction(candidate)
        return Measured(
            name=name,
            size_bytes=self.plan.full_bytes if candidate is None else candidate.size_bytes,
            average_bits=self.plan.full_bits if candidate is None else candidate.average_bits,
            divergence=means["divergence"][0],
            divergence_se=means["divergence"][1],
            loss=means.get("loss", (None,))[0],
            agreement=means.get("agreement", (None,))[0],
            predicted=predicted.get("sensitivity"),
            fits=None if candidate is None else _fits(self.plan, candidate, predicted),
        )

    def _prediction(self, candidate: Plan | None) -> Mapping[str, float]:
        if candidate is None:
            return {}
        if self.table is None:
            return self.plan.predicted if candidate is self.plan else {}
        try:
            return predict(self.table, candidate)
        except ValueError:  # an option that this table does not price has no prediction
            return {}


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().cpu().double() for part in parts])


def _fits(plan: Plan, candidate: Plan, predicted: Mapping[str, float]) -> bool | None:
    known = {"value_size": candidate.value_bytes, **predicted, "size": candidate.size_bytes}
    kept = [known[b.quantity] <= b.limit * (1 + 1e-9) if b.quantity in known else None for b in plan.budgets]
    return False if False in kept else None if None in kept else True


def _text(value: float | None, spec: str) -> str:
    return " " * int(spec.split(".", maxsplit=1)[0]) if value is None else format(value, spec)
