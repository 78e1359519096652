"""Every export target: plain data, unquantised layers left out, and what it lacks refused by name. No target needed."""

import json
import re

import numpy as np
import pytest
from plans_to_export import decoder_layers, layer, planned

import mpq
from mpq.exporting import refusal, targets, write_export
from mpq.gguf_names import gguf_names, parameter_of
from mpq.options import Option
from mpq.plan import Entry, Plan, Split

Q, K, V, OUT, GATE, UP, DOWN = (
    f"model.layers.0.{name}"
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
)
FORMATS = {  # of one plan each target holds
    "torchao": "int4@group32",
    "llama.cpp": "q4_0",
    "autoround": "int4@group32",
    "modelopt": "int4@group32",
    "compressed-tensors": "int4@group32",
    "gptqmodel": "int4@group32",
    "quanto": "int8",
    "hawq": "int4",
    "csv": "nf4@group64",
}


@pytest.mark.parametrize("target", sorted(FORMATS))
def test_exports_are_plain_data_and_name_every_quantised_layer_and_no_other(target):
    plan = planned(decoder_layers(), {"*_proj": FORMATS[target]})
    if target == "hawq":
        plan = planned(tuple(e.layer for e in plan.entries if "proj" in e.layer.name), {"*": "int4"})
    exported = mpq.export(plan, target)
    text = json.dumps(exported)
    assert text == json.dumps(mpq.export(plan, target))
    if target == "llama.cpp":
        assert text.count("blk") == 14
    else:
        quantised = [e.layer.name for e in plan.entries if "proj" in e.layer.name]
        found = text.replace("\\", "")
        assert target == "gptqmodel" or all(name in found for name in quantised)


@pytest.mark.parametrize(
    ("target", "option", "message"),
    [
        ("llama.cpp", "int4", "llama.cpp cannot hold int4 .*q_proj.*has q4_0"),
        ("llama.cpp", "q4_k", "blocks of 256 do not divide its 64 inputs.*would store q5_0"),
        ("llama.cpp", "q8_0/int8", "drop '/int8@tensor'"),
        ("onnxruntime", "int3@scale=fp32", "has weights in int4, int8"),
        ("onnxruntime", "int4@group32", "write int4@group32@scale=fp32"),
        ("onnxruntime", "int4@group8@scale=fp32", "blocks are of 16"),
        ("autoround", "int5", "AutoRound has weights in int or uint of 2, 3, 4 and 8 bits"),
        ("autoround", "int4@mse", "scales weights by their range, not @mse"),
        ("autoround", "int8/int8@tensor", "int8@token"),
        ("modelopt", "uint4", "Model Optimizer has weights in int2 to int8"),
        ("modelopt", "int8/int8@token", "inputs in int8@tensor"),
        ("compressed-tensors", "int3", "has, for vLLM, weights in int4, int8"),
        ("compressed-tensors", "int4/int8@token", "of the same kind"),
        ("compressed-tensors", "int8@tensor", "by channel or group"),
        ("gptqmodel", "int4@group48", "48 does not divide its 64 inputs"),
        ("gptqmodel", "int8/int8", "leaves inputs alone"),
        ("quanto", "int4", "uint2 and uint4"),
        ("quanto", "uint4@group32", "groups in .*q_proj.* are @channel"),
        ("hawq", "fp32", "HAWQ has weights in int2 to int8"),
        ("hawq", "int4@group32", "scale a channel"),
    ],
)
def test_what_a_target_lacks_is_refused_by_layer_format_and_what_it_has(target, option, message):
    first = next(each for each in decoder_layers() if each.name == Q)
    plan = Plan((Entry(first, Option.parse(option)),), "")
    with pytest.raises(ValueError, match=message):
        mpq.export(plan, target, **({"source": None, "output": "x"} if target == "onnxruntime" else {}))
    assert refusal(target, first, option) is not None


