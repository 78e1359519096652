"""Weights that another quantiser made, read from files: the same scores and plans as with that quantiser at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import cnn, decoder, images, tokens
from torch import nn

import mpq
from mpq.cache import Pieces
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.options import Option, SearchSpace
from mpq.plan import Split, uniform_plan
from mpq.quantizer import RoundToNearest, quantised_weight
from mpq.sensitivity import Measurement, available, estimate
from mpq.sensitivity.measurement import check_ranks
from mpq.weight_database import WeightDatabase, save_quantized_weights
from mpq.weight_view import as_rows

SPACE = SearchSpace(["int3", "int8"])
SETTINGS = {"hessian_trace": {"probes": 4}, "ggn_trace": {"draws": 2}}
INT3, INT8 = (parse(text).bind("weight") for text in ("int3", "int8"))


@dataclass(frozen=True)
class Compensating:
    """What rounding leaves of a column is added to the next one, as a poor man's GPTQ; `calls` counts."""

    share: float = 0.5
    calls: list = field(default_factory=list, repr=False, compare=False)

    def __call__(self, rows, fmt, layer):
        self.calls.append(layer.name)
        result = rows.reshape(rows.shape[0], -1).clone()
        for column in range(result.shape[1]):
            exact = result[:, column].clone()
            result[:, column] = fake_quantize(result, fmt)[:, column]
            if column + 1 < result.shape[1]:
                result[:, column + 1] += self.share * (exact - result[:, column])
        return result.reshape(rows.shape)


def scores(model, data, quantizer, **settings):
    network = mpq.trace(model, data[0] if isinstance(data[0], dict) else data[0][0])
    return estimate(model, data, network, SPACE, quantizer=quantizer, progress=False, **settings)


def written(model, folder, quantizer, **settings):
    network = mpq.trace(model, images()[0][0] if hasattr(model, "up") else tokens()[0])
    return save_quantized_weights(model, network, SPACE, quantizer, folder, progress=False, **settings)


@pytest.mark.parametrize("method", available())
def test_every_method_scores_what_the_files_hold(method, tmp_path):
    model, data, settings = cnn(), images(), SETTINGS.get(method, {})
    exact = scores(model, data, None, method=method, **settings)
    same = scores(model, data, written(model, tmp_path / "rounded", RoundToNearest()), method=method, **settings)
    np.testing.assert_array_equal(exact.to_numpy(), same.to_numpy())
    if method == "entropy":  # of inputs, in a model whose weights are as they were
        return
    other = written(model, tmp_path / "compensated", Compensating())
    found = scores(model, data, other, method=method, **settings)
    np.testing.assert_array_equal(
        found.to_numpy(), scores(model, data, Compensating(), method=method, **settings).to_numpy()
    )
    assert not np.allclose(found["sensitivity"], exact["sensitivity"], rtol=1e-3)


@pytest.mark.parametrize("granularity", ["rows:2", "groups:4"])
def test_finer_units_take_their_part(granularity, tmp_path):
    model, data = decoder(), tokens()
    database = written(model, tmp_path, Compensating(), granularity=granularity)
    for method in ("weight_error", "fisher"):
        asked = {"method": method, "granularity": granularity, "task": "causal-lm"}
        expected = scores(model, data, Compensating(), **asked)
        np.testing.assert_array_equal(scores(model, data, database, **asked).to_numpy(), expected.to_numpy())
    network = mpq.trace(model, data[0])
    layer = network.layers[1]
    count = int((network.units(granularity).layer_index == 1).sum())
    split = Split(granularity, tuple(map(Option.parse, ("int3", "int8"))), (np.arange(count) % 2).astype(np.uint8))
    found = quantised_weight(model.q.weight, split, layer, database)
    low, high = (database.units(model.q.weight.detach(), fmt, layer, granularity) for fmt in (INT3, INT8))
    row, column = torch.arange(8)[:, None], torch.arange(8)[None]
    odd = (row // 2 if granularity == "rows:2" else row * 2 + column // 4) % 2 == 1
    assert torch.equal(found, torch.where(odd.expand(8, 8), high, low))


def test_plans_are_deployed_and_verified_with_these_weights(tmp_path):
    model, data = cnn(), images()
    database = written(model, tmp_path, Compensating())
    plan = mpq.search(model, data, ["int3", "int8"], {"size": "40%"}, quantizer=database, progress=False)
    layers = {entry.layer.name: entry for entry in plan.entries}
    exact = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with mpq.quantized(model, plan, quantizer=database):
        for name, entry in layers.items():
            expected = Compensating()(as_rows(exact[f"{name}.weight"], entry.layer), entry.choice.weight, entry.layer)
            assert torch.equal(as_rows(model.get_parameter(f"{name}.weight"), entry.layer), expected)
        outputs = [model(x) for x, _ in data]
    assert all(torch.equal(parameter, exact[name]) for name, parameter in model.named_parameters())
    report = mpq.verify(model, data, plan, quantizer=database)
    task = mpq.tasks.Distribution()
    divergences = [
        task.divergence(mpq.tasks.Outputs(model(x)), mpq.tasks.Outputs(z))
        for (x, _), z in zip(data, outputs, strict=True)
    ]
    assert report.plan.divergence == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-9)
    assert report.plan.divergence != pytest.approx(mpq.verify(model, data, plan).plan.divergence, rel=1e-3)
    assert plan.provenance["quantizer"] == repr(database)


