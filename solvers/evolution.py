"""NSGA-II over a table: a plan, or a front over any number of resources, where exact methods do not reach."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mpq.arrays import BoolArray, FloatArray, IntArray
from mpq.frontier import Frontier
from mpq.problem import Allocation, AllocationProblem

from .breeding import Breeding, Scored
from .descent import descend
from .dominance import nondominated
from .exchange import improve
from .exhaustive import ExhaustiveSolver
from .features import EVERYTHING
from .ilp import ILPSolver
from .recomputed import objectives, usages, within
from .thinning import distinct_points

PLAIN = frozenset({"several budgets", "p-norm", "pairs", "transitions"})  # figures of many plans at once are exact
ARCHIVE = 4096  # points of the first front kept before dominated ones are thrown out


@dataclass(frozen=True, kw_only=True)
class EvolutionSolver:
    """NSGA-II (Deb et al. 2002, IEEE Trans. Evol. Comput. 6(2)) with one objective: an elitist genetic search.

    Genes are ordinal, a group's options in the order of their cost. Children are repaired, not rejected: cheapest harm
    first until every sum budget holds. The population starts from uniform plans, the best plans for many prices, and
    random ones that keep the budgets. The best plan is improved by single and double exchanges in the end.

    An exact solver is better on every additive problem; this one needs only the value of a plan, and shows what the
    search over real evaluations (`mpq.evolve`) is able to. Where there are no more plans than it would evaluate, all
    are looked at. Cost: population · generations evaluations: 100,000 a second with one budget at 200 layers of 6
    options, 60,000 with three budgets, on one core.

    Args:
        population: plans that survive a generation.
        generations: how many; each evaluates as many children as the population holds.
        seeded: whether uniform plans and the best ones for many prices are among the first.
        seed: of everything random.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]},
        ...                             budgets={"size": 9}, options=("int4", "int8"))
        >>> EvolutionSolver().solve(problem).options
        ('int8', 'int4')
    """

    population: int = 200
    generations: int = 200
    seeded: bool = True
    seed: int = 0

    exact: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = EVERYTHING

    def __post_init__(self) -> None:
        check_sizes(self.population, self.generations)

    def solve(self, problem: AllocationProblem) -> Allocation:
        """A plan under all budgets, never worse than the best of the seeds.

        Raises:
            InfeasibleError: if there is none; where the search finds none, `ILPSolver` decides.
        """
        breeding = Breeding(problem)
        core = breeding.encoding.core
        if math.prod(breeding.encoding.counts.tolist()) <= self.population * self.generations:
            return ExhaustiveSolver().solve(problem)
        rng = np.random.default_rng(self.seed)
        found = _last(breeding, _first(breeding, self, rng), self, rng)
        plans = breeding.encoding.options(found.genes)
        fitting = (plan for plan in plans if core.is_feasible(plan))
        best = next(fitting, None)
        if best is None:
            return ILPSolver().solve(problem)
        best = improve(core, best)
        bound = None
        if not (core.couplings or core.has_goal or core.counts_formats):
            descent = descend(core)
            bound = None if descent is None else core.objective(descent.bound)
        return problem.allocation(core.expand(best), status="heuristic", bound=bound)


def evolve(
    problem: AllocationProblem,
    resources: Sequence[str] = (),
    *,
    population: int = 200,
    generations: int = 200,
    seeds: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Frontier:
    """A front of the objective against any number of resources, by NSGA-II; `pareto_frontier` is exact up to three.

    Args:
        problem: everything is taken: budgets, peaks, couplings, format limits, norms.
        resources: names of sum or peak resources to trade the objective for, budgeted or not; all by default.
        population: plans that survive a generation; the front may hold more, all found are kept.
        generations: how many, of as many evaluations as the population holds.
        seeds: ``(plans, layers)`` to start from, repaired where they exceed a budget; an empty list for random plans
            alone. By default uniform plans and the best plans for many prices.
        seed: of everything random.

    Returns:
        The front in order of the first resource. Every seed within the budgets is equalled or beaten by a point of it.

    Raises:
        InfeasibleError: if no plan meets the budgets.
        ValueError: for a name that is no resource, or sizes below 2 and 1.

    Cost: population · generations evaluations: 100,000 a second with one resource at 200 layers of 6 options, on one
    core; the fronts of three or more objectives take population² comparisons a generation, half as many a second.

    Example:
        >>> problem = AllocationProblem(objective=[[5, 1], [3, 0.5]], resources={"size": [[2, 4], [4, 8]]})
        >>> front = evolve(problem, ["size"])
        >>> front.resource.tolist(), front.objective.tolist()
        ([6.0, 8.0, 12.0], [8.0, 4.0, 1.5])
    """
    check_sizes(population, generations)
    names = tuple(resources) or (*problem.resources, *problem.peak_resources)
    if not names:
        raise ValueError("resources must name something to trade the objective for: the problem has no resource")
    breeding, rng = Breeding(problem, names), np.random.default_rng(seed)
    how = EvolutionSolver(population=population, generations=generations, seeded=seeds is None)
    given = None if seeds is None else np.asarray(seeds, dtype=np.int64).reshape(-1, len(problem.objective))
    found = _last(breeding, _first(breeding, how, rng, given), how, rng)
    return front_of(problem, names, breeding.layers(found.genes))


def check_sizes(population: int, generations: int) -> None:
    """Raise a ValueError for a population or a number of generations that is no evolution."""
    if population < 2 or generations < 1:
        raise ValueError(f"population must be at least 2 and generations 1, got {population} and {generations}")


def front_of(problem: AllocationProblem, names: tuple[str, ...], choices: IntArray) -> Frontier:
    """The non-dominated of some plans ``(plans, layers)``, recomputed; those outside the budgets are left out."""
    plans = choices[_feasible(problem, choices)]
    if not len(plans):
        plans = ILPSolver().solve(problem).choices[None]
    points, noise = _points(problem, names, plans)
    picked = distinct_points(points, noise)
    return Frontier(
        problem=problem,
        names=names,
        resource=points[picked, 0] if len(names) == 1 else points[picked, :-1],
        objective=points[picked, -1],
        choices=plans[picked].astype(np.uint16),
        is_heuristic=True,
    )


def _feasible(problem: AllocationProblem, plans: IntArray) -> BoolArray:
    """(plans,): whether all limits are kept, by exact sums where those of many plans at once are not enough."""
    if problem.features <= PLAIN:
        return within(problem, plans.T)
    return np.array([problem.is_feasible(plan) for plan in plans], dtype=bool)


def _points(problem: AllocationProblem, names: tuple[str, ...], plans: IntArray) -> tuple[FloatArray, FloatArray]:
    """Resources and objective ``(plans, 1 + resources)``, and what is rounding in each."""
    if problem.features <= PLAIN and all(name in problem.resources for name in names):
        columns = [*(usages(problem, name, plans.T) for name in names), objectives(problem, plans.T)]
        return np.stack([column.total for column in columns], axis=1), np.array([column.noise for column in columns])
    rows = []
    for plan in plans:
        objective, usage = problem.evaluate(plan)
        rows.append([*(usage[name] for name in names), objective])
    return np.array(rows), np.zeros(1 + len(names))


def _first(breeding: Breeding, how: EvolutionSolver, rng: np.random.Generator, given: IntArray | None = None) -> Scored:
    """The first population and its seeds, all scored."""
    seeds = breeding.seeds() if how.seeded else np.zeros((0, len(breeding.encoding.counts)), dtype=np.int16)
    if given is not None and len(given):
        seeds = breeding.repaired(breeding.genes(given))
    missing = max(how.population - len(seeds), how.population // 2)
    return breeding.scored(np.concatenate([seeds, breeding.random(missing, rng)]))


def _last(breeding: Breeding, first: Scored, how: EvolutionSolver, rng: np.random.Generator) -> Scored:
    """The last population, best first; with several objectives every non-dominated plan that was ever seen."""
    kept: list[Scored] = []
    parents = breeding.best(first, how.population)
    is_front = first.points.shape[1] > 1
    if is_front:
        kept.append(_front(first))
    for _ in range(how.generations):
        children = breeding.scored(breeding.children(parents.genes, how.population, rng))
        if is_front:
            kept.append(children.fitting())
            if sum(len(part.genes) for part in kept) > ARCHIVE + len(kept[0].genes):
                kept = [_front(_joined(kept))]
        parents = breeding.best(_joined([parents, children]), how.population)
    return _front(_joined([*kept, parents])) if is_front else parents


def _joined(parts: Sequence[Scored]) -> Scored:
    genes, points, excess, signature = zip(*parts, strict=True)
    return Scored(np.concatenate(genes), np.concatenate(points), np.concatenate(excess), np.concatenate(signature))


def _front(plans: Scored) -> Scored:
    """The non-dominated plans within the limits."""
    inside = plans.fitting()
    return inside.pick(nondominated(inside.points)) if len(inside.genes) else inside
