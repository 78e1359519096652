"""The answer to an allocation problem: choices, what they cost, and how much is proved about them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["optimal", "feasible", "heuristic"]


class InfeasibleError(ValueError):
    """No plan meets all budgets.

    Attributes:
        reachable: ``{budget: smallest value that can be reached}``, with the other budgets in force, or alone where
            the others already conflict with each other; offsets are included. Empty where no budget is the cause.
        budgets: ``{budget: what was asked for}``.
        obstacles: in words, the ties and pins without which there would be a plan.
    """

    def __init__(
        self,
        message: str,
        reachable: Mapping[str, float] | None = None,
        budgets: Mapping[str, float] | None = None,
        obstacles: Sequence[str] = (),
    ) -> None:
        super().__init__(message + (f"; in the way: {', '.join(obstacles)}" if obstacles else ""))
        self.reachable = dict(reachable or {})
        self.budgets = dict(budgets or {})
        self.obstacles = tuple(obstacles)


@dataclass(frozen=True)
class Proof:
    """How good an allocation is known to be.

    Attributes:
        status: "optimal": proved, no plan is better. "feasible": an exact method stopped early, the best plan is
            between ``bound`` and the objective; give it more time. "heuristic": found by a rule without such a proof.
        bound: no plan has an objective below this; None where nothing is known.
        gap: (objective − bound) / |objective|; 0 where both are 0; None without a bound.

    Example:
        >>> Proof.of(4.0, 3.0, "feasible")
        Proof(status='feasible', bound=3.0, gap=0.25)
    """

    status: Status
    bound: float | None = None
    gap: float | None = None

    @classmethod
    def of(cls, objective: float, bound: float | None, status: Status) -> "Proof":
        """The proof of an objective by a bound; a bound above the objective by rounding is brought down to it."""
        if bound is None or bound == -math.inf:
            return cls(status)
        bound = min(bound, objective)
        distance = objective - bound
        return cls(status, bound, 0.0 if distance == 0 else distance / abs(objective) if objective else math.inf)


@dataclass(frozen=True, eq=False)
class Allocation:
    """One option a layer.

    Attributes:
        choices: ``(layers,)`` int64, index of the option of every layer.
        objective: recomputed from the choices.
        usage: every resource, recomputed from the choices, offsets included.
        proof: how good it is known to be.
        layers: labels of the layers, empty where the problem has none.
        option_labels: labels of all the options there were.
    """

    choices: npt.NDArray[np.int64]
    objective: float
    usage: Mapping[str, float]
    proof: Proof
    layers: tuple[str, ...]
    option_labels: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Label of the option of every layer."""
        return tuple(self.option_labels[choice] for choice in self.choices)

    def to_frame(self) -> "pd.DataFrame":
        """One row a layer: its option; `attrs` has objective, usage and status."""
        import pandas as pd

        names = self.layers or tuple(f"layer {index}" for index in range(len(self.choices)))
        frame = pd.DataFrame({"option": list(self.options)}, index=pd.Index(names, name="layer"))
        frame.attrs |= {"objective": self.objective, "usage": dict(self.usage), "status": self.proof.status}
        return frame

    def plot(self, ax: Any = None, *, interactive: bool = False) -> Any:
        """The bits of every layer: matplotlib's Axes, or a plotly Figure; it is not shown yet.

        Raises:
            ImportError: without matplotlib or plotly: ``pip install 'mpq-search[explore]'``.
        """
        from mpq.allocation_picture import allocation_picture

        return allocation_picture(self).drawn(ax, interactive=interactive)

    def _repr_html_(self) -> str:
        from mpq.notebook_cards import allocation_card

        return allocation_card(self)

    def __repr__(self) -> str:
        names = self.layers[:12] or [f"layer {index}" for index in range(len(self.choices[:12]))]
        chosen = [self.option_labels[choice] for choice in self.choices[:12]]
        shown = [f"{layer}: {option}" for layer, option in zip(names, chosen, strict=True)]
        more = [f"… {len(self.choices) - 12} more"] if len(self.choices) > 12 else []
        gap = "" if self.proof.gap is None else f", gap {self.proof.gap:.3g}"
        usage = "".join(f", {name} {value:.6g}" for name, value in self.usage.items())
        plan = ", ".join([*shown, *more])
        return f"Allocation(objective {self.objective:.6g}{usage}, {self.proof.status}{gap}, {{{plan}}})"
