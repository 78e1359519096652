"""Plans from safetensors files without the model: against the loaded model, in little memory, tied weights and all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import mpq
from mpq.__main__ import main
from mpq.checkpoints import read_checkpoint
from mpq.fake_quantize import fake_quantize
from mpq.plan import Plan
from mpq.quantizer import RoundToNearest
from mpq.sensitivity import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = ["int3@group8", "int4@group8", "int8@group8"]
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(16).reshape(2, 8)


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def llama(folder, **settings):
    torch.manual_seed(0)
    library = transformers()
    model = library.LlamaForCausalLM(library.LlamaConfig(**SIZES, **settings)).eval()
    model.save_pretrained(folder)
    return model


def rewritten(folder, change, **config):
    """The files of a folder with their tensors changed, and their config."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))


def others():
    library = transformers()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "GPT2": (library.GPT2LMHeadModel, library.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)),
        "ViT": (library.ViTModel, library.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3)),
        "T5": (
            library.T5Model,
            library.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2),
        ),
    }


@pytest.mark.parametrize("family", ["Llama", "GPT2", "ViT", "T5"])
def test_a_folder_scores_as_the_model_that_it_holds(family, tmp_path, monkeypatch):
    """GPT2 stores inputs first, ViT has a convolution, T5 an encoder and one embedding for three places."""
    monkeypatch.setattr(checkpoint, "CHUNK", 100)
    if family == "Llama":
        model = llama(tmp_path)
    else:
        kind, config = others()[family]
        model = kind(config).eval()
        model.save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)} if family == "ViT" else {"input_ids": IDS}
    inputs |= {"decoder_input_ids": IDS} if family == "T5" else {}
    network = mpq.trace(model, inputs)
    space = mpq.SearchSpace(OPTIONS)
    expected = mpq.sensitivity.estimate(model, inputs, network, space, "weight_error", progress=False)
    table = mpq.measure(tmp_path, None, space, sensitivity="weight_error")
    assert table.layers != ()
    assert [layer.name for layer in table.layers] == [layer.name for layer in network.layers]
    assert [layer.aliases for layer in table.layers] == [layer.aliases for layer in network.layers]
    np.testing.assert_allclose(table.quantities["sensitivity"].ravel(), expected["sensitivity"].to_numpy(), rtol=1e-5)
    assert table.fingerprint == network.fingerprint
    assert table.offsets["size"] == network.outside_bytes
    plan = table.solve({"size": "60%"})
    with mpq.quantized(model, plan):
        model(**inputs)


