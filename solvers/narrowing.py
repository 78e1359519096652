"""The search behind `ILPSolver`: solve, drop what cannot be better, zoom in on what is left, solve again."""

import math
import time
from typing import NamedTuple

import numpy as np

from mpq.arrays import IntArray

from . import pulp_adapter
from .cover_cut import Cut, cover_cut
from .descent import descend
from .exchange import improve
from .linear_program import ROOM, SCALE, linear_program
from .pulp_adapter import Status
from .reduction import Core

PASSES = 40  # each narrows the objective tenfold; float64 has no more decades than that
CUTS = 20  # plans over a budget by less than the code's tolerance that are excluded one by one
ALIKE = 1e-8  # relative to the objective above the floor: plans nearer to each other than that are equal to the code


class Search(NamedTuple):
    """Settings of one search: see `ILPSolver`."""

    backend: str
    gap: float
    time_limit: float
    deadline: float

    def remaining(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def renewed(self) -> "Search":
        """The same with all of its time."""
        return self._replace(deadline=time.monotonic() + self.time_limit)


class Outcome(NamedTuple):
    """What is known about a core: a plan, in choices of groups, and a value that none is below."""

    status: Status
    choice: IntArray | None
    bound: float

    @property
    def is_proved(self) -> bool:
        """Whether it is proved that no plan is better, or that there is none."""
        return self.status in ("optimal", "infeasible")


class _Step(NamedTuple):
    """One pass: the code's plan, and how far from the optimum it was allowed to stop."""

    status: Status
    choice: IntArray | None
    bound: float
    allowance: float = 0.0


def minimise(core: Core, search: Search, best: IntArray | None = None) -> Outcome:
    """Solve a core; ``best`` is a feasible plan to start from.

    Every pass drops the options that are worse than the best plan, scales what is left to the distance between that
    plan and the floor, and solves. The result is called optimal when the distance no longer falls tenfold (so that
    the code saw it finely enough) and the code's own optimum is as good as the best plan known.
    """
    best = _start(core) if best is None else best
    bound = -math.inf
    for _ in range(PASSES):
        tight = core.tightened(best)
        if tight is None or (best is not None and tight.distance(tight.floors(), best) <= 0):
            return Outcome("infeasible", None, math.inf) if best is None else Outcome("optimal", best, core.value(best))
        bound = max(bound, tight.floor())
        if search.remaining() <= 0:
            break
        step = _pass(tight, best, search)
        bound = max(bound, step.bound)
        if step.status == "infeasible" and best is None:
            return Outcome("infeasible", None, math.inf)
        before, best = best, _better(core, best, step.choice)
        if step.status != "optimal" or best is None:
            break
        if before is not None and _is_settled(tight, before, best, step):
            return Outcome("feasible" if step.allowance else "optimal", best, min(bound, core.value(best)))
        if best is before:  # the code contradicts itself: its optimum is worse than a plan it was given
            break
    return unproved(core, best, bound)


def unproved(core: Core, best: IntArray | None, bound: float) -> Outcome:
    """The outcome of a search that stopped early; optimal all the same where the bound says so."""
    if best is None:
        return Outcome("unknown", None, bound)
    value = core.value(best)
    return Outcome("optimal" if bound >= value else "feasible", best, min(bound, value))


def _is_settled(tight: Core, before: IntArray, best: IntArray, step: _Step) -> bool:
    floors = tight.floors()
    left = tight.distance(floors, best)
    if left < 0.1 * tight.distance(floors, before):
        return False
    return step.choice is None or tight.distance(floors, step.choice) - left <= ALIKE * left + step.allowance


def _pass(tight: Core, best: IntArray | None, search: Search) -> _Step:
    """Relaxation, bound, fewer options, integer program."""
    scale, floor = _scale(tight, best), tight.floor()
    program = linear_program(tight, scale)
    if not program.names:
        return _only_plan(tight)
    relaxed = pulp_adapter.run(program, backend=search.backend, time_limit=search.remaining(), relaxed=True)
    if relaxed.status == "infeasible":
        return _Step("infeasible", None, math.inf)
    bound = floor
    if relaxed.duals is not None:
        low, extra = program.bound(relaxed.duals)
        bound = max(floor, floor + low / scale)
        if best is not None:
            limit = scale * tight.distance(tight.floors(), best)
            dropped = (program.column >= 0) & (low + extra[program.column] > limit * (1 + 1e-9))
            smaller = tight.without(dropped).tightened(best) if dropped.any() else tight
            if smaller is None:
                return _Step("optimal", best, bound)
            tight = smaller
    allowance = 0.0 if best is None else _allowance(tight, best, bound, search.gap)
    if best is not None and tight.value(best) - bound <= allowance:
        return _Step("optimal", best, bound, allowance)
    step = _integer_plan(tight, best, search, allowance)
    return step._replace(bound=max(bound, step.bound))


def _integer_plan(tight: Core, best: IntArray | None, search: Search, allowance: float) -> _Step:
    """The integer optimum; plans over a budget by less than the code's tolerance are cut off.

    Where too many of them crowd at the edge, the rows are drawn in instead: the plan is then the best but for those
    within 1e-9 of a budget, and proved only if it is as good as the last plan cut off.
    """
    cuts: list[Cut] = []
    scale, bound = _scale(tight, best), -math.inf
    while search.remaining() > 0:
        room = ROOM if len(cuts) < CUTS else -ROOM
        program = linear_program(tight, scale, cuts, room=room)
        if not program.names:
            return _only_plan(tight)
        answer = pulp_adapter.run(program, backend=search.backend, time_limit=search.remaining(), gap=allowance * scale)
        if answer.values is None:
            is_proof = answer.status == "infeasible" and room > 0
            return _Step("infeasible" if is_proof else "unknown", None, bound, allowance)
        choice = program.choice(answer.values, tight)
        value, is_optimal = tight.value(choice), answer.status == "optimal"
        if is_optimal and room > 0:
            bound = value - allowance
        if tight.is_feasible(choice):
            is_proof = is_optimal and value - allowance <= bound
            return _Step("optimal" if is_proof else "feasible", choice, bound, allowance)
        if not is_optimal or room < 0:
            break
        cuts.append(cover_cut(tight, choice))
    return _Step("unknown", None, bound, allowance)


def _only_plan(tight: Core) -> _Step:
    choice = tight.allowed.argmax(1).astype(np.int64)
    if tight.is_feasible(choice):
        return _Step("optimal", choice, tight.value(choice))
    return _Step("infeasible", None, math.inf)


def _scale(tight: Core, best: IntArray | None) -> float:
    """What takes the distance between the best plan (or the worst of all) and the floor to `SCALE`."""
    floors = tight.floors()
    if best is not None:
        distance = tight.distance(floors, best)
    elif tight.has_goal:
        distance = float(np.where(tight.allowed[tight.steps.group], floors.step_excess, 0).max())
    else:
        distance = float(np.where(tight.allowed, floors.excess[0], 0).max(1).sum())
    return min(SCALE / distance, 1e250) if distance > 0 else 1.0  # the quotient of a denormal is infinite


def _allowance(tight: Core, best: IntArray, bound: float, gap: float) -> float:
    """How far from the optimum a plan may be, in values of the core, for a relative gap of the objective."""
    norm, value = float(tight.problem.norm), tight.value(best)
    if norm == math.inf or not gap:
        return 0.0
    if norm != 1:
        return max(bound, 0.0) * (1 - float((1 - gap) ** norm))
    return gap * min(abs(bound), abs(value)) if bound * value > 0 else 0.0


def _start(core: Core) -> IntArray | None:
    """A first plan: the least of every group where that fits, else the greedy one."""
    tight = core.tightened()
    if tight is None:
        return None
    choice = np.where(tight.allowed, tight.table[0], np.inf).argmin(1).astype(np.int64)
    if not tight.is_feasible(choice):
        found = descend(tight)
        if found is None:
            return None
        choice = found.choice
    return improve(tight, choice)


def _better(core: Core, best: IntArray | None, choice: IntArray | None) -> IntArray | None:
    if choice is None:
        return best
    improved = improve(core, choice)
    return improved if best is None or core.value(improved) < core.value(best) else best
