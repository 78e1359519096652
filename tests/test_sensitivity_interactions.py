"""Interactions against copies of the model with two and three layers replaced, exact quadratics, and dense clips."""

import copy
import itertools

import numpy as np
import pytest
import torch
from small_models import cnn, images
from torch import nn
from torch.nn import functional

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.sensitivity.interactions import Interactions, block_of, clipped, partners_of

OPTIONS = ["int2", "int3"]


class Sum(nn.Module):
    """Three linears on the same input, added up: any squared error is quadratic in all weights together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, 4) for _ in range(3))

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x)


def summed():
    torch.manual_seed(0)
    return Sum().double().eval(), [(torch.randn(6, 5).double(), torch.randn(6, 4).double()) for _ in range(2)]


def estimate(model, data, options=OPTIONS, **settings):
    network = mpq.trace(model, data[0][0])
    space = SearchSpace(options, ties=None)
    return mpq.sensitivity.estimate(model, data, network, space, "interactions", progress=False, **settings)


def with_options(model, choices):
    changed = copy.deepcopy(model)
    for name, option in choices.items():
        layer = changed.get_submodule(name)
        layer.weight.data = fake_quantize(layer.weight.detach(), option)
    return changed


def predicted(frame, names, options, choice):
    """½ xᵀ C x, by the matrix."""
    size = len(names) * len(options)
    matrix = np.diag(2 * frame["sensitivity"].to_numpy())
    for (i, j), block in frame.attrs["pairs"].items():
        rows = slice(i * len(options), (i + 1) * len(options))
        columns = slice(j * len(options), (j + 1) * len(options))
        matrix[rows, columns], matrix[columns, rows] = block, block.T
    x = np.zeros(size)
    x[[i * len(options) + column for i, column in enumerate(choice)]] = 1
    return 0.5 * x @ matrix @ x


@pytest.mark.parametrize("objective", ["loss", "divergence"])
@torch.no_grad()
def test_an_exact_quadratic_is_predicted_exactly_in_all_eight_plans(objective):
    model, data = summed()
    frame = estimate(model, data, objective=objective, clip=False)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    exact = model(x)
    for choice in itertools.product(range(2), repeat=3):
        outputs = with_options(model, {name: OPTIONS[c] for name, c in zip("abc", choice, strict=True)})(x)
        if objective == "loss":
            truth = functional.mse_loss(outputs, y) - functional.mse_loss(exact, y)
        else:
            truth = ((outputs - exact).square().sum(1) / exact.square().sum(1)).mean()
        assert predicted(frame, "abc", OPTIONS, choice) == pytest.approx(float(truth), abs=1e-12)
    assert any(np.abs(block).max() > 1e-3 for block in frame.attrs["pairs"].values())


def test_the_clip_changes_nothing_on_a_convex_quadratic():
    model, data = summed()
    raw, clip = estimate(model, data, clip=False), estimate(model, data, clip=True)
    scale = raw["sensitivity"].max()
    np.testing.assert_allclose(clip["sensitivity"], raw["sensitivity"], atol=1e-4 * scale)
    for key, block in raw.attrs["pairs"].items():
        np.testing.assert_allclose(clip.attrs["pairs"][key], block, atol=1e-4 * scale)


@torch.no_grad()
def test_pairs_equal_copied_models_on_a_network_with_reuse_and_without():
    model, data = cnn(), images()
    names = ["first", "depthwise", "up", "head"]
    options = ["int2", "fp32", "int4"]
    frame = estimate(model, data, options, clip=False)
    fresh = estimate(model, data, options, clip=False, keep_bytes=0)
    assert frame.equals(fresh)

    def kl(**choices):
        changed = copy.deepcopy(model)
        for name, option in choices.items():
            layer = changed.get_submodule(name)
            parts = layer.weight.detach().chunk(2) if name == "up" else [layer.weight.detach()]
            layer.weight.data = torch.cat([fake_quantize(part, option, axis=int(name == "up")) for part in parts])
        p, q = (torch.cat([net(x) for x, _ in data]).double().log_softmax(1) for net in (model, changed))
        return float((p.exp() * (p - q)).sum(1).mean())

    pairs = frame.attrs["pairs"]
    assert set(pairs) == {(i, j) for i in range(4) for j in range(i + 1, 4)}
    for (i, j), block in pairs.items():
        np.testing.assert_array_equal(block, fresh.attrs["pairs"][i, j])
        assert (block[1] == 0).all()
        assert (block[:, 1] == 0).all()
        for b, c in itertools.product((0, 2), repeat=2):
            one, other = {names[i]: options[b]}, {names[j]: options[c]}
            expected = kl(**one, **other) - kl(**one) - kl(**other)
            assert block[b, c] == pytest.approx(expected, rel=1e-3, abs=2e-7)
    singles = mpq.sensitivity.estimate(
        model, data, mpq.trace(model, data[0][0]), SearchSpace(options, ties=None), "kl", progress=False
    )
    np.testing.assert_allclose(frame, singles, rtol=1e-6, atol=1e-9)


def test_the_number_of_runs_is_that_of_the_formula():
    model, data = summed()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    network, space = mpq.trace(model, data[0][0]), SearchSpace(OPTIONS, ties=None)
    runs.clear()
    mpq.sensitivity.estimate(
        model, data[:1], network, space, Interactions(keep_bytes=0), task="features", progress=False
    )
    k, options = 6, 2
    assert len(runs) == 1 + k + k * (k - options) / 2


def test_the_clip_is_that_of_the_dense_matrix_where_nothing_is_free():
    generator = np.random.default_rng(0)
    single = generator.random((5, 1))
    pairs = {(i, j): generator.normal(size=(1, 1)) * 3 for i in range(5) for j in range(i + 1, 5)}
    matrix = np.diag(2 * single[:, 0])
    for (i, j), block in pairs.items():
        matrix[i, j] = matrix[j, i] = block.item()
    values, vectors = np.linalg.eigh(matrix)
    assert values[0] < -1
    expected = vectors @ np.diag(values.clip(0)) @ vectors.T
    new, terms = clipped(single, pairs, np.ones((5, 1), dtype=bool))
    np.testing.assert_allclose(2 * new[:, 0], np.diag(expected), atol=1e-12)
    assert all(terms[i, j].item() == pytest.approx(expected[i, j], abs=1e-12) for i, j in pairs)
    assert (new >= single - 1e-12).all()


def test_clipped_plans_never_cost_less_than_nothing_and_absent_options_take_no_part():
    generator = np.random.default_rng(1)
    single = generator.normal(size=(4, 3)) ** 2 / 10
    pairs = {(i, j): generator.normal(size=(3, 3)) for i in range(4) for j in range(i + 1, 4)}
    allowed = np.ones((4, 3), dtype=bool)
    allowed[2, 1] = False
    new, terms = clipped(single, pairs, allowed)
    for choice in itertools.product(range(3), repeat=4):
        total = sum(new[i, c] for i, c in enumerate(choice))
        total += sum(block[choice[i], choice[j]] for (i, j), block in terms.items())
        assert total >= -1e-9
    other = {key: block.copy() for key, block in pairs.items()}
    other[2, 3][1] = 99
    again, _ = clipped(single, other, allowed)
    np.testing.assert_array_equal(again[allowed], new[allowed])


def test_partners_are_blocks_or_neighbours():
    model = nn.Sequential()
    for index in range(2):
        model.add_module(f"blocks_{index}", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)))
    network = mpq.trace(model, torch.randn(2, 4))
    ends = {which: np.argwhere(partners_of(network, which)).tolist() for which in ("all", "block", "neighbours")}
    assert ends["all"] == [[i, j] for i in range(6) for j in range(i + 1, 6)]
    assert ends["block"] == [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]
    assert ends["neighbours"] == [[i, i + 1] for i in range(5)]
    branches = mpq.trace(Sum(), torch.randn(2, 5))
    assert np.argwhere(partners_of(branches, "neighbours")).tolist() == [[0, 1], [1, 2]]
    assert np.argwhere(partners_of(mpq.trace(cnn(), images()[0][0]), "neighbours")).tolist() == [
        [0, 1],
        [0, 2],
        [1, 2],
        [2, 3],
    ]
    names = ["features.3", "encoder.layer.11.attention.self.query", "fc", "blocks.2.mlp.0", "layer1.0.conv1"]
    assert list(map(block_of, names)) == ["features", "encoder.layer.11", "", "blocks.2", "layer1.0"]


def test_only_the_pairs_that_were_asked_for_are_measured():
    model, data = summed()
    frame, whole = estimate(model, data, which="neighbours", clip=False), estimate(model, data, clip=False)
    assert set(frame.attrs["pairs"]) == {(0, 1), (1, 2)}
    assert frame.equals(whole)
    np.testing.assert_array_equal(frame.attrs["pairs"][0, 1], whole.attrs["pairs"][0, 1])


def test_a_killed_measurement_goes_on(tmp_path, monkeypatch):
    model, data = summed()
    original, made = Interactions._row, []

    def dies(self, on_batch, chosen, others):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(chosen)
        return original(self, on_batch, chosen, others)

    monkeypatch.setattr(Interactions, "_row", dies)
    with pytest.raises(KeyboardInterrupt):
        estimate(model, data, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 7
    made[:] = [None] * 100
    resumed = estimate(model, data, cache=tmp_path)
    assert len(made) == 100 + 12 - 7
    monkeypatch.undo()
    fresh = estimate(model, data)
    assert resumed.equals(fresh)
    assert all((resumed.attrs["pairs"][key] == block).all() for key, block in fresh.attrs["pairs"].items())


@pytest.mark.parametrize("solver", ["auto", "exhaustive"])
def test_a_search_takes_the_pairs_into_account(solver, tmp_path):
    model, data = summed()
    model, data = model.float(), [(x.float(), y.float()) for x, y in data]
    table = mpq.measure(model, data, SearchSpace(OPTIONS, ties=None), sensitivity="interactions", progress=False)
    table.save(tmp_path / "table.parquet")
    table = mpq.CostTable.load(tmp_path / "table.parquet")
    problem = table.problem({"size": 0.5 * sum(table.reachable("size"))})
    assert set(problem.pairs) == {(0, 1), (0, 2), (1, 2)}
    plan = table.solve({"size": 0.5 * sum(table.reachable("size"))}, solver=solver)
    frame = table.frame[["sensitivity"]]
    frame.attrs["pairs"] = problem.pairs
    sizes, best = table.quantity("size"), {}
    for choice in itertools.product(range(2), repeat=3):
        if sizes[range(3), choice].sum() + table.offsets.get("size", 0) <= 0.5 * sum(table.reachable("size")):
            best[choice] = predicted(frame, "abc", OPTIONS, choice)
    assert tuple(OPTIONS.index(option) for option in plan.options.values()) == min(best, key=best.get)
    assert plan.predicted["sensitivity"] == pytest.approx(min(best.values()))


def test_settings_and_units_are_checked():
    model, data = summed()
    for settings, message in (
        ({"which": "some"}, "which must be one of all, block, neighbours"),
        ({"objective": "kl"}, "objective must be one of divergence, loss"),
        ({"granularity": "rows:2"}, "interactions are measured between whole layers"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(model, data, **settings)
    network, space = mpq.trace(cnn(), images()[0][0]), SearchSpace(OPTIONS)
    with pytest.raises(ValueError, match="loss needs data with labels.*use kl"):
        mpq.sensitivity.estimate(cnn(), images()[0][0], network, space, Interactions(objective="loss"), progress=False)
