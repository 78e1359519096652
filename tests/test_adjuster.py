"""Adjustments one after the other: each by what it promises on the model as those before left it; and in `verify`."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from small_models import cnn, images
from torch import nn

import mpq
from mpq import adaquant, batch_norm_tuning, bias_correction, verification
from mpq.adjuster import ADJUSTMENTS, STEP_MACS, Adjuster
from mpq.adjustment import Adjustment
from mpq.gptq import GPTQ, input_hessians
from mpq.options import Option
from mpq.plan import Entry, Plan, uniform_plan
from mpq.verification_report import FULL_PRECISION, UNADJUSTED


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mpq.adaquant.Calibration", partial(adaquant.Calibration, steps=20, samples=4))


def with_norm():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()).eval()


def uniform(model, text="int3"):
    network = mpq.trace(model, images()[0][0])
    return Plan(tuple(Entry(layer, Option.parse(text)) for layer in network.layers), network.fingerprint)


def outputs_of(model, names, data):
    """{name: outputs of the module, all samples}, by plain hooks."""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found[name].append(y.clone()))
        for name in names
    ]
    with torch.no_grad():
        for x, _ in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(several) for name, several in found.items()}


def means(outputs):
    return {name: (y.mean((0, 2, 3)) if y.ndim == 4 else y.mean(0)) for name, y in outputs.items()}


def test_names_are_those_that_plans_are_told():
    modules = (adaquant, bias_correction, batch_norm_tuning)
    assert tuple(ADJUSTMENTS.values()) == tuple(module.NAME for module in modules)
    assert Adjuster(["batch-norm-tuning", "adaquant"], images()).names == ("adaquant", "batch-norm-tuning")


@pytest.mark.parametrize("quantised_by", ["nearest", "gptq"])
def test_biases_are_corrected_for_the_weights_of_adaquant(quantised_by):
    """With both, the mean of every output is that of full precision, and the weights are AdaQuant's."""
    model, data = cnn(), images(batches=1, samples=24)
    plan = uniform(model, "int2")
    quantizer = None
    if quantised_by == "gptq":
        from mpq.quantizer import RoundToNearest

        layers = [entry.layer for entry in plan.entries]
        quantizer = GPTQ(hessians=input_hessians(model, data, layers), otherwise=RoundToNearest())
    exact = means(outputs_of(model, plan.options, data))
    made = Adjuster(["bias-correction", "adaquant"], data)(model, plan, quantizer)
    alone = adaquant.adaquant(model, data, plan, quantizer=quantizer)
    assert made.steps == ("AdaQuant", "bias correction")
    weights = [name for name in alone.tensors if name.endswith("weight")]
    assert weights
    assert all(torch.equal(made.tensors[name], alone.tensors[name]) for name in weights)
    with mpq.quantized(model, plan, quantizer=quantizer):
        wrong = bias_correction.correct_biases(model, data, plan, quantizer=quantizer)  # for other weights
        assert any(not torch.allclose(made.tensors[name], value, atol=1e-4) for name, value in wrong.tensors.items())
        with made.applied(model):
            found = means(outputs_of(model, plan.options, data))
    for name, mean in exact.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-5)


def test_norms_are_tuned_in_the_model_as_adjusted_before():
    model, data = with_norm(), images(batches=1, samples=24)
    plan = uniform(model, "int2")
    made = Adjuster(["batch-norm-tuning", "adaquant"], data)(model, plan, None)
    with mpq.quantized(model, plan), made.applied(model):
        read = outputs_of(model, ["0"], data)["0"]
        torch.testing.assert_close(model[1].running_mean, read.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model[1].running_var, read.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)
    with mpq.quantized(model, plan):
        before = outputs_of(model, ["0"], data)["0"]
    assert not torch.allclose(before.mean((0, 2, 3)), read.mean((0, 2, 3)), rtol=1e-3)


def test_what_it_costs_is_counted():
    model, data = cnn(), images(batches=2, samples=5)
    plan = uniform(model)
    layers = [entry.layer for entry in plan.entries]
    a_pass = 0.0
    for layer in layers:
        a_pass += 10 * layer.macs / layer.batch
    assert Adjuster(["batch-norm-tuning"], data).macs(plan) == pytest.approx(a_pass)
    assert Adjuster(["bias-correction"], data).macs(plan) == pytest.approx((len(layers) + 1) * a_pass)
    both = Adjuster(["bias-correction", "batch-norm-tuning"], data).macs(plan)
    assert both == pytest.approx((len(layers) + 2) * a_pass)
    steps = Adjuster(["adaquant"], data).macs(plan) - len(layers) * a_pass
    assert steps == pytest.approx(len(layers) * 20 * STEP_MACS)  # layers this small take the least a step takes


@pytest.mark.parametrize(
    ("names", "message"),
    [(["bias-corection"], "one of adaquant, .*did you mean 'bias-correction'"), ([], "needs adjustments to make")],
)
def test_names_that_are_none_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        Adjuster(names, images())


