"""Evolution over real evaluations: Optuna's samplers, seeded with uniform plans and the exact frontier of the table."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpq.frontier import Frontier
from mpq.planning import solve_units
from mpq.progress import meter
from mpq.sampler_mirror import SamplerMirror
from mpq.studies import PLAN, Measured, Proposal, SharedStudy, open_study, pack, quiet, unpack
from mpq.suggestions import did_you_mean

if TYPE_CHECKING:
    import optuna

    from mpq.options import Option
    from mpq.problem import AllocationProblem
    from mpq.tables import CostTable

SAMPLERS = ("nsga2", "nsga3", "tpe")
LITTER = 8  # children bred at once, of which the first new one is measured
TRIES = 16  # litters before the search says that it finds nothing new
EPSILON = 0.05  # of the frontier that seeds come from
FRONTIER_ENTRIES = 20_000  # groups · options up to which it is made


class Evaluates(Protocol):
    """What measures plans: `mpq.evaluator.Evaluator`, or anything else with a table and a `measure`."""

    table: CostTable

    def measure(self, choices: Any) -> Any:
        """`divergence` of a plan, one option index a unit; `standard_error` and `samples` are kept where they exist."""


def evolve(
    evaluator: Evaluates,
    resources: Sequence[str] = ("size",),
    budgets: Mapping[str, float | str] | None = None,
    *,
    sampler: Any = "nsga2",
    evaluations: int = 200,
    seconds: float = math.inf,
    population: int = 24,
    pins: Mapping[str, Option | str] | None = None,
    objective: str = "sensitivity",
    seeds: Any = None,
    storage: Any = None,
    study: str = "mpq",
    stale: float = 3600.0,
    seed: int = 0,
    progress: bool = True,
) -> Frontier:
    """Search over measured plans: the front of what they lose against any number of resources.

    Every plan that is measured keeps all budgets, ties and pins: children are repaired with the moves that the table
    says do least harm, never rejected. Genes are ordinal, a group's options in the order of their cost. First come
    uniform plans, the best plan of the table under the budgets, and its exact frontier.

    Call it with the same `storage` in as many processes as there are machines for: they share one population, no plan
    is measured twice, and one that dies loses nothing: finished plans stay, the plan it was at goes to another. Calling
    it again with more `evaluations` goes on where it ended.

    Args:
        evaluator: measures plans (`mpq.evaluator.Evaluator`); its own limits end the search as well.
        resources: quantities of the table that are objectives besides the measured divergence.
        budgets: limits that every plan keeps, as for `search`.
        sampler: "nsga2" (Deb et al. 2002), "nsga3" (Deb & Jain 2014; for four objectives or more), "tpe" (Bergstra et
            al. 2011), or a sampler of Optuna. For NSGA, Optuna decides who survives and children are bred from packed
            genomes: a few milliseconds a trial. TPE and others model every gene: about half a second a trial at 200
            layers, and more as trials add up.
        evaluations: plans measured in the study, by all workers and calls together.
        seconds: of this call, after which no further plan is begun.
        population: plans that survive a generation of NSGA.
        pins: name patterns and the option those layers take.
        objective: the quantity of the table that says which moves do little harm.
        seeds: ``(plans, units)`` to start from in place of the usual ones, repaired; [] for random plans alone.
        storage: None for memory; a path of a journal file; a URL such as ``sqlite:///study.db``; an Optuna storage.
        study: its name there.
        stale: seconds after which a plan that a worker on another host began counts as lost.
        seed: of everything random; workers are told apart by what is on the storage.
        progress: show a bar on a terminal.

    Returns:
        The non-dominated of all plans measured so far in the study, whoever measured them. `objective` is what was
        measured, `standard_error` its error, `provenance` says how many plans there were and where each came from.

    Raises:
        InfeasibleError: if no plan keeps the budgets.
        ValueError: if a name is wrong, or the study is one of another table, pins or data.
        ImportError: without Optuna: ``pip install 'mpq-search[evolve]'``.

    Example:
        A stand-in that "measures" what the table says, and a little more.

        >>> from types import SimpleNamespace
        >>> from mpq.tables import CostTable
        >>> table = CostTable(units=["conv", "fc"], options=["int4", "int8"],
        ...     quantities={"sensitivity": [[2.0, 0.5], [3.0, 0.1]], "size": [[50, 100], [10, 20]]})
        >>> scores = table.quantity("sensitivity")
        >>> def measure(choices):
        ...     return SimpleNamespace(divergence=1.1 * scores[[0, 1], choices].sum())
        >>> front = evolve(SimpleNamespace(table=table, measure=measure), ["size"], evaluations=10)
        >>> front.resource.tolist(), front.objective.round(2).tolist()
        ([60.0, 70.0, 120.0], [5.5, 2.31, 0.66])
    """
    if not hasattr(evaluator, "measure") or not hasattr(evaluator, "table"):
        given = type(evaluator).__name__
        raise TypeError(f"evaluator must measure plans, such as mpq.Evaluator(model, data, table), got {given}")
    names = _checked(evaluator.table, resources, objective)
    if evaluations < 1 or population < 2:
        raise ValueError(f"evaluations must be at least 1 and population 2, got {evaluations} and {population}")
    best = solve_units(evaluator.table, budgets or {}, objective=objective, pins=pins)
    breeding = import_module("mpq.solvers.breeding").Breeding(best.problem, names)
    first = _seeds(breeding, best.allocation.choices, evaluations) if seeds is None else _given(breeding, seeds)
    with quiet():
        chosen = _sampler(sampler, population, seed)
        same = "" if storage is None else _fingerprint(evaluator, best.problem, names)
        opened = open_study(storage, study, 1 + len(names), same, chosen)
        shared = SharedStudy(opened, stale)
        search = _Search(evaluator, breeding, shared, chosen, np.random.default_rng([seed, shared.counted()]))
        with shared.working(), meter("evolve", evaluations, "plans", shown=progress) as search.tell:
            search.stopped = search.run(first, evaluations, time.monotonic() + seconds)
        return replace(search.front(names), table=evaluator.table, minimised=objective)


@dataclass(eq=False)
class _Search:
    """One worker."""

    evaluator: Evaluates
    breeding: Any
    shared: SharedStudy
    sampler: Any
    rng: np.random.Generator
    tell: Callable[[float, str], None] = lambda done, more: None
    stopped: str = ""

    def run(self, seeds: NDArray[np.int16], evaluations: int, deadline: float) -> str:
        """Measure until there are enough plans, or the time or the evaluator's budget is over; which it was."""
        shared = self.shared
        shared.reclaim()
        shared.enqueue(self._texts(seeds), "seed")
        while time.monotonic() < deadline and getattr(self.evaluator, "left", math.inf) > 0:
            self.tell(counted := shared.counted(), "")
            if counted >= evaluations and not shared.reclaim():
                return f"the study has its {evaluations} plans"
            proposal = shared.take() or self._proposed()
            if proposal is None:
                return "nothing was proposed that is not measured"
            if shared.is_held_twice(proposal):
                shared.give_back(proposal)
            elif not self._measured(proposal):
                break
        return "the time is over" if time.monotonic() >= deadline else "the evaluator's budget is spent"

    def _measured(self, proposal: Proposal) -> bool:
        """Whether a plan could be measured; if not it waits for another worker."""
        choices = unpack(proposal.plan)[self.breeding.problem.groups]
        try:
            found = self.evaluator.measure(choices)
        except BaseException as error:
            self.shared.give_back(proposal)
            if type(error).__name__ == "Exhausted":  # the evaluator's budget is spent
                return False
            raise
        usage = self.breeding.problem.evaluate(choices)[1]
        values = [float(found.divergence), *(usage[name] for name in self.breeding.resources)]
        figures = [float(getattr(found, name, math.nan)) for name in ("standard_error", "samples")]
        self.shared.tell(proposal, values, [number for number in figures if math.isfinite(number)])
        return True

    # -- proposing ---------------------------------------------------------------------------------------------------

    def _proposed(self) -> Proposal | None:
        """A new plan from the sampler, None where it finds nothing that was not measured."""
        known = self.shared.known()
        trial = self.shared.study.ask()
        plan, origin = self._modelled(known) if self._mirror else self._bred(trial, known)
        if plan is None:
            import optuna

            self.shared.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return None
        return self.shared.sign(trial, plan, origin)

    def _bred(self, trial: optuna.Trial, known: set[str]) -> tuple[str | None, str]:
        """A child of the parents that Optuna's NSGA lets survive; of the first generation a random plan."""
        study = self.shared.study
        frozen = study.get_trials(deepcopy=False)[trial.number]
        parents = self.sampler.get_parent_population(study, self.sampler.get_trial_generation(study, frozen))
        ranked = self._ranked(parents)
        for attempt in range(TRIES):
            if len(ranked) and attempt < TRIES // 2:
                litter, origin = self.breeding.children(ranked, LITTER, self.rng), "child"
            else:
                litter, origin = self.breeding.random(LITTER, self.rng), "random"
            for text in self._texts(self._within(litter)):
                if text not in known:
                    return text, origin
        return None, ""

    def _texts(self, genes: NDArray[np.int16]) -> list[str]:
        return [pack(options) for options in self.breeding.encoding.options(genes)]

    def _genes(self, texts: Sequence[str]) -> NDArray[np.int16]:
        options = np.array([unpack(text) for text in texts], dtype=np.int64).reshape(
            len(texts), len(self.breeding.encoding.counts)
        )
        genes: NDArray[np.int16] = self.breeding.encoding.genes(options)
        return genes

    def _ranked(self, parents: Sequence[optuna.trial.FrozenTrial]) -> NDArray[np.int16]:
        """Genes of the parents, best first."""
        genes = self._genes([parent.user_attrs[PLAN][0] for parent in parents])
        if not parents:
            return genes
        order = import_module("mpq.solvers.nsga").standing(
            np.array([parent.values for parent in parents]), np.zeros(len(parents)), np.arange(len(parents))
        )
        ranked: NDArray[np.int16] = genes[order]
        return ranked

    def _within(self, genes: NDArray[np.int16]) -> NDArray[np.int16]:
        """Early exit: only plans within all limits are worth a measurement."""
        fitting: NDArray[np.int16] = genes[self.breeding.encoding.costs(genes).excess <= 0]
        return fitting

    @cached_property
    def _mirror(self) -> SamplerMirror | None:
        """For samplers that model every gene."""
        if hasattr(self.sampler, "get_parent_population"):
            return None
        return SamplerMirror(self.sampler, self.breeding.encoding.counts, 1 + len(self.breeding.resources))

    def _modelled(self, known: set[str]) -> tuple[str | None, str]:
        mirror = self._mirror
        if mirror is None:
            return None, ""
        found = self.shared.finished()
        mirror.follow(found, self._genes([one.plan for one in found]))
        for _ in range(TRIES):
            genes = self._within(self.breeding.repaired(mirror.proposal()[None]))
            if len(genes) and self._texts(genes)[0] not in known:
                return self._texts(genes)[0], type(self.sampler).__name__
        fresh = self._texts(self._within(self.breeding.random(LITTER * TRIES, self.rng)))
        return next((text for text in fresh if text not in known), None), "random"

    # -- the result --------------------------------------------------------------------------------------------------

    def front(self, names: tuple[str, ...]) -> Frontier:
        """The non-dominated of all that were measured and keep the budgets of this call."""
        problem, found = self.breeding.problem, self.shared.finished()
        plans = np.array([unpack(one.plan)[problem.groups] for one in found])
        fits = [index for index, plan in enumerate(plans) if problem.is_feasible(plan)]
        if not fits:
            raise ValueError("no plan was measured: give more evaluations or seconds, or an evaluator with some left")
        measured, found, plans = len(found), [found[index] for index in fits], plans[fits]
        points = np.array([[*one.values[1:], one.values[0]] for one in found])
        picked = import_module("mpq.solvers.dominance").nondominated(points)
        return Frontier(
            problem=problem,
            names=names,
            resource=points[picked, 0] if len(names) == 1 else points[picked, :-1],
            objective=points[picked, -1],
            choices=plans[picked].astype(np.uint16),
            standard_error=_errors([found[index] for index in picked]),
            is_heuristic=True,
            provenance=self._provenance(found, picked) | {"plans": measured, "stopped": self.stopped},
        )

    def _provenance(self, found: Sequence[Measured], picked: NDArray[np.int64]) -> dict[str, Any]:
        given = dict(getattr(self.evaluator, "provenance", {}) or {})
        return {
            "measured": "divergence",
            **given,
            "method": type(self.sampler).__name__,
            "study": self.shared.study.study_name,
            "trials": [found[index].number for index in picked],
            "origins": [found[index].origin for index in picked],
        }


