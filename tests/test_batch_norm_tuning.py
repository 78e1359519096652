"""Batch-norm tuning against statistics of all data at once, and against PyTorch's own training mode."""

import copy

import pytest
import torch
from torch import nn

import mpq
from mpq.adjustment import Adjustment
from mpq.batch_norm_tuning import tune_batch_norms
from mpq.demo import cnn, digits
from mpq.options import Option
from mpq.plan import Entry, Plan
from mpq.tasks import Distribution


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    model[1].running_mean.fill_(5.0)
    return model.eval()


def uniform(model, x, text):
    found = mpq.trace(model, x)
    return Plan(tuple(Entry(layer, Option.parse(text)) for layer in found.layers), found.fingerprint)


def test_one_batch_normalises_as_training_does():
    model, x = network(), torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    plan = uniform(model, x, "int2/int4")
    tuned = tune_batch_norms(model, x, plan)
    with mpq.quantized(model, plan), torch.no_grad():
        with tuned.applied(model):
            found = model(x)
        trained = copy.deepcopy(model).train()(x)
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)


def test_batches_are_pooled():
    model, x = network(), 3 + torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    plan = uniform(model, x, "int2")
    tuned = tune_batch_norms(model, [x[:2], x[2:]], plan).tensors
    with mpq.quantized(model, plan), torch.no_grad():
        read = model[0](x).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(tuned["1.running_mean"].double(), read.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuned["1.running_var"].double(), read.var(1, unbiased=False), rtol=1e-5, atol=1e-6)


def test_the_model_comes_back():
    model, x = network().train(), torch.randn(5, 2, 6, 6)
    model[4].eval()
    plan = uniform(model, x, "int2")
    before = copy.deepcopy(model.state_dict())
    tune_batch_norms(model, x, plan)
    assert [module.training for module in model] == [True, True, True, True, False]
    assert all(module.track_running_stats for module in (model[1], model[4]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[1]._forward_pre_hooks


def test_other_adjustments_are_in_force():
    model, x = network(), torch.randn(5, 2, 6, 6)
    shift = Adjustment("shift", {"0.bias": model[0].bias + 2})
    plan = uniform(model, x, "int2")
    one, two = (tune_batch_norms(model, x, plan, adjustment=a).tensors["1.running_mean"] for a in (None, shift))
    torch.testing.assert_close(two, one + 2)


def test_it_repairs_a_trained_network_at_two_bits():
    model, data, task = cnn(), digits(), Distribution()
    plan = uniform(model, data.calibration[0][0], "int2")
    tuned = tune_batch_norms(model, data.calibration, plan)
    x = data.holdout[0]
    with torch.no_grad():
        exact = task.run(model, x)
        with mpq.quantized(model, plan):
            before = task.divergence(exact, task.run(model, x)).mean()
            with tuned.applied(model):
                after = task.divergence(exact, task.run(model, x)).mean()
    assert after < before / 2


def test_models_without_batch_norm_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        tune_batch_norms(model, torch.ones(2, 2), Plan((), ""))