@pytest.mark.parametrize(
    ("target", "library"),
    [
        ("autoround", "AutoRound"),
        ("compressed-tensors", "compressed-tensors"),
        ("gptqmodel", "GPTQModel"),
        ("hawq", "HAWQ"),
        ("modelopt", "Model Optimizer"),
        ("onnxruntime", "ONNX Runtime"),
    ],
)
def test_why_a_width_is_lacking_is_a_sentence_about_the_library(target, library):
    option = Option.parse("int9@scale=fp32" if target == "onnxruntime" else "int9")
    assert re.match(rf"{library} has\b", refusal(target, layer(Q, (64, 64)), option))


def test_llama_cpp_names_tensors_as_gguf_does_tied_ones_twice():
    plan = planned(decoder_layers(tied=True), {"*": "q8_0", "*down_proj": "q6_k"})
    types = mpq.export(plan, "llama.cpp")["tensor_types"]
    by_tensor = {pattern.strip("^$").replace("\\", ""): kind for pattern, kind in types.items()}
    assert by_tensor["token_embd.weight"] == by_tensor["output.weight"] == "q8_0"
    assert by_tensor["blk.1.ffn_down.weight"] == "q6_k"
    assert len(types) == 16


def test_gguf_names_agree_with_the_gguf_package():
    gguf = pytest.importorskip("gguf", reason="the extra mpq-search[test] is not installed")
    names = [each.weight_name for each in decoder_layers()]
    for architecture in ("llama", "qwen2", "qwen3", "mistral3"):
        for name in names:
            assert gguf_names(name) == gguf_names(name, architecture=architecture)
    assert gguf_names("model.layers.0.self_attn.qkv_proj.weight", architecture="phi3") == gguf_names(
        "model.layers.0.self_attn.qkv_proj.weight"
    )
    assert gguf_names("transformer.h.3.attn.c_attn.weight", architecture="gpt2") == ("blk.3.attn_qkv.weight",)
    assert set(gguf.MODEL_ARCH_NAMES.values()) >= {"llama", "gpt2"}


def test_gguf_names_and_back():
    for each in decoder_layers():
        for tensor in gguf_names(each.weight_name):
            assert any(each.name.endswith(ending) for ending in parameter_of(tensor))
    with pytest.raises(ValueError, match="no GGUF name is known for 'model.layers.0.mlp.gait_proj.weight'.*gate_proj"):
        gguf_names("model.layers.0.mlp.gait_proj.weight")
    assert gguf_names("model.layers.0.mlp.experts.gate_up_proj") == (
        "blk.0.ffn_gate_exps.weight",
        "blk.0.ffn_up_exps.weight",
    )


def test_llama_cpp_refuses_routers_and_convolutions():
    assert "router" in str(refusal("llama.cpp", layer("model.layers.0.mlp.gate", (8, 64)), "q8_0"))
    assert refusal("llama.cpp", layer("model.layers.0.mlp.gate", (8, 64)), "fp32") is None
    assert "conv2d as it is" in str(refusal("llama.cpp", layer("c", (8, 4, 3, 3), "conv2d"), "fp32"))


