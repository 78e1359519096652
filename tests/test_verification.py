"""Verification against figures computed by hand on tiny models, and what its verdict says when."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq import verification
from mpq.confidence import Estimate
from mpq.output_figures import estimates, sample_figures
from mpq.task_choice import TASKS
from mpq.tasks import CustomLoss, Features, Outputs
from mpq.verification_report import FULL_PRECISION, Measured, QuantityCheck, Verification, interval_text

OPTIONS = ["int2", "int4", "int8"]


def search(model=None, data=None, **changes):
    settings = {"options": OPTIONS, "budgets": {"size": "5 bits"}, "progress": False, **changes}
    return mpq.search(model or cnn(), images() if data is None else data, **settings)


@pytest.fixture(scope="module")
def plan():
    return search()


def by_name(report):
    return {row.name: row for row in report.rows}


def test_plan_baselines_and_full_precision_are_measured_on_the_same_data(plan):
    model, data = cnn(), images(batches=3, samples=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = mpq.verify(model, data, plan)
    rows = by_name(report)
    drawn = {"ends protected", "small first", "sorted by score", "shuffled (of 5)", "random (of 20)"}
    assert set(rows) == {FULL_PRECISION, "plan", *(f"uniform {option}" for option in OPTIONS), *drawn}
    assert rows[FULL_PRECISION].divergence == 0
    assert rows[FULL_PRECISION].agreement == 1
    assert rows["uniform int8"].fits is False
    assert rows["uniform int2"].fits is True
    assert all(rows[name].fits for name in drawn)
    assert rows["plan"].predicted == pytest.approx(plan.predicted["sensitivity"])
    assert report.uniform.name in ("uniform int2", "uniform int4")
    with mpq.quantized(model, plan), torch.no_grad():
        inside = torch.cat([model(x) for x, _ in data])
    with torch.no_grad():
        exact = torch.cat([model(x) for x, _ in data])
    inside, exact = inside.double(), exact.double()
    labels = torch.cat([y for _, y in data])
    kl = nn.functional.kl_div(inside.log_softmax(1), exact.log_softmax(1), log_target=True, reduction="batchmean")
    assert rows["plan"].divergence == pytest.approx(float(kl), rel=1e-4)
    assert rows["plan"].loss == pytest.approx(float(nn.functional.cross_entropy(inside, labels)), rel=1e-5)
    assert report.measured["KL"] == rows["plan"].divergence
    assert report.measured["accuracy"] == pytest.approx(float((inside.argmax(1) == labels).double().mean()))
    assert report.plan.name in str(report)
    assert len(report.to_frame()) == len(report.rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LOGITS = torch.log(torch.tensor([[[0.7, 0.2, 0.1]], [[0.6, 0.3, 0.1]], [[0.2, 0.7, 0.1]], [[0.1, 0.1, 0.8]]]))[:, 0]
CHANGED = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]))


def figures_of(task, values, labels, mask=None, metric=None):
    exact, found = (Outputs(v, mask, labels) for v in values)
    full, mine = sample_figures(task, [exact], [exact]), sample_figures(task, [exact], [found])
    if metric is not None:
        full, mine = replace(full, metric=metric[0]), replace(mine, metric=metric[1])
    return estimates(mine, full, task, "mine")


def test_figures_of_a_classifier_by_hand():
    labels = torch.tensor([0, 1, 1, 0])  # before: right, wrong, right, wrong; after: right, right, wrong, wrong
    found = figures_of(TASKS["classification"], (LOGITS, CHANGED), labels)
    second = 0.6 * math.log(2) + 0.3 * math.log(0.5)
    third = 0.2 * math.log(1 / 3) + 0.7 * math.log(7 / 3)
    assert found["divergence"].value == pytest.approx((second + third) / 4)
    deviation = np.std([0, second, third, 0], ddof=1) / 2
    assert found["divergence"].margin == pytest.approx(3.1824 * deviation, rel=0.01)
    assert found["divergence p99"].value == pytest.approx(max(second, third))
    assert found["loss"].value == pytest.approx(-(math.log(0.7) + math.log(0.6) + math.log(0.3) + math.log(0.1)) / 4)
    assert found["agreement"].value == 0.5
    assert found["accuracy"].value == 0.5
    assert found["correct to wrong"].value == 0.25
    assert found["wrong to correct"].value == 0.25
    assert (round(found["accuracy"].low, 2), round(found["accuracy"].high, 2)) == (0.15, 0.85)  # Wilson, 2 of 4


def test_perplexity_counts_tokens_and_ignores_padding():
    # two sequences of 2 and 1 tokens that count, probabilities of the labels 1/2, 1/8 and 1/4
    chances = torch.tensor([[[0.5, 0.5], [0.125, 0.875]], [[0.25, 0.75], [0.5, 0.5]]])
    labels = torch.tensor([[0, 0], [0, -100]])
    found = figures_of(TASKS["causal-lm"], (chances.log(), chances.log()), labels, mask=labels != -100)
    assert found["perplexity"].value == pytest.approx((2 * 8 * 4) ** (1 / 3))
    assert found["loss"].value == pytest.approx(((math.log(2) + math.log(8)) / 2 + math.log(4)) / 2)
    assert "accuracy" not in found
    assert found["correct to wrong"].value == 0


def test_flips_of_positions_count_labelled_ones_only():
    before = torch.tensor([[[2.0, 0], [2, 0]], [[2, 0], [2, 0]], [[0, 2], [0, 2]]])
    after = before.flip(-1)
    labels = torch.tensor([[0, 0], [0, -100], [-100, 0]])
    found = figures_of(TASKS["classification"], (before, after), labels, mask=labels != -100)
    assert found["correct to wrong"].value == pytest.approx(3 / 4)
    assert found["wrong to correct"].value == pytest.approx(1 / 4)
    assert found["accuracy"].value == pytest.approx(1 / 4)


def test_features_have_a_relative_error_and_no_decisions():
    found = figures_of(Features(), (torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[3.0, 5], [0, 2]])), None)
    assert set(found) == {"divergence", "divergence p99"}
    assert found["divergence"].value == pytest.approx(1 / 25 / 2)


def test_a_metric_of_ones_own_is_reported(plan):
    def mean_logit(model, batch):
        return model(batch[0]).mean(1)

    model, data = cnn(), images()
    report = mpq.verify(model, data, plan, metric=mean_logit, baselines=())
    with mpq.quantized(model, plan), torch.no_grad():
        values = torch.cat([model(x).mean(1) for x, _ in data])
    assert report.metric_name == "mean_logit"
    assert report.measured["mean_logit"] == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_language_model_has_a_perplexity():
    data = [batch | {"labels": batch["input_ids"]} for batch in tokens()]
    plan = search(decoder(), data, task="causal-lm", budgets={"size": "6 bits"})
    report = mpq.verify(decoder(), data, plan, task="causal-lm")
    assert report.metric_name == "perplexity"
    assert report.measured["perplexity"] == pytest.approx(math.exp(report.measured["loss"]))
    assert any(line.startswith("perplexity") and "full precision" in line for line in report.plan_lines)


# -- the verdict ---------------------------------------------------------------------------------------------------


def made(plan, full=None, skipped=(), **baselines):
    """A report from divergences a sample."""

    def row(name, values, fits):
        estimate = Estimate(float(np.mean(values)), 0.0, 1.0)
        figures = {"divergence": estimate, "divergence p99": estimate}
        values = np.array(values, float)
        return Measured(name=name, size_bytes=1, average_bits=4, estimates=figures, fits=fits, per_sample=values)

    rows = [row(FULL_PRECISION, np.zeros(len(plan)), None), row("plan", plan, True)]
    rows += [row(name, values, True) for name, values in baselines.items()]
    missing = dict.fromkeys(skipped, "too dear")
    return Verification(rows=tuple(rows), divergence_name="KL", samples=len(plan), skipped=missing)


NOISE = np.random.default_rng(0).exponential(size=400)


def test_differences_are_paired():
    better = NOISE * 0.97
    report = made(better, rival=NOISE)
    apart = math.hypot(*(1.966 * np.std(values) / 20 for values in (better, NOISE)))
    assert apart > 4 * abs(np.mean(better - NOISE))  # side by side nobody could tell
    assert report.difference(report.rows[2]).high < 0
    assert "better than rival" in report.verdict


def test_better_means_better_than_every_baseline():
    good, wild = NOISE * 1.1, np.random.default_rng(1).permutation(NOISE) * 1.02
    assert "better than good at" in made(NOISE, good=good).verdict
    verdict = made(NOISE, good=good, wild=wild).verdict
    assert "did not earn" in verdict
    assert "it and wild are equal within the noise" in verdict
    assert "the best of 2 baselines, at" in made(NOISE, good=good, worse=good * 2).verdict
    assert "baselines that were measured, at" in made(NOISE, good=good, worse=good * 2, skipped=["random"]).verdict


def test_a_plan_that_a_rule_finds_as_well_did_not_earn_its_complexity():
    assert "it does what rule does" in made(NOISE, rule=NOISE, other=NOISE * 2).verdict


def test_outputs_that_are_no_numbers_win_nothing():
    nothing = np.full(400, np.nan)
    assert "is of NO USE" in made(nothing, good=NOISE).verdict
    assert "better than every baseline" in made(NOISE, bad=nothing).verdict
    assert "better than good at" in made(NOISE, good=NOISE * 1.1, bad=nothing).verdict
    report = made(NOISE, **{"uniform int2": nothing, "uniform int3": NOISE * 2})
    assert report.uniform.name == "uniform int3"
    full = replace(report.rows[0], estimates={"divergence": Estimate(math.nan, 0, 1)})
    assert "nothing can be compared" in replace(report, rows=(full, *report.rows[1:])).verdict


def test_the_interval_of_a_verdict_is_the_one_that_decided():
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        plan = rng.exponential(size=30)
        report = made(plan, **{f"b{i}": plan - 0.02 + 0.05 * rng.standard_normal(30) for i in range(8)})
        if "equal within the noise" in report.verdict:
            low, high = map(float, report.verdict.split("over all 8 ")[1].rstrip(").").split(" to "))
            assert low <= 0 <= high
            found += 1
    assert found > 20


def test_static_ranges_of_the_plan_hold_for_baselines_with_the_same_input_formats():
    options = ["int2/int4", "int8/int4", "int4/int8"]
    plan = search(options=options, budgets={"size": "5 bits"})
    static = mpq.activation_ranges.calibrate_ranges(cnn(), images(), plan, "percentile80")
    report = mpq.verify(cnn(), images(), static, baselines="all")
    own = {entry.layer.name: entry for entry in static.entries}
    same = 0
    for row in report.rows[2:]:
        for entry in row.plan.entries:
            is_same = entry.activation == own[entry.layer.name].activation
            assert entry.input_range == (own[entry.layer.name].input_range if is_same else None)
            same += is_same
    assert same > 10
    dynamic = by_name(mpq.verify(cnn(), images(), plan, baselines="uniform"))
    rows = by_name(report)
    assert rows["uniform int8/int4"].divergence != pytest.approx(dynamic["uniform int8/int4"].divergence)


def test_nobody_is_called_worse_by_chance():
    rng, called = np.random.default_rng(2), 0
    for _ in range(200):
        plan = rng.exponential(size=40)
        called += "WORSE" in made(plan, **{f"b{i}": rng.exponential(size=40) for i in range(10)}).verdict
    assert called / 200 <= 0.08  # of 10 uncorrected comparisons 15 to 20 % would be


def test_the_verdict_says_when_a_plan_loses():
    plan = search(budgets={"size": "100%"}).with_options({"*": "int2"})
    data = [(torch.randn(200, 1, 6, 6), torch.randint(0, 5, (200,)))]
    report = mpq.verify(cnn(), data, plan, baselines="uniform")
    assert "WORSE than uniform int8" in report.verdict


def test_a_verdict_needs_a_kept_budget_and_more_than_one_sample(plan):
    quick = {"baselines": "uniform"}
    assert "One sample" in mpq.verify(cnn(), images(batches=1, samples=1), plan, **quick).verdict
    over = plan.with_options({"*": "int8"})
    assert "does not keep its budgets" in mpq.verify(cnn(), images(), over, **quick).verdict
    assert "not compared" in mpq.verify(cnn(), images(), plan, baselines=()).verdict


# -- predicted next to found, and which baselines ------------------------------------------------------------------


def test_budgeted_quantities_are_counted_measured_or_only_predicted():
    plan = search(budgets={"size": "60%", "latency": "100%", "bops": "20%"}, hardware="nvidia-t4")
    found = {check.quantity: check for check in mpq.verify(cnn(), images(), plan, baselines=()).quantities}
    assert set(found) == {"size", "latency", "bops", "sensitivity"}
    assert (found["size"].how, found["size"].found) == ("counted", plan.size_bytes)
    assert (found["latency"].how, found["latency"].found) == ("not measured", None)
    assert found["latency"].predicted == pytest.approx(plan.predicted["latency"])
    assert found["latency"].limit == next(b.limit for b in plan.budgets if b.quantity == "latency")
    assert found["sensitivity"].how == "measured"
    seen = []

    def device(model, candidate):
        seen.append(candidate)
        return {"latency": 0.003}

    report = mpq.verify(cnn(), images(), plan, baselines=(), device=device)
    found = {check.quantity: check for check in report.quantities}
    assert (found["latency"].how, found["latency"].found) == ("measured", 0.003)
    assert found["latency"].texts[3] == "3.00 ms measured"
    assert seen == [plan]


def test_what_is_not_measured_has_no_figure():
    check = QuantityCheck(quantity="energy", measure="J", limit=2e-3, predicted=1e-3, found=None, how="not measured")
    assert check.texts == ("energy", "2.00 mJ", "1.00 mJ", "not measured")
    assert interval_text("loss", Estimate(0.5, -math.inf, math.inf)) == "0.5"


def test_a_plan_from_disk_is_verified_by_what_it_predicted(tmp_path):
    plan = search(options=["int4/int8", "int8/int8"], budgets={"bops": "20%"})
    plan.save(tmp_path / "plan.json")
    report = mpq.verify(cnn(), images(), mpq.Plan.load(tmp_path / "plan.json"))
    assert report.plan.fits is True
    assert report.plan.predicted == plan.predicted["sensitivity"]
    assert [row.fits for row in report.rows if row.name.startswith("uniform")] == [None, None]
    assert "over budget" not in str(report)
    assert "not known without the table" in report.verdict
    assert set(report.skipped) == {"protected", "smallest", "sorted", "shuffled", "random"}
    assert "table of the search" in report.notes[-1]


def test_auto_measures_what_it_can_afford_and_says_what_it_skips(plan, monkeypatch):
    macs = sum(layer.macs / layer.batch for layer in plan.table.layers) * 6
    monkeypatch.setattr(verification, "AFFORDABLE_MACS", 8.5 * macs)
    report = mpq.verify(cnn(), images(), plan)
    assert set(report.skipped) == {"random"}
    assert "baselines='all'" in report.notes[-1]
    assert {"shuffled (of 5)", "ends protected"} <= set(by_name(report))
    assert not mpq.verify(cnn(), images(batches=1), plan, baselines="all").skipped
    assert [*by_name(mpq.verify(cnn(), images(batches=1), plan, baselines="sorted"))][2:] == ["sorted by score"]
    with pytest.raises(ValueError, match="uniform, protected, .*'randm'.*'random'"):
        mpq.verify(cnn(), images(), plan, baselines=["randm"])


def test_a_drawn_baseline_is_its_median_plan(plan):
    row = by_name(mpq.verify(cnn(), images(), plan, baselines=["random"]))["random (of 20)"]
    measured = sorted(value for _, value in row.tries)
    assert len(measured) == 20
    assert row.divergence == measured[9]


def test_pins_hold_for_baselines(plan):
    again = plan.table.solve({"size": "6 bits"}, pins={"first": "int8"})
    planner = verification._Planner(again, again.table, 0)
    for name in ("smallest", "random", "shuffled"):
        assert {made_up.options["first"] for made_up in planner.plans(planner.maker(), name)} == {"int8"}


def test_predicted_and_measured_ranks_come_with_many_plans(plan):
    many = search(options=["int2", "int3", "int4", "int6", "int8"], ties=None, budgets={"size": "9 bits"})
    report = mpq.verify(cnn(), images(), many, baselines=["random", "shuffled", "uniform"])
    rho, count = report.rank_correlation
    pairs = {pair for row in report.rows[1:] if row.fits for pair in row.tries}
    predicted, measured = np.array(sorted(pairs)).T
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert count == len(pairs) >= 10
    assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert f"rank {count} plans alike" in report.notes[0]
    assert mpq.verify(cnn(), images(), plan, baselines="uniform").rank_correlation is None


def test_rows_of_a_layer_are_compared_with_whole_layers():
    plan = search(granularity="rows:2", sensitivity="output_fisher", budgets={"size": "5 bits"})
    report = mpq.verify(cnn(), images(), plan)
    assert not report.skipped
    assert all(row.fits for row in report.rows[-5:])


def test_an_increase_of_the_users_loss_is_not_called_kl(plan):
    report = mpq.verify(cnn(), images(), plan, task=lambda model, batch: model(batch[0]).square().mean(1))
    assert set(report.measured) == {"loss added", "loss added_se", "loss added_p99", "loss"}


def test_a_loss_of_one_number_a_batch_works():
    task = CustomLoss(lambda model, batch: model(batch[0]).square().mean())
    report = mpq.verify(cnn(), images(), search(task=task), task=task, baselines="uniform")
    assert report.samples == 6


def test_a_plan_for_another_model_is_refused_by_verify(plan):
    with pytest.raises(ValueError, match="another model"):
        mpq.verify(nn.Linear(2, 2), [torch.ones(1, 2)], plan)
