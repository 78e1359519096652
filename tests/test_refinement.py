"""Refinement finds what sums get wrong, believes only what fresh data confirms, and ends the same when killed."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cnn, images

import mpq
from mpq import learned_scores
from mpq.accuracy_constraint import _with_one_lost, smallest
from mpq.evaluator import Evaluator, Exhausted
from mpq.learned_scores import LearnedScores
from mpq.measured_loss import MeasuredLoss
from mpq.measured_search import MeasuredSearch, Settings
from mpq.paired_test import paired_test, student_quantile, student_tail
from mpq.plan_keys import choices_of_key, key_of
from mpq.refinement import Compared, refine
from mpq.shrunk_errors import errors_of
from mpq.tasks import Distribution
from mpq.terminal import refinement_in_words

BITS = np.array([2.0, 3, 4, 6, 8])
LABELS = ["int2", "int3", "int4", "int6", "int8"]


class Fake:
    """An evaluator whose losses are a formula: `loss(choices)` times a factor a sample, and noise."""

    def __init__(self, loss, samples=64, noise=0.0, evaluations=math.inf):
        self.loss, self.samples, self.noise, self.evaluations = loss, samples, noise, evaluations
        self.factor = np.random.default_rng(9).uniform(0.5, 1.5, samples)
        self.factor /= self.factor.mean()
        self.measured, self.spent, self.calls = {}, 0.0, []

    @property
    def left(self):
        return self.evaluations - self.spent

    def measure(self, choices, samples=None):
        choices = np.asarray(choices, dtype=np.int64)
        key, count = key_of(choices), self.samples if samples is None else min(samples, self.samples)
        before = self.measured[key].samples if key in self.measured else 0
        if count > before:
            if self.spent + (count - before) / self.samples > self.evaluations:
                raise Exhausted("spent")
            self.spent += (count - before) / self.samples
            self.calls.append((key, before, count))
            self.measured[key] = MeasuredLoss.of(self._values(choices)[:count])
        return MeasuredLoss.of(self.measured[key].per_sample[:count])

    def measure_all(self, plans, samples=None):
        return [self.measure(plan, samples) for plan in plans]

    def slopes(self, choices, samples=None):
        return None

    def _values(self, choices):
        seed = np.frombuffer(choices.tobytes(), dtype=np.uint8).tolist()
        noise = self.noise * np.random.default_rng(seed).standard_normal(self.samples)
        return self.loss(choices) * self.factor + noise


def truth_of(layers=20, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.3, 3, (layers, 1)) * 4.0**-BITS * rng.uniform(0.8, 1.2, (layers, len(BITS)))


def problem_of(scores, sizes=None, **more):
    sizes = np.ones(len(scores)) if sizes is None else sizes
    return mpq.AllocationProblem(
        scores, resources={"size": sizes[:, None] * BITS}, budgets={"size": 3.6 * sizes.sum()}, **more
    )


def optimum(problem):
    """By dynamic programming over whole bits, in the plainest way."""
    cost = problem.resources["size"].astype(int)
    best = {0: (0.0, ())}
    for scores, costs in zip(problem.objective, cost, strict=True):
        found = {}
        for used, (value, plan) in best.items():
            for option in range(len(scores)):
                total = used + costs[option]
                if total <= problem.budgets["size"] and (value + scores[option], plan) < found.get(total, (math.inf,)):
                    found[total] = (value + scores[option], (*plan, option))
        best = found
    return min(best.values())


def additive(scores):
    rows = np.arange(len(scores))
    return lambda choices: float(scores[rows, choices].sum())


def search_of(evaluator, problem, seed=0, **settings):
    return MeasuredSearch(evaluator, problem, Settings(**settings), np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(2))
def test_additive_loss_leads_to_the_optimum_from_a_wrong_table(seed):
    truth = truth_of(seed=seed)
    sizes = np.random.default_rng(seed).integers(1, 9, 20).astype(float)
    wrong = truth * np.exp(0.8 * np.random.default_rng(seed + 50).standard_normal(truth.shape))
    value, _ = optimum(problem_of(truth, sizes))
    problem = problem_of(wrong, sizes)
    start = mpq.solvers.solve(problem).choices
    evaluator = Fake(additive(truth))
    best, _ = search_of(evaluator, problem, seed, patience=10).run(start)
    assert additive(truth)(start) > 1.1 * value
    assert additive(truth)(best) == pytest.approx(value, rel=0.005)
    assert evaluator.spent < 150


def test_right_table_is_left_alone():
    problem = problem_of(truth_of())
    start = mpq.solvers.solve(problem).choices
    search = search_of(Fake(additive(problem.objective)), problem)
    best, _ = search.run(start)
    assert np.array_equal(best, start)
    assert search.history == []


def test_what_drawn_tables_gain_over_the_table():
    """Interactions that the table does not know: neighbours that are both coarse cost extra."""
    truth, rng = truth_of(), np.random.default_rng(1)
    extra = rng.uniform(0, 2, 19)

    def loss(choices):
        coarse = truth[np.arange(20), choices]
        return float(coarse.sum() + (extra * np.sqrt(coarse[1:] * coarse[:-1])).sum())

    problem = problem_of(truth)
    start = mpq.solvers.solve(problem).choices
    best, _ = search_of(Fake(loss), problem).run(start)
    assert loss(best) < 0.97 * loss(start)


def test_every_plan_measured_keeps_the_budget_and_none_is_measured_twice():
    truth = truth_of()
    sizes = np.random.default_rng(0).integers(1, 9, 20).astype(float)
    problem = problem_of(truth * 1.0, sizes, ties=[(0, 1), (5, 6, 7)])
    evaluator = Fake(additive(truth_of(seed=4)))
    search_of(evaluator, problem, patience=3).run(mpq.solvers.solve(problem).choices)
    plans = [choices_of_key(key) for key in evaluator.measured]
    assert len(plans) > 50
    assert all(problem.is_feasible(plan) for plan in plans)
    spans = sorted(evaluator.calls)
    assert all(one[0] != other[0] or one[2] == other[1] for one, other in itertools.pairwise(spans))


def test_same_seed_same_search():
    def run(seed):
        problem, evaluator = problem_of(truth_of()), Fake(additive(truth_of(seed=3)))
        search_of(evaluator, problem, seed, patience=2).run(mpq.solvers.solve(problem).choices)
        return evaluator.calls

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_noise_is_rejected():
    """All plans equally good: what looks better is noise, and is believed as often as the level and the tests say."""
    problem = problem_of(truth_of(8))
    start = mpq.solvers.solve(problem).choices
    believed, walked, searches = 0, 0, 16
    for seed in range(searches):
        evaluator = Fake(lambda choices: 1.0, samples=64, noise=0.5)
        evaluator.factor = np.random.default_rng(seed).uniform(0.5, 1.5, 64)
        evaluator._values = noisy(seed, evaluator)
        search = search_of(evaluator, problem, seed, patience=1, level=0.05, kbest=8, offspring=4, pool=2)
        best, _ = search.run(start)
        believed += not np.array_equal(best, start)
        walked += not np.array_equal(search.walker, start)
    assert walked > 10  # on the selection data some plan nearly always looks better
    assert believed <= 4  # one to three tests of 5 % a search that depend on one another: 2 of 16 are expected


def noisy(seed, evaluator):
    """Noise that differs from search to search as well."""

    def values(choices):
        rng = np.random.default_rng([seed, *choices.tolist()])
        return evaluator.factor + evaluator.noise * rng.standard_normal(evaluator.samples)

    return values


@pytest.mark.parametrize("shares", [(0.0, 0.0, 1.0), (0.3, 0.5, 0.2)])
def test_posterior_is_bayes_rule_written_out(shares, monkeypatch):
    """Posterior mean of the scores, against the dense formula over every (unit, option)."""
    monkeypatch.setattr(learned_scores, "SHARES", (shares,))
    rng = np.random.default_rng(0)
    scores, plans = truth_of(4), rng.integers(0, 5, (15, 4))
    values = additive_of(truth_of(4, seed=2), plans)
    factors = learned_scores.alike(["0.up", "0.down", "1.up", "head"])
    found = LearnedScores(scores, np.zeros_like(scores), factors).learned(list(plans), values, np.full(15, 1e-3))
    onehot = np.zeros((15, 4 * 5 + 1))
    for row, plan in enumerate(found.plans):
        onehot[row, [5 * unit + option for unit, option in enumerate(plan)]] = 1
        onehot[row, -1] = 1
    prior = np.zeros((21, 21))
    prior[-1, -1] = found.level**2
    for (row, (i, o)), (column, (j, p)) in itertools.product(enumerate(np.ndindex(4, 5)), repeat=2):
        same = shares[0] * (factors[i] @ factors[j]) + shares[1] * (i == j) + shares[2] * (i == j and o == p)
        prior[row, column] = found.spread[i, o] * found.spread[j, p] * same
    mean = np.append(found.mean.ravel(), 0)
    covariance = onehot @ prior @ onehot.T
    kernel = covariance + np.diag(found.noise**2 + 1e-9 * np.diag(covariance))
    expected = mean + prior @ onehot.T @ np.linalg.solve(kernel, found.values - onehot @ mean)
    assert found.expected.ravel() == pytest.approx(expected[:-1], rel=1e-6, abs=1e-12)
    draws = np.array([found.drawn(rng).ravel() for _ in range(4000)])
    spread = prior - prior @ onehot.T @ np.linalg.solve(kernel, onehot @ prior)
    assert draws.mean(0) == pytest.approx(expected[:-1], abs=0.1 * found.spread.max())
    assert draws.std(0) == pytest.approx(np.sqrt(np.diag(spread))[:-1], rel=0.06)


def test_what_is_explored_is_a_draw_in_which_nothing_is_almost_free():
    scores, plans = truth_of(6), np.random.default_rng(0).integers(0, 5, (10, 6))
    values = additive_of(truth_of(6, seed=3), plans)
    found = LearnedScores(scores, np.zeros_like(scores)).learned(list(plans), values, np.full(10, 1e-3))
    draws = [np.random.default_rng(seed) for seed in range(100)]
    drawn = np.array([found.drawn(rng) for rng in draws])
    explored = np.array([found.explored(np.random.default_rng(seed)) for seed in range(100)])
    assert (drawn < 0.2 * found.mean).any()
    assert (explored >= 0.2 * found.mean).all()
    assert explored == pytest.approx(np.maximum(drawn, 0.2 * found.mean))


def test_units_alike_are_of_one_kind_or_near():
    names = [f"blocks.{block}.{part}" for block in range(6) for part in ("up", "down")]
    common = (found := learned_scores.alike(names)) @ found.T
    assert np.diag(common) == pytest.approx(1)
    assert common[0, 2] > 0.7 > 0.55 > common[0, 10] > 0.45  # the same kind, near and far
    assert common[0, 1] > 0.4 > 0.05 > common[0, 11]  # another kind, near and far


def additive_of(scores, plans):
    return scores[np.arange(len(scores)), plans].sum(1)


def test_students_distribution():
    for t, freedom, tail in ((1.812461, 10, 0.05), (2.364624, 7, 0.025), (1.660234, 100, 0.05), (63.65674, 1, 0.005)):
        assert student_tail(t, freedom) == pytest.approx(tail, rel=1e-5)
        assert student_tail(-t, freedom) == pytest.approx(1 - tail, rel=1e-5)
        assert student_quantile(1 - tail, freedom) == pytest.approx(t, rel=1e-5)


def test_sign_test_counts_signs():
    rng = np.random.default_rng(0)
    differences = rng.standard_normal(10) - 0.4
    signs = np.array(list(itertools.product([0, 1], repeat=10))).sum(1)
    expected = (signs >= (differences < 0).sum()).mean()
    assert paired_test(differences, test="sign").p_value == pytest.approx(expected)


def test_level_of_the_test_is_what_it_says():
    rng = np.random.default_rng(0)
    p_values = [paired_test(rng.standard_normal(30), rng.standard_normal(30)).p_value for _ in range(1000)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.02)
    tests = [paired_test(rng.standard_normal(30)) for _ in range(200)]
    assert [test.upper(0.05) < 0 for test in tests] == [test.p_value < 0.05 for test in tests]


def test_paired_test_refuses():
    with pytest.raises(ValueError, match="two equal vectors"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="t or sign"):
        paired_test([1.0, 2.0], test="z")
    assert paired_test([-1.0]).p_value == 1
    assert paired_test([0.0, 0.0]).p_value == 1


def test_errors_of_few_samples_are_drawn_to_the_usual_one():
    rng = np.random.default_rng(0)
    true = 0.02 + 0.1 * np.linspace(0, 1, 60)
    counts = rng.choice([2, 3, 16], 60)
    vectors = [10 * error + error * rng.standard_normal(n) for error, n in zip(true, counts, strict=True)]
    own = np.array([vector.std(ddof=1) for vector in vectors]) / np.sqrt(counts)
    wrong = [np.abs(np.log(found / (np.abs(true) / np.sqrt(counts)))) for found in (own, errors_of(vectors))]
    assert wrong[1].max() < wrong[0].max() / 2
    assert wrong[1].mean() < wrong[0].mean()
    many = [rng.standard_normal(5000) for _ in range(3)]
    assert errors_of(many) == pytest.approx([vector.std(ddof=1) / 5000**0.5 for vector in many], rel=0.01)
    assert errors_of([np.zeros(3)]) == [0.0]


def test_kinds_of_layers_that_the_table_gets_wrong_are_found_with_few_samples():
    """40 layers of four kinds, two of them wrong by a factor; two samples a child at first."""
    rng, kinds = np.random.default_rng(3), np.tile([3.0, 0.4, 1.0, 1.0], 10)
    truth = truth_of(40, seed=3) * kinds[:, None]
    table = truth / kinds[:, None] * np.exp(0.1 * rng.standard_normal((40, 1)))
    problem = problem_of(table, layers=[f"{index // 4}.{'qkvo'[index % 4]}" for index in range(40)])
    start = mpq.solvers.solve(problem).choices
    loss, least = additive(truth), additive(truth)(mpq.solvers.solve(problem_of(truth)).choices)
    evaluator = Fake(loss, samples=32, noise=0.02 * loss(start), evaluations=20)  # two are for the test
    search = search_of(evaluator, problem, kbest=2, offspring=8, patience=4, first=0.25, finalists=2)
    assert search.run(start)[1] == "the budget is spent, its last part on the test"
    assert loss(search.walker) - least < 0.25 * (loss(start) - least)  # .37 where layers have nothing in common


# -- on a model --------------------------------------------------------------------------------------------------------

DATA = images(4, 16)


@pytest.fixture(scope="module")
def table():
    space = mpq.SearchSpace(LABELS, ties=None)
    return mpq.measure(cnn(), DATA, space, sensitivity="weight_error", progress=False)


BUDGET = {"size": "3.2 bits values"}
QUICK = {"patience": 2, "offspring": 6, "kbest": 8, "level": 0.3}


def test_refined_plan_keeps_its_budget_and_is_never_worse(table):
    found = refine(cnn(), DATA, table, BUDGET, holdout=images(3, 5), evaluations=25, seed=1, **QUICK)
    assert found.selection.best <= found.selection.start
    assert found.plan.value_bytes <= found.plan.budgets[0].limit * (1 + 1e-9)
    assert found.start.options == table.solve(BUDGET).options
    assert found.selection.test.samples == 64
    assert found.fresh.test.samples == 32
    assert found.heldout.test.samples == 15
    assert found.evaluations <= 25
    kept = found.plan.provenance["refined"]
    assert (kept["evaluations"], kept["plans"]) == (found.evaluations, len(found.evaluator.measured))
    for name in ("selection", "fresh", "heldout"):
        assert kept[name] == getattr(found, name).facts()
    with mpq.quantized(cnn(), found.plan):
        pass
    text = str(found)
    assert "held out" in text
    assert "fresh part" in text
    direct = Evaluator(cnn(), DATA, table).measure(found.plan).divergence
    assert found.selection.best == pytest.approx(direct)


def test_plan_brings_its_table_and_budgets(table):
    plan = table.solve(BUDGET)
    one = refine(cnn(), DATA, plan, evaluations=8, **QUICK)
    other = refine(cnn(), DATA, table, BUDGET, evaluations=8, **QUICK)
    assert one.plan.options == other.plan.options
    with pytest.raises(ValueError, match="pass the table"):
        refine(cnn(), DATA, replace(plan, table=None))
    with pytest.raises(ValueError, match="budgets must be given"):
        refine(cnn(), DATA, table)
    with pytest.raises(ValueError, match="exceeds value_size by 19 B: pass its table"):
        refine(cnn(), DATA, plan, {"size": "2.2 bits values"})
    fast = replace(plan, budgets=(replace(plan.budgets[0], quantity="latency"),))
    with pytest.raises(ValueError, match="table has no quantity 'latency'"):
        refine(cnn(), DATA, fast)
    pinned = refine(cnn(), DATA, plan, pins={"head": "int8"}, evaluations=8, **QUICK)
    assert pinned.plan.options["head"] == "int8"


def test_a_refined_plan_says_apart_what_chose_it_and_what_did_not():
    def facts(start, best, samples):
        return {"start": start, "best": best, "p_value": 0.02, "samples": samples}

    kept = {"measured": "loss", "plans": 9, "selection": facts(2, 1, 64), "heldout": facts(3, 2.5, 32)}
    words = refinement_in_words(kept)
    assert words == "loss 2 -> 1 on the 64 samples that chose it among 9 plans; held out 3 -> 2.5 on 32 (p = 0.02)"
    assert refinement_in_words(kept | {"heldout": None}).endswith("; not judged on held-out data")
    found = refinement_in_words(kept | {"selection": facts(2, 2, 64)})
    assert found == "nothing better was found among 9 plans on 64 samples"


def test_samples_of_a_batch_that_belong_together_confirm_no_more_than_one(table):
    """Eight photos of 40 equal crops each."""
    generator = torch.Generator().manual_seed(0)
    photos = [torch.randn(1, 1, 6, 6, generator=generator).repeat(40, 1, 1, 1) for _ in range(8)]
    how = {"evaluations": 12, "seed": 1, **QUICK}
    crops = refine(cnn(), photos, table, BUDGET, **how)
    found = refine(cnn(), photos, table, BUDGET, holdout=images(3, 5), independent="batches", **how)
    assert (crops.fresh.test.samples, found.fresh.test.samples, found.heldout.test.samples) == (160, 4, 3)
    assert found.selection.independent == "batches"
    assert "8 batches" in str(found)
    assert "8 batches" in refinement_in_words(found.plan.provenance["refined"])
    assert found.plan.provenance["refined"]["asked"]["independent"] == "batches"


def test_what_the_plan_was_solved_under_holds_for_the_refined_one(table):
    free = refine(cnn(), DATA, table.solve(BUDGET), evaluations=12, seed=1, **QUICK)
    assert free.is_improved
    moved = next(name for name in free.plan.options if free.plan.options[name] != free.start.options[name])
    plan = table.solve(BUDGET, pins={moved: free.start.options[moved]})
    pinned = refine(cnn(), DATA, plan, evaluations=12, seed=1, **QUICK)
    assert pinned.plan.options[moved] == free.start.options[moved]
    assert pinned.plan.edited == (moved,)
    few = refine(cnn(), DATA, table.solve(BUDGET, max_formats=2), evaluations=12, seed=1, **QUICK)
    assert len(set(few.plan.options.values())) <= 2
    assert few.plan.provenance["max_formats"] == 2
    again = refine(cnn(), DATA, few.plan, evaluations=8, **QUICK)
    assert len(set(again.plan.options.values())) <= 2
    assert pinned.plan.provenance["price_of_pins"] == plan.provenance["price_of_pins"]
    other = next(name for name in plan.options if name != moved)
    more = refine(cnn(), DATA, plan, pins={other: "int4"}, evaluations=8, **QUICK)
    assert (more.plan.options[moved], more.plan.options[other]) == (plan.options[moved], "int4")
    assert set(more.plan.edited) == {moved, other}
    fresh = refine(cnn(), DATA, table, BUDGET, pins={other: "int4"}, evaluations=4, **QUICK)
    assert fresh.plan.edited == (other,)
    assert refine(cnn(), DATA, fresh.plan, evaluations=4, **QUICK).plan.options[other] == "int4"


def test_plans_with_static_ranges_are_refused():
    space = mpq.SearchSpace(["int4/int8", "int8/int8"], ties=None)
    plan = mpq.search(cnn(), DATA, space.options, {"size": "5 bits values"}, sensitivity="weight_error", progress=False)
    static = mpq.activation_ranges.calibrate_ranges(cnn(), DATA, plan)
    with pytest.raises(ValueError, match="static input ranges.* calibrate what comes out"):
        refine(cnn(), DATA, static, evaluations=4)


def test_held_out_data_is_judged_with_the_evaluators_quantizer(table):
    class Coarse(mpq.quantizer.RoundToNearest):
        def __call__(self, rows, fmt, layer):
            return super().__call__(rows, fmt, layer) * 0.9

    evaluator = Evaluator(cnn(), DATA, table, quantizer=Coarse(), evaluations=6)
    found = refine(cnn(), None, table, BUDGET, evaluator=evaluator, holdout=DATA, **QUICK)
    assert found.heldout.best == pytest.approx(found.selection.best)
    assert found.heldout.best != pytest.approx(Evaluator(cnn(), DATA, table).measure(found.plan).divergence)


def test_data_that_cannot_be_split_is_refused(table):
    with pytest.raises(ValueError, match="parts that are measured apart.* give more samples"):
        refine(cnn(), images(1, 1), table, BUDGET, evaluations=4)
    with pytest.raises(ValueError, match="more batches"):
        refine(cnn(), images(1, 16), table, BUDGET, evaluations=4, task=lambda model, batch: model(batch[0]).sum(1))


def test_the_last_piece_may_be_too_large_to_be_halved(table):
    data = [
        (torch.cat([x for x, _ in DATA])[:64], torch.zeros(64)),
        (torch.cat([x for x, _ in DATA])[:36], torch.zeros(36)),
    ]
    for seed in range(4):
        how = {"task": lambda model, batch: model(batch[0]).square().sum(1), "seed": seed, "evaluations": 12}
        found = refine(cnn(), data, table, BUDGET, **how, **QUICK)
        assert found.fresh.test.samples in (36, 64)


def test_plans_whose_outputs_are_no_numbers_are_left_behind():
    scores = truth_of(seed=3)
    start = mpq.solvers.solve(problem_of(truth_of(seed=4))).choices
    loss = additive(scores)
    broken = [(place, option) for place in range(3) for option in (0, 1) if start[place] != option]

    def sometimes_nothing(choices):
        return math.nan if any(choices[place] == option for place, option in broken) else loss(choices)

    evaluator = Fake(sometimes_nothing, evaluations=60)
    search = search_of(evaluator, problem_of(truth_of(seed=4)), patience=3, offspring=8)
    best, _ = search.run(start)
    assert any(math.isnan(found.divergence) for found in evaluator.measured.values())
    assert loss(best) < 0.9 * loss(start)
    assert not math.isnan(sometimes_nothing(best))
    late = Fake(loss, evaluations=60)  # better than the start, but for a sample that the walk does not see
    values = late._values
    late._values = lambda choices: np.where(
        (np.arange(64) == 60) & (not np.array_equal(choices, start)), math.nan, values(choices)
    )
    best, _ = search_of(late, problem_of(truth_of(seed=4)), patience=3, offspring=8).run(start)
    assert np.array_equal(best, start)
    with pytest.raises(ValueError, match="start plan's outputs must be finite"):
        search_of(Fake(lambda choices: math.nan), problem_of(scores)).run(start)


def test_the_headline_says_when_held_out_data_disagree(table):
    found = refine(cnn(), DATA, table, BUDGET, holdout=images(3, 5), evaluations=25, seed=1, **QUICK)
    assert found.is_improved
    for best, start, said in (
        (math.nan, 0.5, "no better"),
        (1.0, 0.5, "but is WORSE on the held-out"),
        (0.51, 0.5, "no better"),
        (0.4, 0.5, None),
    ):
        noise = np.linspace(-0.3, 0.3, 20)
        heldout = Compared.of(best + noise[::-1], start + noise)
        text = str(replace(found, heldout=heldout)).splitlines()[0]
        assert (said in text) if said else ("held-out" not in text)


def test_end_of_the_budget_ends_the_search(table):
    found = refine(cnn(), DATA, table, BUDGET, evaluations=3, **QUICK)
    assert found.stopped == "the budget is spent, its last part on the test"
    assert found.evaluations <= 3
    assert "seconds for measurements are over" in refine(cnn(), DATA, table, BUDGET, seconds=1e-9, **QUICK).stopped


class Killed(Distribution):
    """Dies after so many runs."""

    left: int = 10**9

    def run(self, model, batch):
        Killed.left -= 1
        if Killed.left < 0:
            raise KeyboardInterrupt
        return super().run(model, batch)


def test_killed_and_started_again_it_ends_the_same_without_measuring_twice(table, tmp_path, monkeypatch):
    def run(cache):
        return refine(cnn(), DATA, table, BUDGET, task=Killed(), cache=cache, evaluations=15, seed=2, **QUICK)

    whole = run(None)
    monkeypatch.setattr(Killed, "left", 150)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(Killed, "left", 10**9)
    again = run(tmp_path)
    assert again.plan.options == whole.plan.options
    assert again.history == whole.history
    assert again.selection == whole.selection
    assert again.evaluator.measured.keys() == whole.evaluator.measured.keys()
    assert again.evaluator.runs <= whole.evaluator.runs - 150 * 4 + 16 * 4 + 4  # all but the piece it was killed in
    third = run(tmp_path)
    assert third.evaluator.runs == 0
    assert third.plan.options == whole.plan.options


def test_search_refines_when_asked():
    batches = (batch for batch in DATA)  # read once
    settings = {"sensitivity": "weight_error", "ties": None, "seed": 1, "progress": False}
    plain = mpq.search(cnn(), DATA, LABELS, BUDGET, **settings)
    found = mpq.search(cnn(), batches, LABELS, BUDGET, refine={"evaluations": 12, **QUICK}, **settings)
    expected = refine(cnn(), DATA, plain, evaluations=12, seed=1, **QUICK)
    assert found.options == expected.plan.options
    assert found.provenance["refined"]["evaluations"] == expected.evaluations
    assert mpq.search(cnn(), DATA, LABELS, BUDGET, refine=2, **settings).provenance["refined"]["evaluations"] <= 2
    assert "refined" not in mpq.search(cnn(), DATA, LABELS, BUDGET, refine=False, **settings).provenance
    with pytest.raises(ValueError, match="evaluations must be a positive number, got '20'"):
        mpq.search(cnn(), DATA, LABELS, BUDGET, refine="20", **settings)


def test_settings_are_checked():
    with pytest.raises(TypeError, match="refine has no setting 'ofspring': did you mean 'offspring'"):
        refine(cnn(), DATA, None, ofspring=3)
    for wrong in ({"patience": 0}, {"level": 1.0}, {"first": 0.0}, {"draws": -1}, {"fresh": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


# -- accuracy as a constraint ------------------------------------------------------------------------------------------


def confident(samples=400):
    """Data labelled by the model itself: full precision is always right."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(samples, 1, 6, 6, generator=generator)
    with torch.no_grad():
        return inputs, cnn()(inputs).argmax(-1)


