"""Where an evolution's plans come from: seeds, random plans within the budgets, and repaired children."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpq.arrays import FloatArray, IntArray
from mpq.problem import AllocationProblem
from mpq.suggestions import did_you_mean

from .budget_repair import BudgetRepair
from .nsga import Variation, standing
from .ordinal_genes import Costs, GeneArray, OrdinalGenes
from .reduction import merge

NEVER = sys.float_info.max / 1e8  # a budget that no plan comes near
DRAWS = 4  # random plans drawn for each that is wanted, before the rest are repaired
PRICES = 64  # prices of which the best plans are seeds


class Scored(NamedTuple):
    """Plans with their figures.

    Attributes:
        genes: ``(plans, groups)``.
        points: ``(plans, objectives)``, +inf for plans outside the limits: those are not scored.
        excess: ``(plans,)``, 0 within the limits.
        signature: ``(plans,)``, equal for copies of a plan.
    """

    genes: GeneArray
    points: FloatArray
    excess: FloatArray
    signature: IntArray

    def pick(self, index: IntArray) -> "Scored":
        """Some of the plans."""
        genes, points = self.genes.take(index, axis=0), self.points.take(index, axis=0)
        return Scored(genes, points, self.excess[index], self.signature[index])

    def fitting(self) -> "Scored":
        """Those within the limits."""
        return self if not self.excess.any() else self.pick(np.flatnonzero(self.excess <= 0))


@dataclass(frozen=True, eq=False)
class Breeding:
    """A problem as an evolution sees it.

    Args:
        problem: what to solve; resources without a budget are unlimited.
        resources: names of resources, sums or peaks, that are objectives besides the problem's.

    Raises:
        ValueError: for a name that is no resource.

    Example:
        >>> problem = AllocationProblem(objective=[[5.0, 1.0], [3.0, 0.5]], budgets={"size": 9},
        ...                             resources={"size": [[2.0, 4.0], [4.0, 8.0]]})
        >>> breeding = Breeding(problem, ("size",))
        >>> breeding.layers(breeding.seeds()).tolist()
        [[0, 0], [1, 0]]
    """

    problem: AllocationProblem
    resources: tuple[str, ...] = ()

    @cached_property
    def encoding(self) -> OrdinalGenes:
        """The genes."""
        return OrdinalGenes.of(merge(with_resources(self.problem, self.resources)))

    @cached_property
    def repaired(self) -> BudgetRepair:
        """Genes pushed inside the budgets."""
        return BudgetRepair(self.encoding)

    @cached_property
    def variation(self) -> Variation:
        """Crossover and mutation."""
        return Variation(self.encoding.counts)

    # -- between genes and layers ------------------------------------------------------------------------------------

    def layers(self, genes: GeneArray) -> IntArray:
        """Choices of layers, ``(plans, layers)``."""
        return self.encoding.options(genes)[:, self.problem.groups]

    def genes(self, choices: IntArray) -> GeneArray:
        """Genes of plans given by layers; of tied layers the first counts, forbidden options become allowed ones."""
        first = np.unique(self.problem.groups, return_index=True)[1]
        return self.encoding.genes(np.atleast_2d(choices)[:, first])

    # -- plans -------------------------------------------------------------------------------------------------------

    def seeds(self) -> GeneArray:
        """Different plans within the budgets, cheapest gene first: uniform ones, and the best for many prices.

        The best plan for a price of the resources is on the exact frontier (of the table without couplings), on its
        lower convex hull. Plans outside the budgets are repaired.
        """
        width = self.encoding.order.shape[1]
        uniform = np.repeat(np.arange(width)[:, None], len(self.encoding.counts), axis=1)
        plans = np.concatenate([self.encoding.genes(uniform), self._priced()])
        return np.unique(self.repaired(plans), axis=0)

    def _priced(self) -> GeneArray:
        """Genes that minimise objective + price · costs, for prices over the slopes of the table."""
        table, counts = self.encoding.table, self.encoding.counts
        forbidden = np.arange(table.shape[2]) >= counts[:, None]
        found = [np.where(forbidden, np.inf, table[0]).argmin(1)[None]]
        mixes = [*np.eye(len(table) - 1), np.full(len(table) - 1, 1.0)] if len(table) > 1 else []
        for mix in mixes[: len(mixes) - (len(mixes) == 2)]:
            cost = np.tensordot(mix / self.encoding.scale, table[1:], 1)
            lost, saved = -np.diff(table[0], axis=1), np.diff(cost, axis=1)
            usable = (saved > 0) & (lost > 0) & ~forbidden[:, 1:]
            if usable.any():
                slopes = np.quantile(lost[usable] / saved[usable], np.linspace(0, 1, PRICES))
                for price in slopes:
                    found.append(np.where(forbidden, np.inf, table[0] + price * cost).argmin(1)[None])
        return np.concatenate(found).astype(np.int16)

    def random(self, count: int, rng: np.random.Generator) -> GeneArray:
        """Random plans, cheap and dear ones alike, within the budgets wherever that is found.

        Early exit (EEEA-Net, arXiv:2108.06156, as read in its code): costs come first, and a plan over a budget is
        drawn again before anything scores it. Values are drawn with a tilt of each plan's own, from mostly cheap to
        mostly dear. What is still outside after a few draws is repaired.
        """
        counts = self.encoding.counts
        fitting, left, wanted = [], np.zeros((0, len(counts)), dtype=np.int16), count
        for _ in range(DRAWS):
            power = np.exp(rng.uniform(-2.5, 2.5, (wanted, 1)))
            drawn = (rng.random((wanted, len(counts))) ** power * counts).astype(np.int16)
            keeps = self.encoding.costs(drawn).excess <= 0
            fitting.append(drawn[keeps])
            left, wanted = drawn[~keeps], wanted - int(keeps.sum())
            if not wanted:
                break
        return np.concatenate([*fitting, self.repaired(left)])

    def children(self, genes: GeneArray, count: int, rng: np.random.Generator) -> GeneArray:
        """Children of a population that stands in the order of quality, repaired; where one plan is looked for, filled.

        Filled: half of the children use up what the budgets leave, so that a gene that gives way pays at once.
        """
        children = self.repaired(self.variation.children(genes, count, rng))
        if self.resources or not self.problem.budgets:
            return children
        return np.concatenate([self.repaired.filled(children[: count // 2]), children[count // 2 :]])

    # -- figures -----------------------------------------------------------------------------------------------------

    def scored(self, genes: GeneArray) -> Scored:
        """Costs of all, and the objective of those within the limits."""
        costs = self.encoding.costs(genes)
        signature = genes @ self._factors
        if not costs.excess.any():
            return Scored(genes, self._points(genes, costs), costs.excess, signature)
        fits = np.flatnonzero(costs.excess <= 0)
        points = np.full((len(genes), 1 + len(self.resources)), np.inf)
        points[fits] = self._points(genes[fits], costs.pick(fits))
        return Scored(genes, points, costs.excess, signature)

    def _points(self, genes: GeneArray, costs: Costs) -> FloatArray:
        core, columns = self.encoding.core, [self.encoding.objective(genes, costs)]
        for name in self.resources:
            if name in core.names:
                columns.append(costs.sums[core.names.index(name)])
            else:
                rows = core.steps.owner == core.steps.names.index(name)
                columns.append(costs.steps[rows].max(0, initial=0.0))
        return np.stack(columns, axis=1)

    def best(self, plans: Scored, count: int) -> Scored:
        """The survivors, in the order of quality."""
        return plans.pick(standing(plans.points, plans.excess, plans.signature, count)[:count])

    @cached_property
    def _factors(self) -> IntArray:
        """Random odd factors: plans with the same sum are taken for copies (a chance of 2⁻⁶⁴ a pair)."""
        rng = np.random.default_rng(len(self.encoding.counts))
        return rng.integers(-(2**62), 2**62, len(self.encoding.counts)) * 2 + 1


def with_resources(problem: AllocationProblem, names: Sequence[str]) -> AllocationProblem:
    """The problem with a budget that nothing reaches for every named resource without one."""
    for name in names:
        if name not in problem.resources and name not in problem.peak_resources:
            known = [*problem.resources, *problem.peak_resources]
            raise ValueError(f"resources must name resources of the problem, got {name!r}{did_you_mean(name, known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"resources must be different, got {list(names)}")
    sums = {name: NEVER for name in names if name in problem.resources}
    peaks = {name: NEVER for name in names if name in problem.peak_resources}
    return replace(problem, budgets=sums | dict(problem.budgets), peak_budgets=peaks | dict(problem.peak_budgets))
