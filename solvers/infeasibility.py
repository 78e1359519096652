"""Why there is no plan: the smallest value of every budget that can be reached."""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from mpq.arrays import FloatArray, IntArray
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
        where = " with the other budgets in force" if others else ""
        choice, is_proved = minimise(aimed_at(core, name, others))
        if choice is not None and problem.is_feasible(core.expand(choice)):
            return choice
        if choice is None and is_proved:
            where = " on its own, the other budgets conflict already"
            choice, is_proved = minimise(aimed_at(core, name, []))
        if choice is None:
            continue
        reachable[name] = problem.evaluate(core.expand(choice))[1][name]
        doubt = "" if is_proved else ", perhaps less: the time limit was reached"
        sentences.append(f"{name} {reachable[name]:.9g}{where} (budget {budget:.9g}{doubt})")
    if core.max_formats is not None and not reachable:
        raise InfeasibleError(_formats_message(core, minimise), {}, budgets)
    message = f"no plan meets all budgets. The smallest that can be reached: {'; '.join(sentences)}"
    raise InfeasibleError(message, reachable, budgets, _ties_in_the_way(core, reachable))


def aimed_at(core: Core, name: str, kept: Collection[str]) -> Core:
    """The core whose objective is the usage of one budget, under the budgets that are kept."""
    rows = [row for row, other in enumerate(core.names) if other in kept]
    is_sum = name in core.names
    picked = [core.names.index(name) + 1 if is_sum else 0, *(row + 1 for row in rows)]

    def aimed(table: FloatArray) -> FloatArray:
        part = table[picked]
        if not is_sum:
            part[0] = 0.0
        return part

    is_kept = np.array([other in kept for other in core.steps.names], dtype=bool)
    is_aim = np.array([other == name for other in core.steps.names], dtype=bool)
    limited, goal = is_kept[core.steps.owner] & ~core.steps.goal, is_aim[core.steps.owner] & ~core.steps.goal
    return replace(
        core,
        table=aimed(core.table),
        limits=core.limits[rows],
        names=tuple(core.names[row] for row in rows),
        couplings=tuple(replace(pair, table=aimed(pair.table)) for pair in core.couplings),
        steps=replace(core.steps, limit=np.where(limited, core.steps.limit, np.inf), goal=goal),
        format_costs=None,
    )


def _formats_message(core: Core, minimise: Minimise) -> str:
    """How many formats the options that the layers allow need."""
    unlimited = aimed_at(core, "", [])
    ones = np.ones(core.allowed.shape[1])
    choice, _ = minimise(replace(unlimited, max_formats=None, format_costs=ones))
    needed = "more" if choice is None else str(len(np.unique(choice)))
    return f"max_formats={core.max_formats} cannot be kept: the options that the layers allow need {needed}"


def _ties_in_the_way(core: Core, reachable: dict[str, float]) -> list[str]:
    """The ties without which a budget could be met on its own, where they alone stand in the way."""
    problem, blocking = core.problem, []
    for name, budget in problem.budgets.items():
        if name not in reachable or problem.transitions.get(name):
            continue
        table = np.where(problem.allowed, problem.resources[name], np.inf)
        free = table.min(1)
        if not float(free.sum()) + problem.offsets.get(name, 0.0) <= budget < reachable[name]:
            continue
        for tie in problem.ties:
            members = list(tie)
            if table[members].sum(0).min() > free[members].sum():
                blocking.append(f"tie ({', '.join(problem.label(layer) for layer in members)}) for {name}")
    return blocking
