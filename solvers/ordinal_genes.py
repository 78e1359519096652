"""Plans as rows of small whole numbers: a gene a group of tied layers, its options counted from the cheapest on."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpq.arrays import BoolArray, FloatArray, IntArray

from .reduction import Core, Coupling

GeneArray = npt.NDArray[np.int16]  # (plans, groups)


class Costs(NamedTuple):
    """What a population costs, known before any plan is scored.

    Attributes:
        sums: ``(budgets, plans)`` usage of the sum budgets, offsets left out.
        steps: ``(rows, plans)`` sums of the step rows.
        excess: ``(plans,)`` by how much limits are exceeded, each relative to its range, added up; 0: all are kept.
        places: ``(plans, groups)``, those of the options in the flattened table.
    """

    sums: FloatArray
    steps: FloatArray
    excess: FloatArray
    places: IntArray

    def pick(self, plans: IntArray) -> "Costs":
        """Those of some plans."""
        return Costs(self.sums[:, plans], self.steps[:, plans], self.excess[plans], self.places[plans])


@dataclass(frozen=True, eq=False)
class OrdinalGenes:
    """A core whose options are numbered by cost in every group, and its figures for many plans at once.

    Attributes:
        core: what the genes stand for.
        order: ``(groups, options)`` option of every gene value: cheapest first, forbidden ones last.
        counts: ``(groups,)`` number of values that a gene has.
        table: ``(1 + budgets, groups, options)``, the core's table in the order of the gene values.

    Cost: a few nanoseconds a gene and table row.
    """

    core: Core
    order: IntArray
    counts: IntArray
    table: FloatArray

    @classmethod
    def of(cls, core: Core) -> "OrdinalGenes":
        """Options by the sum of their costs, each relative to its range; where nothing costs, from bad to good."""
        masked = np.where(core.allowed, core.table, 0.0)
        span = np.abs(masked).max((1, 2))
        unit = np.divide(1.0, span, out=np.zeros_like(span), where=span > 0)
        cost = np.tensordot(unit[1:], masked[1:], 1) if len(masked) > 1 else -masked[0]
        if not cost.any():
            cost = -masked[0]
        order = np.argsort(np.where(core.allowed, cost, np.inf), axis=1, kind="stable")
        return cls(core, order, core.allowed.sum(1), np.take_along_axis(core.table, order[None], 2))

    # -- between genes and options -----------------------------------------------------------------------------------

    def options(self, genes: GeneArray) -> IntArray:
        """Options of groups, ``(plans, groups)``, from genes of the same shape."""
        return np.take_along_axis(self.order, genes.T.astype(np.int64), 1).T

    def genes(self, options: IntArray) -> GeneArray:
        """Genes from options of groups; a forbidden option becomes the allowed one next to it in cost."""
        place = np.argsort(self.order, axis=1)
        found = np.take_along_axis(place, options.T, 1).T
        return np.minimum(found, self.counts - 1).astype(np.int16)

    # -- figures -----------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> IntArray:
        """Where every group's values begin in a flattened table, (groups,)."""
        return np.arange(0, self.order.size, self.order.shape[1])

    @cached_property
    def _ones(self) -> FloatArray:
        return np.ones(len(self.order))

    @cached_property
    def flat(self) -> FloatArray:
        """The table as (1 + budgets, groups · options)."""
        return np.ascontiguousarray(self.table.reshape(len(self.table), -1))

    @cached_property
    def couplings(self) -> tuple[Coupling, ...]:
        """Those of the core, in the order of the gene values."""
        return tuple(
            Coupling(pair.first, pair.second, pair.table[:, self.order[pair.first]][:, :, self.order[pair.second]])
            for pair in self.core.couplings
        )

    @cached_property
    def scale(self) -> FloatArray:
        """What an excess is relative to, (budgets,): the range of each sum."""
        masked = np.where(self.core.allowed, self.core.table[1:], 0.0)
        span = masked.max(2).sum(1) - masked.min(2).sum(1)
        return np.where(span > 0, span, 1.0)

    def costs(self, genes: GeneArray) -> Costs:
        """Everything that is limited, without the objective."""
        core = self.core
        places = genes + self.start
        sums = self.sums(genes, places)
        steps = self._steps(genes)
        over = np.maximum(sums - core.limits[:, None], 0.0) / self.scale[:, None]
        excess = over.sum(0)
        limited = ~core.steps.goal & np.isfinite(core.steps.limit)
        if limited.any():
            limit = core.steps.limit[limited][:, None]
            high = np.maximum(steps[limited] - limit, 0.0)
            excess = excess + (high / (np.abs(limit) + high.max(initial=0.0) + 1e-300)).sum(0)
        if core.max_formats is not None:
            excess = excess + np.maximum(self._used(genes).sum(1) - core.max_formats, 0)
        return Costs(sums, steps, excess, places)

    def objective(self, genes: GeneArray, costs: Costs) -> FloatArray:
        """Objective of the core for every plan, (plans,); ``costs`` are its own."""
        core = self.core
        if core.has_goal:
            highest: FloatArray = costs.steps[core.steps.goal].max(0)
            return highest
        total: FloatArray = self._totals(genes, costs.places, range(1))[0]
        if core.format_costs is not None:
            total = total + self._used(genes) @ core.format_costs
        return total

    def sums(self, genes: GeneArray, places: IntArray) -> FloatArray:
        """``(budgets, plans)`` usage of the sum budgets; places are ``genes + start``."""
        return self._totals(genes, places, range(1, len(self.table)))

    def _totals(self, genes: GeneArray, places: IntArray, rows: range) -> FloatArray:
        totals = np.empty((len(rows), len(genes)))
        for total, row in zip(totals, rows, strict=True):
            np.dot(self.flat[row].take(places, mode="clip"), self._ones, out=total)  # faster than a sum along an axis
        for pair in self.couplings:
            totals += pair.table[rows.start : rows.stop, genes[:, pair.first], genes[:, pair.second]]
        return totals

    def _steps(self, genes: GeneArray) -> FloatArray:
        steps = self.core.steps
        sums = np.zeros((len(steps.limit), len(genes)))
        if not len(steps.row):
            return sums
        order, begins, value = self._blocks
        group = steps.group[order]
        taken = value.ravel().take(genes[:, group] + np.arange(len(group)) * value.shape[1])
        sums[steps.row[order][begins]] = np.add.reduceat(taken, begins, axis=1).T
        return sums

    @cached_property
    def _blocks(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Blocks by row, where each row begins, and their values in the order of the gene values."""
        steps = self.core.steps
        order = np.argsort(steps.row, kind="stable")
        begins = np.flatnonzero(np.append(True, np.diff(steps.row[order]) != 0))
        value = np.take_along_axis(steps.value, self.order[steps.group], 1)[order]
        return order, begins, np.ascontiguousarray(value)

    def _used(self, genes: GeneArray) -> BoolArray:
        """Options in use, (plans, options)."""
        options = self.options(genes)
        return np.stack([(options == option).any(1) for option in range(self.order.shape[1])], axis=1)
