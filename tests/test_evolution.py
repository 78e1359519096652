"""NSGA-II over a table: its parts against plain loops, its plans against the optimum, its fronts against the exact."""

import itertools
import time

import numpy as np
import pytest
from test_reference_hawq import PUBLISHED, REFERENCE, resnet18, whole_costs

from mpq.problem import AllocationProblem, InfeasibleError, SparsePeak
from mpq.random_problems import KINDS, close, random_problem
from mpq.solver_conformance import SolverConformance, answer
from mpq.solvers import EvolutionSolver, ExhaustiveSolver, ILPSolver, evolve, pareto_frontier
from mpq.solvers.breeding import Breeding
from mpq.solvers.budget_repair import BudgetRepair
from mpq.solvers.hypervolume import hypervolume
from mpq.solvers.nsga import Variation, crowding, ranks, standing
from mpq.solvers.ordinal_genes import OrdinalGenes
from mpq.solvers.reduction import merge


class TestEvolution(SolverConformance):
    @pytest.fixture
    def solver(self):
        return EvolutionSolver()


def layered(layers=30, options=5, budgets=1, seed=0, share=0.3):
    """Scores falling as 4^-bits with noise; size, latency and energy."""
    rng, bits = np.random.default_rng(seed), np.linspace(2, 8, options)
    count = rng.lognormal(10, 1.2, (layers, 1))
    score = rng.lognormal(0, 1.5, (layers, 1)) * count * 4.0**-bits * rng.lognormal(0, 0.3, (layers, options))
    tables = {
        "size": count * bits / 8,
        "latency": count * bits * rng.uniform(0.5, 2, (layers, 1)) + count * rng.uniform(0, 0.3, (layers, options)),
        "energy": count * bits * rng.uniform(0.5, 2, (layers, 1)),
    }
    limits = {
        name: float((1 - share) * table.min(1).sum() + share * table.max(1).sum())
        for name, table in itertools.islice(tables.items(), budgets)
    }
    return AllocationProblem(objective=score, resources=tables, budgets=limits)


# -- ranks, crowding, hypervolume ------------------------------------------------------------------------------------


