"""The one place that talks to PuLP, 3.3.1 to 4.x: a program in, an answer whose status means what it says out."""

import inspect
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpq.arrays import FloatArray
from mpq.suggestions import did_you_mean

from .linear_program import LinearProgram, Row

PREFERRED = ("CBC", "HiGHS")

# CBC 2.10's preprocessing strengthens rows wrongly: on rows whose terms nearly fill the budget it calls worse plans
# optimal, or feasible programs infeasible. Off, with tolerances below the distances that matter, none of that was seen.
CBC_OPTIONS = ("preprocess off", "integerTolerance 1e-9", "primalTolerance 1e-9")
HIGHS_OPTIONS = {"primal_feasibility_tolerance": 1e-9, "mip_feasibility_tolerance": 1e-9}

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a code said.

    Attributes:
        status: "optimal" within the gap asked for; "feasible": stopped early with a plan; "infeasible"; "unknown":
            stopped early without one.
        values: of the columns.
        duals: prices of ``program.rows``, for relaxations.
    """

    status: Status
    values: FloatArray | None
    duals: FloatArray | None


def run(program: LinearProgram, *, backend: str, time_limit: float, gap: float = 0.0, relaxed: bool = False) -> Answer:
    """Solve a program, or its linear relaxation, on one thread.

    Args:
        program: what to solve.
        backend: "auto", "CBC", "HiGHS" or the name of any solver that PuLP lists as available.
        time_limit: seconds.
        gap: absolute, in units of the program's objective.
        relaxed: solve the linear relaxation, for its prices.

    Raises:
        ValueError: for a backend that is not there.
    """
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    columns = [
        model.add_variable(name, 0, upper, pulp.LpInteger if whole else pulp.LpContinuous)
        for name, upper, whole in zip(program.names, program.upper.tolist(), program.integer.tolist(), strict=True)
    ]
    # A list of terms makes an expression at once, where lpSum adds them up one by one; PuLP 4 renamed the constructor.
    expression = getattr(pulp.LpAffineExpression, "from_list", pulp.LpAffineExpression)
    model.setObjective(expression(list(zip(columns, program.cost.tolist(), strict=True))))
    for number, row in enumerate((*program.one_hot, *program.rows)):
        terms = expression([(columns[j], v) for j, v in zip(row.columns.tolist(), row.values.tolist(), strict=True)])
        model += _related(terms, row), f"r{number}"
    status = _solved(pulp, model, backend, time_limit=time_limit, gap=gap, relaxed=relaxed)
    values = duals = None
    if status in ("optimal", "feasible"):
        values = np.array([column.varValue or 0.0 for column in columns])
    if relaxed and status == "optimal":
        first = len(program.one_hot)
        rows = [model.get_constraint_by_name(f"r{number}") for number in range(first, first + len(program.rows))]
        duals = np.array([row.pi or 0.0 for row in rows])
    return Answer(status, values, duals)


def available() -> list[str]:
    """Names of the solvers PuLP can use here, the preferred ones first."""
    import pulp

    found = pulp.listSolvers(onlyAvailable=True)
    first = [name for name in PREFERRED if name in found or (name == "CBC" and _cbc(pulp).available())]
    return [*first, *(name for name in found if name not in first)]


def _related(terms: Any, row: Row) -> Any:
    return terms == row.rhs if row.is_equality else terms <= row.rhs


def _status(model: Any, solved: Any) -> Status:
    """PuLP 3 keeps the truth in ``sol_status`` (``status`` calls a plan at the time limit optimal), PuLP 4 returns it.

    A gap limit is reached only where a gap was asked for.
    """
    if hasattr(solved, "has_solution"):
        if solved.status.name in ("Optimal", "GapLimit"):
            return "optimal"
        if solved.status.name == "Infeasible":
            return "infeasible"
        return "feasible" if solved.has_solution else "unknown"
    if model.sol_status in (1, 2):
        return "optimal" if model.sol_status == 1 else "feasible"
    return "infeasible" if model.status == -1 else "unknown"  # an "integer infeasible" has sol_status 0


def _cbc(pulp: Any, **settings: Any) -> Any:
    """CBC, by the path of the one that PuLP 3 brings along where there is one (its own class is deprecated)."""
    path = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    # One thread is CBC's default; asked for one, it starts a worker and can wait for it forever.
    settings = {name: value for name, value in settings.items() if name != "threads"}
    return pulp.COIN_CMD(path=path, msg=False, **settings)


def _solved(pulp: Any, model: Any, backend: str, *, time_limit: float, gap: float, relaxed: bool) -> Status:
    """Solve with tight settings; once more with the code's own where it gives up on those before the time is over."""
    start = time.monotonic()
    for is_tight in (True, False):
        left = max(time_limit - (time.monotonic() - start), 0.01)
        wanted = {"mip": not relaxed, "timeLimit": left, "gapAbs": gap, "gapRel": 0.0, "threads": 1}
        try:
            status = _status(model, model.solve(_solver(pulp, backend, wanted, is_tight=is_tight)))
        except pulp.PulpSolverError:  # CBC without preprocessing can crash on what it finds infeasible
            if not is_tight:
                raise
            continue
        if status != "unknown" or time.monotonic() - start > 0.9 * time_limit:
            break
    return status


def _solver(pulp: Any, backend: str, wanted: dict[str, float], *, is_tight: bool) -> Any:
    names = available()
    if not names:
        raise ValueError("PuLP finds no solver: install one, for example with `pip install highspy`")
    name = names[0] if backend == "auto" else backend
    if name not in names:
        raise ValueError(f"backend must be a solver PuLP finds here, got {backend!r}{did_you_mean(backend, names)}")
    if name == "CBC":
        return _cbc(pulp, **wanted, options=list(CBC_OPTIONS) if is_tight else None)
    if name == "HiGHS":
        return pulp.HiGHS(msg=False, **wanted, **(HIGHS_OPTIONS if is_tight else {}))
    kind = type(pulp.getSolver(name, msg=False))
    taken = inspect.signature(kind.__init__).parameters
    return kind(msg=False, **{key: value for key, value in wanted.items() if key in taken})
