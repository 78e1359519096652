"""The trade-off between the objective and resources: every allocation that no other beats in all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mpq.arrays import FloatArray
from mpq.problem import BUDGET_TOLERANCE, Allocation, AllocationProblem, InfeasibleError
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from mpq.frontier_gain import FrontierGain
    from mpq.limits import Limit
    from mpq.plan import Plan
    from mpq.tables import CostTable


class FrontierPoint(NamedTuple):
    """One allocation of a frontier: its resource (several: an array), its objective and the option of every layer."""

    resource: float | FloatArray
    objective: float
    choices: npt.NDArray[np.unsignedinteger]


At = float | str | FrontierPoint | Sequence[float | str] | Mapping[str, float | str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Frontier:
    """Non-dominated allocations of a problem, in the order of their (first) resource.

    Attributes:
        problem: what they are allocations of; its budgets hold for all of them.
        names: the resources traded against the objective.
        resource: ``(points,)``, or ``(points, resources)`` where there are several; offsets are included.
        objective: ``(points,)``.
        choices: ``(points, layers)`` unsigned, index of the option of every layer.
        epsilon: 0 where every non-dominated allocation is here; see `pareto_frontier` for what it promises otherwise.
        floor: ``(1 + resources,)``, what ``epsilon`` is relative to is counted from here; the objective's first.
        is_restricted: whether only allocations in the order of given priorities were looked at.
        is_heuristic: whether better allocations may exist that were never looked at.
        standard_error: ``(points,)`` of a measured objective.
        provenance: how the objective was measured, under "measured"; empty where it is the problem's own.
        table: the cost table that the problem comes from; with it points become plans and numbers have units.
        minimised: the table's quantity that is the problem's objective.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             options=("int4", "int8"))
        >>> front = Frontier(problem=problem, names=("size",), resource=[6, 8, 12], objective=[8, 4, 1.5],
        ...                  choices=[[0, 0], [1, 0], [1, 1]])
        >>> front
        Frontier(3 points, size 6 … 12, objective 8 … 1.5)
        >>> front.allocation(at=11).options
        ('int8', 'int4')
        >>> front[-1].objective
        1.5
    """

    problem: AllocationProblem
    names: tuple[str, ...]
    resource: FloatArray
    objective: FloatArray
    choices: npt.NDArray[np.unsignedinteger]
    epsilon: float = 0.0
    floor: FloatArray = cast(FloatArray, (0.0,))  # noqa: RUF009
    is_restricted: bool = False
    is_heuristic: bool = False
    standard_error: FloatArray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    table: "CostTable | None" = field(default=None, repr=False)
    minimised: str = "objective"

    @property
    def is_measured(self) -> bool:
        """Whether the objective was measured on a model, and is not that of the problem."""
        return "measured" in self.provenance

    def __post_init__(self) -> None:
        kind = np.uint8 if len(self.problem.options) <= 256 else np.uint16
        arrays = {"resource": np.float64, "objective": np.float64, "floor": np.float64, "choices": kind}
        if self.standard_error is not None:
            arrays["standard_error"] = np.float64
        for name, dtype in arrays.items():
            array = np.asarray(getattr(self, name), dtype=dtype).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        points, width = len(self.objective), len(self.names)
        shapes = {
            "resource": (points,) if width == 1 else (points, width),
            "objective": (points,),
            "choices": (points, len(self.problem.objective)),
        }
        if self.standard_error is not None:
            shapes["standard_error"] = (points,)
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} of a frontier must have shape {shape}, got {getattr(self, name).shape}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Labels of the layers."""
        return tuple(self.problem.label(layer) for layer in range(len(self.problem.objective)))

    @property
    def options(self) -> tuple[str, ...]:
        """Labels of the options that ``choices`` are indices of."""
        return self.problem.options

    @property
    def objective_name(self) -> str:
        """What the objective is called: a quantity of the table, or what was measured."""
        return str(self.provenance["measured"]) if self.is_measured else self.minimised

    @property
    def measures(self) -> dict[str, str]:
        """Base unit of every resource; empty without a table."""
        return {} if self.table is None else {name: self.table.measures[name] for name in self.names}

    def __len__(self) -> int:
        return len(self.objective)

    def __getitem__(self, index: int) -> FrontierPoint:
        resource = self.resource[index]
        return FrontierPoint(
            resource if self.resource.ndim > 1 else float(resource), float(self.objective[index]), self.choices[index]
        )

    def __iter__(self) -> Iterator[FrontierPoint]:
        return (self[index] for index in range(len(self)))

    def allocation(self, at: At) -> Allocation:
        """The best allocation whose resource is at most ``at``.

        "optimal" in its proof says that no allocation within ``at`` (and the budgets of the problem) is better. A
        frontier with an epsilon gives "feasible" and the bound that follows from it, one over allocations in a given
        order, a heuristic or a measured one "heuristic". Of a measured frontier the objective is the measured one.

        Args:
            at: the most that the resource may be: a number in base units, or text as in a budget (``"3 ms"``, and
                ``"18%"`` where the frontier knows its table); for several resources one each, in order or by name; or
                a point of this frontier.

        Raises:
            InfeasibleError: where no point is within, with the range that can be reached.
            ValueError: where a limit is no number or has the wrong unit.
        """
        return self._allocation(np.array([limit.value for limit in self._limits(at)]))

    def plan(self, at: At) -> "Plan":
        """The best plan whose resource is at most ``at``; arguments and proof as of `allocation`.

        Its predictions are the table's. What was measured of it, on a measured frontier, is in its provenance, under
        "frontier", and is no measurement on held-out data.

        Raises:
            InfeasibleError: where no point is within, with the range that can be reached.
            ValueError: where the frontier has no table, its table no layers, or a limit is wrong.

        Example:
            >>> from mpq.layers import Layer
            >>> from mpq.tables import CostTable
            >>> layers = tuple(Layer(name, "linear", (4, 8), 32, 32, (1, 8), (1, 4)) for name in ("stem", "head"))
            >>> table = CostTable(units=["stem", "head"], options=["int4", "int8"], layers=layers,
            ...     quantities={"sensitivity": [[5, 1], [3, 0.5]], "size": [[2, 4], [4, 8]]})
            >>> table.pareto("size").plan(at="11 B").options
            {'stem': 'int8', 'head': 'int4'}
        """
        from mpq.planning import Solution

        if self.table is None:
            raise ValueError(
                "this frontier does not know its table and has allocations alone: take frontier.allocation(at=...), "
                "or make it by table.pareto(resource), mpq.pareto or mpq.evolve"
            )
        limits = self._limits(at)
        found = self._allocation(np.array([limit.value for limit in limits]))
        asked = (*limits, *self._other_limits())
        solution = Solution(
            table=self.table, objective=self.minimised, limits=asked, problem=self.problem, allocation=found
        )
        plan = solution.plan()
        if not self.is_measured:
            return plan
        point = int((self.choices == found.choices).all(1).argmax())
        measured: dict[str, Any] = {"measured": self.objective_name, "value": float(self.objective[point])}
        if self.standard_error is not None:
            measured["standard_error"] = float(self.standard_error[point])
        return replace(plan, provenance={**plan.provenance, "frontier": measured})

    def knee(self) -> FrontierPoint:
        """The point after which more of the resource buys little: farthest below the line between both ends.

        argmin over points of Σ over coordinates of (x − min x) / (max x − min x), resources and objective alike; with
        one resource that is the largest distance from the chord between the ends. After Das (1999, "On characterizing
        the knee of the Pareto curve", Structural Optimization 18), who measures from the plane through the best points
        of every objective (from memory); with several resources the sum is a simpler stand-in for that plane. The
        point depends on where the frontier ends: a budget moves it.

        Example:
            >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]})
            >>> front = Frontier(problem=problem, names=("size",), resource=[6, 8, 12], objective=[8, 4, 1.5],
            ...                  choices=[[0, 0], [1, 0], [1, 1]])
            >>> front.knee().resource
            8.0
        """
        points = np.column_stack([self.resource.reshape(len(self), -1), self.objective])
        span = np.ptp(points, axis=0)
        return self[int(((points - points.min(0)) / np.where(span > 0, span, 1.0)).sum(1).argmin())]

    def compare(self, other: "Frontier") -> "FrontierGain":
        """What this frontier gains on another at equal resource; see `mpq.frontier_gain.FrontierGain`.

        Raises:
            ValueError: if they trade different things, or several resources.
        """
        from mpq.frontier_gain import FrontierGain

        return FrontierGain(self, other)

    def plot(self, ax: Any = None, *, interactive: bool = False, **marks: Any) -> Any:
        """A picture of the trade-off: matplotlib's Axes to build on, or a plotly Figure; it is not shown.

        One resource: a staircase of points, error bars where they are measured. Two: a scatter of both, coloured by
        the objective, or in three dimensions where it is interactive. Three: the third as the size of the points.

        Args:
            ax: Axes to draw on; new ones by default.
            interactive: a plotly Figure instead.
            **marks: what else to show, as in `mpq.frontier_picture.frontier_picture`: plan, points, budget, uniform,
                others.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
        """
        from mpq.frontier_picture import frontier_picture

        return frontier_picture(self, **marks).drawn(ax, interactive=interactive)

    def _allocation(self, limits: FloatArray) -> Allocation:
        inside = self._within(limits)
        if not inside.any():
            asked = dict(zip(self.names, limits.tolist(), strict=True))
            raise InfeasibleError(self._range_message(limits), self._least(), asked)
        best = int(np.where(inside, self.objective, np.inf).argmin())
        if self.is_measured:
            found = self.problem.allocation(self.choices[best], status="heuristic")
            return replace(found, objective=float(self.objective[best]))
        if self.is_restricted or self.is_heuristic:
            return self.problem.allocation(self.choices[best], status="heuristic")
        if not self.epsilon:
            return self.problem.allocation(self.choices[best], status="optimal")
        return self.problem.allocation(self.choices[best], status="feasible", bound=self._bound(limits))

    def _limits(self, at: At) -> "tuple[Limit, ...]":
        """One limit a resource, infinite where none was asked for."""
        from mpq.limits import limit_of

        given = at.resource if isinstance(at, FrontierPoint) else at
        if isinstance(given, Mapping):
            for name in given:
                if name not in self.names:
                    raise ValueError(f"at={name!r} must be {', '.join(self.names)}{did_you_mean(name, self.names)}")
            given = [given.get(name, np.inf) for name in self.names]
        several = list(given) if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else [given]
        if len(several) != len(self.names) or any(isinstance(each, float) and np.isnan(each) for each in several):
            raise ValueError(f"at must be a number for each of {', '.join(self.names)}, got {at!r}")
        return tuple(limit_of(name, asked, self.table) for name, asked in zip(self.names, several, strict=True))

    def _other_limits(self) -> "Iterator[Limit]":
        """The budgets of the problem that are not those of the point."""
        from mpq.limits import limit_of

        budgets = {**self.problem.budgets, **self.problem.peak_budgets}
        return (limit_of(name, value, self.table) for name, value in budgets.items() if name not in self.names)

    def _within(self, limits: FloatArray) -> npt.NDArray[np.bool_]:
        room = np.where(np.isfinite(limits), BUDGET_TOLERANCE * np.abs(limits), 0.0)
        inside = self.resource.reshape(len(self), -1) <= limits + room
        return np.asarray(np.logical_and.reduce(inside, axis=1))

    def _bound(self, limits: FloatArray) -> float:
        """What no allocation within the limits is below: its stand-in here is within slightly wider ones."""
        wider = limits + self.epsilon * (limits - self.floor[1:])
        best = float(self.objective[self._within(wider)].min())
        return best - self.epsilon / (1 + self.epsilon) * (best - float(self.floor[0]))

    def _least(self) -> dict[str, float]:
        return dict(zip(self.names, self.resource.reshape(len(self), -1).min(0).tolist(), strict=True))

    def _range_message(self, limits: FloatArray) -> str:
        rows = self.resource.reshape(len(self), -1)
        reach = [
            f"{name} from {low:.9g} to {high:.9g} (asked for {limit:.9g})"
            for name, low, high, limit in zip(self.names, rows.min(0), rows.max(0), limits, strict=True)
        ]
        together = " together" if len(reach) > 1 else ""
        return f"no point of the frontier is within the limits{together}; it reaches {', '.join(reach)}"

    def to_frame(self) -> "pd.DataFrame":
        """One row a point: the resources, the objective, then the option of every layer by its label.

        A measured frontier has a column ``standard_error`` behind the objective. ``attrs["measures"]`` holds the units
        of the resources, ``attrs["objective"]`` what the objective is.
        """
        import pandas as pd

        rows = self.resource.reshape(len(self), -1)
        numbers = {name: rows[:, column] for column, name in enumerate(self.names)} | {"objective": self.objective}
        if self.standard_error is not None:
            numbers["standard_error"] = self.standard_error
        labels = pd.Index(self.options)
        chosen = {
            layer: pd.Categorical.from_codes(self.choices[:, column].astype(np.int64), categories=labels)
            for column, layer in enumerate(self.layers)
        }
        frame = pd.DataFrame({**numbers, **chosen})
        frame.attrs |= {"measures": self.measures, "objective": self.objective_name}
        return frame

    def __repr__(self) -> str:
        rows = self.resource.reshape(len(self), -1)
        spans = "".join(f", {name} {self._span(name, column)}" for name, column in zip(self.names, rows.T, strict=True))
        epsilon = f", epsilon {self.epsilon:g}" if self.epsilon else ""
        order = ", in the order of the priorities" if self.is_restricted else ""
        span = f"{self.objective_name} {self.objective.max():.6g} … {self.objective.min():.6g}"
        how = ", measured" if self.is_measured else ", heuristic" if self.is_heuristic else ""
        return f"Frontier({len(self)} points{spans}, {span}{epsilon}{order}{how})"

    def _span(self, name: str, values: FloatArray) -> str:
        from mpq.budgets import format_quantity

        if name not in self.measures:
            return f"{values.min():.6g} … {values.max():.6g}"
        return " … ".join(format_quantity(float(end), self.measures[name]) for end in (values.min(), values.max()))

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import frontier_card

        return frontier_card(self)