def test_tied_weights_are_found_by_any_of_their_names(tmp_path):
    model = decoder()
    network = mpq.trace(model, tokens()[0])
    tied = next(layer for layer in network.layers if layer.aliases)
    for name in (tied.name, tied.weight_name, *tied.aliases):
        folder = tmp_path / name
        folder.mkdir()
        save_file({name: model.embed.weight.detach() * 0.9}, folder / "int3.safetensors")
        found = WeightDatabase(folder)(model.embed.weight.detach(), INT3, tied)
        assert torch.equal(found, model.embed.weight * 0.9)


def square(width=4, name="fc"):
    """A layer and its weight."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(width, width))
    model.get_submodule(name).weight.data = torch.randn(width, width, generator=generator)
    return mpq.trace(model, torch.randn(2, width)).layers[0], model.get_submodule(name).weight.detach()


def stored(folder, **files):
    """A folder with files of tensors, `/` and `@` in names allowed."""
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return folder


def test_files_may_be_laid_out_in_three_ways(tmp_path):
    layer, weight = square()
    low, high = fake_quantize(weight, "int3"), fake_quantize(weight, "int8@group2")
    norm = {"norm.weight": torch.ones(4)}
    group = parse("int8@group2")
    folders = [
        stored(tmp_path / "a", **{"int3": {"fc.weight": low, **norm}, "int8@group2": {"fc": high}}),
        stored(tmp_path / "b", **{"int3/1": norm, "int3/deep/2": {"fc.weight": low}, "int8@group2/x": {"fc": high}}),
        stored(tmp_path / "c", all={"fc|int3@channel": low, "fc.weight|int8@group2/int8": high}),
    ]
    for folder in folders:
        database = WeightDatabase(folder)
        assert torch.equal(database(weight, INT3, layer), low)
        assert torch.equal(database(weight, group, layer), high)


def test_weights_come_in_the_dtype_of_the_model(tmp_path):
    layer, weight = square()
    database = WeightDatabase(stored(tmp_path, int3={"fc": weight.double() * 0.9}))
    found = database(weight.bfloat16(), INT3, layer)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight.double() * 0.9).bfloat16())


def test_what_is_missing_is_named_or_comes_from_elsewhere(tmp_path):
    layer, weight = square(name="encoder_fc")
    database = WeightDatabase(stored(tmp_path, int8={"encoder_fc": weight}, int2={"encoder_fd": weight}))
    with pytest.raises(ValueError, match=r"no weight of 'encoder_fc' in int3@channel in .*: it has int8@channel of it"):
        database(weight, INT3, layer)
    other, _ = square(name="encoder_fe")
    with pytest.raises(ValueError, match=r"no such layer: did you mean 'encoder_f.'.*'encoder_fe\|int8@channel'"):
        database(weight, INT8, other)
    for text in ("fp16", "bf16", "fp32"):
        assert torch.equal(database(weight, parse(text), layer), fake_quantize(weight, text))
    otherwise = WeightDatabase(tmp_path, otherwise=RoundToNearest())
    assert torch.equal(otherwise(weight, INT3, layer), fake_quantize(weight, "int3"))
    assert torch.equal(otherwise(weight, INT8, layer), weight)
    groups = otherwise.units(weight, INT3, layer, "groups:2")
    assert torch.equal(groups, fake_quantize(weight, "int3@group2"))


def test_weights_that_cannot_be_those_of_the_layer_are_refused(tmp_path):
    layer, weight = square(32)
    broken = weight.clone()
    broken[3, 3] = torch.nan
    refusals = {
        "shape": (weight[:, :7].contiguous(), r"stores 'fc', \(32, 32\), got torch.float32 of \(32, 7\)"),
        "codes": (weight.to(torch.int8), r"floating-point tensor .* got torch.int8"),
        "nan": (broken, "must be finite in torch.float32"),
        "transposed": (weight.T.contiguous(), "nothing in common with it: is it of another model, transposed"),
        "another": (torch.randn(32, 32, generator=torch.Generator().manual_seed(7)), "nothing in common"),
    }
    for name, (tensor, message) in refusals.items():
        database = WeightDatabase(stored(tmp_path / name, int3={"fc": tensor}))
        with pytest.raises(ValueError, match=message):
            database(weight, INT3, layer)
    for text in ("int2", "int2@tensor", "bcq1", "log2", "int2@percentile60"):
        coarse = fake_quantize(weight, text)
        database = WeightDatabase(stored(tmp_path / text, **{text: {"fc": coarse}}))
        assert torch.equal(database(weight, parse(text).bind("weight"), layer), coarse)
    zeros = WeightDatabase(stored(tmp_path / "zeros", int3={"fc": torch.zeros(32, 32)}))
    assert not zeros(weight, INT3, layer).any()


def test_folders_that_are_no_database_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with .safetensors files, got '.*absent'"):
        WeightDatabase(tmp_path / "absent")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "int4.safetensors").write_bytes(b"half a header")
    with pytest.raises(ValueError, match="cannot read .*int4.safetensors"):
        WeightDatabase(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"'fc' of .*model.safetensors' must say its format.*\(fc\|int4\): unknown"):
        WeightDatabase(stored(tmp_path / "plain", model={"fc": torch.ones(1)}))
    twice = {"int4": {"fc": torch.ones(1)}, "w4/x": {"other|int4@channel": torch.ones(1), "fc|w4": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"'fc' in int4@channel must be there once, it is in .*int4.* and .*x"):
        WeightDatabase(stored(tmp_path / "twice", **twice))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    layer, weight = square()
    database = WeightDatabase(stored(tmp_path, int3={"fc": weight, "far": torch.ones(3)}, int8={"fc": weight}))
    read = []

    class Noting:
        def __init__(self, file, framework):
            self.file, self.opened = file, safe_open(file, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_tensor(self, key):
            read.append((self.file.name, key))
            return self.opened.get_tensor(key)

    monkeypatch.setattr("mpq.weight_database.safe_open", Noting)
    database(weight, INT3, layer)
    assert read == [("int3.safetensors", "fc")]


def test_a_cache_holds_for_the_contents_and_not_for_the_place(tmp_path):
    layer, weight = square()
    one, two = (WeightDatabase(stored(tmp_path / host / "gptq", int3={layer.name: weight})) for host in "ab")
    assert repr(one) == repr(two)
    assert "gptq" in repr(one)
    other = WeightDatabase(stored(tmp_path / "c" / "gptq", int3={layer.name: weight * 0.9}))
    assert repr(other) != repr(one)
    assert repr(WeightDatabase(tmp_path / "a" / "gptq", otherwise=RoundToNearest())) != repr(one)
    model, data = cnn(), images()
    rounded = written(model, tmp_path / "weights", RoundToNearest())
    first = scores(model, data, rounded, method="kl", cache=tmp_path / "cache")
    compensated = written(model, tmp_path / "weights", Compensating())
    second = scores(model, data, compensated, method="kl", cache=tmp_path / "cache")
    assert not np.allclose(first["sensitivity"], second["sensitivity"], rtol=1e-3)


@dataclass(frozen=True)
class TwoRanks:
    """Ranks of which this one notes what they must agree on."""

    told: list
    rank: int = 0
    world: int = 2

    def agree(self, what, digest):
        self.told.append((what, digest))


def test_ranks_must_have_the_same_files(tmp_path):
    layer, weight = square()
    told = []
    for name, factor in (("a", 1.0), ("b", 1.0), ("c", 0.9)):
        database = WeightDatabase(stored(tmp_path / name / "gptq", int3={layer.name: weight * factor}))
        ranks = TwoRanks([])
        network = mpq.trace(nn.Linear(2, 2), torch.ones(1, 2))
        check_ranks(
            Measurement(
                model=nn.Identity(), batches=[torch.ones(1, 2)], network=network, options=SPACE.all_options,
                candidates={}, granularity="layer", task=mpq.tasks.Features(), quantizer=database, seed=0,
                pieces=Pieces(), progress=False, ranks=ranks,
            )
        )  # fmt: skip
        told.append(dict(ranks.told))
    assert told[0] == told[1]
    assert [what for what in told[0] if told[0][what] != told[2][what]] == ["settings"]


class KilledError(Exception):
    pass


def test_writing_goes_on_where_it_was_killed(tmp_path):
    model, first, quantizer = cnn(), [], Compensating()

    @dataclass(frozen=True)
    class Killed(Compensating):
        def __call__(self, rows, fmt, layer):
            if len(self.calls) == 5:
                raise KilledError
            return super().__call__(rows, fmt, layer)

    with pytest.raises(KilledError):
        written(model, tmp_path, Killed(calls=first))
    del first[1:]  # a quantiser's settings are its identity, and here one of them is how far it has come
    with pytest.raises(KilledError):
        written(model, tmp_path, Killed(calls=first))
    database = written(model, tmp_path, quantizer)
    network = mpq.trace(model, images()[0][0])
    assert len(quantizer.calls) == 2 * len(network.layers)
    for layer in network.layers:
        weight = as_rows(model.get_parameter(layer.weight_name).detach(), layer)
        assert torch.equal(database(weight, INT3, layer), Compensating()(weight, INT3, layer))


@dataclass(frozen=True)
class Counted:
    """Rounds, and notes it where no fingerprint sees it."""

    share: float = 1.0

    def __call__(self, rows, fmt, layer):
        NOTED.append(layer.name)
        return self.share * fake_quantize(rows, fmt)


NOTED: list[str] = []


class Unidentified:
    """A quantiser of whose settings nothing is known."""

    def __call__(self, rows, fmt, layer):
        return Counted()(rows, fmt, layer)


def test_files_that_are_there_are_made_anew_only_if_something_changed(tmp_path):
    def noted(model, quantizer, **settings):
        NOTED.clear()
        written(model, tmp_path, quantizer, **settings)
        return len(NOTED)

    model = cnn()
    assert noted(model, Counted()) == 8
    assert noted(model, Counted()) == 0
    (tmp_path / "int3" / "head.safetensors").unlink()
    (tmp_path / "int8" / "up.safetensors").write_bytes(b"cut")
    assert noted(model, Counted()) == 2
    model.head.weight.data[0, 0] += 1
    assert noted(model, Counted()) == 2
    assert noted(model, Counted(share=0.9)) == 8
    assert noted(model, Counted(share=0.9), granularity="rows:2") == 8
    assert noted(model, Unidentified()) == noted(model, Unidentified()) == 8
    assert load_file(tmp_path / "int3" / "up.safetensors")["up.weight"].shape == model.up.weight.shape


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write .*file/int3/first.safetensors"):
        written(cnn(), tmp_path / "file", RoundToNearest())


def test_plans_uniform_in_a_format_without_weights_are_refused_before_they_run(tmp_path):
    model, data = cnn(), images()
    database = written(model, tmp_path, RoundToNearest())
    plan = mpq.search(model, data, ["int3", "int8"], {"size": "60%"}, quantizer=database, progress=False)
    with (
        pytest.raises(ValueError, match="no weight of 'first' in int4@channel"),
        mpq.quantized(model, uniform_plan(plan, Option.parse("int4")), quantizer=database),
    ):
        pass
