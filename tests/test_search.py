"""The main job end to end: search, edit and solve again; and what it refuses before it starts."""

import math

import numpy as np
import pytest
import torch
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.options import Option
from mpq.plan import uniform_plan
from mpq.planning import choices_of, predict

OPTIONS = ["int2", "int4", "int8"]


def search(model=None, data=None, **changes):
    settings = {"options": OPTIONS, "budgets": {"size": "5 bits"}, "progress": False, **changes}
    return mpq.search(model or cnn(), images() if data is None else data, **settings)


def test_a_plan_keeps_its_budget_and_is_the_best_of_all_plans():
    plan = search(ties=None)
    assert plan.average_bits <= 5 + 1e-9
    assert plan.proof.status == "optimal"
    assert plan.proof.gap == 0
    problem = plan.table.problem({"size": "5 bits"})
    best = min(
        (problem.evaluate(choices)[0] for choices in np.ndindex(3, 3, 3, 3) if not problem.violations(choices)),
    )
    assert plan.predicted["sensitivity"] == pytest.approx(best, rel=1e-12)
    assert plan.predicted["size"] == pytest.approx(plan.size_bytes, rel=1e-12)


def test_sizes_are_the_bytes_that_would_be_stored():
    model = cnn()
    plan = search(model, budgets={"size": "40%"})
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert plan.full_bytes == state
    assert plan.size_bytes <= 0.4 * state
    stored = 0
    for entry in plan.entries:
        weight = model.get_parameter(entry.layer.weight_name)
        scales = entry.layer.weight_shape[0] * 16
        stored += (weight.numel() * int(str(entry.choice).removeprefix("int")) + scales) / 8
    rest = state - 4 * sum(layer.parameters for layer in plan.table.layers)
    assert plan.size_bytes == stored + rest


def test_a_model_in_double_precision_is_priced_by_its_64_bits():
    model, data = cnn().double(), [(x.double(), y) for x, y in images()]
    plan = search(model, data, options=[*OPTIONS, "fp32", "fp64"], budgets={"size": "40%"})
    assert plan.full_bits == 64
    assert plan.full_bytes == sum(value.numel() * 8 for value in model.state_dict().values())
    as_it_stands = plan.with_options({"*": "fp64"})
    assert as_it_stands.size_bytes == plan.full_bytes
    report = mpq.verify(model, data, as_it_stands)
    assert report.plan.divergence == 0


def test_several_budgets_with_hardware():
    plan = search(budgets={"size": "60%", "latency": "100%", "bops": "20%"}, hardware="nvidia-t4")
    assert {"size", "latency", "bops"} <= set(plan.predicted)
    for budget in plan.budgets:
        assert plan.predicted[budget.quantity] <= budget.limit * (1 + 1e-9)
    assert "latency" in plan.provenance["estimates"]


def test_ties_and_pins_hold():
    plan = search(decoder(), tokens(), pins={"o": "int8"}, task="classification", budgets={"size": "6 bits"})
    assert plan.options["q"] == plan.options["k"] == plan.options["v"]
    assert plan.options["o"] == "int8"


def test_same_seed_same_plan():
    assert search(seed=1, sensitivity="output_fisher").options == search(seed=1, sensitivity="output_fisher").options


def test_an_edited_plan_is_solved_again_and_the_price_is_named():
    plan = search()
    table = plan.table
    edited = plan.with_options({"head": "int2"})
    again = table.solve({"size": "5 bits"}, pins=edited.pins())
    assert again.options["head"] == "int2"
    assert again.average_bits <= 5 + 1e-9
    price = again.provenance["price_of_pins"]["sensitivity"]
    assert price == pytest.approx(again.predicted["sensitivity"] - plan.predicted["sensitivity"])
    assert price >= 0
    assert predict(table, edited)["sensitivity"] >= 0
    assert again.pins() == {"head": "int2"}


def test_rows_of_a_model_take_their_own_options():
    plan = search(granularity="rows:2", sensitivity="output_fisher", budgets={"size": "5 bits"})
    assert plan.average_bits <= 5 + 1e-9
    assert plan.predicted["size"] == pytest.approx(plan.size_bytes)
    assert any("rows:2" in label for label in plan.options.values())
    model, (x, _) = cnn(), images()[0]
    with mpq.quantized(model, plan), torch.no_grad():
        inside = model(x)
    with torch.no_grad():
        assert not torch.equal(inside, model(x))
    units = plan.table.layer_index
    assert len(choices_of(plan.table, plan)) == len(units)


