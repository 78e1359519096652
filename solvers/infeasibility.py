"""Why there is no plan: the smallest value of every budget that can be reached."""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from mpq.arrays import IntArray
from mpq.problem import InfeasibleError

from .reduction import Core

Minimise = Callable[[Core], tuple[IntArray | None, bool]]


def explain(core: Core, minimise: Minimise) -> IntArray:
    """Raise the InfeasibleError of a core without a plan.

    For every budget the least usage is solved for with the other budgets in force; where those already conflict,
    with none of them. Cost: one or two solves a budget.

    Args:
        core: an infeasible core.
        minimise: the best plan of a core, None where there is none, and whether that is proved.

    Returns:
        A plan that meets all budgets after all, should one turn up.

    Raises:
        InfeasibleError: as asked for.
    """
    problem = core.problem
    budgets = {**problem.budgets, **problem.peak_budgets}
    reachable: dict[str, float] = {}
    sentences = []
    for name, budget in budgets.items():
        others = [other for other in budgets if other != name]
        choice, is_proved = minimise(aimed_at(core, name, others))
        where = "with the other budgets in force" if others else ""
        if choice is not None and problem.is_feasible(core.expand(choice)):
            return choice
        if choice is None and is_proved:
            choice, is_proved = minimise(aimed_at(core, name, []))
            where = "on its own (the other budgets already conflict)"
        if choice is None:
            continue
        reachable[name] = problem.evaluate(core.expand(choice))[1][name]
        found = "cannot get below" if is_proved else "was not brought below (time limit)"
        within = " (within its budget)" if reachable[name] <= budget else ""
        sentences.append(
            f"{name} {found} {reachable[name]:.9g} {where}, budget {budget:.9g}{within}".replace(" ,", ",")
        )
    if not sentences and core.max_formats is not None:
        raise InfeasibleError(_formats_message(core, minimise), {}, budgets)
    message = "no plan meets all budgets: " + "; ".join(sentences) + _ties_message(core, reachable)
    raise InfeasibleError(message, reachable, budgets)


def aimed_at(core: Core, name: str, kept: Collection[str]) -> Core:
    """The core whose objective is the usage of one budget, under the budgets that are kept."""
    rows = [row for row, other in enumerate(core.names) if other in kept]
    head = core.names.index(name) if name in core.names else None
    picked = [0 if head is None else head + 1, *(row + 1 for row in rows)]
    steps = np.array(core.steps.names, dtype=object)
    limited = np.isin(steps, list(kept)) & ~core.steps.goal if len(steps) else core.steps.goal
    goal = (steps == name) & (head is None) & ~core.steps.goal if len(steps) else core.steps.goal

    def chosen(table: np.ndarray) -> np.ndarray:
        part = table[picked]
        if head is None:
            part[0] = 0.0
        return part

    return replace(
        core,
        table=chosen(core.table),
        limits=core.limits[rows],
        names=tuple(core.names[row] for row in rows),
        couplings=tuple(replace(pair, table=chosen(pair.table)) for pair in core.couplings),
        steps=replace(core.steps, limit=np.where(limited, core.steps.limit, np.inf), goal=goal),
        format_costs=None,
    )


def _formats_message(core: Core, minimise: Minimise) -> str:
    table = np.zeros((1, *core.allowed.shape))
    steps = replace(
        core.steps, limit=np.full(len(core.steps.limit), np.inf), goal=np.zeros(len(core.steps.limit), bool)
    )
    free = replace(
        core, table=table, limits=np.zeros(0), names=(), couplings=(), steps=steps, max_formats=None,
        format_costs=np.ones(core.allowed.shape[1]),
    )  # fmt: skip
    choice, _ = minimise(free)
    least = "more" if choice is None else str(len(np.unique(choice)))
    return f"max_formats={core.max_formats} cannot be kept: the allowed options of the layers need {least} formats"


def _ties_message(core: Core, reachable: dict[str, float]) -> str:
    """The ties without which a budget could be met on its own, where they alone stand in the way."""
    problem, blocking = core.problem, []
    for name, budget in problem.budgets.items():
        if name not in reachable or problem.transitions.get(name):
            continue
        table = np.where(problem.allowed, problem.resources[name], np.inf)
        free = table.min(1)
        alone = float(free.sum()) + problem.offsets.get(name, 0.0)
        if not alone <= budget < reachable[name]:
            continue
        for tie in problem.ties:
            members = list(tie)
            if table[members].sum(0).min() > free[members].sum():
                blocking.append(f"({', '.join(problem.label(layer) for layer in members)}) for {name}")
    return f"; ties that stand in the way: {', '.join(blocking)}" if blocking else ""