def test_smallest_plan_within_a_drop_is_that_of_the_whole_frontier(table):
    data = confident()
    found = smallest(cnn(), data, table, drop=0.05)
    evaluator = Evaluator(cnn(), data, table, metric="accuracy")
    front = table.pareto("size", epsilon=1e-3)
    drops = [evaluator.measure(point.choices.astype(int)) for point in front]
    passing = [
        point.resource
        for point, drop in zip(front, drops, strict=True)
        if paired_test(np.append(drop.per_sample, 1.0), 0.05).p_value < 0.05
    ]
    assert found.plan is not None
    assert found.drop <= 0.05
    assert found.test.p_value < 0.05
    assert min(passing) <= found.resource <= 1.1 * min(passing)
    assert found.plan.size_bytes == pytest.approx(found.resource)
    assert found.unsure.size_bytes <= found.plan.size_bytes
    assert len(found.history) < len(front) / 2
    assert "sure that it is below" in str(found)


def test_smallest_says_what_it_found_and_why_it_stopped(table):
    data = confident()
    through = smallest(cnn(), data, table, drop=0.05)
    assert through.stopped == ""
    assert str(through).startswith(f"size {through.resource:.0f} B: accuracy drop")
    cut = smallest(cnn(), data, table, drop=0.05, evaluations=1)
    assert cut.plan is None or "a smaller one may do" in str(cut)
    assert cut.stopped == "the 1 evaluations are spent"
    none = smallest(cnn(), data, replaced(table, "int2", "int3"), drop=1e-9, evaluations=1)
    assert "the 1 evaluations are spent, before the search was through: allow more of them" in str(none)


