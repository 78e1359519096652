"""Slopes at a plan are finite differences of the divergence; steps along them find what tables miss."""

import math

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from test_refinement import Fake, additive, problem_of, search_of, truth_of

import mpq
from mpq import evaluator as evaluator_file
from mpq.evaluator import Evaluator, Exhausted
from mpq.formats import parse
from mpq.layer_levels import LayerLevels, LevelEvaluator
from mpq.paired_test import best_of_several, paired_test
from mpq.quantizer import RoundToNearest, quantised_rows
from mpq.refinement import refine
from mpq.slope_steps import Slopes, slope_steps
from mpq.surgery import layer_parameters
from mpq.tasks import Distribution
from mpq.weight_view import as_rows, from_rows

LABELS = ["int3", "int4", "int8"]
DATA = images(2, 4)


def table_of(model, data, granularity="layer", options=LABELS):
    space = mpq.SearchSpace(options, ties=None)
    how = {"sensitivity": "weight_error", "granularity": granularity, "progress": False}
    return mpq.measure(model, data, space, **how)


def in_double(model, data):
    return model.double(), [(x.double(), y) for x, y in data]


def divergence_of(model, data, reference, task):
    with torch.no_grad():
        found = [task.divergence(exact, task.run(model, batch)) for exact, batch in zip(reference, data, strict=True)]
    return float(torch.cat(found).mean())


def unit_masks(layer, granularity):
    """(rows, columns) masks of every unit, in the plainest way."""
    rows, columns = layer.weight_shape[0], layer.parameters // layer.weight_shape[0]
    kind, _, size = granularity.partition(":")
    if kind == "layer":
        return [torch.ones(rows, columns)]
    masks = []
    for row in range(rows):
        for first in range(0, columns, int(size) if kind == "groups" else columns):
            mask = torch.zeros(rows, columns)
            mask[row, first : first + (int(size) if kind == "groups" else columns)] = 1
            masks.append(mask)
    return masks


@pytest.mark.parametrize("granularity", ["layer", "rows:1", "groups:8"])
def test_slopes_are_finite_differences(granularity):
    model, data = in_double(cnn(), DATA)
    table = table_of(model, data, granularity)
    rng, task, step = np.random.default_rng(0), Distribution(), 1e-3
    plan = rng.integers(0, 3, len(table.units))
    evaluator = Evaluator(model, data, table)
    slopes = evaluator.slopes(plan).first
    with torch.no_grad():
        reference = [task.run(model.eval(), batch) for batch in data]
    index, codes = np.asarray(table.layer_index), iter(range(len(plan)))
    changes = {}  # by unit: the layer, and towards each option
    for position, layer in enumerate(table.layers):
        exact = as_rows(layer_parameters(model, layer)[0].detach(), layer).clone()
        quantised = [quantised_rows(exact, parse(x), layer, granularity, RoundToNearest()) for x in LABELS]
        quantised = [each.reshape(len(exact), -1) for each in quantised]
        planned = torch.zeros_like(quantised[0])
        for mask in unit_masks(layer, granularity):
            unit = next(codes)
            assert index[unit] == position
            planned += mask * quantised[plan[unit]]
            changes[unit] = layer, [mask * (each - quantised[plan[unit]]) for each in quantised]
        layer_parameters(model, layer)[0].data = from_rows(planned.reshape(layer.weight_shape), layer).contiguous()
    for unit in rng.choice(len(plan), min(12, len(plan)), replace=False):
        layer, towards = changes[unit]
        parameter = layer_parameters(model, layer)[0]
        before = parameter.data
        for option, change in enumerate(towards):
            ends = []
            for sign in (1, -1):
                moved = as_rows(before, layer).reshape(change.shape) + sign * step * change
                parameter.data = from_rows(moved.reshape(layer.weight_shape), layer).contiguous()
                ends.append(divergence_of(model, data, reference, task))
            parameter.data = before
            expected = (ends[0] - ends[1]) / (2 * step)
            assert slopes[unit, option] == pytest.approx(expected, rel=2e-3, abs=1e-6 * abs(slopes).max())


def test_second_order_is_both_scores_where_the_option_changes():
    found = Slopes.around(np.array([1, 0]), np.zeros((2, 2)), np.array([[3.0, 1.0], [2.0, np.nan]]), 1.0)
    assert found.second.tolist() == [[4.0, 0.0], [0.0, 2.0]]


