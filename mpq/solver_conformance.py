"""What every solver promises: subclass `SolverConformance`, give it a fixture `solver`, and pytest runs the tests.

    from mpq.solver_conformance import SolverConformance

    class TestMine(SolverConformance):
        @pytest.fixture
        def solver(self):
            return MySolver()

Every test compares with plain loops over all plans of a few hundred small random problems.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpq.conformance import expect, in_another_process
from mpq.problem import Allocation, AllocationProblem, InfeasibleError, Proof
from mpq.random_problems import by_loops, close, random_problem


def answer(solver: Any, problem: AllocationProblem) -> Allocation | InfeasibleError:
    """The allocation, or the error that there is none."""
    try:
        found: Allocation = solver.solve(problem)
    except InfeasibleError as error:
        return error
    return found


def scaled(problem: AllocationProblem, *, objective: float = 1.0, resource: float = 1.0) -> AllocationProblem:
    """The same problem, of sums, in other units."""
    return AllocationProblem(
        objective=problem.objective * objective,
        resources={name: table * resource for name, table in problem.resources.items()},
        budgets={name: budget * resource for name, budget in problem.budgets.items()},
        offsets={name: offset * resource for name, offset in problem.offsets.items()},
        ties=problem.ties,
        norm=problem.norm,
    )


def check_answer(
    solver: Any, problem: AllocationProblem, found: Allocation | InfeasibleError, *, strictly: bool = True
) -> bool:
    """Check an answer against plain loops; returns whether there is a plan.

    Strictly: an exact solver proves its plan, and an error has the least that every budget can reach.

    Raises:
        AssertionError: if it is over a budget, not what it says it is, or its proof is wrong.
    """
    best, reachable = by_loops(problem)
    if best is None:
        expect(isinstance(found, InfeasibleError), f"where there is no plan, InfeasibleError: {problem}, got {found}")
        if isinstance(found, InfeasibleError) and strictly:
            told = {name: found.reachable.get(name, np.nan) for name, value in reachable.items() if value < np.inf}
            right = all(close(value, reachable[name]) for name, value in told.items())
            expect(right, f"InfeasibleError says what can be reached: {reachable}, got {told} for {problem}")
        return False
    if isinstance(found, InfeasibleError):
        raise AssertionError(f"not kept: a plan where there is one: {problem} has one of {best}, got {found!r}")
    expect(problem.is_feasible(found.choices), f"a plan keeps every budget, tie and limit: {problem}, got {found}")
    evaluated = problem.evaluate(found.choices)
    expect((found.objective, found.usage) == evaluated, f"objective and usage are those of the plan, {evaluated}")
    expect(found.objective >= best or close(found.objective, best), f"nothing is below the optimum {best}: {found}")
    bound, exact = found.proof.bound, getattr(solver, "exact", False) and strictly
    below = bound is None or bound <= best or close(bound, best)
    expect(below, f"a bound is at most the optimum {best}: {found.proof}")
    expect(not exact or found.proof.status == "optimal", f"a solver that says `exact` proves its plan: {found.proof}")
    is_best = found.proof.status != "optimal" or close(found.objective, best)
    expect(is_best, f"what is called optimal is: the optimum is {best}, got {found}")
    return True


def is_plain(problem: AllocationProblem, budgets: int | None = None) -> bool:
    """Whether a problem is sums under so many budgets at most, which every solver takes."""
    return problem.features <= {"several budgets"} and len(problem.budgets) <= (budgets or len(problem.budgets))


def answers(solver: Any, seeds: Sequence[int], kinds: Sequence[str], budgets: int | None) -> list[str]:
    """The answers to random problems, in words."""
    return [str(answer(solver, random_problem(seed, kinds=kinds, budgets=budgets))) for seed in seeds]


class SolverConformance:
    """Promises of a solver; a subclass has the fixture `solver`.

    Attributes:
        kinds: of `mpq.random_problems.KINDS`, what the solver takes besides sums under budgets.
        budgets: how many it takes at once; None: any number.
        seeds: of the problems; fewer are quicker.
    """

    kinds: Sequence[str] = ("ties", "forbidden", "negative", "whole")
    budgets: int | None = None
    seeds: Sequence[int] = range(40)

    def problems(self, **how: Any) -> Iterator[AllocationProblem]:
        """Random problems of the kinds that the solver takes."""
        return (random_problem(seed, kinds=self.kinds, budgets=self.budgets, **how) for seed in self.seeds)

    def test_plans_are_feasible_bounds_are_bounds_and_exact_is_exact(self, solver: Any) -> None:
        """Against plain loops, scores and costs of one size and of many decades."""
        problems = itertools.chain(self.problems(), self.problems(wide=True))
        plans = sum(check_answer(solver, problem, answer(solver, problem)) for problem in problems)
        expect(plans > len(self.seeds) / 2, f"most of the problems have a plan, {plans} of {2 * len(self.seeds)} had")

    def test_what_it_does_not_take_it_refuses(self, solver: Any) -> None:
        """Every feature there is: a right answer, or a ValueError that says why there is none."""
        for seed in self.seeds:
            problem = random_problem(10_000 + seed)
            try:
                found = answer(solver, problem)
            except ValueError as error:
                told = f"{problem} with {sorted(problem.features)}, got {error!r}"
                refusable = str(error) and not is_plain(problem, self.budgets)
                expect(refusable, f"only what is more than sums under budgets is refused: {told}")
                continue
            check_answer(solver, problem, found, strictly=False)

    def test_units_do_not_matter(self, solver: Any) -> None:
        """Bytes or gigabytes, seconds or nanoseconds: the same plan value and the same proof."""
        for problem in self.problems():
            found = answer(solver, problem)
            for objective, resource in ((1e-12, 1e9), (1e12, 1e-9)):
                again = answer(solver, scaled(problem, objective=objective, resource=resource))
                if isinstance(found, InfeasibleError) or isinstance(again, InfeasibleError):
                    values = [(getattr(other, "reachable", None) or {}) for other in (found, again)]
                    same = values[0].keys() == values[1].keys() and type(found) is type(again)
                    same = same and all(close(values[1][name], value * resource) for name, value in values[0].items())
                    expect(same, f"units do not matter: {problem} times {resource}, got {found!r} and {again!r}")
                    continue
                same = close(again.objective, found.objective * objective)
                expect(same, f"units do not matter: {found} times {objective}, got {again} for {problem}")
                expect(again.proof.status == found.proof.status, f"nor for the proof: {found.proof}, {again.proof}")

    def test_order_of_layers_does_not_matter(self, solver: Any) -> None:
        """The same layers in another order: a plan of the same value."""
        for seed, problem in zip(self.seeds, self.problems(), strict=True):
            order = np.random.default_rng(seed).permutation(len(problem.objective))
            place = np.argsort(order)
            turned = AllocationProblem(
                objective=problem.objective[order],
                resources={name: table[order] for name, table in problem.resources.items()},
                budgets=problem.budgets,
                offsets=problem.offsets,
                ties=[tuple(place[list(tie)]) for tie in problem.ties],
                norm=problem.norm,
            )
            found, again = answer(solver, problem), answer(solver, turned)
            if isinstance(found, InfeasibleError) or isinstance(again, InfeasibleError):
                expect(type(found) is type(again), f"the order of layers does not matter: {found!r}, {again!r}")
            else:
                expect(close(again.objective, found.objective), f"the order does not matter: {found}, then {again}")

    def test_one_layer_one_option_and_duplicates(self, solver: Any) -> None:
        """The smallest problems, options that are alike, and no budget at all."""
        only = AllocationProblem(
            objective=np.array([[2.0]]), resources={"size": np.array([[3.0]])}, budgets={"size": 3.0}
        )
        expect(solver.solve(only).proof == Proof("optimal", 2.0, 0.0), "one layer with one option is proved optimal")
        table = {"size": np.full((3, 2), 3.0)}
        same = AllocationProblem(objective=np.full((3, 2), 2.0), resources=table, budgets={"size": 9.0})
        expect(solver.solve(same).objective == 6.0, "of options that are alike either will do")
        free = AllocationProblem(objective=np.array([[2.0, -1.0, 5.0]] * 3))
        expect(solver.solve(free).choices.tolist() == [1, 1, 1], "without a budget every layer takes its best option")

    def test_a_budget_that_is_just_met_is_met(self, solver: Any) -> None:
        """Costs that add up to the budget exactly fit, and what is a millionth above does not."""
        costs = np.array([[0.1, 0.7], [0.2, 0.8], [0.3, 0.9]])
        table = {"size": costs}
        score = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        for choices in itertools.product(range(2), repeat=3):
            budget = float(sum(costs[layer, option] for layer, option in enumerate(choices)))
            for factor in (1.0, 1 - 1e-6):
                problem = AllocationProblem(objective=score, resources=table, budgets={"size": budget * factor})
                check_answer(solver, problem, answer(solver, problem))

    def test_infeasible_in_words(self, solver: Any) -> None:
        """The error names the budget, what was asked for and what can be reached, offsets included."""
        score, table = np.array([[5.0, 1.0], [3.0, 0.5]]), {"size": np.array([[2.0, 4.0], [4.0, 8.0]])}
        problem = AllocationProblem(objective=score, resources=table, budgets={"size": 5.0}, offsets={"size": 1.0})
        found = answer(solver, problem)
        if not isinstance(found, InfeasibleError):
            raise AssertionError(f"not kept: a budget that no plan keeps is an InfeasibleError, got {found}")
        words = str(found)
        expect("size 7" in words and "budget 5" in words, f"it says `size 7` and `budget 5`, got {words!r}")
        expect(found.reachable == {"size": 7.0}, f"it has what can be reached, 7, got {found.reachable}")
        expect(found.budgets == {"size": 5.0}, f"it has what was asked for, 5, got {found.budgets}")

    def test_solving_again_gives_the_same_answer(self, solver: Any) -> None:
        """Nothing is kept from one problem to the next: in reverse order, the same answers."""
        problems = list(self.problems())
        first = [str(answer(solver, problem)) for problem in problems]
        again = [str(answer(solver, problem)) for problem in reversed(problems)][::-1]
        expect(again == first, "the same problem gives the same answer, whatever was solved before")

    def test_another_process_gives_the_same_answer(self, solver: Any) -> None:
        """Nor does it depend on the process, on how texts hash or on the time; the solver's class is importable."""
        given = (solver, self.seeds, self.kinds, self.budgets)
        expect(in_another_process(answers, *given) == answers(*given), "another process gives the same answers")