def ranks_by_loops(points):
    left, rank, found = set(range(len(points))), 0, [0] * len(points)
    while left:
        front = {
            i for i in left if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)
        }
        for i in front:
            found[i] = rank
        left -= front
        rank += 1
    return found


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_ranks_by_brute_force(objectives):
    rng = np.random.default_rng(objectives)
    for size in (1, 2, 7, 40):
        for high in (3, 1000):
            points = rng.integers(0, high, (size, objectives)).astype(float)
            expected = ranks_by_loops(points)
            assert ranks(points).tolist() == expected
            some = ranks(points, enough=size // 2)
            known = [rank for rank in range(max(expected) + 1) if sum(r < rank for r in expected) < size // 2]
            for index, rank in enumerate(expected):  # those that are told apart are right
                assert some[index] == rank if rank in known else some[index] >= len(known)


def test_crowding_by_brute_force():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (30, 3))
    rank = rng.integers(0, 3, 30)
    expected = np.zeros(30)
    for front in range(3):
        members = [i for i in range(30) if rank[i] == front]
        for m in range(3):
            line = sorted(members, key=lambda i: points[i, m])
            span = points[line[-1], m] - points[line[0], m]
            expected[line[0]] = expected[line[-1]] = np.inf
            for before, i, after in zip(line, line[1:], line[2:], strict=False):
                expected[i] += (points[after, m] - points[before, m]) / span
    assert crowding(points, rank) == pytest.approx(expected)


def test_the_standing_puts_feasible_before_infeasible_and_copies_last():
    points = np.array([[3.0, 3.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [np.inf, np.inf], [np.inf, np.inf]])
    order = standing(points, np.array([0.0, 0, 0, 0, 0.5, 0.1]), np.array([10, 11, 12, 11, 13, 14]))
    assert sorted(order[:2].tolist()) == [1, 2]
    assert order[2:].tolist() == [0, 5, 4, 3]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_counts_cells(objectives):
    rng = np.random.default_rng(objectives)
    for _ in range(20):
        points = rng.integers(0, 7, (int(rng.integers(0, 9)), objectives))
        cells = itertools.product(range(5), repeat=objectives)  # of the box below (5, …); points outside count nothing
        inside = sum(any((point <= cell).all() for point in points) for cell in cells)
        assert hypervolume(points, [5] * objectives) == inside


def test_hypervolume_wants_as_many_coordinates():
    with pytest.raises(ValueError, match=r"3 objectives as the reference, got shape \(2, 2\)"):
        hypervolume([[1, 2], [2, 1]], [3, 3, 3])


# -- genes, repair, variation ----------------------------------------------------------------------------------------


def test_figures_of_many_plans_are_those_of_each():
    """Every feature, against `AllocationProblem.evaluate` and `is_feasible`."""
    inside = 0
    for seed in range(150):
        problem = random_problem(seed, kinds=KINDS)
        core = merge(problem)
        genes = OrdinalGenes.of(core)
        rng = np.random.default_rng(seed)
        plans = (rng.random((8, len(genes.counts))) * genes.counts).astype(np.int16)
        costs = genes.costs(plans)
        scores = genes.objective(plans, costs)
        assert (genes.genes(genes.options(plans)) == plans).all()
        for plan, options in enumerate(genes.options(plans)):
            choices = core.expand(options)
            objective, usage = problem.evaluate(choices)
            assert (costs.excess[plan] <= 0) == problem.is_feasible(choices)
            assert core.objective(scores[plan]) == pytest.approx(objective, rel=1e-9, abs=1e-9)
            for row, name in enumerate(core.names):
                offset = problem.offsets.get(name, 0.0)
                assert costs.sums[row, plan] + offset == pytest.approx(usage[name], rel=1e-9, abs=1e-9)
            inside += costs.excess[plan] <= 0
    assert inside > 300


def test_genes_are_ordinal():
    problem = layered()
    genes = OrdinalGenes.of(merge(problem))
    size = np.take_along_axis(problem.resources["size"], genes.order, 1)
    assert (np.diff(size, axis=1) > 0).all()


def lowered_by_loops(genes, plan):
    """One budget: the cheapest move per unit saved over all groups, from where each group stood, until it fits."""
    table, limit = genes.table, genes.core.limits[0]
    plan = list(plan)
    while True:
        over = sum(table[1, g, v] for g, v in enumerate(plan)) - limit
        if over <= 0:
            return plan
        moves = []
        for g, v in enumerate(plan):
            score, cost = table[:2, g]
            slopes = [
                ((score[w] - score[v]) / (cost[v] - cost[w]), cost[w] - cost[v], w)
                for w in range(genes.counts[g])
                if cost[w] < cost[v]
            ]
            if slopes:
                slope, change, value = min(slopes)
                moves.append((slope, g, value, -change))
        for _, g, value, saved in sorted(moves):
            if over <= 0:
                break
            plan[g] = value
            over -= saved


def test_repair_by_loops():
    for seed in range(20):
        problem = layered(layers=12, options=4, seed=seed, share=0.15)
        genes = OrdinalGenes.of(merge(problem))
        plans = np.random.default_rng(seed).integers(0, 4, (20, 12)).astype(np.int16)
        found = BudgetRepair(genes)(plans)
        assert [plan.tolist() for plan in found] == [lowered_by_loops(genes, plan.tolist()) for plan in plans]
        assert (found != plans).any()


@pytest.mark.parametrize("budgets", [1, 3])
def test_filling_by_loops(budgets):
    """Best gains per relative cost first, up to the first that does not fit."""
    problem = layered(layers=10, options=4, budgets=budgets, share=0.5)
    genes = OrdinalGenes.of(merge(problem))
    repair, table, limits = BudgetRepair(genes), genes.table, genes.core.limits
    plans = repair(np.random.default_rng(0).integers(0, 4, (30, 10)).astype(np.int16))
    cost = sum(table[1 + b] / genes.scale[b] for b in range(budgets))
    for plan, found in zip(plans, repair.filled(plans), strict=True):
        moves = []
        for g, v in enumerate(plan):
            better = [w for w in range(4) if table[0, g, w] < table[0, g, v]]
            prices = [(max(cost[g, w] - cost[g, v], 0) / (table[0, g, v] - table[0, g, w]), w) for w in better]
            moves += [(*min(prices), g)] if prices else []
        filled = plan.copy()
        for _, value, g in sorted(moves):
            other = filled.copy()
            other[g] = value
            if (table[1:, range(10), other].sum(1) > limits).any():
                break
            filled = other
        assert found.tolist() == filled.tolist()
        assert problem.is_feasible(genes.options(found[None])[0])


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_repair_keeps_budgets_and_what_is_within_already(budgets):
    problem = layered(layers=40, budgets=budgets, share=0.1)
    breeding = Breeding(problem)
    rng = np.random.default_rng(0)
    plans = rng.integers(0, 5, (200, 40)).astype(np.int16)
    found = breeding.repaired(plans)
    for choices in breeding.layers(found):
        assert problem.is_feasible(choices)
    assert (breeding.repaired(found) == found).all()
    assert (plans >= 0).all()  # the plans handed over are left alone
    assert (plans != found).any()


def test_a_move_that_raises_another_budget_is_the_last_resort():
    """Option 0 saves size at less harm, but at the cost of latency; where only that saves, it is taken."""
    tables = {"size": np.array([[1.0, 2.0, 9.0], [1.0, 9.0, 9.0]]), "latency": np.array([[5.0, 1.0, 1.0]] * 2)}
    problem = AllocationProblem(
        objective=[[1.0, 4.0, 0.0], [1.0, 4.0, 0.0]], resources=tables, budgets={"size": 12.0, "latency": 11.0}
    )
    breeding = Breeding(problem)
    assert breeding.layers(breeding.repaired(breeding.genes(np.array([[2, 2]])))).tolist() in ([[1, 2]], [[2, 0]])
    moves = breeding.repaired._moves[0]
    start, order = breeding.encoding.start, breeding.encoding.order
    targets = [order[g, moves.target[start[g] + list(order[g]).index(2)]] for g in range(2)]
    assert targets == [1, 0]


def test_children_keep_ties_and_forbidden_options():
    objective = np.random.default_rng(0).uniform(0, 1, (6, 4))
    objective[2, [0, 3]] = np.inf
    problem = AllocationProblem(objective=objective, ties=[(0, 4), (1, 5)])
    breeding, rng = Breeding(problem), np.random.default_rng(1)
    plans = breeding.layers(breeding.children(breeding.random(50, rng), 400, rng))
    assert all(problem.is_feasible(plan) for plan in plans)
    assert len(np.unique(plans, axis=0)) > 50


def test_crossover_takes_every_gene_from_a_parent():
    genes = np.array([[0] * 64, [7] * 64], dtype=np.int16)
    children = Variation(np.full(64, 8), mutations=0.0).children(genes, 300, np.random.default_rng(0))
    whole = (children == 0) | (children == 7)
    assert whole.mean() > 0.95  # the rest are level switches, two genes of half of the children at most
    assert (~whole).sum(1).max() <= 2
    assert ((children == 7).mean(1) > 0.2).sum() > 50


def test_first_plans_keep_the_budgets_and_differ_in_cost():
    problem = layered(layers=60, share=0.5)
    breeding = Breeding(problem, ("size",))
    scored = breeding.scored(breeding.random(300, np.random.default_rng(0)))
    assert (scored.excess <= 0).all()
    assert scored.points[:, 1].max() > 1.5 * scored.points[:, 1].min()
    for plan in breeding.layers(breeding.seeds()):
        assert problem.is_feasible(plan)


# -- one plan --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published data")
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("constraint", PUBLISHED)
def test_hawq_resnet18_within_three_percent(constraint, seeded):
    import json

    data = json.loads((REFERENCE / "hawq_ilp_resnet18.json").read_text())
    optima = json.loads((REFERENCE / "hawq_ilp_resnet18_optima.json").read_text())["constraints"]
    costs = whole_costs(data, constraint)
    solver = EvolutionSolver(seeded=seeded, population=60, generations=60)
    for case in optima[constraint]["alpha_grid"][::3]:
        problem = resnet18(data, costs, case["limit"])
        best = problem.objective[:, 0].sum() - case["gain"]
        found = solver.solve(problem)
        assert best * (1 - 1e-9) <= found.objective <= 1.03 * best
        assert not problem.violations(found.choices)


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_near_the_optimum_without_seeds_and_never_worse_than_the_best_seed(budgets):
    problem = layered(budgets=budgets, seed=budgets)
    best = ILPSolver().solve(problem).objective
    unseeded = EvolutionSolver(seeded=False, population=60, generations=60).solve(problem)
    assert best * (1 - 1e-9) <= unseeded.objective <= 1.03 * best
    breeding = Breeding(problem)
    seeds = min(problem.evaluate(plan)[0] for plan in breeding.layers(breeding.seeds()))
    short = EvolutionSolver(population=4, generations=1).solve(problem)
    assert short.objective <= seeds
    assert short.proof.status == "heuristic"
    assert short.proof.bound <= best * (1 + 1e-9)


def test_every_feature_without_enumeration():
    """Too few evaluations to look at all plans: feasible where a plan exists, and the optimum most of the time."""
    solver, searched, optimal = EvolutionSolver(population=10, generations=4), 0, 0
    for seed in range(200):
        problem = random_problem(seed, kinds=KINDS)
        if np.prod(merge(problem).allowed.sum(1)) <= 40:
            continue
        exact, found = answer(ExhaustiveSolver(), problem), answer(solver, problem)
        if isinstance(exact, InfeasibleError):
            assert isinstance(found, InfeasibleError)
            continue
        searched, best = searched + 1, exact.objective
        assert problem.is_feasible(found.choices)
        assert found.objective >= best or close(found.objective, best)
        assert found.proof.bound is None or found.proof.bound <= best or close(found.proof.bound, best)
        optimal += close(found.objective, best)
    assert searched > 25
    assert optimal > 0.8 * searched


def test_the_seed_decides():
    problem = layered(seed=3, budgets=3)
    how = {"population": 20, "generations": 5, "seeded": False}
    first, again = (EvolutionSolver(seed=1, **how).solve(problem) for _ in range(2))
    assert first.choices.tolist() == again.choices.tolist()
    fronts = [evolve(problem, ["size"], population=20, generations=5, seeds=[], seed=seed) for seed in (1, 1, 2)]
    assert fronts[0].choices.tolist() == fronts[1].choices.tolist() != fronts[2].choices.tolist()


def test_sizes_that_are_no_evolution():
    with pytest.raises(ValueError, match="population must be at least 2 and generations 1, got 1 and 5"):
        EvolutionSolver(population=1, generations=5)
    with pytest.raises(ValueError, match="got 5 and 0"):
        evolve(layered(), ["size"], population=5, generations=0)


# -- fronts ----------------------------------------------------------------------------------------------------------


def volume(front, problem, names):
    """In units of the box from the cheapest plan's corner to the dearest's, scores on a log scale."""
    cost = front.resource.reshape(len(front), -1)
    low = np.array([problem.resources[name].min(1).sum() for name in names])
    high = np.array([problem.resources[name].max(1).sum() for name in names])
    worst, best = problem.objective.max(1).sum(), problem.objective.min(1).sum()
    loss = np.log(front.objective / best) / np.log(worst / best)
    return hypervolume(np.column_stack([(cost - low) / (high - low), loss]), [1.0] * (1 + len(names)))


def test_the_front_is_that_of_all_plans():
    problem = layered(layers=5, options=3)
    exact = pareto_frontier(problem, "size")
    found = evolve(problem, ["size"], population=50, generations=40)
    assert found.resource.tolist() == pytest.approx(exact.resource.tolist())
    assert found.objective.tolist() == pytest.approx(exact.objective.tolist())
    assert found.is_heuristic
    assert found.allocation(at=float(exact.resource[3])).proof.status == "heuristic"


@pytest.mark.parametrize("names", [("size",), ("size", "latency")])
def test_hypervolume_against_random_and_unseeded_at_equal_evaluations(names):
    problem = layered(layers=40, budgets=0)
    how = {"population": 40, "generations": 20}
    seeded = volume(evolve(problem, names, **how), problem, names)
    unseeded = volume(evolve(problem, names, **how, seeds=[]), problem, names)
    plans = np.random.default_rng(0).integers(0, 5, (840, 40))
    drawn = evolve(problem, names, population=2, generations=1, seeds=plans)  # the front of random plans
    assert seeded > unseeded > volume(drawn, problem, names)
    if len(names) == 1:
        exact = volume(pareto_frontier(problem, "size", epsilon=0.01), problem, names)
        assert 0.97 * exact < seeded <= exact * 1.02


def test_every_seed_is_equalled_or_beaten():
    problem = layered(layers=20, budgets=2, share=0.6)
    seeds = np.random.default_rng(0).integers(0, 4, (60, 20))
    seeds = [plan for plan in seeds if problem.is_feasible(plan)]
    assert len(seeds) > 10
    front = evolve(problem, ["size", "energy"], population=4, generations=3, seeds=seeds)
    for plan in seeds:
        objective, usage = problem.evaluate(plan)
        point = np.array([usage["size"], usage["energy"], objective]) * (1 + 1e-9)
        assert (np.column_stack([front.resource, front.objective]) <= point).all(1).any()


def test_a_front_over_a_peak_with_couplings_and_formats():
    rng = np.random.default_rng(4)
    held = SparsePeak.from_dense(rng.uniform(0, 3, (3, 4, 3)))
    problem = AllocationProblem(
        objective=rng.uniform(0, 5, (4, 3)),
        resources={"size": rng.uniform(0, 5, (4, 3))},
        peak_resources={"memory": held},
        pairs={(0, 2): rng.normal(size=(3, 3))},
        max_formats=2,
        offsets={"memory": 1.0},
    )
    front = evolve(problem, population=60, generations=20)
    assert front.names == ("size", "memory")
    points = []
    for choices in itertools.product(range(3), repeat=4):
        if problem.is_feasible(choices):
            objective, usage = problem.evaluate(choices)
            points.append([usage["size"], usage["memory"], objective])
    points = np.array(points)
    best = points[np.array(ranks_by_loops(points)) == 0]
    found = np.column_stack([front.resource, front.objective])
    assert np.array(sorted(found.tolist())) == pytest.approx(np.array(sorted(best.tolist())))


def test_budgets_hold_on_the_whole_front():
    problem = layered(budgets=2, share=0.4)
    front = evolve(problem, ["size"], population=40, generations=10)
    assert len(front) > 10
    assert all(problem.is_feasible(plan) for plan in front.choices.astype(int))


def test_no_plan_and_no_resource():
    problem = layered(share=0.3)
    tight = AllocationProblem(objective=problem.objective, resources=problem.resources, budgets={"size": 1.0})
    with pytest.raises(InfeasibleError, match="size"):
        evolve(tight, ["size"], population=4, generations=1)
    with pytest.raises(ValueError, match="'sise': did you mean 'size'"):
        evolve(problem, ["sise"])
    with pytest.raises(ValueError, match="must be different"):
        evolve(problem, ["size", "size"])
    with pytest.raises(ValueError, match="the problem has no resource"):
        evolve(AllocationProblem(objective=problem.objective))


def test_many_plans_at_once_are_far_faster_than_one_by_one():
    problem = layered(layers=100, budgets=0)
    plans = np.random.default_rng(0).integers(0, 5, (300, 100))
    start = time.process_time()
    for plan in plans:
        problem.evaluate(plan)
    one_by_one = (time.process_time() - start) / len(plans)
    start = time.process_time()
    evolve(problem, ["size"], population=200, generations=50, seeds=[])
    assert time.process_time() - start < 10_000 * one_by_one / 2  # selection and breeding included