def test_model_comes_back_and_the_budget_pays_three_measurements():
    model, table = cnn(), table_of(cnn(), DATA)
    model.head.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: value.requires_grad for name, value in model.named_parameters()}
    state, training = torch.random.get_rng_state(), model.training
    evaluator = Evaluator(model, DATA, table, evaluations=4)
    evaluator.slopes(np.ones(len(table.units), dtype=int))
    assert evaluator.spent == 3
    evaluator.slopes(np.ones(len(table.units), dtype=int), samples=2)
    assert evaluator.spent == pytest.approx(3.75)
    with pytest.raises(Exhausted):
        evaluator.slopes(np.ones(len(table.units), dtype=int))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == asked
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(value.grad is None for name, value in model.named_parameters() if name != "head.weight")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training == training


def test_slopes_are_found_again_in_the_folder(tmp_path, monkeypatch):
    model, table = cnn(), table_of(cnn(), DATA)
    plan = np.ones(len(table.units), dtype=int)
    first = Evaluator(model, DATA, table, cache=tmp_path).slopes(plan, samples=4)
    monkeypatch.setattr(evaluator_file, "plan_slopes", lambda *_: pytest.fail("taken again"))
    again = Evaluator(model, DATA, table, cache=tmp_path)
    assert np.array_equal(again.slopes(plan, samples=4).first, first.first)
    assert again.spent == 1.5
    with pytest.raises(pytest.fail.Exception, match="taken again"):
        again.slopes(plan)


def test_rounded_inputs_let_gradients_through():
    model = cnn()
    table = table_of(model, DATA, options=["int4/int8", "int8/int8"])
    plan = np.zeros(len(table.units), dtype=int)
    evaluator = Evaluator(model, DATA, table)
    slopes = evaluator.slopes(plan).first
    assert (slopes[:, 0] == 0).all()
    assert (slopes[:, 1] != 0).all()  # the first layers' too, behind which every input is rounded
    weights = Evaluator(model, DATA, table_of(model, DATA, options=["int4", "int8"])).slopes(plan).first
    assert slopes[:, 1] == pytest.approx(weights[:, 1], rel=0.3)


def test_a_model_without_gradients_is_searched_without(recwarn):
    class Closed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cnn()

        @torch.no_grad()
        def forward(self, x):
            return self.inner(x)

    model = Closed()
    table = table_of(model, DATA)
    assert Evaluator(model, DATA, table).slopes(np.ones(len(table.units), dtype=int)) is None
    assert refine(model, DATA, table, {"size": "4 bits values"}, evaluations=5, slopes=True).evaluations > 0
    assert not [warned for warned in recwarn if "gradient" in str(warned.message)]


def test_tied_weights_of_a_language_model_have_the_gradients_of_both_uses():
    model, data = decoder().double(), tokens()
    table = table_of(model, data)
    plan, step = np.zeros(len(table.units), dtype=int), 1e-4
    evaluator = Evaluator(model, data, table)
    slopes, task = evaluator.slopes(plan).first, evaluator.task
    with torch.no_grad():
        reference = [task.run(model, batch) for batch in data]
    place, layer = next((i, layer) for i, layer in enumerate(table.layers) if layer.aliases)
    exact = layer_parameters(model, layer)[0].detach().clone()
    coarse, fine = (quantised_rows(exact, parse(label), layer, "layer", RoundToNearest()) for label in LABELS[::2])
    for other in table.layers:
        parameter = layer_parameters(model, other)[0]
        parameter.data = quantised_rows(parameter.detach(), parse(LABELS[0]), other, "layer", RoundToNearest())
    ends = []
    for sign in (1, -1):
        for parameter in layer_parameters(model, layer):
            parameter.data = coarse + sign * step * (fine - coarse)
        ends.append(divergence_of(model, data, reference, task))
    assert slopes[place, 2] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3)


def test_half_precision_keeps_small_gradients():
    found = []
    for dtype in (torch.float32, torch.float16):
        model = cnn().to(dtype)
        data = [(1e-3 * x.to(dtype), y) for x, y in DATA]
        table = table_of(cnn(), DATA)
        found.append(Evaluator(model, data, table).slopes(np.zeros(len(table.units), dtype=int)).first)
    assert found[1][:, 2] == pytest.approx(found[0][:, 2], rel=0.2, abs=0.02 * abs(found[0]).max())


def test_slopes_are_those_of_divergence_whatever_the_metric():
    model, table = cnn(), table_of(cnn(), DATA)
    plan = np.zeros(len(table.units), dtype=int)
    one, other = (Evaluator(model, DATA, table, metric=metric).slopes(plan) for metric in ("divergence", "accuracy"))
    assert np.array_equal(one.first, other.first)
    assert other.divergence == pytest.approx(Evaluator(model, DATA, table).measure(plan).divergence)


