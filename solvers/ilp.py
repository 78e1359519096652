"""Integer programming through PuLP, made safe: exact at any scale, no budget exceeded, "optimal" only when proved."""

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from mpq.arrays import IntArray
from mpq.problem import Allocation, AllocationProblem

from . import pulp_adapter
from .exchange import improve
from .features import EVERYTHING
from .greedy import descend
from .infeasibility import explain
from .linear_program import ROOM, SCALE, Cut, linear_program
from .reduction import Core, merge

PASSES = 40  # each narrows the objective tenfold; float64 has no more decades than that
CUTS = 20  # plans over a budget by less than the code's tolerance that are excluded one by one
ALIKE = 1e-8  # relative to the objective above the floor: finer than that the code cannot tell plans apart


@dataclass(frozen=True, kw_only=True)
class ILPSolver:
    """The exact solver for every kind of problem, with any integer-programming code that PuLP finds.

    HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680) states bit allocation as an integer program: one binary a layer and
    option, exactly one of them 1, sums under budgets. Codes solve it to absolute tolerances of about 1e-6, so that
    small scores drown (the optimum of a table in 1e-6 comes out wrong and is called optimal). Hence:

    1. options that no better plan than the best known can contain are dropped, dominated ones too (`Core.tightened`);
    2. the linear relaxation gives prices, the prices a bound that is computed here (`LinearProgram.bound`), the bound
       drops more options;
    3. what is left is scaled to the distance between the best plan and the floor, and solved;
    4. again, while that distance still falls tenfold; only then the answer is called optimal.

    Choices are evaluated from the problem, never read off the code's sums; a plan that exceeds a budget within the
    code's tolerance is cut off and the program solved again.

    Args:
        time_limit: seconds. When they are over, the best plan comes back as "feasible", with its bound.
        gap: accept a plan within this fraction of the optimum; it is then called "feasible", with its bound. Not for
            the max norm, which is solved to the end.
        backend: "auto" (CBC, then HiGHS, then any), or the name of a solver that PuLP lists as available.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> allocation = ILPSolver().solve(problem)
        >>> allocation.options, allocation.usage, allocation.proof.status
        (('int8', 'int4'), {'size': 8.0}, 'optimal')
    """

    time_limit: float = 60.0
    gap: float = 0.0
    backend: str = "auto"

    exact: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = EVERYTHING

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, got {self.time_limit}")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be from 0 up to 1, got {self.gap}")

    def solve(self, problem: AllocationProblem) -> Allocation:
        """The best plan under all budgets.

        Raises:
            InfeasibleError: if there is none, with the smallest reachable value of every budget.
            TimeoutError: if the time was over before any plan was found.
            ValueError: for a backend that PuLP does not find.
        """
        search = Search(self.backend, self.gap, self.time_limit, time.monotonic() + self.time_limit)
        core = merge(problem)
        outcome = minimise(core, search)
        if outcome.status == "infeasible":
            choice = explain(core, lambda aimed: minimise(aimed, search.renewed()).plan)
            outcome = minimise(core, search, choice)
        if outcome.choice is None:
            raise TimeoutError(f"no plan found within time_limit={self.time_limit:g} s: raise it")
        while (nearer := core.refocused(outcome.choice)) is not None:
            core = nearer
            outcome = minimise(core, search, outcome.choice)
        choice = core.expand(outcome.choice)
        if problem.norm == math.inf:
            choice = _least_sum(problem, choice, search)
        status: Literal["optimal", "feasible"] = "optimal" if outcome.status == "optimal" else "feasible"
        return problem.allocation(choice, status=status, bound=core.objective(outcome.bound))


class Search(NamedTuple):
    """Settings of one search."""

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

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    choice: IntArray | None
    bound: float

    @property
    def plan(self) -> tuple[IntArray | None, bool]:
        """The plan, and whether it, or that there is none, is proved."""
        return self.choice, self.status in ("optimal", "infeasible")


