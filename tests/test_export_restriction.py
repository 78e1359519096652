"""A search for one library chooses among what that library holds."""

import pytest
import torch
from torch import nn

import mpq
from mpq.export_restriction import without_refused
from mpq.exporting import refusal
from mpq.options import SearchSpace
from mpq.pipeline import price

MODEL = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
OPTIONS = ["int4@group32", "uint4@channel", "int8", "fp32"]


def test_what_the_library_refuses_is_no_option_and_says_why():
    priced = price(MODEL, X, SearchSpace(OPTIONS), target="quanto")
    expected = {
        (layer.name, option): f"quanto: {reason}"
        for layer in priced.network.layers
        for option in OPTIONS
        if (reason := refusal("quanto", layer, option)) is not None
    }
    assert expected
    assert priced.refused == expected
    table = priced.table({})
    for unit, name in enumerate(table.units):
        for column, option in enumerate(table.options):
            assert table.allowed[unit, column] == ((str(name), option) not in expected)
    assert table.provenance["target"] == "quanto"


def test_the_plan_of_a_search_for_a_library_can_be_exported():
    plan = mpq.search(MODEL, X, OPTIONS, {"size": "40%"}, target="quanto", sensitivity="weight_error", progress=False)
    assert mpq.export(plan, "quanto")
    with pytest.raises(ValueError, match="Quanto cannot hold int4@group32"):
        mpq.export(plan.with_options({"*": "int4@group32"}), "quanto")


def test_a_layer_without_an_option_left_is_named_before_anything_is_measured():
    with pytest.raises(ValueError, match="quanto can hold no option of '0'.*int4@group32: .*widen its options"):
        mpq.search(MODEL, X, ["int4@group32"], {"size": "40%"}, target="quanto", progress=False)


def test_budgets_that_only_a_refused_option_would_keep_say_which_and_why():
    with pytest.raises(
        mpq.InfeasibleError, match="can be reached.*refused: int4@group32 in 2 layers .quanto: "
    ) as told:
        mpq.search(MODEL, X, ["int4@group32", "int8"], {"size": "20%"}, target="quanto", progress=False)
    assert told.value.reachable["size"] > told.value.budgets["size"]


def test_an_unknown_library_is_told():
    priced = price(MODEL, X, SearchSpace(OPTIONS))
    with pytest.raises(ValueError, match="export target 'quantoo' is not known"):
        without_refused(priced.costs, priced.network, priced.space, "quantoo")
