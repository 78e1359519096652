"""What a report is about: a plan, and what goes with it, checked once to belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.limits import Limit
from mpq.plan import check_layers
from mpq.planning import choices_of
from mpq.table_problem import totals

if TYPE_CHECKING:
    from mpq.plan import Plan
    from mpq.tables import CostTable
    from mpq.verification_report import Verification

Floats = NDArray[np.float64]
Choices = NDArray[np.int64]

ROUNDING = 1e-6  # relative: what the same sum may differ by on two machines


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A plan with its table, its verification and its device, as far as they are there.

    Attributes:
        plan: what is reported on.
        table: the cost table it was solved from; predictions, frontier and prices need it.
        verification: what `mpq.verify` measured.
        device: a `Target`: every number of it with its source.
        model: how the model is named in commands.
        data: what kind of data was measured on: "held-out", "calibration", or any other word.

    Raises:
        ValueError: if the table is one of another model.
    """

    plan: Plan
    table: CostTable | None = None
    verification: Verification | None = None
    device: Any = None
    model: str = "MODEL"
    data: str = "verification"

    def __post_init__(self) -> None:
        table = self.table
        if table is None:
            return
        try:
            check_layers(self.plan, [layer.name for layer in table.layers])
        except ValueError as error:
            raise ValueError(f"the table is not the plan's: {error}") from error
        if table.fingerprint != self.plan.fingerprint:
            raise ValueError(
                "the table was measured on another model than the plan is for (their fingerprints differ): "
                "give the table that `mpq search --table` wrote with this plan"
            )

    @cached_property
    def choices(self) -> Choices | None:
        """(units,) option index of every unit; None without a table, or where it has not the plan's options."""
        if self.table is None:
            return None
        try:
            found = choices_of(self.table, self.plan)
        except ValueError:
            return None
        return found if self.table.allowed[np.arange(len(found)), found].all() else None

    @cached_property
    def totals(self) -> dict[str, float]:
        """What the table predicts for the plan; empty where it does not."""
        return {} if self.table is None or self.choices is None else totals(self.table, self.choices)

    @property
    def warnings(self) -> list[str]:
        """Where what is shown does not fit together, in sentences."""
        found = []
        if self.table is not None and self.choices is None:
            found.append("The plan takes options that the table does not price: it is on no picture of predictions.")
        for name, value in self.totals.items():
            expected = self.plan.predicted.get(name)
            if expected is not None and not math.isclose(value, expected, rel_tol=ROUNDING, abs_tol=1e-12):
                found.append(
                    f"The table predicts {name} {value:.4g} for this plan, the plan itself says {expected:.4g}: "
                    "the table is of another run."
                )
                break
        if self.verification is not None and self.data == "calibration":
            found.append("It was measured on the data that it was made on, which flatters it: give held-out data.")
        if self.plan.edited and "price_of_pins" not in self.plan.provenance:
            found.append("The plan was edited by hand after it was solved: it is no answer of a solver any more.")
        return found

    @property
    def objective(self) -> str:
        """The quantity that the plan minimises."""
        return str(self.plan.provenance.get("objective", "sensitivity"))

    @property
    def limits(self) -> dict[str, float]:
        """The tightest budget of every quantity in base units."""
        found: dict[str, float] = {}
        for budget in self.plan.budgets:
            found[budget.quantity] = min(budget.limit, found.get(budget.quantity, math.inf))
        return found

    @property
    def limit_records(self) -> tuple[Limit, ...]:
        """The budgets as a problem takes them, of quantities that the table has."""
        known = () if self.table is None else self.table.quantities
        return tuple(Limit(b.quantity, b.limit, b.asked, b.meaning) for b in self.plan.budgets if b.quantity in known)

    @property
    def measures(self) -> Mapping[str, str]:
        """Base unit of every quantity."""
        return {**self.plan.measures, **(self.table.measures if self.table is not None else {})}

    @property
    def loss_name(self) -> str:
        """What the predicted sensitivity is called: a loss where it is one, else a score."""
        return "predicted loss" if self.measures.get("sensitivity") != "score" else "predicted score"

    @property
    def is_comparable(self) -> bool:
        """Whether predicted and measured divergence are the same quantity, which a score is not."""
        return self.measures.get("sensitivity") == "loss"

    @cached_property
    def pinned(self) -> Choices | None:
        """(units,) option index where a pin fixed it, else -1; None without pins."""
        table, choices = self.table, self.choices
        if table is None or choices is None or "price_of_pins" not in self.plan.provenance:
            return None
        is_pinned = np.array([layer.name in self.plan.edited for layer in table.layers])[table.layer_index]
        return np.where(is_pinned, choices, -1)

    @cached_property
    def worst(self) -> tuple[Floats, list[str]] | None:
        """(layers,) predicted loss of every layer alone in its least accurate option, and which that is."""
        table = self.table
        if table is None or "sensitivity" not in table.quantities:
            return None
        values = np.where(table.allowed, table.quantity("sensitivity"), -np.inf)
        labels = np.asarray(table.options, dtype=object)[values.argmax(1)]
        count = len(table.layers)
        totals_of: Floats = np.bincount(table.layer_index, weights=values.max(1), minlength=count).astype(np.float64)
        first = np.searchsorted(np.sort(table.layer_index), np.arange(count))
        order = np.argsort(table.layer_index, kind="stable")
        return totals_of, [str(labels[order[position]]) for position in first]

    def per_layer(self, quantity: str, choices: Choices | None = None) -> Floats | None:
        """(layers,) of a quantity under choices, the plan's by default; None where the table does not say."""
        table = self.table
        chosen = self.choices if choices is None else choices
        if table is None or chosen is None or quantity not in table.quantities:
            return None
        values = table.quantity(quantity)[np.arange(len(chosen)), chosen]
        found = np.bincount(table.layer_index, weights=values, minlength=len(table.layers))
        return found.astype(np.float64)