def minimise(core: Core, search: Search, best: IntArray | None = None) -> Outcome:
    """Solve a core; ``best`` is a feasible plan to start from."""
    best = _start(core) if best is None else best
    bound = -math.inf
    for _ in range(PASSES):
        tight = core.tightened(best)
        if tight is None or (best is not None and tight.distance(tight.floors(), best) <= 0):
            break
        bound = max(bound, tight.floor())
        if search.remaining() <= 0:
            return _unproved(core, best, bound)
        step = _pass(tight, best, search)
        bound = max(bound, step.bound)
        if step.status == "infeasible" and best is None:
            return Outcome("infeasible", None, math.inf)
        before, best = best, _better(core, best, step.choice)
        if step.status != "optimal" or best is None:
            return _unproved(core, best, bound)
        if step.is_settled(tight, before, best):
            return Outcome("optimal" if step.slack == 0 else "feasible", best, min(bound, core.value(best)))
    else:
        return _unproved(core, best, bound)
    return Outcome("infeasible", None, math.inf) if best is None else Outcome("optimal", best, core.value(best))


class _Step(NamedTuple):
    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    choice: IntArray | None
    bound: float
    slack: float  # how far from the optimum the code was allowed to stop

    def is_settled(self, tight: Core, before: IntArray | None, best: IntArray) -> bool:
        """Whether the code saw the objective finely enough, and nothing better than its optimum is known."""
        if self.choice is None:
            return True
        floors = tight.floors()
        left = tight.distance(floors, best)
        if before is None or left < 0.1 * tight.distance(floors, before):
            return False
        return tight.distance(floors, self.choice) - left <= ALIKE * left + self.slack


def _pass(tight: Core, best: IntArray | None, search: Search) -> _Step:
    """Relaxation, bound, fewer options, integer program."""
    scale, floor = _scale(tight, best), tight.floor()
    program = linear_program(tight, scale)
    if not program.names:
        return _only_plan(tight)
    relaxed = pulp_adapter.run(program, backend=search.backend, time_limit=search.remaining(), relaxed=True)
    bound = floor
    if relaxed.status == "infeasible":
        return _Step("infeasible", None, math.inf, 0.0)
    if relaxed.duals is not None:
        low, extra = program.bound(relaxed.duals)
        bound = max(floor, floor + low / scale)
        if best is not None:
            limit = scale * tight.distance(tight.floors(), best)
            dropped = (program.column >= 0) & (low + extra[program.column] > limit * (1 + 1e-9))
            if dropped.any():
                smaller = tight.without(dropped).tightened(best)
                if smaller is None:
                    return _Step("optimal", best, bound, 0.0)
                tight = smaller
    allowance = 0.0 if best is None else _allowance(tight, best, bound, search.gap)
    if best is not None and tight.value(best) - bound <= allowance:
        return _Step("optimal", best, bound, allowance)
    step = _integer_plan(tight, best, search, allowance)
    return step._replace(bound=max(bound, step.bound))


def _integer_plan(tight: Core, best: IntArray | None, search: Search, allowance: float) -> _Step:
    """The integer optimum; plans over a budget by less than the code's tolerance are cut off.

    Where too many of them crowd at the edge, the rows are drawn in instead: the plan is then the best but for those
    within 1e-9 of a budget, and proved only if it is as good as the plans cut off.
    """
    cuts: list[Cut] = []
    scale, bound = _scale(tight, best), -math.inf
    while search.remaining() > 0:
        program = linear_program(tight, scale, cuts, room=ROOM if len(cuts) < CUTS else -ROOM)
        if not program.names:
            return _only_plan(tight)
        answer = pulp_adapter.run(program, backend=search.backend, time_limit=search.remaining(), gap=allowance * scale)
        if answer.values is None:
            is_proof = answer.status == "infeasible" and len(cuts) < CUTS
            return _Step("infeasible" if is_proof else "unknown", None, bound, allowance)
        choice = program.choice(answer.values, tight)
        is_feasible, value = tight.is_feasible(choice), tight.value(choice)
        if answer.status == "optimal" and len(cuts) < CUTS:
            bound = value - allowance
        if is_feasible:
            is_proof = answer.status == "optimal" and value - allowance <= bound
            return _Step("optimal" if is_proof else "feasible", choice, bound, allowance)
        if answer.status != "optimal" or len(cuts) == CUTS:
            break
        cuts.append(cover(tight, choice))
    return _Step("unknown", None, bound, allowance)


