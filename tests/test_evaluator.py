"""Measured plans: against a loop that copies the model, each made once, within the budget, found again on disk."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens

import mpq
from mpq.drops import drop_of
from mpq.evaluator import Evaluator, Exhausted
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.kept_weights import KeptWeights
from mpq.measured_loss import MeasuredLoss
from mpq.plan_keys import key_of
from mpq.quantizer import RoundToNearest
from mpq.surgery import layer_parameters
from mpq.tasks import CustomLoss, Distribution, Features, Outputs
from mpq.weight_view import as_rows, from_rows

OPTIONS = ["int2", "int4", "int8"]


@pytest.fixture(scope="module")
def table():
    return table_of(cnn(), images(4, 8))


def table_of(model, data, **settings):
    space = mpq.SearchSpace(OPTIONS, ties=None)
    return mpq.measure(model, data, space, sensitivity="weight_error", progress=False, **settings)


def plans(table, count=4, seed=0):
    return np.random.default_rng(seed).integers(0, len(table.options), (count, len(table.units)))


def dumb_divergence(model, inputs, table, choices):
    """KL a sample with weights quantised in a copy of the model."""
    quantised = copy.deepcopy(model)
    for layer, choice in zip(table.layers, choices, strict=True):
        for parameter in layer_parameters(quantised, layer):
            rows = fake_quantize(as_rows(parameter.detach(), layer), parse(table.options[choice]), name=layer.name)
            parameter.data = from_rows(rows, layer).contiguous()
    with torch.no_grad():
        p, q = (net(inputs).double().log_softmax(-1) for net in (model, quantised))
    return (p.exp() * (p - q)).sum(-1).numpy()


def test_equals_a_loop_over_copies(table):
    model, data = cnn(), images(4, 8)
    evaluator = Evaluator(model, data, table)
    for choices in plans(table):
        found = evaluator.measure(choices)
        every = np.concatenate([dumb_divergence(model, inputs, table, choices) for inputs, _ in data])
        assert np.sort(found.per_sample) == pytest.approx(np.sort(every), rel=1e-4, abs=1e-7)
        assert found.divergence == pytest.approx(every.mean(), rel=1e-4)
        assert found.standard_error == pytest.approx(every.std(ddof=1) / math.sqrt(32), rel=1e-4)
        assert found.samples == 32


def test_a_plan_is_measured_like_its_choices(table):
    evaluator = Evaluator(cnn(), images(4, 8), table)
    plan = table.solve({"size": "4 bits values"})
    choices = [table.options.index(option) for option in plan.options.values()]
    assert evaluator.measure(plan) is evaluator.measure(choices)
    assert evaluator.plan(choices).options == plan.options
    assert evaluator.plan(choices).predicted == pytest.approx(plan.predicted)


def test_amounts_are_nested_and_cost_what_they_take(table):
    evaluator, (choices, *_) = Evaluator(cnn(), images(4, 8), table, seed=3), plans(table)
    little = evaluator.measure(choices, 5)
    assert 5 <= little.samples < 12
    assert evaluator.spent == little.samples / 32
    whole = evaluator.measure(choices)
    assert np.array_equal(whole.per_sample[: little.samples], little.per_sample)
    assert evaluator.spent == 1
    assert evaluator.runs == 32
    again = evaluator.measure(choices, 5)
    assert np.array_equal(again.per_sample, little.per_sample)
    assert evaluator.runs == 32
    direct = Evaluator(cnn(), images(4, 8), table, seed=3).measure(choices)
    assert np.array_equal(direct.per_sample, whole.per_sample)


def test_seed_shuffles_the_samples(table):
    choices = plans(table)[0]
    one, other = (Evaluator(cnn(), images(4, 8), table, seed=seed).measure(choices) for seed in (0, 1))
    assert not np.array_equal(one.per_sample, other.per_sample)
    assert np.sort(one.per_sample) == pytest.approx(np.sort(other.per_sample), rel=1e-4, abs=1e-7)


class Counting:
    """Rounds to nearest and counts."""

    def __init__(self):
        self.calls = []

    def __call__(self, rows, fmt, layer):
        self.calls.append((layer.name, str(fmt)))
        return RoundToNearest()(rows, fmt, layer)


def test_each_weight_is_quantised_once(table):
    quantizer = Counting()
    evaluator = Evaluator(cnn(), images(4, 8), table, quantizer=quantizer)
    first = np.zeros(len(table.units), dtype=int)
    evaluator.measure(first)
    assert len(quantizer.calls) == len(table.units)
    second = first.copy()
    second[[1, 3]] = 1, 2
    evaluator.measure(second)
    assert quantizer.calls[len(table.units) :] == [("depthwise", "int4@channel"), ("head", "int8@channel")]
    evaluator.measure(np.where(second == 0, 0, first))
    assert len(quantizer.calls) == len(table.units) + 2


def test_without_room_nothing_is_kept_and_nothing_changes(table):
    quantizer = Counting()
    small = Evaluator(cnn(), images(4, 8), table, quantizer=quantizer, kept_bytes=0)
    large = Evaluator(cnn(), images(4, 8), table)
    for choices in plans(table):
        assert np.array_equal(small.measure(choices).per_sample, large.measure(choices).per_sample)
    assert len(quantizer.calls) > len(set(quantizer.calls))


def test_rows_take_options_of_their_own():
    model, data = cnn(), images(4, 8)
    table = table_of(model, data, granularity="rows:1")
    choices = plans(table, 1)[0]
    quantised = copy.deepcopy(model)
    for position, layer in enumerate(table.layers):
        mine = choices[table.layer_index == position]
        for parameter in layer_parameters(quantised, layer):
            rows = as_rows(parameter.detach(), layer)
            parts = [fake_quantize(rows[r : r + 1], parse(table.options[c]), name="") for r, c in enumerate(mine)]
            parameter.data = from_rows(torch.cat(parts), layer).contiguous()
    with torch.no_grad():
        p, q = (torch.cat([net(inputs) for inputs, _ in data]).double().log_softmax(-1) for net in (model, quantised))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert Evaluator(model, data, table).measure(choices).divergence == pytest.approx(float(expected), rel=1e-4)


def test_model_comes_back_bit_for_bit_even_when_interrupted(table):
    model, runs = cnn(), [0]
    before = copy.deepcopy(model.state_dict())
    evaluator = Evaluator(model, images(4, 8), table)

    class Interrupted(Distribution):
        def run(self, model, batch):
            runs[0] += 1
            if runs[0] == 26:
                raise KeyboardInterrupt
            return super().run(model, batch)

    evaluator.task = Interrupted()
    choices = plans(table)[0]
    with pytest.raises(KeyboardInterrupt):
        evaluator.measure(choices)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert evaluator.runs == 18  # 16 runs of full precision, then 9 pieces of 2
    assert evaluator.measure(choices).samples == 32
    assert evaluator.runs == 32


def test_budget_of_evaluations(table):
    evaluator = Evaluator(cnn(), images(4, 8), table, evaluations=1.5)
    first, second, third, _ = plans(table)
    evaluator.measure(first)
    assert evaluator.left == 0.5
    evaluator.measure(second, 16)
    assert evaluator.left == 0
    with pytest.raises(Exhausted, match=r"1\.5 evaluations"):
        evaluator.measure(third, 1)
    assert evaluator.measure(first).samples == 32  # what is known costs nothing
    assert set(evaluator.measured) == {key_of(plan) for plan in (first, second)}
    assert Evaluator(cnn(), images(4, 8), table).left == math.inf


def test_budget_of_seconds(table):
    evaluator = Evaluator(cnn(), images(4, 8), table, seconds=1e-9)
    first, second, *_ = plans(table)
    with pytest.raises(Exhausted, match="seconds"):
        [evaluator.measure(choices) for choices in (first, second)]
    assert evaluator.left == 0


def test_cache_finds_everything_again_and_nothing_else(table, tmp_path):
    choices = plans(table)
    first = Evaluator(cnn(), images(4, 8), table, cache=tmp_path)
    found = [first.measure(choice).per_sample for choice in choices]
    again = Evaluator(cnn(), images(4, 8), table, cache=tmp_path, evaluations=10)
    assert all(np.array_equal(again.measure(c).per_sample, f) for c, f in zip(choices, found, strict=True))
    assert (again.runs, again.spent) == (0, 4)
    model = cnn()
    with torch.no_grad():
        model.head.bias[0] += 1
    for other in (
        Evaluator(model, images(4, 8), table, cache=tmp_path),
        Evaluator(cnn(), images(4, 7), table, cache=tmp_path),
        Evaluator(cnn(), images(4, 8), table, cache=tmp_path, seed=1),
        Evaluator(cnn(), images(4, 8), table, cache=tmp_path, metric="accuracy"),
        Evaluator(cnn(), images(4, 8), replace(table, options=["int2", "int4", "int6"]), cache=tmp_path),
    ):
        other.measure(choices[0])
        assert other.runs == other.samples


def test_cache_goes_on_with_part_of_a_plan(table, tmp_path):
    choices = plans(table)[0]
    part = Evaluator(cnn(), images(4, 8), table, cache=tmp_path).measure(choices, 10)
    evaluator = Evaluator(cnn(), images(4, 8), table, cache=tmp_path)
    whole = evaluator.measure(choices)
    assert evaluator.runs == 32 - part.samples
    assert np.array_equal(whole.per_sample, Evaluator(cnn(), images(4, 8), table).measure(choices).per_sample)


def test_frontier_of_plans_measured_on_a_part(table):
    evaluator = Evaluator(cnn(), images(4, 16), table)
    plans = [np.full(len(table.units), option) for option in range(3)]
    for plan, samples in zip(plans, (64, 32, 16), strict=True):
        evaluator.measure(plan, samples)
    assert [len(evaluator.frontier("size", samples)) for samples in (None, 64, 32, 10)] == [1, 1, 2, 3]
    front, before = evaluator.frontier("size", 32), evaluator.spent
    expected = [evaluator.measure(plan, 32).divergence for plan in plans[:2]]
    assert front.objective.tolist() == pytest.approx(expected)
    assert front.provenance["samples"] == 32
    assert evaluator.spent == before
    with pytest.raises(ValueError, match="on 65 samples: .* samples=64 at most"):
        evaluator.frontier("size", 65)


def test_plans_without_a_number_are_on_no_frontier(table, monkeypatch):
    evaluator = Evaluator(cnn(), images(4, 16), table)
    coarse, fine = (np.full(len(table.units), option) for option in (0, 2))
    evaluator.measure(fine)
    evaluator.measured[key_of(coarse)] = MeasuredLoss.of(np.full(64, np.nan))
    assert len(evaluator.frontier("size")) == 1
    evaluator.measured.pop(key_of(fine))
    with pytest.raises(ValueError, match="no plan was measured on all the data"):
        evaluator.frontier("size")


def test_frontier_is_what_no_other_beats(table):
    evaluator = Evaluator(cnn(), images(4, 8), table)
    tried = plans(table, 30)
    loss = np.array([evaluator.measure(choices).divergence for choices in tried])
    evaluator.measure(np.full(len(table.units), 2), 4)  # on little data: not comparable
    size = table.quantities["size"][np.arange(len(table.units)), tried].sum(1) + table.offsets["size"]
    beaten = [((size <= s) & (loss <= x) & ((size < s) | (loss < x))).any() for s, x in zip(size, loss, strict=True)]
    front = evaluator.frontier("size")
    expected = sorted({(s, x) for s, x, bad in zip(size, loss, beaten, strict=True) if not bad})
    assert list(zip(front.resource, front.objective, strict=True)) == [pytest.approx(point) for point in expected]
    assert front.provenance["measured"] == "divergence"
    assert front.provenance["samples"] == 32
    assert front.allocation(at=float(size.max())).proof.status == "heuristic"


def test_accuracy_agreement_and_loss_against_arithmetic():
    exact = Outputs(torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 5]]), labels=torch.tensor([0, 0, 2]))
    found = Outputs(torch.tensor([[1.0, 3, 0], [4, 2, 1], [1, 0, 5]]), labels=torch.tensor([0, 0, 2]))
    task = Distribution()
    assert drop_of("accuracy", task)(exact, found).tolist() == [1, -1, 0]
    assert drop_of("agreement", task)(exact, found).tolist() == [1, 1, 0]
    log = [output.values.double().log_softmax(-1)[range(3), [0, 0, 2]] for output in (exact, found)]
    assert drop_of("loss", task)(exact, found).tolist() == pytest.approx((log[0] - log[1]).tolist(), rel=1e-6)
    assert drop_of(lambda outputs: outputs.values[:, 0], task)(exact, found).tolist() == [2, -4, 0]


def test_accuracy_of_tokens_leaves_padding_out():
    values = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 3, 3]])]
    labels = torch.tensor([[0, 1, 3], [3, -100, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    wrong = Outputs(torch.zeros(2, 3, 4), mask, labels)  # class 0 everywhere
    drop = drop_of("accuracy", Distribution())(Outputs(values, mask, labels), wrong)
    assert drop.tolist() == pytest.approx([2 / 3 - 1 / 3, 1.0])


def test_metric_that_is_not_there():
    outputs = Outputs(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="needs labels"):
        drop_of("accuracy", Distribution())(outputs, outputs)
    with pytest.raises(ValueError, match="take 'divergence'"):
        drop_of("agreement", Features())(outputs, outputs)
    with pytest.raises(ValueError, match="must be one of divergence"):
        drop_of("f1", Distribution())
    with pytest.raises(ValueError, match="one number a sample"):
        drop_of(lambda outputs: outputs.values, Distribution())(outputs, outputs)


def test_tokens_and_losses_of_ones_own():
    model, data = decoder(), tokens(4, 6)
    table = table_of(model, data, task="causal-lm")
    found = Evaluator(model, data, table, task="causal-lm").measure(plans(table)[0])
    assert found.samples == 24
    assert found.divergence > 0
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        return model(**batch)["logits"].square().mean()

    evaluator = Evaluator(model, data, table, task=CustomLoss(loss))
    evaluator.measure(plans(table)[0])
    assert set(sizes) == {6}  # a function gets its batches as they are


def test_refusals(table):
    by_hand = mpq.CostTable(units=["a"], options=["int4"], quantities={"sensitivity": [[1.0]]})
    with pytest.raises(ValueError, match="must have layers"):
        Evaluator(cnn(), images(), by_hand)
    with pytest.raises(ValueError, match="choices must be"):
        Evaluator(cnn(), images(), table).measure(np.full(len(table.units), 0.7))
    with pytest.raises(ValueError, match="evaluations must be a positive number, got 0"):
        Evaluator(cnn(), images(), table, evaluations=0)
    evaluator = Evaluator(cnn(), images(), table)
    for wrong in ([0], [9] * len(table.units), [-1] * len(table.units)):
        with pytest.raises(ValueError, match="indices below 3"):
            evaluator.measure(wrong)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        evaluator.measure(plans(table)[0], 0)
    with pytest.raises(ValueError, match="no plan was measured"):
        evaluator.frontier("size")


def test_casts_take_no_room_from_what_is_quantised():
    quantizer, layer = Counting(), mpq.trace(cnn(), images()[0][0]).layers[0]
    rows = torch.randn(4, 9)
    kept = KeptWeights(quantizer, rows.numel() * rows.element_size())
    for _ in range(3):
        for fmt in ("int4@channel", "fp32"):
            kept(rows, parse(fmt).bind("weight"), layer)
    assert quantizer.calls.count((layer.name, "int4@channel")) == 1


def photos_and_crops(photos=7, crops=5):
    """Crops of one photo differ in next to nothing; the first photo has two more. A photo a batch."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for photo in range(photos):
        image, count = torch.randn(1, 1, 6, 6, generator=generator), crops + 2 * (photo == 0)
        found.append(image + 1e-4 * torch.randn(count, 1, 6, 6, generator=generator))
    return found