def test_autoround_schemes():
    options = {Q: "int4@group32", K: "uint2@group64", V: "int8/int8@token", OUT: "mxfp4", GATE: "nvfp4"}
    found = mpq.export(planned(decoder_layers(1), options), "autoround")
    assert found[Q] == {"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "act_bits": 16}
    assert (found[K]["sym"], found[V]["act_bits"], found[V]["group_size"]) == (False, 8, -1)
    assert (found[OUT]["data_type"], found[GATE]["group_size"]) == ("mx_fp", 16)
    assert found["lm_head"]["bits"] == 16
    assert "model.embed_tokens" not in found


def test_modelopt_switches_all_off_first_then_on_by_name():
    found = mpq.export(planned(decoder_layers(1), {Q: "int4@group32", K: "fp8_e4m3/int8"}), "modelopt")["quant_cfg"]
    assert found[0] == {"quantizer_name": "*", "enable": False}
    assert found[1]["cfg"] == {"num_bits": 4, "block_sizes": {-1: 32}}
    assert [entry["quantizer_name"].rpartition(".")[2] for entry in found[1:]] == [
        *("weight_quantizer", "weight_quantizer", "input_quantizer"),
    ]


def test_compressed_tensors_groups_by_option_ignores_by_name_and_keeps_fused_layers_alike():
    same = {"*[qkv]_proj": "int4@group32", "*gate_proj": "int8/int8@token", "*up_proj": "int8/int8@token"}
    found = mpq.export(planned(decoder_layers(1), same), "compressed-tensors")
    assert found["format"] == "mixed-precision"
    assert [len(group["targets"]) for group in found["config_groups"].values()] == [3, 2]
    assert [group["weights"]["strategy"] for group in found["config_groups"].values()] == ["group", "channel"]
    assert set(found["ignore"]) == {OUT, DOWN, "lm_head"}
    patterns = [target.removeprefix("re:") for group in found["config_groups"].values() for target in group["targets"]]
    assert sum(bool(re.match(pattern, K)) for pattern in patterns) == 1
    with pytest.raises(ValueError, match=r"q_proj.*beside fp32 .*k_proj.*vLLM fuses"):
        mpq.export(planned(decoder_layers(1), {Q: "int4"}), "compressed-tensors")


def test_gptqmodel_takes_the_option_of_most_weights_and_names_the_others():
    found = mpq.export(planned(decoder_layers(1), {"*proj": "int4@group32", Q: "int8", K: "fp32"}), "gptqmodel")
    assert (found["bits"], found["group_size"]) == (4, 32)
    assert found["dynamic"] == {
        f"+:^{re.escape(Q)}$": {"bits": 8, "group_size": -1, "sym": True, "act_group_aware": False},
        f"-:^{re.escape(K)}$": {},
        "-:^lm_head$": {},
    }
    few = mpq.export(
        planned(decoder_layers(1), {"*proj": "int4", "*gate_proj": "int8", "*down_proj": "int8"}), "gptqmodel"
    )
    assert few["bits"] == 8  # 2 of 7 layers, but most of the weights
    with pytest.raises(ValueError, match="needs a layer to quantise"):
        mpq.export(planned(decoder_layers(1), {}), "gptqmodel")


def test_hawq_takes_its_own_names_and_refuses_unknown_ones():
    plan = planned((layer("layer1.0.conv1", (8, 4, 3, 3), "conv2d"),), {"*": "int4/int8"})
    assert mpq.export(plan, "hawq", names={"layer1.0.conv1": "stage1.unit1.quant_convbn1"}) == {
        "stage1.unit1.quant_convbn1": 4
    }
    with pytest.raises(ValueError, match="no such layer: did you mean 'layer1.0.conv1'"):
        mpq.export(plan, "hawq", names={"layer1.0.conv2": "x"})


def test_files_are_written_in_the_form_the_library_reads(tmp_path):
    plan = planned(decoder_layers(1), {"*": "q8_0"})
    write_export(plan, "llama.cpp", tmp_path / "types.txt")
    assert "^output\\.weight$=q8_0" in (tmp_path / "types.txt").read_text().splitlines()
    write_export(plan, "csv", tmp_path / "plan.csv")
    rows = (tmp_path / "plan.csv").read_text().splitlines()
    assert len(rows) == 1 + len(plan.entries)
    assert sum(float(row.split(",")[-1]) for row in rows[1:]) == pytest.approx(plan.size_bytes - 100)
    write_export(planned(decoder_layers(1), {}), "autoround", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["lm_head"]["bits"] == 16


def test_every_target_refuses_split_layers_but_csv():
    assert set(targets()) == {*FORMATS, "onnxruntime"}
    first = next(each for each in decoder_layers() if each.name == Q)
    split = Split("rows:32", (Option("int4"), Option("int8")), np.array([0, 1], np.uint8))
    plan = Plan((Entry(first, split),), "")
    for target in sorted({*FORMATS} - {"csv"}):
        with pytest.raises(ValueError, match="takes one format a layer, .*q_proj.* is split"):
            mpq.export(plan, target)
    assert "int4 x1" in mpq.export(plan, "csv")["rows"][0][2]
