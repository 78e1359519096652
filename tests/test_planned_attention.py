"""Operators of attention in a search space, against attention spelled out, bytes counted and plans listed by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import decoder, tokens
from torch import nn
from torch.nn import functional

import mpq
from mpq.attention_operators import OPERATORS, attention_operators
from mpq.exporting import refusal, targets
from mpq.fake_quantize import fake_quantize
from mpq.hardware_models import available, compose, load
from mpq.hardware_models.device_numbers import Entry as DeviceEntry
from mpq.hardware_models.energy import ActivePower
from mpq.options import Option, SearchSpace
from mpq.plan import Entry, Plan
from mpq.pricing import price_network

BATCH, POSITIONS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 3, 5, 4, 2, 4, 6


class Attend(nn.Module):
    """Four heads of queries that share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, HEADS * WIDTH), nn.Linear(8, KV_HEADS * WIDTH)
        self.v, self.o = nn.Linear(8, KV_HEADS * VALUE_WIDTH), nn.Linear(HEADS * VALUE_WIDTH, 8)

    def split(self, x):
        q, k, v = ((part(x).unflatten(-1, (heads, -1)).transpose(1, 2)) for part, heads in self.parts)
        return q, k, v

    @property
    def parts(self):
        return (self.q, HEADS), (self.k, KV_HEADS), (self.v, KV_HEADS)

    def forward(self, x):
        mixed = functional.scaled_dot_product_attention(*self.split(x), is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Attend(), Attend(), nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.first(x)
        return self.head((x + self.second(x)).mean(1))


class SpelledOut(Attend):
    def forward(self, x):
        q, k, v = self.split(x)
        weights = (q @ k.repeat_interleave(2, 1).mT / WIDTH**0.5).softmax(-1)
        return self.o((weights @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


def attend_by_hand(module, x, formats):
    """Head by head and position by position; formats of operators, or none."""
    q, k, v = module.split(x)
    if "cache" in formats:
        k, v = fake_quantize(k, formats["cache"]), fake_quantize(v, formats["cache"])
    if "scores" in formats:
        q, k = fake_quantize(q, formats["scores"]), fake_quantize(k, formats["scores"])
    if "mixing" in formats:
        v = fake_quantize(v, formats["mixing"])
    weights = torch.zeros(len(x), HEADS, x.shape[1], x.shape[1])
    for b, h, i in itertools.product(range(len(x)), range(HEADS), range(x.shape[1])):
        seen = torch.stack([q[b, h, i] @ k[b, h // 2, j] for j in range(i + 1)]) / WIDTH**0.5
        weights[b, h, i, : i + 1] = seen.softmax(0)
    if read := formats.get("softmax", formats.get("mixing")):
        weights = fake_quantize(weights, read)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, v.repeat_interleave(2, 1))
    return module.o(mixed.flatten(2))


def run_by_hand(model, x, formats):
    """{(module name, operator): format} of the whole toy."""
    own = [{kind: fmt for (at, kind), fmt in formats.items() if at == name} for name in ("first", "second")]
    x = x + attend_by_hand(model.first, x, own[0])
    return model.head((x + attend_by_hand(model.second, x, own[1])).mean(1))


def divergences(exact, found):
    """KL of every sample, of logits (samples, classes)."""
    p, q = (logits.double().log_softmax(-1) for logits in (exact, found))
    return (p.exp() * (p - q)).sum(-1).tolist()


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(BATCH, POSITIONS, 8, generator=generator) for _ in range(count)]
    return [(x, torch.randint(0, 3, (BATCH,), generator=generator)) for x in made]


OPTIONS = ["-/int4", "-/int2@token", "-/fp32"]
ALL = {"*": ["int4", "int8"], "*:*": OPTIONS, "*:softmax": OPTIONS}
CACHES = {"*": ["int8"], "*:cache": ["-/int2@token", "-/int4@token", "-/int8@token", "-/fp16"]}


@pytest.fixture(scope="module")
def network():
    return mpq.trace(Toy(), batches()[0][0])


def test_operators_of_the_trace(network):
    found = {each.name: each for each in attention_operators(network)}
    assert list(found) == [f"{at}:{kind}" for at in ("first", "second") for kind in OPERATORS]
    assert list(OPERATORS) == ["scores", "mixing", "cache", "softmax"]
    assert found["first:scores"].macs == BATCH * HEADS * POSITIONS * POSITIONS * WIDTH
    assert found["first:mixing"].macs == BATCH * HEADS * POSITIONS * POSITIONS * VALUE_WIDTH
    assert found["first:cache"].input_elements == BATCH * POSITIONS * KV_HEADS * (WIDTH + VALUE_WIDTH)
    queries, keys = BATCH * POSITIONS * HEADS * WIDTH, BATCH * POSITIONS * KV_HEADS * WIDTH
    assert found["first:scores"].input_elements == queries + keys
    values = BATCH * POSITIONS * KV_HEADS * VALUE_WIDTH
    assert found["first:mixing"].input_elements == BATCH * HEADS * POSITIONS * POSITIONS + values
    assert found["first:softmax"].input_elements == BATCH * HEADS * POSITIONS * POSITIONS
    assert found["first:softmax"].macs == 0
    assert all(each.parameters == 0 and each.module is None for each in found.values())


def test_the_softmax_may_have_a_logarithmic_format_of_its_own(network):
    model, data = Toy(), batches()
    options = {"*": ["int8"], "*:mixing": ["-/int8"], "*:softmax": ["-/ulog4", "-/ulogsqrt4", "-/uint4"]}
    plan = mpq.search(model, data, options, {"size": "100%"}, sensitivity="kl", progress=False)
    assert not any(each.kind == "softmax" for each in SearchSpace({"*": ["int8"], "*:*": OPTIONS}).operators(network))
    for kept in ("-/ulog4", "-/fp32"):
        fixed = replace(
            plan, entries=tuple(each for each in plan.entries if each.layer.name not in ("second:softmax",))
        )
        fixed = fixed.with_options({"first:softmax": kept})
        formats = {("first", "mixing"): "int8@tensor", ("second", "mixing"): "int8@tensor"}
        formats["first", "softmax"] = "ulog4@tensor" if kept == "-/ulog4" else "fp32"
        with mpq.quantized(model, fixed), torch.no_grad():
            found = model(data[0][0])
        layers = {each.layer.name: "int8" for each in fixed.entries if ":" not in each.layer.name}
        by_hand = replace(fixed, entries=tuple(each for each in fixed.entries if each.layer.name in layers))
        with mpq.quantized(model, by_hand), torch.no_grad():
            expected = run_by_hand(model, data[0][0], formats)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_measured_scores_are_those_of_quantising_by_hand(network, keep_bytes):
    model, data = Toy(), batches()
    frames = {
        method: mpq.sensitivity.estimate(
            model, data, network, SearchSpace(ALL), method=method, keep_bytes=keep_bytes, progress=False
        )
        for method in ("kl", "output_mse")
    }
    with torch.no_grad():
        exact = [run_by_hand(model, x, {}) for x, _ in data]
    for name, (label, fmt) in itertools.product(
        (each.name for each in attention_operators(network)),
        (("-/int4", "int4@tensor"), ("-/int2@token", "int2@token")),
    ):
        kl, squares = [], []
        for (x, _), reference in zip(data, exact, strict=True):
            with torch.no_grad():
                found = run_by_hand(model, x, {tuple(name.split(":")): fmt})
            kl += divergences(reference, found)
            squares += (reference - found).double().square().mean(-1).tolist()
        for method, values in (("kl", kl), ("output_mse", squares)):
            score, error = frames[method].loc[(name, label)]
            assert score == pytest.approx(np.mean(values), rel=1e-3, abs=1e-8), (method, name, label)
            assert error == pytest.approx(np.std(values) / (len(values) - 1) ** 0.5, rel=1e-2, abs=1e-8)
            assert frames[method].loc[(name, "-/fp32"), "sensitivity"] == 0
    assert frames["kl"].loc["first.q", "sensitivity"][["-/int4", "-/fp32"]].isna().all()
    assert frames["kl"].loc["first:cache", "sensitivity"][["int4", "int8"]].isna().all()


def test_a_plan_is_simulated_as_by_hand(network):
    model, x = Toy(), batches()[0][0]
    taken = {
        ("first", "scores"): "-/int4",
        ("first", "cache"): "-/int3@token",
        ("first", "mixing"): "-/fp32",
        ("second", "mixing"): "-/uint4",
        ("second", "cache"): "-/fp8_e4m3",
    }
    layers = tuple(Entry(layer, Option("int4")) for layer in network.layers)
    operators = {each.name: each for each in attention_operators(network)}
    entries = tuple(Entry(operators[":".join(key)], Option.parse(label)) for key, label in taken.items())
    plan = Plan((*layers, *entries), network.fingerprint)
    formats = {key: Option.parse(label).activation for key, label in taken.items()}
    del formats["first", "mixing"]
    kernel = functional.scaled_dot_product_attention
    with torch.no_grad():
        with mpq.quantized(model, Plan(layers, network.fingerprint)):
            expected, weights_alone = run_by_hand(model, x, formats), model(x)
        with mpq.quantized(model, plan):
            found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights_alone, found, rtol=1e-3, atol=1e-4)
    assert functional.scaled_dot_product_attention is kernel
    assert not any(module._forward_pre_hooks for module in model.modules())
    with mpq.quantized(model, plan):
        pass  # nothing ran: nothing is wrong


def test_cache_bytes_are_counted(network):
    """Keys and values of one run: 2 heads x positions x (4 + 6) numbers a sample, and 16 bits a scale."""
    space = SearchSpace(
        {"*": ["int8"], "*:cache": ["-/int4", "-/int8@token", "-/int4@channel", "-/int4@group4", "-/fp16"]}
    )
    for samples, phase, context, positions in ((1, None, None, 5), (2, None, None, 5), (2, "decode", 100, 100)):
        costs = mpq.hardware_models.storage().costs(network, space, batch=samples, phase=phase, context=context)
        rows = samples * KV_HEADS * positions
        by_hand = {
            "-/int4": (rows * 10 * 4 + 2 * 16) / 8,
            "-/int8@token": (rows * 10 * 8 + 2 * rows * 16) / 8,
            "-/int4@channel": (rows * 10 * 4 + (4 + 6) * 16) / 8,
            "-/int4@group4": (rows * 10 * 4 + rows * (1 + 2) * 16) / 8,
            "-/fp16": rows * 10 * 2,
        }
        for name in ("first:cache", "second:cache"):
            assert costs["cache"][name].dropna().to_dict() == by_hand
        assert costs["cache"]["first.q"]["int8"] == 0
        assert costs.attrs["reference"]["cache"] == 2 * rows * 10 * 4
        assert costs.attrs["offsets"]["cache"] == 0
    one = mpq.hardware_models.storage().costs(network, SearchSpace({"*": ["int8"], "second:cache": ["-/int8"]}))
    assert one.attrs["offsets"]["cache"] == KV_HEADS * POSITIONS * 10 * 4
    assert one.attrs["reference"]["cache"] == 2 * KV_HEADS * POSITIONS * 10 * 4


def test_bit_operations_of_products(network):
    costs = mpq.hardware_models.storage().costs(network, SearchSpace({"*": ["int8"], "first:*": ["-/int4", "-/fp32"]}))
    pairs = HEADS * POSITIONS * POSITIONS
    assert costs["bops"]["first:scores"]["-/int4"] == pairs * WIDTH * 16
    assert costs["bops"]["first:mixing"]["-/fp32"] == pairs * VALUE_WIDTH * 32 * 32
    assert costs["bops"]["first:cache"]["-/int4"] == 0
    plain = mpq.hardware_models.storage().costs(network, SearchSpace(["int8"]))
    more = costs.attrs["reference"]["bops"] - plain.attrs["reference"]["bops"]
    assert more == pairs * (WIDTH + VALUE_WIDTH) * 32 * 32


def test_decoding_reads_the_cache_in_its_format(network):
    run = {"phase": "decode", "context": 50_000, "batch": 2}
    target = load("nvidia-t4")
    plain = target.costs(network, SearchSpace(["int8"]), **run)
    costs = target.costs(network, SearchSpace({"*": ["int8"], "*:cache": ["-/int8", "-/fp16", "-/fp32"]}), **run)
    cache = costs["latency"]["first:cache"]
    total = costs.attrs["offsets"]["latency"] + costs["latency"]["second:cache"]["-/fp32"] + cache["-/fp32"]
    assert total == pytest.approx(plain.attrs["offsets"]["latency"], rel=1e-9)
    assert costs.attrs["reference"]["latency"] == pytest.approx(plain.attrs["reference"]["latency"], rel=1e-9)
    (memory,) = [entry for entry in target.entries if entry.where == "memory.dram"]
    bandwidth = memory["bandwidth_Bps"] * memory["efficiency"]
    fewer = 2 * KV_HEADS * 50_000 * 10 * (32 - 16) / 8
    assert cache["-/fp32"] - cache["-/fp16"] == pytest.approx(fewer / bandwidth, rel=1e-6)
    assert cache["-/int8"] < cache["-/fp16"]
    prefill = target.costs(network, SearchSpace({"*": ["int8"], "*:cache": ["-/int8"]}))
    assert prefill["latency"]["first:cache"]["-/int8"] == 0
    assert prefill.attrs["offsets"] == target.costs(network, SearchSpace(["int8"])).attrs["offsets"] | {"cache": 0.0}


@pytest.mark.parametrize("name", available())
def test_every_device_prices_operators_and_leaves_layers_as_they_are(network, name):
    target = load(name)
    for phase in (None, "decode"):
        plain = target.costs(network, SearchSpace(["int8", "int8/int8"]), phase=phase)
        space = SearchSpace({"*": ["int8", "int8/int8"], "*:*": ["-/int8", "-/fp32"], "*:softmax": ["-/int8"]})
        costs = target.costs(network, space, phase=phase)
        layers = [layer.name for layer in network.layers]
        same = costs.loc[layers].drop(columns="cache").loc[plain.index]
        assert np.array_equal(same.to_numpy(), plain.to_numpy(), equal_nan=True)
        rows = costs.loc[[(each.name, "-/int8") for each in attention_operators(network)]]
        assert np.isfinite(rows.to_numpy()).all()
        for quantity, whole in plain.attrs["reference"].items():
            if quantity != "bops":
                assert costs.attrs["reference"][quantity] == pytest.approx(whole, rel=1e-9), quantity


def moved(costs, quantity, label):
    """What both caches and the rest of attention come to."""
    caches = sum(costs[quantity][name][label] for name in ("first:cache", "second:cache"))
    return costs.attrs["offsets"].get(quantity, 0.0) + caches


DECODE = {"phase": "decode", "context": 50_000}


def test_energy_of_a_decoding_step_falls_with_the_cache(network):
    target = load("eyeriss")
    space = SearchSpace({"*": ["int8/int8"], "*:cache": ["-/int4", "-/int8", "-/fp32"]})
    costs = target.costs(network, space, **DECODE)
    plain = target.costs(network, SearchSpace(["int8/int8"]), **DECODE)
    assert moved(costs, "energy", "-/fp32") == pytest.approx(plain.attrs["offsets"]["energy"], rel=1e-9)
    (bit,) = [model.bits["dram"].value for model in target.models if hasattr(model, "bits")]
    fewer = KV_HEADS * 50_000 * 10 * 4  # bits of one run, from int8 to int4
    energy = costs["energy"]["first:cache"]
    assert energy["-/int8"] - energy["-/int4"] == pytest.approx(fewer * bit * 1e-12, rel=1e-9)


def test_power_calibration_and_composition_reach_the_cache(network):
    space = SearchSpace({"*": ["int8/int8"], "*:cache": ["-/int8", "-/fp32"]})
    t4, eyeriss = load("nvidia-t4"), load("eyeriss")
    plain = t4.costs(network, space, **DECODE)
    scaled = replace(t4, calibration=DeviceEntry("calibration", {"alpha": 2.0}, ())).costs(network, space, **DECODE)
    both = compose(latency=t4, energy=eyeriss).costs(network, space, **DECODE)
    powered = replace(t4, models=(*t4.models, ActivePower(DeviceEntry("energy", {"active_W": 70.0}, ()))))
    watts = powered.costs(network, space, **DECODE)
    for label in ("-/int8", "-/fp32"):
        seconds = plain["latency"]["first:cache"][label]
        assert scaled["latency"]["first:cache"][label] == pytest.approx(2 * seconds, rel=1e-12)
        assert both["latency"]["first:cache"][label] == seconds
        alone = eyeriss.costs(network, space, **DECODE)["energy"]["first:cache"][label]
        assert both["energy"]["first:cache"][label] == alone
        assert watts["energy"]["first:cache"][label] == pytest.approx(70 * seconds, rel=1e-12)


def test_a_space_without_operators_is_what_it_was(network):
    model, data = Toy(), batches()
    plain = mpq.measure(model, data, ["int4", "int8"], sensitivity="kl", progress=False)
    with_caches = mpq.measure(
        model, data, {"*": ["int4", "int8"], "*:cache": ["-/int8"]}, sensitivity="kl", progress=False
    )
    assert plain.units.tolist() == [layer.name for layer in network.layers]
    assert "cache" not in plain.quantities
    assert plain.layers == network.layers
    count = len(network.layers)
    assert with_caches.units.tolist()[count:] == ["first:cache", "second:cache"]
    for name, values in plain.quantities.items():
        assert np.array_equal(with_caches.quantity(name)[:count, :2], values, equal_nan=True)
    assert with_caches.reference["size"] == plain.reference["size"]
    assert [with_caches.parameters[count:].tolist(), with_caches.parameters[:count].tolist()] == [
        [0, 0],
        plain.parameters.tolist(),
    ]


@pytest.fixture(scope="module")
def table():
    return mpq.measure(Toy(), batches(), CACHES, sensitivity="kl", progress=False)


def test_a_budget_on_the_cache_is_solved_as_by_listing_plans(table):
    labels = ["-/int2@token", "-/int4@token", "-/int8@token", "-/fp16"]
    frame = table.frame
    for budget, limit in (("30%", 0.3 * table.reference["cache"]), ("0.0002 MB", 200.0), (250, 250.0)):
        plan = table.solve({"cache": budget})
        best = min(
            (
                (frame["sensitivity"]["first:cache", a] + frame["sensitivity"]["second:cache", b], a, b)
                for a, b in itertools.product(labels, labels)
                if frame["cache"]["first:cache", a] + frame["cache"]["second:cache", b] <= limit
            ),
            key=lambda found: found[0],
        )
        assert (plan.options["first:cache"], plan.options["second:cache"]) == best[1:], budget
        assert plan.predicted["cache"] <= limit
    with pytest.raises(mpq.InfeasibleError, match="cache at most 1%"):
        table.solve({"cache": "1%"})


def test_plans_and_tables_come_back_from_disk(table, tmp_path):
    plan = table.solve({"cache": "30%"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").entries == plan.entries
    table.save(tmp_path / "table.parquet")
    assert mpq.CostTable.load(tmp_path / "table.parquet").solve({"cache": "30%"}).options == plan.options
    assert repr(plan).startswith("Plan(9 layers and 2 operators: ")
    assert set(plan.weight_bits.values()) == {8}
    assert plan.value_bytes == sum(entry.layer.parameters for entry in plan.of_layers)
    assert plan.to_frame().loc["first:cache", "weights"] == 0
    assert any(text.startswith("cache ") for text in plan.provenance["binding"])
    report = mpq.verify(Toy(), batches(), plan, baselines="all", progress=False)
    assert report.quantities[0].quantity == "cache"
    page = plan.report(tmp_path / "page.html", verification=report).read_text("utf-8")
    assert "first:cache" in page
    plan._repr_html_(), plan.plot()


def test_verify_and_refine_measure_the_cache(table):
    model, data = Toy(), batches()
    plan = table.solve({"cache": "20%"}, pins={"*:cache": "-/int2@token"})
    assert set(plan.pins()) == {"first:cache", "second:cache"}
    finest = plan.with_options({"*:cache": "-/fp16"})
    rough, fine = (
        mpq.verify(model, data, each, baselines=(), progress=False).rows[1].divergence for each in (plan, finest)
    )
    expected = []
    with torch.no_grad(), mpq.quantized(model, finest):
        coarse = {(at, "cache"): "int2@token" for at in ("first", "second")}
        outputs = [run_by_hand(model, x, coarse) for x, _ in data]
    with torch.no_grad():
        for (x, _), found in zip(data, outputs, strict=True):
            expected += divergences(model(x), found)
    assert rough == pytest.approx(np.mean(expected), rel=1e-3)
    assert fine < rough / 10
    refined = mpq.refine(model, data, table, {"cache": "30%"}, evaluations=4)
    assert refined.plan.predicted["cache"] <= 0.3 * table.reference["cache"]


def test_ties_give_all_caches_one_format():
    space = SearchSpace(CACHES, ties=["*:cache"])
    table = mpq.measure(Toy(), batches(), space, sensitivity="kl", progress=False)
    assert table.ties == ((8 + 1, 8 + 2),)
    options = table.solve({"cache": "28%"}).options
    assert options["first:cache"] == options["second:cache"]


def test_operators_that_are_named_alone_are_planned_and_pins_name_them(network):
    space = SearchSpace({"*": ["int8"], "first:cache": ["-/int8"]}, pins={"*:scores": "-/int4"})
    assert [each.name for each in space.operators(network)] == ["first:scores", "first:cache", "second:scores"]
    assert space.candidates(network)["second:scores"] == (Option.parse("-/int4"),)
    assert SearchSpace({"*": ["int4"], "[fs]*": ["int8"]}).operators(network) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"*": ["int8"], "*:cache": ["int8"]}, "'first:cache' has a weight format, attention has no weights"),
        ({"*": ["int8", "-/int8"]}, "option -/int8 of layer 'first.q' has no weight format"),
        ({"*": ["int8"], "third:cache": ["-/int8"]}, "no operator of attention: there are first:scores, first:mixing"),
    ],
)
def test_spaces_that_are_wrong(network, options, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(options).candidates(network)


def test_attention_that_cannot_be_quantised_is_refused(network):
    spelled_out = Toy()
    spelled_out.first, spelled_out.second = SpelledOut(), SpelledOut()
    with pytest.raises(ValueError, match="'first' does not run through torch.nn.functional"):
        mpq.measure(spelled_out, batches(), CACHES, progress=False)
    with pytest.raises(ValueError, match="matches no operator of attention"):  # the model itself runs it
        mpq.measure(decoder(), tokens(), CACHES, progress=False)
    with pytest.raises(ValueError, match="the network has no attention"):
        mpq.measure(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), CACHES, progress=False)
    cache = attention_operators(network)[2]
    plan = Plan((*(Entry(layer, Option("int8")) for layer in network.layers), Entry(cache, Option(None, "int4"))), "")
    with (
        pytest.raises(ValueError, match="the attention of 'first' was to be quantised and did not run"),
        mpq.quantized(spelled_out, plan),
    ):
        spelled_out(batches()[0][0])
    with (
        pytest.raises(ValueError, match="has no module 'first'"),
        mpq.quantized(nn.Sequential(), Plan(plan.entries[-1:], "")),
    ):
        pass
    with pytest.raises(ValueError, match="'first:cache' has no weights, int8 has a weight format"):
        plan.with_options({"first:cache": "int8"})


@pytest.mark.parametrize("method", ["fisher", "weight_error", "hessian_trace", "interactions"])
def test_methods_of_weights_refuse_operators(network, method):
    with pytest.raises(ValueError, match=r"scores weights, and 'first:cache' has none: .*sensitivity='kl'"):
        mpq.sensitivity.estimate(Toy(), batches(), network, SearchSpace(CACHES), method=method, progress=False)
    with pytest.raises(ValueError, match="scores weights, and 'first:cache' has none"):
        mpq.sensitivity.estimate_together(Toy(), batches(), network, SearchSpace(CACHES), ["kl", method])
    with pytest.raises(ValueError, match="takes no 'rows:4'"):
        price_network(network, SearchSpace(CACHES), granularity="rows:4")


def test_auto_measures_and_says_why(network):
    frame = mpq.sensitivity.estimate(Toy(), batches(1), network, SearchSpace(CACHES), progress=False)
    assert frame.attrs["method"].startswith("KL")
    assert "no weights" in frame.attrs["why"]


@pytest.mark.parametrize("target", targets())
def test_exporters_refuse_quantised_attention(table, target):
    plan = table.solve({"cache": "30%"})
    operator = plan.entries[-1].layer
    settings = {"output": "unused.onnx", "source": "unused.onnx"} if target == "onnxruntime" else {}
    if target == "csv":
        assert ["first:cache", "", plan.options["first:cache"], 4, 0, 0, 0] in mpq.export(plan, "csv")["rows"]
        assert refusal(target, operator, "-/int8") is None
        return
    with pytest.raises(ValueError, match=r"cannot hold -/int4@token \('first:cache'\): mpq exports formats of weights"):
        mpq.export(plan, target, **settings)
    assert refusal(target, operator, "-/fp16") is None
    assert "not of attention" in refusal(target, operator, "-/int8")


def test_attention_in_floats_is_exported_as_if_it_were_not_there(table, network):
    plan = table.solve({"cache": "30%"})
    plain = Plan(plan.of_layers, plan.fingerprint)
    assert mpq.export(plan.with_options({"*:*": "-/fp16"}), "torchao") == mpq.export(plain, "torchao")
    with pytest.raises(ValueError, match="torchao can hold no option of 'first:cache'"):
        price_network(network, SearchSpace({"*": ["int8"], "*:cache": ["-/int8"]}), target="torchao")
    with pytest.raises(ValueError, match="cannot hold -/int4@token"):
        mpq.apply(Toy(), plan, "torchao")


class Twice(nn.Module):
    """nn.MultiheadAttention, in evaluation mode a fused kernel of its own, run twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        for _ in range(2):
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def test_a_module_that_runs_twice_is_one_operator_even_where_it_is_fused():
    model, data = Twice().eval(), batches(1)
    network = mpq.trace(model, data[0][0])
    (scores, _, cache, _) = attention_operators(network)
    assert cache.calls == 2
    assert cache.input_elements == 2 * 2 * BATCH * POSITIONS * 8
    space = SearchSpace({"*": ["int8"], "*:cache": ["-/int2", "-/int8"]})
    frame = mpq.sensitivity.estimate(model, data, network, space, method="kl", progress=False)
    assert frame.loc[(cache.name, "-/int2"), "sensitivity"] > 10 * frame.loc[(cache.name, "-/int8"), "sensitivity"] > 0
    assert scores.macs == 2 * BATCH * 2 * POSITIONS * POSITIONS * 4


def test_a_llama_under_a_cache_budget():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 32, (3, 8)), "labels": torch.randint(0, 32, (3, 8))}]
    options = {"*": ["int8"], "*:cache": ["-/int2@token", "-/int4@token", "-/int8@token", "-/fp16"]}
    plan = mpq.search(model, data, options, {"cache": "26%"}, phase="decode", context=4096, progress=False)
    caches = {name: label for name, label in plan.options.items() if name.endswith(":cache")}
    assert list(caches) == [f"model.layers.{at}.self_attn:cache" for at in range(2)]
    rows = 2 * 4096  # heads x positions, keys and values of width 4 each
    by_hand = {"-/int2@token": 2, "-/int4@token": 4, "-/int8@token": 8}
    assert plan.predicted["cache"] == sum((rows * 8 * by_hand[label] + 2 * rows * 16) / 8 for label in caches.values())
    assert plan.table.reference["cache"] == 2 * rows * 8 * 4
    exact = mpq.quantized(model, Plan(plan.of_layers, plan.fingerprint))
    with torch.no_grad(), exact:
        alone = model(data[0]["input_ids"]).logits
    with torch.no_grad(), mpq.quantized(model, plan):
        assert not torch.equal(model(data[0]["input_ids"]).logits, alone)