def test_a_model_without_norms_has_nothing_to_tune():
    plan = uniform(cnn())
    with pytest.raises(ValueError, match="no batch norm"):
        mpq.verify(cnn(), images(), plan, adjust=Adjuster(["batch-norm-tuning"], images()), baselines=())


# -- in verify --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    options = ["int2", "int3", "int4"]
    return mpq.search(cnn(), images(), options, {"size": "5 bits"}, sensitivity="weight_error", progress=False)


def loss_by_hand(model, data, plan, adjustment):
    """Mean cross entropy of the quantised, adjusted model, by a loop."""
    found = []
    with mpq.quantized(model, plan), adjustment.applied(model) if adjustment else nullcontext(), torch.no_grad():
        for x, y in data:
            found += nn.functional.cross_entropy(model(x), y, reduction="none").tolist()
    return sum(found) / len(found)


def test_plan_and_baselines_are_each_adjusted_for_their_own_formats(plan):
    model, calibration, data = cnn(), images(batches=2, samples=8), images(batches=3, samples=8)[2:]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = mpq.verify(model, data, plan, baselines="uniform")
    found = mpq.verify(model, data, plan, adjust=Adjuster(["bias-correction"], calibration), baselines="uniform")
    rows = {row.name: row for row in found.rows}
    assert list(rows)[:3] == [FULL_PRECISION, "plan", UNADJUSTED]
    candidates = {"plan": plan} | {
        f"uniform {option}": uniform_plan(plan, Option(option)) for option in ("int2", "int3")
    }
    for name, candidate in candidates.items():
        own = bias_correction.correct_biases(model, calibration, candidate)
        assert rows[name].loss == pytest.approx(loss_by_hand(model, data, candidate, own), rel=1e-5)
        assert rows[name].loss != pytest.approx(loss_by_hand(model, data, candidate, None), rel=1e-4)
        assert rows[name].plan.help == ("bias correction",)
        assert rows[name].plan.options == candidate.options
    assert rows[UNADJUSTED].divergence == plain.plan.divergence
    assert rows[UNADJUSTED].plan.help == ()
    assert rows[UNADJUSTED].name not in {row.name for row in found.baselines}
    assert UNADJUSTED not in found.verdict
    assert (found.adjustments, plain.adjustments) == (("bias correction",), ())
    assert "plan and baselines alike: bias correction" in "\n".join(found.notes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_better_unadjusted_plan_does_not_change_the_verdict(plan):
    """An adjustment that ruins everything: without rivals nothing is compared, however good the plan was before."""

    def ruin(model, candidate, quantizer):
        return Adjustment("ruin", {"head.bias": torch.full((5,), 100.0) * torch.arange(5)})

    found = mpq.verify(cnn(), images(), plan, adjust=ruin, baselines=())
    assert found.plan.divergence > 100 * {row.name: row for row in found.rows}[UNADJUSTED].divergence
    assert found.verdict == "The plan was not compared with any baseline."
    assert "the plan is WORSE with that than without it" in "\n".join(found.notes)
    assert found.plan.plan.help == ("ruin",)


def test_a_plan_that_names_an_adjustment_names_it_once(plan):
    found = mpq.verify(
        cnn(),
        images(),
        plan.with_help("layer-norm scales", "bias correction"),
        adjust=Adjuster("bias-correction", images()),
        baselines=(),
    )
    assert found.plan.plan.help == ("layer-norm scales", "bias correction")


def test_auto_counts_what_adjusting_takes(plan, monkeypatch):
    adjust = Adjuster(["bias-correction"], images())
    macs = sum(layer.macs / layer.batch for layer in plan.table.layers) * 6
    monkeypatch.setattr(verification, "AFFORDABLE_MACS", 3.5 * (macs + adjust.macs(plan)))
    assert set(mpq.verify(cnn(), images(), plan, adjust=adjust).skipped) == {"random", "shuffled"}
    assert "shuffled" not in mpq.verify(cnn(), images(), plan).skipped
    counted = mpq.verify(
        cnn(), images(), plan, adjust=lambda model, candidate, quantizer: adjust(model, candidate, None)
    )
    assert "shuffled" not in counted.skipped  # a function without `macs` counts as nothing


def test_the_quantiser_reaches_the_adjustment(plan):
    seen = []

    def note(model, candidate, quantizer):
        seen.append(quantizer)
        return Adjustment("none", {})

    quantizer = GPTQ(hessians={}, otherwise=mpq.quantizer.RoundToNearest())
    found = mpq.verify(cnn(), images(), plan, quantizer=quantizer, adjust=note, baselines="uniform")
    assert len(seen) > 1
    assert all(one is quantizer for one in seen)
    assert found.quantizer == repr(quantizer)
    assert "weights quantised by GPTQ" in str(found)