def test_slopes_of_levels_are_sums_over_their_units():
    model = cnn()
    table = table_of(model, DATA, "rows:1")
    problem = table.problem({"size": "4 bits values"})
    start = mpq.solvers.solve(problem).choices
    evaluator = Evaluator(model, DATA, table)
    levels = LayerLevels(problem, np.asarray(table.layer_index), start, reach=2)
    found = LevelEvaluator(evaluator, levels).slopes(levels.middle)
    fine = evaluator.slopes(start)
    for layer in range(len(table.layers)):
        units = np.flatnonzero(np.asarray(table.layer_index) == layer)
        for level, plan in enumerate(levels.plans):
            assert found.first[layer, level] == pytest.approx(fine.first[units, plan[units]].sum())
            scores = table.quantity("sensitivity")
            second = sum(scores[u, plan[u]] + scores[u, start[u]] for u in units if plan[u] != start[u])
            assert found.second[layer, level] == pytest.approx(second)


# -- steps -------------------------------------------------------------------------------------------------------------


class Interacting(Fake):
    """Errors that add up before they are squared, in a few directions; the table has every layer's own square right."""

    def __init__(self, scores, directions=4, seed=0, **settings):
        rng = np.random.default_rng(seed)
        self.scores = scores
        self.errors = np.sqrt(scores)
        self.shared = rng.standard_normal((len(scores), directions)) / directions**0.5
        self.interaction = 0.3 * self.shared @ self.shared.T
        np.fill_diagonal(self.interaction, 1.0)
        super().__init__(self.quadratic, **settings)

    def quadratic(self, choices):
        error = self.errors[np.arange(len(choices)), choices]
        return float(error @ self.interaction @ error)

    def slopes(self, choices, samples=None):
        error = self.errors[np.arange(len(choices)), choices]
        gradient = 2 * self.interaction @ error
        return Slopes.around(
            choices, gradient[:, None] * (self.errors - error[:, None]), self.scores, self.quadratic(choices)
        )


def test_steps_find_in_few_evaluations_what_interactions_hide_from_the_table():
    problem = problem_of(truth_of(layers=100))
    start = mpq.solvers.solve(problem).choices
    found = {}
    for slopes in (True, False):
        evaluator = Interacting(problem.objective, evaluations=25)
        search = search_of(evaluator, problem, slopes=slopes, kbest=1, draws=0, offspring=8, finalists=2)
        best, _ = search.run(start)
        found[slopes] = evaluator.quadratic(best) / evaluator.quadratic(start)
    assert found[True] < 1 - 2 * (1 - found[False])
    assert found[True] < 0.9


def test_steps_keep_the_budget_and_differ():
    problem = problem_of(truth_of(layers=100))
    start = mpq.solvers.solve(problem).choices
    evaluator = Interacting(problem.objective)
    slopes, divergence = evaluator.slopes(start), evaluator.quadratic(start)
    steps = list(slope_steps(problem, slopes, start, additive(problem.objective)(start)))
    assert 1 < len(steps) == len({step.tobytes() for step in steps})
    assert all(problem.is_feasible(step) for step in steps)
    assert min(evaluator.quadratic(step) for step in steps) < divergence


# -- the test of several -----------------------------------------------------------------------------------------------


def test_equal_plans_are_one_and_different_ones_count():
    rng = np.random.default_rng(0)
    rival = rng.standard_normal(40)
    plans = rival + rng.standard_normal((5, 40)) - 0.25
    single = np.array([paired_test(plan, rival).p_value for plan in plans])
    same = best_of_several([plans[0]] * 5, rival)
    assert same == pytest.approx([single[0]] * 5, abs=4 * math.sqrt(single[0] / 20_000))
    assert best_of_several(plans[:1], rival) == pytest.approx(single[:1])
    each = best_of_several(plans, rival)
    assert (each >= single).all()
    assert each == pytest.approx(1 - (1 - single) ** 5, abs=0.04)  # they share a rival with noise of its own: not quite
    assert best_of_several(plans, rival, test="sign") == pytest.approx(
        [min(1, 5 * paired_test(plan, rival, test="sign").p_value) for plan in plans]
    )


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_level_holds_for_all_plans_together(alike):
    rng, found, repeats = np.random.default_rng(1), 0, 300
    for _ in range(repeats):
        common, own = rng.standard_normal(24), rng.standard_normal((8, 24))
        found += best_of_several(math.sqrt(alike) * common + math.sqrt(1 - alike) * own, np.zeros(24)).min() < 0.2
    assert abs(found / repeats - 0.2) < 3 * math.sqrt(0.16 / repeats)