@pytest.mark.parametrize("granularity", ["layer", "rows:4"])
def test_scores_without_data_by_hand(tmp_path, granularity):
    weights = [torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)) * rows for rows in (4, 12)]
    save_file({f"{len(w)}.weight": w for w in weights}, tmp_path / "model.safetensors")
    rows = [part for w in weights for part in (w.split(4) if granularity == "rows:4" else [w])]
    wholes = [w for w in weights for _ in range(len(w) // 4 if granularity == "rows:4" else 1)]
    for method in ("auto", "weight_error", "relative_weight_error"):
        table = mpq.measure(tmp_path, None, ["int3", "int8"], sensitivity=method, granularity=granularity)
        expected = []
        for part, whole in zip(rows, wholes, strict=True):
            over = {"auto": whole.square().mean(), "weight_error": 1.0, "relative_weight_error": whole.square().sum()}
            errors = [(fake_quantize(part, option) - part).square().sum() for option in ("int3", "int8")]
            expected.append([float(error / over[method]) for error in errors])
        order = sorted(range(len(rows)), key=lambda i: len(wholes[i]))
        np.testing.assert_allclose(table.quantities["sensitivity"], np.array(expected)[order], rtol=1e-5)


def test_bits_are_those_of_the_plan_of_the_loaded_model(tmp_path):
    model = llama(tmp_path, tie_word_embeddings=True)
    budgets = {"size": "5 bits", "bops": "30%"}
    ours = mpq.search(tmp_path, None, OPTIONS, budgets, sensitivity="weight_error")
    theirs = mpq.search(model, {"input_ids": IDS}, OPTIONS, budgets, sensitivity="weight_error", progress=False)
    assert ours.options == theirs.options
    assert ours.predicted["size"] == theirs.predicted["size"] == ours.size_bytes
    assert ours.predicted["sensitivity"] == pytest.approx(theirs.predicted["sensitivity"], rel=1e-5)


@pytest.mark.parametrize("stored", ["embedding", "head", "both, equal", "both, different"])
def test_tied_embeddings_however_they_are_stored(tmp_path, stored):
    model = llama(tmp_path, tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def change(tensors):
        assert head not in tensors
        weight = tensors.pop(embedding)
        shown = {"embedding": {embedding: weight}, "head": {head: weight}}
        shown |= {"both, equal": {embedding: weight, head: weight.clone()}}
        shown |= {"both, different": {embedding: weight, head: -weight}}
        return {**tensors, **shown[stored]}

    rewritten(tmp_path, change)
    plan = mpq.search(tmp_path, None, ["int4", "int8"], {"size": "30%"})
    layers = {entry.layer.name: entry.layer for entry in plan.entries}
    loaded = transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (stored != "both, different")
    assert layers["model.embed_tokens"].aliases == ((head,) if tied else ())
    assert ("lm_head" in layers) != tied
    assert plan.full_bytes == sum({id(p): 4 * p.numel() for p in loaded.parameters()}.values())
    assert [("counted once" in note) for note in plan.provenance["notes"]] == [tied] * stored.startswith("both")
    assert plan.fingerprint == mpq.trace(model, {"input_ids": IDS}).fingerprint
    with mpq.quantized(loaded, plan):
        pass
    types = mpq.export(plan.with_options({"*": "fp16"}), "llama.cpp")
    names = {r"^token_embd\.weight$", r"^output\.weight$"}
    assert names <= set(types["tensor_types"])


def test_an_untied_head_that_is_missing_is_named(tmp_path):
    llama(tmp_path, tie_word_embeddings=True)
    rewritten(tmp_path, lambda tensors: tensors, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"must hold 'lm_head\.weight'.*tie_word_embeddings"):
        mpq.search(tmp_path, None, ["int4"], {"size": "30%"})


def test_errors_name_what_is_wrong(tmp_path):
    llama(tmp_path)
    with pytest.raises(ValueError, match="planned without data"):
        mpq.search(tmp_path, {"input_ids": IDS}, ["int4"], {"size": "30%"})
    with pytest.raises(ValueError, match=r"sensitivity of a path.*'kl'"):
        mpq.search(tmp_path, None, ["int4"], {"size": "30%"}, sensitivity="kl")
    with pytest.raises(ValueError, match="quantizer needs a model that runs"):
        mpq.search(tmp_path, None, ["int4"], {"size": "30%"}, quantizer=RoundToNearest())
    with pytest.raises(ValueError, match="refine and holdout measure the model"):
        mpq.search(tmp_path, None, ["int4"], {"size": "30%"}, refine=5)
    with pytest.raises(mpq.InfeasibleError):
        mpq.search(tmp_path, None, ["int4"], {"size": "1%"})
    rewritten(tmp_path, lambda tensors: {**tensors, "lm_head.weight": torch.ones(63, 16)})
    with pytest.raises(ValueError, match=r"'lm_head' must be stored as \(64, 16\).*is \(63, 16\)"):
        mpq.search(tmp_path, None, ["int4"], {"size": "30%"})
    with pytest.raises(ValueError, match="must be a .safetensors file or a folder with some"):
        mpq.search(tmp_path / "nothing", None, ["int4"], {"size": "30%"})


def test_names_and_shapes_tell_what_is_tied(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    names = [f"layers.{i}.{part}" for i in (0, 1, 10, 2) for part in parts]
    tensors = {
        f"{name}.weight": torch.randn(8, 16, generator=generator) for name in [*names, "lm_head", "embed_tokens"]
    }
    save_file({**tensors, "norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    network = read_checkpoint(tmp_path).network
    order = [f"layers.{i}" for i in (0, 1, 2, 10)]
    assert [layer.name for layer in network.layers][0::25] == ["embed_tokens", "lm_head"]
    assert (
        list(dict.fromkeys(layer.name.rpartition(".")[0].rpartition(".")[0] for layer in network.layers[1:-1])) == order
    )
    ends = [[name.rpartition(".")[2] for name in group] for group in network.siblings]
    assert sorted(ends) == sorted([["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 4)
    assert network.outside_bytes == 64
    plan = mpq.search(tmp_path, None, ["int4", "int8"], {"size": "20%"})
    assert set(plan.predicted) == {"sensitivity", "size", "value_size"}
    with pytest.raises(ValueError, match="hardware needs the multiply-adds of every layer.*no config.json"):
        mpq.search(tmp_path, None, ["int4"], {"latency": "50%"}, hardware="nvidia-t4")


def test_a_device_prices_a_folder_without_its_weights(tmp_path):
    model = llama(tmp_path)
    how = {"hardware": "nvidia-t4", "phase": "decode", "context": 64, "sensitivity": "weight_error"}
    ours = mpq.search(tmp_path, None, ["int8", "fp16"], {"latency": "100%"}, **how)
    ids = torch.zeros(1, 128, dtype=torch.long)
    theirs = mpq.search(model, {"input_ids": ids}, ["int8", "fp16"], {"latency": "100%"}, progress=False, **how)
    assert ours.predicted["latency"] == theirs.predicted["latency"]
    assert ours.predicted["bops"] == theirs.predicted["bops"]


def test_the_command_line_plans_and_exports_a_folder(tmp_path):
    llama(tmp_path, tie_word_embeddings=True, hidden_act="silu")
    plan, types = tmp_path / "plan.json", tmp_path / "types.txt"
    command = ["search", str(tmp_path), "--options", "fp16,bf16", "--budget", "size=60%", "--output", str(plan)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "scored by weight error alone" in done.output
    done = CliRunner().invoke(main, ["export", str(plan), "llama.cpp", "--output", str(types)])
    assert done.exit_code == 0, done.output
    assert len(types.read_text().splitlines()) == 2 + 2 * 7
    assert Plan.load(plan).provenance["why"].startswith("without data")


# Not getrusage, whose peak a process takes over from the one that started it.
PEAK = """
import re, sys
import mpq

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def plan(folder):
    return mpq.search(folder, None, ["int4@group64", "int8@group64"], {"size": "6 bits"})

plan(sys.argv[1])
before = peak()
plan(sys.argv[2])
print(peak() - before, peak())
"""


def zeros(folder: Path, rows: int, files: int) -> int:
    """Shards of zeros in bf16 that take no room on disk, and their bytes."""
    folder.mkdir()
    weight_map = {}
    for i in range(files):
        name, end = f"layers.{i}.up.weight", 2 * rows * 4096
        header = json.dumps({name: {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, end]}}).encode()
        header += b" " * (-len(header) % 8)
        weight_map[name] = f"model-{i}.safetensors"
        with (folder / weight_map[name]).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files * end


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_is_that_of_a_chunk_whatever_the_size_of_the_files(tmp_path):
    """A chunk of 2^20 weights is 4 MB in float32; there are a handful of those, and what the allocator holds."""
    zeros(tmp_path / "small", 16, 2)
    size = zeros(tmp_path / "big", 12288, 2)
    folders = [str(tmp_path / name) for name in ("small", "big")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, whole = map(int, re.findall(r"\d+", done.stdout))
    assert 0 < grown < 16 * 4 * checkpoint.CHUNK < size / 2
    assert whole < 2e9


def test_inspect_says_what_a_folder_can_reach(tmp_path):
    llama(tmp_path, tie_word_embeddings=True)
    done = CliRunner().invoke(main, ["inspect", str(tmp_path), "--options", "int4,int8"])
    assert done.exit_code == 0, done.output
    assert "tied: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in done.output
    assert "weights alone, 0 samples, method squared weight error over the mean squared weight" in done.output
    assert "from 15 ns a weight and option on one core" in done.output