def test_too_few_samples_confirm_nothing(table):
    inputs, labels = confident()
    found = smallest(cnn(), (inputs[:12], labels[:12]), replaced(table, "int2", "int3"), drop=0.01)
    assert found.plan is None
    assert "no plan of the frontier was confirmed" in str(found)


def test_a_drop_at_the_limit_is_confirmed_no_more_often_than_the_level_says():
    rng = np.random.default_rng(0)
    for samples in (300, 1000):
        flips = rng.random((2000, samples)) < 0.01
        p_values = [paired_test(_with_one_lost(row.astype(float), "accuracy"), 0.01).p_value for row in flips]
        assert np.mean(np.array(p_values) < 0.05) <= 0.06
    assert paired_test(_with_one_lost(np.zeros(200), "accuracy"), 0.01).p_value > 0.05
    assert paired_test(_with_one_lost(np.zeros(300), "accuracy"), 0.01).p_value < 0.05


def replaced(table, *labels):
    columns = [table.options.index(label) for label in labels]
    return replace(
        table, options=list(labels), quantities={n: values[:, columns] for n, values in table.quantities.items()}
    )


def test_smallest_refuses():
    with pytest.raises(TypeError, match="table must be a CostTable, such as plan.table, got NoneType"):
        smallest(cnn(), DATA, None)
    table = mpq.measure(cnn(), DATA, ["int4", "int8"], sensitivity="weight_error", progress=False)
    with pytest.raises(ValueError, match="drop must be a positive number"):
        smallest(cnn(), DATA, table, drop=0)
    with pytest.raises(ValueError, match="evaluator measures 'divergence'"):
        smallest(cnn(), DATA, table, evaluator=Evaluator(cnn(), DATA, table))