def _errors(found: Sequence[Measured]) -> NDArray[np.float64] | None:
    if not all(one.figures for one in found):
        return None
    return np.array([one.figures[0] for one in found])


def _checked(table: CostTable, resources: Sequence[str], objective: str) -> tuple[str, ...]:
    names = (resources,) if isinstance(resources, str) else tuple(resources)
    for name in names:
        table.quantity(name)
        if name == objective or name.endswith("_se"):
            raise ValueError(f"resources must be quantities other than the objective and its errors, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"resources must be one or more different quantities, got {list(names)}")
    return names


def _sampler(sampler: Any, population: int, seed: int) -> Any:
    from optuna import samplers

    if not isinstance(sampler, str):
        if not isinstance(sampler, samplers.BaseSampler):
            raise TypeError(f"sampler must be one of {', '.join(SAMPLERS)} or a sampler of Optuna, got {sampler!r}")
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}{did_you_mean(sampler, SAMPLERS)}")
    if sampler == "tpe":
        return samplers.TPESampler(seed=seed)
    made = samplers.NSGAIISampler if sampler == "nsga2" else samplers.NSGAIIISampler
    return made(population_size=population, seed=seed)


def _seeds(breeding: Any, best: NDArray[np.int64], evaluations: int) -> NDArray[np.int16]:
    """The best plan of the table, uniform plans, and points of the exact frontier: half of the evaluations at most."""
    width = breeding.encoding.order.shape[1]
    uniform = np.repeat(np.arange(width)[:, None], len(breeding.problem.objective), axis=1)
    first = breeding.repaired(np.concatenate([breeding.genes(best), breeding.genes(uniform)]))
    first = first[np.sort(np.unique(first, axis=0, return_index=True)[1])]
    frontier = _frontier_genes(breeding)
    wanted = min(len(frontier), max(evaluations // 2 - len(first), 0))
    spread = np.unique(np.linspace(0, len(frontier) - 1, wanted).round().astype(np.int64))
    seeds: NDArray[np.int16] = np.concatenate([first, frontier[spread]])
    return seeds


def _frontier_genes(breeding: Any) -> NDArray[np.int16]:
    """Plans of the frontier of the first resource; where there is none, of its convex hull."""
    problem: AllocationProblem = breeding.problem
    if breeding.encoding.order.size <= FRONTIER_ENTRIES and breeding.resources[0] in problem.resources:
        try:
            front = import_module("mpq.solvers.pareto").pareto_frontier(problem, breeding.resources[0], epsilon=EPSILON)
        except ValueError:  # features that it does not take, or too many partial plans
            pass
        else:
            genes: NDArray[np.int16] = breeding.genes(front.choices.astype(np.int64))
            return genes
    hull: NDArray[np.int16] = breeding.seeds()
    return hull


def _given(breeding: Any, seeds: Any) -> NDArray[np.int16]:
    layers, options = breeding.problem.objective.shape
    choices = np.atleast_2d(np.asarray(seeds))
    choices = choices if choices.size else np.zeros((0, layers), dtype=np.int64)
    is_right = choices.dtype.kind in "iu" and choices.ndim == 2 and choices.shape[1] == layers
    if not is_right or choices.min(initial=0) < 0 or choices.max(initial=0) >= options:
        raise ValueError(f"seeds must be (plans, {layers}) option indices below {options}, got {seeds!r}")
    genes: NDArray[np.int16] = breeding.repaired(breeding.genes(choices))
    return genes


def _fingerprint(evaluator: Evaluates, problem: AllocationProblem, names: tuple[str, ...]) -> str:
    """What trials of one study have in common: genes, resources, and on what and how plans are measured."""
    digest = hashlib.sha256(repr((problem.layers, problem.options, names)).encode())
    how = repr(sorted(dict(getattr(evaluator, "provenance", {}) or {}).items()))
    with contextlib.suppress(ValueError):  # a task or a quantiser that only its address tells from others
        digest.update(str(getattr(evaluator, "fingerprint", "")).encode())
    digest.update(re.sub(" at 0x[0-9a-f]+", "", how).encode())  # addresses differ between workers
    digest.update(np.ascontiguousarray(problem.groups).tobytes() + problem.allowed.tobytes())
    for name in names:
        digest.update(np.where(problem.allowed, evaluator.table.quantity(name), 0.0).tobytes())
    return digest.hexdigest()
