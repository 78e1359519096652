"""From a cost table to a plan and back: solve under budgets, predict what any plan costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.budgets import format_quantity
from mpq.explanation import bindings
from mpq.limits import Limit, apply_budgets
from mpq.options import Option, matching
from mpq.plan import AskedBudget, Plan, check_layers
from mpq.problem import Allocation, AllocationProblem, InfeasibleError, Proof
from mpq.table_entries import entries_of
from mpq.table_problem import build_problem, totals

if TYPE_CHECKING:
    from mpq.frontier import Frontier
    from mpq.tables import CostTable


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """The answer for a table: an option a unit, and what it was asked for.

    Attributes:
        table: the cost table.
        objective: the quantity that was minimised.
        limits: the budgets in base units.
        problem: what was solved.
        allocation: the answer; its objective is that of the problem, without what no option touches.
        robust: a `mpq.solvers.robust_plans.RobustAllocation` where standard errors were guarded against.
    """

    table: CostTable
    objective: str
    limits: tuple[Limit, ...]
    problem: AllocationProblem
    allocation: Allocation
    robust: Any = None

    @cached_property
    def totals(self) -> dict[str, float]:
        """What every quantity comes to, in base units; quantities that add up, even if a norm was minimised."""
        return totals(self.table, self.allocation.choices)

    @property
    def proof(self) -> Proof:
        """How good the answer is; for a sum the bound is one on the total, offsets included."""
        proof = self.allocation.proof
        offset = self.table.offsets.get(self.objective, 0.0) if self.problem.norm == 1 else 0.0
        if not offset or proof.bound is None:
            return proof
        return Proof.of(self.allocation.objective + offset, proof.bound + offset, proof.status)

    @property
    def worst_case(self) -> float | None:
        """The objective at the bad end of the errors guarded against; for a sum offsets are included."""
        if self.robust is None:
            return None
        offset = self.table.offsets.get(self.objective, 0.0) if self.problem.norm == 1 else 0.0
        return float(self.robust.worst_case + offset)

    @property
    def options(self) -> dict[str, str]:
        """{unit label: option label}."""
        labels = np.asarray(self.table.options, dtype=object)[self.allocation.choices]
        return dict(zip(np.asarray(self.table.units).tolist(), labels.tolist(), strict=True))

    def plan(self) -> Plan:
        """The answer as a plan for the model that the table was measured on.

        Raises:
            ValueError: if the table has no layers.
        """
        if not self.table.layers:
            raise ValueError(
                "the table has no layers to make a plan for (it was written by hand?): solve table.problem(budgets) "
                "instead, or write the option of every unit with `mpq solve ... --output UNITS.csv`"
            )
        return _plan(self)


def solve_table(
    table: CostTable,
    budgets: Mapping[str, float | str],
    *,
    pins: Mapping[str, Option | str] | None = None,
    **how: Any,
) -> Plan:
    """The best plan of a table under budgets; needs neither the model nor torch.

    Args:
        table: scores and costs, with the layers they belong to.
        budgets: a limit a quantity, a number in base units or text such as "18%", "4.5 bits", "4 ms".
        pins: name patterns and the option those layers take; `provenance["price_of_pins"]` says what they cost.
        **how: `objective`, `solver`, `norm`, `max_formats`, `format_costs`, `robust` and settings, as in
            `solve_units`.

    Raises:
        InfeasibleError: if no plan keeps the budgets; it says what could be reached.
        ValueError: if a name, a unit or a pattern is wrong, or the table has no layers.
    """
    solution = solve_units(table, budgets, pins=pins, **how)
    plan = solution.plan()
    if not pins:
        return plan
    names = [layer.name for layer in table.layers]
    pinned = dict.fromkeys(name for pattern in pins for name in matching(pattern, names, "pins"))
    free = solve_units(table, budgets, **how)
    price = {name: solution.totals[name] - value for name, value in free.totals.items()}
    return replace(plan, edited=tuple(pinned), provenance={**plan.provenance, "price_of_pins": price})


def solve_units(
    table: CostTable,
    budgets: Mapping[str, float | str],
    *,
    objective: str = "sensitivity",
    solver: Any = "auto",
    pins: Mapping[str, Option | str] | None = None,
    robust: float | None = None,
    norm: float | None = None,
    max_formats: int | None = None,
    format_costs: Any = None,
    **settings: Any,
) -> Solution:
    """The best option of every unit of a table, which need not have layers.

    Args:
        table: scores and costs.
        budgets: a limit a quantity, a number in base units or text such as "18%", "4.5 bits", "4 ms".
        objective: the quantity to minimise; any other may have a budget.
        solver: a name or an instance of `mpq.solvers`.
        pins: name patterns of layers (of units, where there are no layers) and the option they take.
        robust: standard errors to guard against, independent of each other (for a norm: all at once); None for none.
        norm: 1 for the sum (default), `math.inf` for the worst unit, p between.
        max_formats: at most so many different options in use.
        format_costs: {option: what using it anywhere adds to the objective}.
        **settings: the solver's, where it is given by name.

    Raises:
        InfeasibleError: if no plan keeps the budgets; it says what could be reached.
        ValueError: if a name, a unit or a pattern is wrong.

    Example:
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["conv", "fc"], options=["int4", "int8"],
        ...     quantities={"sensitivity": [[2.0, 0.5], [3.0, 0.1]], "size": [[50, 100], [10, 20]]})
        >>> solve_units(table, {"sensitivity": 2.5}, objective="size").options
        {'conv': 'int4', 'fc': 'int8'}
    """
    limits = apply_budgets(table, budgets)
    labels = {pattern: str(option) for pattern, option in (pins or {}).items()}
    features = {"norm": norm, "max_formats": max_formats, "format_costs": format_costs}
    problem = build_problem(table, limits, objective, labels, features)
    if robust is not None and problem.objective_se is None:
        raise ValueError(f"robust needs standard errors: the table has no quantity '{objective}_se'")
    named, cautious = _Named(solver, settings), None
    try:
        if robust is None:
            allocation = named.solve(problem)
        else:
            how = "independent" if problem.norm == 1 else "interval"
            find = import_module("mpq.solvers.robust_plans").robust
            cautious = find(problem, deviations=robust, uncertainty=how, solver=named)
            allocation = cautious.allocation
    except InfeasibleError as error:
        free = {name: build_problem(table, limits, objective, _without(labels, name), features) for name in labels}
        pins_in_the_way = [f"pin {name}={labels[name]}" for name, other in free.items() if _has_a_plan(other, named)]
        raise _in_words(error, table, limits, (*error.obstacles, *pins_in_the_way)) from error
    return Solution(
        table=table, objective=objective, limits=limits, problem=problem, allocation=allocation, robust=cautious
    )


@dataclass(frozen=True)
class _Named:
    """A solver by name and settings, found when it is needed."""

    solver: Any
    settings: Mapping[str, Any]

    def solve(self, problem: AllocationProblem) -> Allocation:
        found: Allocation = import_module("mpq.solvers").solve(problem, self.solver, **self.settings)
        return found


def trade_off(
    table: CostTable,
    resource: str | Sequence[str],
    budgets: Mapping[str, float | str] | None = None,
    *,
    objective: str = "sensitivity",
    pins: Mapping[str, Option | str] | None = None,
    epsilon: float = 0.0,
) -> Frontier:
    """The Pareto frontier of a table: every best exchange of a resource for the objective.

    Args:
        table: scores and costs.
        resource: the quantity to trade the objective for, or up to three of them.
        budgets: limits that every point keeps, on the resource as well where it should end somewhere.
        objective: the quantity that gets better as the resource grows.
        pins: name patterns and the option those layers take.
        epsilon: leave out points that are better by less than this fraction; 0 keeps every one.

    Returns:
        A `Frontier`, in order of the (first) resource.

    Raises:
        InfeasibleError: if no plan keeps the budgets.
        ValueError: if a name, a unit or a pattern is wrong.
    """
    for name in (resource,) if isinstance(resource, str) else resource:
        table.quantity(name)
        if name == objective or name.endswith("_se"):
            raise ValueError(f"resource must be a quantity that adds up, other than the objective, got {name!r}")
    limits = apply_budgets(table, budgets or {})
    labels = {pattern: str(option) for pattern, option in (pins or {}).items()}
    problem = build_problem(table, limits, objective, labels, {})
    try:
        front: Frontier = import_module("mpq.solvers.pareto").pareto_frontier(problem, resource, epsilon=epsilon)
    except InfeasibleError as error:
        raise _in_words(error, table, limits, error.obstacles) from error
    return replace(front, table=table, minimised=objective)


def predict(table: CostTable, plan: Plan) -> dict[str, float]:
    """What the table predicts for a plan, a quantity in base units.

    Raises:
        ValueError: if the plan is for other layers, or takes an option the table does not price.
    """
    choices = choices_of(table, plan)
    if not table.allowed[np.arange(len(choices)), choices].all():
        raise ValueError("the plan takes an option that the table does not allow for its layer: it has no prediction")
    return totals(table, choices)


def choices_of(table: CostTable, plan: Plan) -> NDArray[np.int64]:
    """The plan as an option index a unit of the table.

    Raises:
        ValueError: if the plan is for other layers, cut otherwise, or takes an option the table does not price.
    """
    check_layers(plan, [layer.name for layer in table.layers])
    by_name = {entry.layer.name: entry.choice for entry in plan.entries}
    choices = np.empty(len(table.units), dtype=np.int64)
    for position, layer in enumerate(table.layers):
        choice = by_name[layer.name]
        if isinstance(choice, Option):
            codes: Any = _column(table, choice, layer.name)
        elif choice.granularity != table.granularity:
            raise ValueError(f"{layer.name!r} is cut into {choice.granularity}, the table into {table.granularity}")
        else:
            codes = np.array([_column(table, option, layer.name) for option in choice.options])[choice.codes]
        choices[table.layer_index == position] = codes
    return choices


def _column(table: CostTable, option: Option, layer: str) -> int:
    if str(option) not in table.options:
        raise ValueError(f"the table does not price {str(option)!r} ({layer!r}): it has {', '.join(table.options)}")
    return table.options.index(str(option))


def _without(labels: Mapping[str, str], name: str) -> dict[str, str]:
    return {pattern: option for pattern, option in labels.items() if pattern != name}


def _has_a_plan(problem: AllocationProblem, solver: _Named) -> bool:
    try:
        solver.solve(problem)
    except InfeasibleError:
        return False
    return True


def _in_words(
    error: InfeasibleError, table: CostTable, limits: tuple[Limit, ...], obstacles: tuple[str, ...]
) -> InfeasibleError:
    """The error with the budgets as they were asked, and what can be reached in the same units."""
    parts = []
    for limit in limits:
        if limit.resource in error.reachable:
            reached, measure = error.reachable[limit.resource], table.measures[limit.resource]
            whole = table.reference.get(limit.resource)
            share = f" ({reached / whole:.1%})" if whole else ""
            least = format_quantity(reached, measure)
            if least == format_quantity(limit.value, measure):
                least = f"{reached:.9g} against {limit.value:.9g}"  # too near to tell in three digits
            parts.append(f"{limit.meaning}, but the smallest that can be reached is {least}{share}")
    if not parts:
        return error
    also = " with the other budgets in force, or alone where the others already conflict" if len(limits) > 1 else ""
    message = f"no plan keeps the budgets: {'; '.join(parts)}{also}"
    return InfeasibleError(message, error.reachable, error.budgets, obstacles)


def _plan(solution: Solution) -> Plan:
    table = solution.table
    return Plan(
        entries=entries_of(table, solution.allocation.choices),
        fingerprint=table.fingerprint,
        predicted=solution.totals,
        measures=dict(table.measures),
        proof=solution.proof,
        budgets=tuple(
            AskedBudget(limit.resource, limit.asked, limit.value, table.measures[limit.resource], limit.meaning)
            for limit in solution.limits
        ),
        outside=dict(table.offsets),
        provenance=dict(table.provenance) | _asked(solution) | _binding(solution),
        table=table,
    )


def _binding(solution: Solution) -> dict[str, Any]:
    """Which budgets hold the plan back, in words; only for whole layers, of which there are not millions."""
    if solution.table.granularity != "layer" or not solution.limits:
        return {}
    limits: dict[str, float] = {}
    for limit in solution.limits:
        limits[limit.resource] = min(limit.value, limits.get(limit.resource, math.inf))
    found = bindings(solution.table, solution.allocation.choices, limits, solution.objective)
    return {"binding": [str(binding) for binding in found]}


def _asked(solution: Solution) -> dict[str, Any]:
    """What was asked beyond a sum under budgets, for the plan's provenance."""
    asked: dict[str, Any] = {}
    if solution.objective != "sensitivity":
        asked["objective"] = solution.objective
    if solution.problem.norm != 1:
        asked["norm"] = "max" if solution.problem.norm == math.inf else solution.problem.norm
    if solution.problem.max_formats is not None:
        asked["max_formats"] = solution.problem.max_formats
    if solution.robust is not None:
        found = solution.robust
        asked["robust"] = {
            "standard_errors": found.deviations,
            "worst_case": solution.worst_case,
            "status": found.proof.status,
            "gap": found.proof.gap,
        }
    return asked
