"""How far a table may be trusted: exact where the loss is additive, in words where it is not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import decoder, tokens
from torch import nn

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.sensitivity import agreement
from mpq.sensitivity.additivity import predicted_by

OPTIONS = ["int2", "int3", "int4", "int6", "int8"]


class Branches(nn.Module):
    """Layers that share neither input nor output: errors of the outputs add up exactly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, width, bias=False) for width in (3, 4, 5, 6, 7, 8, 9, 10))

    def forward(self, x):
        return torch.cat([branch(x[:, index]) for index, branch in enumerate(self.branches)], dim=1)


def inputs(samples=40):
    return [torch.randn(samples, 8, 6, generator=torch.Generator().manual_seed(1))]


def table_of(model, data, task="features"):
    space = mpq.SearchSpace(OPTIONS, ties=None)
    return mpq.measure(model, data, space, sensitivity="kl", task=task, progress=False)


def measured_with(table, plans):
    budgets = {"size": "4 bits values"}
    return agreement(Branches(), inputs(), table, budgets, plans=plans, task="features", progress=False)


def test_where_errors_add_up_the_table_is_right():
    table = table_of(Branches(), inputs())
    found = measured_with(table, plans=20)
    assert found.predicted == pytest.approx(found.measured, rel=1e-5)
    assert found.spearman == found.kendall == found.spearman_top == 1
    assert (found.slope, found.ratio) == pytest.approx((1, 1), rel=1e-4)
    assert found.is_trusted
    assert found.uniform[0] == "int4"
    assert found.plan[0] <= found.uniform[1]


def test_shuffled_scores_are_not_trusted_and_lose():
    table = table_of(Branches(), inputs())
    scores = table.quantities["sensitivity"]
    upside_down = replace(table, quantities={**table.quantities, "sensitivity": scores[::-1, ::-1].copy()})
    found = measured_with(upside_down, plans=20)
    assert found.spearman < 0.5
    assert not found.is_trusted
    assert found.loses
    assert "does NOT rank" in found.verdict
    assert "LOSES to int4" in found.verdict


def test_measured_is_what_a_loop_measures():
    model, data, budgets = decoder(), tokens(), {"size": "3 bits values"}
    table = table_of(model, data, task=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, again = (
        agreement(model, data, table, budgets, plans=5, bootstraps=3, seed=4, progress=False) for _ in range(2)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (found.measured == again.measured).all()
    quantised, divergences = copy.deepcopy(model), []
    for entry in table.solve(budgets).entries:
        weight = quantised.get_parameter(entry.layer.weight_name)
        weight.data = fake_quantize(weight.data, parse(str(entry.choice)))
    with torch.no_grad():
        for batch in data:
            log_p, log_q = (net(**batch)["logits"].double().log_softmax(-1) for net in (model, quantised))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
    assert found.plan[0] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-9)


def test_noise_of_the_scores_is_reported():
    table = table_of(Branches(), inputs())
    scores = table.quantities["sensitivity"]
    noisy = replace(table, quantities={**table.quantities, "sensitivity_se": np.abs(scores)})
    found = measured_with(noisy, plans=5)
    assert found.changed > 0.1
    assert "change option within the scores' noise" in found.verdict
    exact = replace(table, quantities={**table.quantities, "sensitivity_se": 0 * scores})
    assert measured_with(exact, plans=5).changed == 0


def test_a_prediction_counts_the_terms_for_pairs():
    table = table_of(Branches(), inputs(samples=4))
    rng = np.random.default_rng(0)
    blocks = {(0, 3): rng.normal(size=(5, 5)), (2, 1): rng.normal(size=(5, 5))}
    paired = replace(table, pairs=blocks)
    for choice in rng.integers(0, 5, (5, 8)):
        sums = sum(table.quantity("sensitivity")[unit, option] for unit, option in enumerate(choice))
        terms = blocks[0, 3][choice[0], choice[3]] + blocks[2, 1][choice[2], choice[1]]
        assert predicted_by(paired, choice) == pytest.approx(sums + terms)
        assert predicted_by(paired, choice) == pytest.approx(paired.problem({}).evaluate(choice)[0])
