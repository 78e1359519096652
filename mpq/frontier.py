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


class FrontierPoint(NamedTuple):
    """One allocation of a frontier: its resource (several: an array), its objective and the option of every layer."""

    resource: float | FloatArray
    objective: float
    choices: npt.NDArray[np.unsignedinteger]


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

    def __len__(self) -> int:
        return len(self.objective)

    def __getitem__(self, index: int) -> FrontierPoint:
        resource = self.resource[index]
        return FrontierPoint(
            resource if self.resource.ndim > 1 else float(resource), float(self.objective[index]), self.choices[index]
        )

    def __iter__(self) -> Iterator[FrontierPoint]:
        return (self[index] for index in range(len(self)))

    def allocation(self, at: float | Sequence[float] | Mapping[str, float]) -> Allocation:
        """The best allocation whose resource is at most ``at``.

        "optimal" in its proof says that no allocation within ``at`` (and the budgets of the problem) is better. A
        frontier with an epsilon gives "feasible" and the bound that follows from it, one over allocations in a given
        order, a heuristic or a measured one "heuristic". Of a measured frontier the objective is the measured one.

        Args:
            at: the most that the resource may be; for several resources one number each, in order or by name.

        Raises:
            InfeasibleError: where no point is within, with the range that can be reached.
        """
        limits = self._limits(at)
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

    def _limits(self, at: float | Sequence[float] | Mapping[str, float]) -> FloatArray:
        if isinstance(at, Mapping):
            for name in at:
                if name not in self.names:
                    raise ValueError(f"at={name!r} must be {', '.join(self.names)}{did_you_mean(name, self.names)}")
            at = [at.get(name, np.inf) for name in self.names]
        limits = np.atleast_1d(np.asarray(at, dtype=np.float64))
        if limits.shape != (len(self.names),) or np.isnan(limits).any():
            raise ValueError(f"at must be a number for each of {', '.join(self.names)}, got {at!r}")
        return limits

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
        """One row a point: the resources, the objective, then the option of every layer by its label."""
        import pandas as pd

        rows = self.resource.reshape(len(self), -1)
        numbers = {name: rows[:, column] for column, name in enumerate(self.names)}
        labels = pd.Index(self.options)
        chosen = {
            layer: pd.Categorical.from_codes(self.choices[:, column].astype(np.int64), categories=labels)
            for column, layer in enumerate(self.layers)
        }
        return pd.DataFrame({**numbers, "objective": self.objective, **chosen})

    def __repr__(self) -> str:
        rows = self.resource.reshape(len(self), -1)
        ends = zip(self.names, rows.min(0), rows.max(0), strict=True)
        spans = "".join(f", {name} {low:.6g} … {high:.6g}" for name, low, high in ends)
        epsilon = f", epsilon {self.epsilon:g}" if self.epsilon else ""
        order = ", in the order of the priorities" if self.is_restricted else ""
        span = f"objective {self.objective.max():.6g} … {self.objective.min():.6g}"
        how = ", measured" if self.is_measured else ", heuristic" if self.is_heuristic else ""
        return f"Frontier({len(self)} points{spans}, {span}{epsilon}{order}{how})"