def test_groups_of_a_linear_take_their_own_options(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    data = [(torch.randn(16, 20), torch.randint(0, 4, (16,)))]
    plan = search(model, data, granularity="groups:8", sensitivity="weight_error", budgets={"size": "7 bits"})
    assert plan.average_bits <= 7 + 1e-9
    plan.save(tmp_path / "plan.json")
    loaded = mpq.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    with mpq.quantized(model, plan):
        inside = model[0].weight.clone()
    with mpq.quantized(model, loaded):
        assert torch.equal(model[0].weight, inside)


def test_finer_units_are_never_worse_for_the_same_table_and_size():
    def solved(granularity):
        # Value bits alone, so that scales and indices do not differ between granularities.
        return search(
            granularity=granularity, sensitivity="weight_error", ties=None, budgets={"size": "4 bits values"}
        ).predicted["sensitivity"]

    assert solved("rows:1") <= solved("rows:2") <= solved("layer")


def test_impossible_budgets_are_refused_before_anything_is_measured(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("measured")

    import mpq.sensitivity.kl as kl

    monkeypatch.setattr(kl.KL, "__call__", never)
    with pytest.raises(mpq.InfeasibleError, match=r"size.*\d"):
        search(budgets={"size": "1%"})
    with pytest.raises(mpq.InfeasibleError) as caught:
        search(budgets={"size": "1%", "bops": "50%"})
    smallest = min(uniform_plan_size(option) for option in OPTIONS)
    assert caught.value.reachable["size"] == pytest.approx(smallest)


def uniform_plan_size(option):
    plan = search(budgets={"size": "100%"}, sensitivity="weight_error")
    return uniform_plan(plan, Option(option)).size_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": {"size": "4 ms"}}, "budget of size"),
        ({"budgets": {"sizze": "40%"}}, "'sizze'.*'size'"),
        ({"budgets": {"latency": "4 ms"}}, "no quantity 'latency'"),
        ({"pins": {"no.such.layer": "int8"}}, "no.such.layer"),
        ({"options": {"*": ["int4"], "zz*": ["int8"]}}, "zz"),
        ({"options": ["int4", "inf8"]}, "inf8"),
        ({"data": []}, "at least one batch"),
        ({"data": [torch.full((2, 1, 6, 6), float("nan"))]}, "must be finite"),
        ({"data": [torch.ones(2, 3)]}, r"cannot run on \(2, 3\)"),
        ({"model": nn.ReLU(), "data": [torch.ones(2, 3)]}, "must have a layer to plan"),
        ({"hardware": "nvidia-t5"}, "nvidia-t4"),
        ({"sensitivity": "klx"}, "'klx'"),
        ({"solver": "ilpp"}, "ilp"),
        ({"granularity": "columns"}, "granularity must be"),
        ({"options": ["int3/int8"], "hardware": "x86-amx"}, "no option left.*int3/int8"),
        ({"cache": "/proc/no/such"}, "cache"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        search(**changes)


def test_a_search_with_held_out_data_carries_what_was_measured():
    plan = search(holdout=images(batches=1))
    assert set(plan.measured) == {"KL", "KL_se", "KL_p99", "loss", "agreement", "accuracy"}
    assert math.isfinite(plan.measured["KL"])


def test_large_tables_solve_without_the_model(tmp_path):
    plan = search()
    plan.table.save(tmp_path / "table.parquet")
    loaded = mpq.CostTable.load(tmp_path / "table.parquet")
    assert loaded.solve({"size": "5 bits"}).options == plan.options


def test_data_is_read_once():
    assert search(data=(batch for batch in images())).options == search().options
    loader = CountingLoader()
    search(data=loader)
    assert loader.reads == 1


class CountingLoader:
    """Iterable like a DataLoader; counts how often."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return iter(images())


@pytest.mark.parametrize("late", [{"holdout": []}, {"solver": "ilpp"}])
def test_what_is_used_last_is_checked_before_anything_is_measured(late, monkeypatch):
    import mpq.sensitivity.kl as kl

    monkeypatch.setattr(kl.KL, "__call__", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"holdout|solver"):
        search(**late)


def test_pins_by_pattern_name_the_layers_they_set():
    again = search().table.solve({"size": "6 bits"}, pins={"d*": "int2"})
    assert again.edited == ("depthwise",)
    assert again.pins() == {"depthwise": "int2"}
    assert "price_of_pins" not in again.with_options({"head": "int8"}).provenance


def test_a_target_whose_rows_are_in_another_order_is_refused():
    class Reversed:
        def costs(self, *args, **settings):
            frame = mpq.hardware_models.storage().costs(*args, **settings)
            backwards = frame.iloc[::-1]
            backwards.attrs = frame.attrs
            return backwards

    with pytest.raises(ValueError, match="must price every .layer, option. in order"):
        search(hardware=Reversed())


def test_refused_options_need_no_index():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16)).eval(), [torch.randn(4, 16)]
    options = ["int4/int8", "int8/int8"]  # the first has no kernel there
    settings = {"granularity": "rows:2", "sensitivity": "weight_error", "budgets": {"size": "100%"}}
    plan = search(model, data, options=options, hardware="x86-amx", **settings)
    assert plan.predicted["size"] == plan.size_bytes


def test_the_frontier_of_a_model_holds_the_plans_of_every_budget():
    front = mpq.pareto(cnn(), images(), OPTIONS, "size", ties=None, progress=False)
    table = mpq.measure(cnn(), images(), mpq.SearchSpace(OPTIONS, ties=None), progress=False)
    assert (np.diff(front.resource) > 0).all()
    assert (np.diff(front.objective) < 0).all()
    for share in ("30%", "45%", "60%"):
        plan = table.solve({"size": share})
        at = front.allocation(at=plan.budgets[0].limit)
        assert at.objective == pytest.approx(plan.predicted["sensitivity"], rel=1e-9)
