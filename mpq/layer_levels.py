"""Layers of a plan of rows or groups, finer or coarser as a whole: a problem of layers for any number of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.plan_keys import key_of
from mpq.problem import AllocationProblem
from mpq.slope_steps import Slopes

if TYPE_CHECKING:
    from mpq.evaluator import Evaluator
    from mpq.measured_loss import MeasuredLoss

STEP = 2**0.5  # from a level's factor to the next: a quarter of a bit, where scores fall by 4 a bit
REACH = 7  # levels on each side of the start: factors of 2**-3.5 to 2**3.5, nearly two bits
TAKEN = frozenset({"several budgets"})  # what a problem may ask beyond a sum under one budget


@dataclass(frozen=True, eq=False)
class LayerLevels:
    """What the units of each layer take if the layer as a whole is more, or less, sensitive than the table says.

    Measuring one unit of a million says nothing, and the table ranks the units of one layer well: they see the same
    inputs and the same error downstream. What it gets wrong is how layers compare. So a layer's scores get a factor θ,
    and at the prices λ of the budgets (Lagrange multipliers of the table's optimum) its unit u takes

        c_u(θ) = argmin_c  θ s[u, c] + Σ_r λ_r cost_r[u, c]

    Every factor is a level: an option of the layer, with the sum of its units' scores and costs. `problem` chooses a
    level a layer under the same budgets, exactly; the level of θ = 1 is what the start plan has. Where all units of a
    layer keep their options from one factor to the next, both are one level.

    Args:
        fine: the problem of units, without peaks, pairs and the like; ties within layers, of sums of their units.
        layer_index: (units,) the layer that each belongs to; every layer has one.
        start: (units,) a plan near the optimum of the table that keeps the budgets.
        step: ratio of the factors of neighbouring levels.
        reach: levels on each side of the start.
        names: of the layers; layers of a kind may have factors in common (`mpq.learned_scores`).

    Cost: units × options × levels to make them; a byte, or two, a unit and level.

    Raises:
        ValueError: if the problem asks for what levels cannot keep.

    Example:
        Two layers of two units. The first layer finer by one of its units is paid for by one of the second:

        >>> scores, sizes = [[4, 1], [8, 2], [4, 1], [9, 2]], [[2, 4]] * 4
        >>> fine = AllocationProblem(scores, resources={"size": sizes}, budgets={"size": 12})
        >>> levels = LayerLevels(fine, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), step=2.5, reach=1)
        >>> levels.expanded([2, 0]), levels.problem.resources["size"].tolist()
        (array([1, 1, 0, 0]), [[4.0, 6.0, 8.0], [4.0, 6.0, 8.0]])
    """

    fine: AllocationProblem
    layer_index: NDArray[np.int64]
    start: NDArray[np.int64]
    step: float = STEP
    reach: int = REACH
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        asked = sorted(self.fine.features - TAKEN) + ["ties across layers"] * _ties_cross(self.fine, self.layer_index)
        if asked:
            raise ValueError(f"levels of layers keep sum budgets alone, the problem has {', '.join(asked)}")

    @staticmethod
    def fit(fine: AllocationProblem, layer_index: NDArray[np.int64]) -> bool:
        """Whether a problem asks for no more than levels can keep."""
        return fine.features <= TAKEN and not _ties_cross(fine, layer_index)

    @cached_property
    def plans(self) -> NDArray[np.unsignedinteger]:
        """(levels, units): the option of every unit if its layer is at a level; the start plan's in the middle row."""
        narrow = np.uint8 if len(self.fine.options) <= 256 else np.uint16
        prices = import_module("mpq.solvers.multipliers").shadow_prices(self.fine)
        price = sum(
            (value * self.fine.resources[name] for name, value in prices.items()), np.zeros_like(self.fine.objective)
        )
        found = np.empty((2 * self.reach + 1, len(self.start)), dtype=narrow)
        scores, price = self._tied(self.fine.objective), self._tied(price)
        for level in range(len(found)):
            each = np.argmin(self.step ** (level - self.reach) * scores + price, axis=1)
            found[level] = each[self.fine.groups] if self.fine.ties else each
        found[self.reach] = self.start
        return found

    def _tied(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(tied units, options): sums over the units of every tie; the values themselves without ties."""
        if not self.fine.ties:
            return values
        return np.column_stack([np.bincount(self.fine.groups, column) for column in values.T])

    @cached_property
    def problem(self) -> AllocationProblem:
        """A level a layer: sums of the units' scores and costs, the budgets of the units."""
        plans, fine = self.plans, self.fine
        scores = self._summed(fine.objective)
        changed = np.ones(scores.shape, dtype=bool)  # from the neighbour that is nearer to the start
        for level in range(len(plans)):
            if level != self.reach:
                nearer = level + (1 if level < self.reach else -1)
                changed[:, level] = self._counts(plans[level] != plans[nearer]) > 0
        return AllocationProblem(
            np.where(changed, scores, np.inf),
            resources={name: self._summed(cost) for name, cost in fine.resources.items()},
            budgets=fine.budgets,
            offsets={name: value for name, value in fine.offsets.items() if name in fine.resources},
            layers=self.names,
            options=[f"θ = {self.step ** (level - self.reach):.3g}" for level in range(len(plans))],  # type: ignore[arg-type]
        )

    @property
    def middle(self) -> NDArray[np.int64]:
        """(layers,): the levels of the start plan."""
        return np.full(self._layers, self.reach, dtype=np.int64)

    def expanded(self, levels: ArrayLike) -> NDArray[np.int64]:
        """(units,): the option of every unit, from a level a layer."""
        taken = self.plans[np.asarray(levels)[self.layer_index], np.arange(len(self.start))]
        return np.asarray(taken, dtype=np.int64)

    @property
    def _layers(self) -> int:
        return int(self.layer_index.max()) + 1

    def slopes(self, around: Slopes) -> Slopes:
        """Slopes of units as (layers, levels)."""
        return Slopes(self._summed(around.first), self._summed(around.second), around.divergence)

    def _summed(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(layers, levels): sums of (units, options) over the units of each layer at each level."""
        rows = np.arange(len(self.start))
        return np.column_stack([self._counts(values[rows, plan]) for plan in self.plans])

    def _counts(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(self.layer_index, values, minlength=self._layers), dtype=np.float64)


def _ties_cross(fine: AllocationProblem, layer_index: NDArray[np.int64]) -> bool:
    """Whether units of different layers are tied."""
    return any(len(np.unique(layer_index[list(tie)])) > 1 for tie in fine.ties)


@dataclass(eq=False)
class LevelEvaluator:
    """Measures plans that are given as a level a layer, with an evaluator of plans of units; the same budget."""

    evaluator: Evaluator
    levels: LayerLevels

    def __post_init__(self) -> None:
        self.measured: dict[bytes, MeasuredLoss] = {}

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.evaluator.samples

    @property
    def spent(self) -> float:
        """Evaluations of the whole data so far."""
        return self.evaluator.spent

    @property
    def left(self) -> float:
        """Evaluations of the whole data that may still be made."""
        return self.evaluator.left

    def measure(self, choices: ArrayLike, samples: int | None = None) -> MeasuredLoss:
        """What a plan loses on the first samples; raises what the evaluator raises."""
        codes = np.asarray(choices, dtype=np.int64)
        found, key = self.evaluator.measure(self.levels.expanded(codes), samples), key_of(codes)
        if key not in self.measured or found.samples > self.measured[key].samples:
            self.measured[key] = found
        return found

    def measure_all(self, plans: Sequence[ArrayLike], samples: int | None = None) -> list[MeasuredLoss]:
        """Several plans; workers on one storage share them."""
        self.evaluator.prepare((self.levels.expanded(plan) for plan in plans), samples)
        return [self.measure(plan, samples) for plan in plans]

    def slopes(self, choices: ArrayLike, samples: int | None = None) -> Slopes | None:
        """How the divergence changes when one layer takes another level."""
        found = self.evaluator.slopes(self.levels.expanded(choices), samples)
        return None if found is None else self.levels.slopes(found)
