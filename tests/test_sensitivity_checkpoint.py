"""Scores of safetensors files: against whole tensors, over shards, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import cnn, images

import mpq
from mpq.fake_quantize import fake_quantize
from mpq.options import SearchSpace
from mpq.sensitivity import checkpoint, score_checkpoint


def relative(weight, option):
    error = fake_quantize(weight, option).double() - weight.double()
    return float(error.square().sum() / weight.double().square().sum())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 40)


OPTIONS = ["int4", "int4@group4", "int4@tensor", "uint4@tensor", "nvfp4", "mxfp4", "int8@mse", "bf16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_chunks_score_as_whole_tensors(small_chunks, tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "fc.weight": torch.randn(37, 12, generator=generator).to(dtype),
        "conv.weight": torch.randn(9, 3, 2, 2, generator=generator).to(dtype),
        "wide.weight": torch.randn(2, 100, generator=generator).to(dtype),
        "zero": torch.zeros(3, 4, dtype=dtype),
        "norm.weight": torch.ones(7, dtype=dtype),
        "steps": torch.arange(6).reshape(2, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    frame = score_checkpoint(tmp_path / "a.safetensors", OPTIONS)
    for option in OPTIONS:
        for name in ("fc", "conv", "wide"):
            expected = relative(tensors[f"{name}.weight"], option)
            assert frame.loc[(name, str(mpq.Option.parse(option))), "sensitivity"] == pytest.approx(expected, rel=1e-6)
    assert (frame.loc["zero"]["sensitivity"] == 0).all()
    assert frame.attrs["skipped"] == {"norm.weight": "it has 1 axes", "steps": "it is I64, not of floating point"}
    assert set(frame.index.get_level_values(0)) == {"fc", "conv", "wide", "zero"}


@pytest.mark.parametrize("granularity", ["layer", "rows:5", "groups:4"])
def test_stacks_of_matrices_are_cut_like_one_matrix(monkeypatch, tmp_path, granularity):
    monkeypatch.setattr(checkpoint, "CHUNK", 400)
    stack = torch.randn(3, 33, 36, generator=torch.Generator().manual_seed(1))
    save_file({"experts.up": stack}, tmp_path / "a.safetensors")
    save_file({"experts.up": stack.flatten(0, 1).clone()}, tmp_path / "b.safetensors")
    frames = [score_checkpoint(tmp_path / f"{x}.safetensors", ["int3", "int8"], granularity=granularity) for x in "ab"]
    monkeypatch.setattr(checkpoint, "CHUNK", 10**6)
    frames.append(score_checkpoint(tmp_path / "a.safetensors", ["int3", "int8"], granularity=granularity))
    for frame in frames[1:]:
        assert list(frame.index) == list(frames[0].index)
        np.testing.assert_allclose(frame.to_numpy(), frames[0].to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("granularity", ["layer", "rows:2"])
def test_agrees_with_the_method_that_has_the_model(tmp_path, granularity):
    model, (batch, *_) = cnn(), images()
    model.up = torch.nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2).requires_grad_(False)
    save_file({n: p for n, p in model.state_dict().items() if not n.startswith("up")}, tmp_path / "m.safetensors")
    space = ["int4", "int8"]
    network = mpq.trace(model, batch[0])
    known = mpq.sensitivity.estimate(
        model, batch, network, SearchSpace(space), "weight_error", granularity=granularity, progress=False
    )
    frame = score_checkpoint(tmp_path, space, granularity=granularity, progress=False)
    np.testing.assert_allclose(frame["weight_error"], known.loc[frame.index]["sensitivity"], rtol=1e-6)


def test_shards_pins_and_patterns(tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors = {f"layers.{i}.{n}.weight": torch.randn(4, 6, generator=generator) for i in range(2) for n in "qk"}
    where = {}
    for shard in range(2):
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{shard}")}
        save_file({**part, "stale.weight": torch.ones(2, 2)}, tmp_path / f"model-{shard}.safetensors")
        where |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    frame = score_checkpoint(tmp_path, ["int2", "int4"], pins={"*.1.k": "int8"}, include=["*.q", "*.1.*"])
    assert list(dict.fromkeys(frame.index.get_level_values(0))) == ["layers.0.q", "layers.1.q", "layers.1.k"]
    assert frame.loc["layers.1.k"]["sensitivity"].isna().tolist() == [True, True, False]
    expected = relative(tensors["layers.1.k.weight"], "int8")
    assert frame.loc[("layers.1.k", "int8"), "sensitivity"] == pytest.approx(expected)
    assert frame.attrs["skipped"] == {"layers.0.k.weight": "not included"}


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"a checkpoint must be a \.safetensors file or a folder"):
        score_checkpoint(tmp_path, ["int4"])
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors"):
        score_checkpoint(tmp_path, ["int4"])
    weight = torch.ones(3, 4)
    weight[1, 1] = torch.nan
    save_file({"fc.weight": weight, "b": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="fc must be finite"):
        score_checkpoint(tmp_path, ["int4"])
    with pytest.raises(ValueError, match="quantises inputs as well: use int4"):
        score_checkpoint(tmp_path, ["int4/int8"])
    with pytest.raises(ValueError, match="must see a whole tensor"):
        score_checkpoint(tmp_path, ["int4@tensor@mse"])
    with pytest.raises(ValueError, match="no scale shared between rows"):
        score_checkpoint(tmp_path, ["int4@tensor"], granularity="rows:2")
    with pytest.raises(ValueError, match=r"include=\['x'\] leaves none"):
        score_checkpoint(tmp_path, ["int4"], include="x")
    with pytest.raises(ValueError, match="pins: pattern 'fx' matches no layer"):
        score_checkpoint(tmp_path, ["int4"], pins={"fx": "int8"})


# Not getrusage, whose peak a process takes over from the one that started it.
PEAK = """
import re, sys
import pandas
from mpq.sensitivity import score_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

score_checkpoint(sys.argv[1], ["int8"], include="small")
before = peak()
score_checkpoint(sys.argv[1], ["int8"], include="big")
print(peak() - before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_tensor_of_many_chunks_takes_the_memory_of_a_few(tmp_path):
    shape, small = [16 * 1024, 4096], 8 * 16
    size = 8 * shape[0] * shape[1]  # 512 MB of zeros that take no room on disk
    entries = {"small": {"dtype": "F64", "shape": [4, 4], "data_offsets": [0, small]}}
    entries["big"] = {"dtype": "F64", "shape": shape, "data_offsets": [small, small + size]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + small + size)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, whole = map(int, done.stdout.split())
    assert 0 < grown < size * 2 / 3
    assert whole < 2 * 2**30