def test_batches_that_belong_together_count_as_one_sample_each(table):
    data = photos_and_crops()
    alone = Evaluator(cnn(), data, table)
    together = Evaluator(cnn(), data, table, independent="batches")
    assert (alone.samples, together.samples) == (37, 7)
    choices = plans(table)[0]
    few, found = alone.measure(choices), together.measure(choices)
    assert found.divergence == pytest.approx(few.divergence)
    dumb = [dumb_divergence(cnn(), batch, table, choices).sum() * 7 / 37 for batch in data]
    assert sorted(found.per_sample) == pytest.approx(sorted(dumb), rel=1e-5)
    assert found.standard_error == pytest.approx(np.std(dumb, ddof=1) / 7**0.5, rel=1e-5)
    assert found.standard_error > 1.5 * few.standard_error
    assert together.spent == alone.spent == 1
    assert together.fingerprint != alone.fingerprint
    half = Evaluator(cnn(), data, table, independent="batches")
    assert half.measure(choices, samples=3).per_sample == pytest.approx(found.per_sample[:3])
    assert half.spent == pytest.approx(3 / 7)
    assert half.provenance["independent"] == "batches"
    assert half.elsewhere(data[:3]).measure(choices).samples == 3


def test_what_is_independent_is_samples_or_batches(table):
    with pytest.raises(ValueError, match="independent must be samples or batches, got 'photos'"):
        Evaluator(cnn(), images(4, 8), table, independent="photos")