def cover(core: Core, choice: IntArray) -> Cut:
    """A cut that every plan within the budgets keeps and this one does not.

    Minimal cover: groups whose options alone, with all others at their least, exceed a budget cannot all keep an
    option that needs as much. Where couplings have a part in it, only the very plan is cut off.
    """
    over = core.problem.violations(core.expand(choice))
    groups = np.arange(len(choice))
    for name in over:
        if name not in core.names:
            continue
        row = core.names.index(name)
        table, limit = core.table[row + 1], float(core.limits[row])
        if any(pair.table[row + 1].any() for pair in core.couplings):
            continue
        taken = table[groups, choice]
        least = np.where(core.allowed, table, np.inf).min(1)
        order = np.argsort(least - taken, kind="stable")
        reached = math.fsum(least.tolist()) + np.cumsum((taken - least)[order])
        enough = np.flatnonzero(reached > limit + 1e-14 * np.abs(table).max(1).sum())
        if len(enough):
            members = core.allowed & (table >= taken[:, None])
            members[order[enough[0] + 1 :]] = False
            return Cut(members, int(enough[0]))
    members = np.zeros_like(core.allowed)
    members[groups, choice] = True
    return Cut(members, len(choice) - 1)


def _only_plan(tight: Core) -> _Step:
    choice = tight.allowed.argmax(1).astype(np.int64)
    if tight.is_feasible(choice):
        return _Step("optimal", choice, tight.value(choice), 0.0)
    return _Step("infeasible", None, math.inf, 0.0)


def _scale(tight: Core, best: IntArray | None) -> float:
    """What takes the distance between the best plan (or the worst of all) and the floor to `SCALE`."""
    floors = tight.floors()
    if best is not None:
        distance = tight.distance(floors, best)
    elif tight.has_goal:
        distance = float(np.where(tight.allowed[tight.steps.group], floors.step_excess, 0).max())
    else:
        distance = float(np.where(tight.allowed, floors.excess[0], 0).max(1).sum())
    return SCALE / distance if distance > 0 else 1.0


def _allowance(tight: Core, best: IntArray, bound: float, gap: float) -> float:
    """How far from the optimum a plan may be, in values of the core, for a relative gap of the objective."""
    norm = tight.problem.norm
    if norm == math.inf or not gap:
        return 0.0
    if norm != 1:
        return max(bound, 0.0) * (1 - (1 - gap) ** norm)
    value = tight.value(best)
    return gap * min(abs(bound), abs(value)) if bound * value > 0 else 0.0


def _start(core: Core) -> IntArray | None:
    """A first plan: the least of every group where that fits, else the greedy one."""
    tight = core.tightened()
    if tight is None:
        return None
    least = np.where(tight.allowed, tight.table[0], np.inf).argmin(1).astype(np.int64)
    found = descend(tight)
    choice = least if tight.is_feasible(least) else None if found is None else found.choice
    return None if choice is None else improve(tight, choice)


def _better(core: Core, best: IntArray | None, choice: IntArray | None) -> IntArray | None:
    if choice is None:
        return best
    improved = improve(core, choice)
    return improved if best is None or core.value(improved) < core.value(best) else best


def _unproved(core: Core, best: IntArray | None, bound: float) -> Outcome:
    return Outcome("unknown", None, bound) if best is None else Outcome("feasible", best, min(bound, core.value(best)))


def _least_sum(problem: AllocationProblem, choice: IntArray, search: Search) -> IntArray:
    """Among the plans whose worst layer is as good, the one with the least sum; what the maximum leaves open."""
    worst = problem.evaluate(choice)[0]
    scores = np.where(problem.objective <= worst, problem.objective, np.inf)
    core = merge(replace(problem, objective=scores, norm=1))
    first = np.unique(problem.groups, return_index=True)[1]
    outcome = minimise(core, search, choice[first])
    return choice if outcome.choice is None else core.expand(outcome.choice)
