"""Mixtures of experts of transformers, from the files or the model to a plan, its simulation and its exports."""

import re

import numpy as np
import pytest
import torch

import mpq
from mpq.exporting import export
from mpq.fake_quantize import fake_quantize
from mpq.options import Option
from mpq.plan import Split, weight_format
from mpq.sensitivity import checkpoint
from mpq.stored_weights import stored_tensors

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = 4
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "Mixtral": {"intermediate_size": 64, "num_local_experts": EXPERTS},
    "Qwen3Moe": {"intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": EXPERTS},
    "GptOss": {"intermediate_size": 64, "num_local_experts": EXPERTS},
}
IDS = torch.arange(32).reshape(4, 8)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """(name, model, folder with its files)."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **FAMILIES[request.param])
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.no_grad():
        for parameter in model.parameters():  # layers of different scales, experts too
            if parameter.ndim > 1:
                parameter.mul_(1 + torch.rand(parameter.shape[0], *[1] * (parameter.ndim - 1)))
    model.save_pretrained(folder)
    return request.param, model, folder


def matrices(name, parameter):
    """Every (out, in) matrix of a parameter of two or three axes, by hand."""
    if parameter.ndim == 2:
        return [parameter]
    return [each.T if name == "GptOss" else each for each in parameter]  # GptOss multiplies from the left


def quantised_by_hand(name, parameter, labels):
    formats = [weight_format(Option.parse(label)) for label in labels]
    parts = [fake_quantize(w, fmt) for w, fmt in zip(matrices(name, parameter.detach()), formats, strict=True)]
    if parameter.ndim == 2:
        return parts[0]
    return torch.stack([part.T if name == "GptOss" else part for part in parts])


def labels_of(entry):
    """The option of every matrix."""
    if isinstance(entry.choice, Split):
        return [str(entry.choice.options[code]) for code in entry.choice.codes]
    return [str(entry.choice)] * entry.layer.experts


def experts_of(plan):
    return [entry for entry in plan.entries if entry.layer.kind == "experts"]


@pytest.mark.parametrize("granularity", ["layer", "experts", "rows:16"])
def test_files_score_as_matrices_quantised_by_hand(family, granularity, monkeypatch):
    name, model, folder = family
    monkeypatch.setattr(checkpoint, "CHUNK", 300)  # several chunks an expert
    table = mpq.measure(folder, None, ["int3", "int4@group8"], sensitivity="weight_error", granularity=granularity)
    expected = []
    for layer in table.layers:
        parameter = model.get_parameter(layer.weight_name).detach()
        whole = matrices(name, parameter)
        parts = [block for w in whole for block in w.split(16)] if granularity == "rows:16" else whole
        errors = [
            [float((fake_quantize(w, option) - w).double().square().sum()) for option in ("int3", "int4@group8")]
            for w in parts
        ]
        expected += [np.sum(errors, axis=0)] if granularity == "layer" else errors
    np.testing.assert_allclose(table.quantities["sensitivity"], expected, rtol=1e-5)
    assert table.fingerprint == mpq.trace(model, {"input_ids": IDS}).fingerprint


@pytest.mark.parametrize("granularity", ["layer", "experts"])
@pytest.mark.parametrize("from_files", [True, False])
def test_the_simulation_is_what_hands_would_quantise(family, granularity, from_files):
    name, model, folder = family
    model_and_data = (folder, None) if from_files else (model, {"input_ids": IDS, "labels": IDS})
    how = {"granularity": granularity, "progress": False} | ({} if from_files else {"sensitivity": "fisher"})
    plan = mpq.search(*model_and_data, ["int2", "int8"], {"size": "5 bits"}, **how)
    chosen = [labels_of(entry) for entry in experts_of(plan)]
    mixed = any(len(set(labels)) > 1 for labels in chosen)
    assert len(chosen) == 4
    assert mixed == (granularity == "experts")
    expected = {e.layer.weight_name: labels_of(e) for e in plan.entries}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with mpq.quantized(model, plan):
        for key, parameter in model.named_parameters():
            if key in expected:
                exact = before[key]
                assert torch.equal(parameter, quantised_by_hand(name, exact, expected[key])), key
            else:
                assert torch.equal(parameter, before[key]), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("granularity", ["layer", "experts"])
def test_sizes_count_every_expert_and_leave_routers_alone(family, granularity):
    name, model, folder = family
    plan = mpq.search(folder, None, ["int2", "int8@group16"], {"size": "6 bits"}, granularity=granularity)
    bits, planned = 0, {}
    for entry in plan.entries:
        parameter = model.get_parameter(entry.layer.weight_name)
        planned[entry.layer.weight_name] = parameter
        shapes = [tuple(w.shape) for w in matrices(name, parameter)]
        formats = [weight_format(Option.parse(label)) for label in labels_of(entry)]
        bits += sum(fmt.storage_bits(shape) for fmt, shape in zip(formats, shapes, strict=True))
        bits += len(shapes) * isinstance(entry.choice, Split)  # one of two options an expert
    left = sum(4 * value.numel() for key, value in model.named_parameters() if key not in planned)
    assert plan.predicted["size"] == plan.size_bytes == bits / 8 + left
    routers = [key for key in plan.provenance["skipped"] if re.search(r"\.(gate|router)\.weight$", key)]
    assert len(routers) == 2
    assert not any("router" in key or key.endswith("mlp.gate.weight") for key in planned)


def test_a_pin_of_its_own_plans_a_router(family):
    name, _, folder = family
    router = "*.mlp.router.weight" if name == "GptOss" else "*.mlp.gate.weight"
    plan = mpq.search(folder, None, ["int4"], {"size": "90%"}, pins={router: "int8"})
    assert [label for key, label in plan.options.items() if key.endswith(router[1:])] == ["int8", "int8"]
    everything = mpq.search(folder, None, ["int4"], {"size": "90%"}, pins={"*": "int4"})
    assert not any(key.endswith(router[1:]) for key in everything.options)


def test_llama_cpp_gets_merged_experts(family):
    _, _, folder = family
    plan = mpq.search(folder, None, ["q4_0", "q8_0"], {"size": "6 bits"}, target="llama.cpp")
    types = export(plan, "llama.cpp")["tensor_types"]
    for block in range(2):
        joined, down = (
            plan.options[f"model.layers.{block}.mlp.experts.{part}"] for part in ("gate_up_proj", "down_proj")
        )
        assert types[rf"^blk\.{block}\.ffn_gate_exps\.weight$"] == joined
        assert types[rf"^blk\.{block}\.ffn_up_exps\.weight$"] == joined
        assert types[rf"^blk\.{block}\.ffn_down_exps\.weight$"] == down
    assert len(types) == 2 + 2 * (4 + 3)
    apart = mpq.search(folder, None, ["q4_0", "q8_0"], {"size": "6 bits"}, granularity="experts")
    with pytest.raises(ValueError, match=r"llama\.cpp takes one format a layer, 'model\.layers\.\d\.mlp\.experts"):
        export(apart, "llama.cpp")


def test_compressed_tensors_names_the_linears_that_files_have(family):
    name, _, folder = family
    pins = {"model.embed_tokens": "fp32", "lm_head": "fp32"}
    how = {"pins": pins, "target": "compressed-tensors"}
    plan = mpq.search(folder, None, ["int4@group8", "int8@group8"], {"size": "60%"}, **how)
    exported = export(plan, "compressed-tensors")
    matched = {}
    for group in exported["config_groups"].values():
        for target in group["targets"]:
            for tensor in stored_tensors(folder):
                if re.match(target.removeprefix("re:"), tensor.removesuffix(".weight")):
                    assert matched.setdefault(tensor, group["weights"]["num_bits"]) == group["weights"]["num_bits"]
    options = plan.options
    for block in range(2):
        path = f"model.layers.{block}"
        bits = {weight_format(Option.parse(v)).bits for k, v in options.items() if f"{path}.mlp.experts" in k}
        assert len(bits) == 1  # tied: vLLM runs them in one kernel
        if name != "GptOss":  # its files have stacks, not linears
            inside = [t for t in stored_tensors(folder) if t.startswith(path) and ".experts." in t]
            assert len(inside) == 3 * EXPERTS
            assert {matched[t] for t in inside} == bits
    router = "router" if name == "GptOss" else "gate"
    assert f"model.layers.1.mlp.{router}" in exported["ignore"]
    assert not any(router == key.split(".")[-2] for key in matched)
    edited = plan.with_options({"model.layers.0.mlp.experts.down_proj": "int4@group16"})
    with pytest.raises(ValueError, match="experts of a block in one kernel"):
        export(edited, "compressed-tensors")


def test_without_a_config_experts_are_tied_unless_told_otherwise(family, tmp_path):
    name, _, folder = family
    if name == "GptOss":
        pytest.skip("its files have stacks, which are one layer anyway")
    for file in folder.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    tied = mpq.search(tmp_path, None, ["q4_0", "q8_0"], {"size": "6 bits"})
    assert "no config.json" in tied.provenance["notes"][0]
    path = next(key for key in tied.options if ".experts.0." in key).partition("experts")[0]
    up, down = ("w3", "w2") if name == "Mixtral" else ("up_proj", "down_proj")
    for part in (up, down):
        assert len({tied.options[f"{path}experts.{i}.{part}"] for i in range(EXPERTS)}) == 1
    assert not any(key.endswith((".gate", ".gate.weight")) for key in tied.options)
    types = export(tied, "llama.cpp")["tensor_types"]
    assert types[r"^blk\.0\.ffn_up_exps\.weight$"] == tied.options[f"{path}experts.0.{up}"]
    apart = tied.with_options({f"{path}experts.0.{up}": "q4_0", f"{path}experts.1.{up}": "q8_0"})
    with pytest.raises(ValueError, match=r"holds all experts of 'blk\.0\.ffn_up_exps\.weight' in one type"):
        export(apart, "llama.cpp")


def test_an_option_an_expert_survives_its_files(family, tmp_path):
    _, _, folder = family
    table = mpq.measure(folder, None, ["int2", "int8"], granularity="experts")
    table.save(tmp_path / "table.parquet")
    loaded = mpq.CostTable.load(tmp_path / "table.parquet")
    plan, again = (each.solve({"size": "5 bits"}) for each in (table, loaded))
    assert plan.options == again.options
    plan.save(tmp_path / "plan.json")
    read = mpq.Plan.load(tmp_path / "plan.json")
    assert read.entries == plan.entries
    assert read.size_bytes == plan.predicted["size"]
    tied = {plan.options[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv"}
    assert len(tied) == 1  # layers that are no stacks are tied as ever
    units = [len(e.choice.codes) if isinstance(e.choice, Split) else 1 for e in plan.entries]
    assert sum(units) == len(table.units) == 2 * (4 + 2 * EXPERTS) + 2
