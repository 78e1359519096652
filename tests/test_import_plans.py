"""Plans of other libraries read into ours; comparison of two plans, layer by layer."""

import json

import numpy as np
import pytest
from plans_to_export import decoder_layers, layer, network, planned

import mpq
from mpq.comparison import compare
from mpq.importing import import_plan, sources
from mpq.tables import CostTable

OPTIONS = {
    "autoround": {"*": "int4@group32", "*k_proj": "uint3@group64", "*gate_proj": "mxfp4", "*v_proj": "int8/int8@token"},
    "modelopt": {"*": "int4@group32", "*k_proj": "fp8_e4m3@tensor", "*up_proj": "int6/int8", "*gate_proj": "int3"},
    "llama.cpp": {"*": "q8_0", "*down_proj": "q3_k", "*o_proj": "fp16", "*q_proj": "mxfp4"},
    "hawq": {"*": "int4", "*down_proj": "int8"},
}


@pytest.mark.parametrize("source", sorted(OPTIONS))
def test_what_is_exported_is_read_back_as_it_was(source, tmp_path):
    layers = decoder_layers()
    plan = planned(layers, OPTIONS[source] | ({} if source in ("hawq", "llama.cpp") else {"*embed*": "fp32"}))
    data = mpq.export(plan, source)
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(data))
    default = "fp32" if source == "autoround" else None
    for given in (data, json.dumps(data), file, str(file)):
        imported = import_plan(given, source, network(layers), default=default)
        assert imported.options == plan.options
        assert imported.size_bytes == plan.size_bytes
        assert imported.fingerprint == plan.fingerprint
    assert import_plan(data, source, plan, default=default).options == plan.options
    assert set(sources()) == set(OPTIONS)


def test_an_imported_plan_is_saved_and_loaded(tmp_path):
    layers = decoder_layers(1)
    imported = import_plan(dict.fromkeys((each.name for each in layers), 4), "hawq", network(layers))
    imported.save(tmp_path / "plan.json")
    assert mpq.Plan.load(tmp_path / "plan.json").options == imported.options
    assert imported.predicted["size"] == imported.size_bytes


def test_llama_cpp_takes_the_first_pattern_found_anywhere_and_names_the_dead_ones():
    layers = decoder_layers()
    text = "--tensor-type blk.0.attn=q5_1 --tensor-type ATTN_Q=Q4_0\nffn_down=iq4_xs"
    options = import_plan(text, "llama.cpp", network(layers), default="q8_0").options
    assert options["model.layers.0.self_attn.q_proj"] == "q5_1"
    assert options["model.layers.1.self_attn.q_proj"] == "q4_0"
    assert options["model.layers.1.mlp.down_proj"] == "iq4_xs"
    assert options["lm_head"] == "q8_0"
    with pytest.raises(ValueError, match="'blk.7' matches no layer"):
        import_plan("blk.7=q8_0", "llama.cpp", network(layers), default="q8_0")
    with pytest.raises(ValueError, match="PATTERN=TYPE, got 'attn_q'"):
        import_plan("attn_q", "llama.cpp", network(layers), default="q8_0")
    with pytest.raises(ValueError, match="type 'q9_z' of 'model.layers.0.self_attn.q_proj' has no counterpart"):
        import_plan("attn_q=q9_z", "llama.cpp", network(layers), default="q8_0")


def test_types_are_read_from_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra mpq-search[test] is not installed")
    layers = (layer("model.layers.0.mlp.up_proj", (8, 64)), layer("lm_head", (4, 64)))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output.weight", values[:4].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = import_plan(tmp_path / "m.gguf", "llama.cpp", network(layers))
    assert list(found.options.values()) == ["q8_0", "fp16"]
    with pytest.raises(ValueError, match="no tensor of layer 'model.layers.1.mlp.up_proj', blk.1.ffn_up.weight"):
        import_plan(tmp_path / "m.gguf", "llama.cpp", network((layer("model.layers.1.mlp.up_proj", (8, 64)),)))


def test_autoround_patterns_presets_and_missing_fields():
    layers = decoder_layers(1)
    data = {"q_proj": "W8A16", ".*mlp.*": {"bits": 3}, "lm_head": {"bits": 16}, "model.layers.0.mlp.up_proj": "NVFP4"}
    options = import_plan(data, "autoround", network(layers), default="int4@group128").options
    assert options["model.layers.0.self_attn.q_proj"] == "int8@group128"
    assert options["model.layers.0.mlp.gate_proj"] == "int3@group128"
    assert options["model.layers.0.mlp.up_proj"] == "nvfp4"
    assert (options["lm_head"], options["model.embed_tokens"]) == ("fp32", "int4@group128")
    with pytest.raises(ValueError, match="says nothing of layer 'model.embed_tokens' and 7 more"):
        import_plan({"lm_head": "W4A16"}, "autoround", network(layers))
    with pytest.raises(ValueError, match="'W4A16_MIXED' of 'lm_head' has no counterpart"):
        import_plan({"lm_head": "W4A16_MIXED"}, "autoround", network(layers), default="fp32")
    with pytest.raises(ValueError, match=r"'lm_haed' matches no layer: did you mean 'lm_head'"):
        import_plan({"lm_haed": "W4A16"}, "autoround", network(layers), default="fp32")


def test_modelopt_the_later_entry_wins_and_off_is_off():
    layers = decoder_layers(1)
    nvfp4 = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
    entries = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 32}}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "block_sizes": {-1: None, "type": "dynamic"}}},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"quantizer_name": "*up_proj.weight_quantizer", "cfg": nvfp4},
        {"quantizer_name": "*mixer*", "enable": False},
        {"quantizer_name": "*k_proj.weight_quantizer", "enable": False},
        {"quantizer_name": "*k_proj.weight_quantizer", "enable": True},
    ]  # fmt: skip
    options = import_plan({"quant_cfg": entries, "algorithm": "max"}, "modelopt", network(layers)).options
    assert options["model.layers.0.self_attn.q_proj"] == "int4@group32/int8@token"
    assert options["model.layers.0.mlp.up_proj"] == "nvfp4/int8@token"
    assert options["model.layers.0.self_attn.k_proj"] == "int8@tensor/int8@token"
    assert options["lm_head"] == "fp32"
    with pytest.raises(ValueError, match="'lm_haed.weight_quantizer' is no layer's quantiser: did you mean"):
        import_plan([{"quantizer_name": "lm_haed.weight_quantizer", "enable": False}], "modelopt", network(layers))
    with pytest.raises(ValueError, match="must be a list of entries, got dict"):
        import_plan({"quant_cfg": {"*": {"enable": False}}}, "modelopt", network(layers))
    with pytest.raises(ValueError, match="axis 1 of"):
        import_plan([{"quantizer_name": "*weight_quantizer", "cfg": {"axis": 1}}], "modelopt", network(layers))


def test_bad_sources_files_and_networks_are_named(tmp_path):
    layers = decoder_layers(1)
    with pytest.raises(ValueError, match="source 'autoronud' is not known: did you mean 'autoround'"):
        import_plan({}, "autoronud", network(layers))
    with pytest.raises(ValueError, match="hawq: the plan must be JSON"):
        import_plan("{", "hawq", network(layers))
    with pytest.raises(ValueError, match="there is no file"):
        import_plan(tmp_path / "none.json", "hawq", network(layers))
    with pytest.raises(TypeError, match="network must be"):
        import_plan({}, "hawq", list(layers))


def test_comparison_names_the_layers_that_differ_and_what_they_cost():
    layers = decoder_layers(1)[1:4]
    names = [each.name for each in layers]
    first, second = planned(layers, {"*": "int4"}), planned(layers, {"*": "int4", "*q_proj": "int8", "*k_proj": "int2"})
    losses = np.array([[0.3, 0.2, 0.1]] * 3)
    table = CostTable(
        units=names,
        options=["int2", "int4", "int8"],
        quantities={"sensitivity": losses, "size": np.ones((3, 3))},
        parameters=[each.parameters for each in layers],
    )
    found = compare(first, second, table)
    assert [difference.layer for difference in found.differences] == names[:2]
    assert found.same == 1
    assert [difference.bytes_change for difference in found.differences] == [2048, -512]
    assert found.bytes_change == pytest.approx(second.size_bytes - first.size_bytes) == 1536
    assert [round(difference.loss_change, 6) for difference in found.differences] == [-0.1, 0.1]
    assert found.loss_change == pytest.approx(0)
    assert "costs more and loses less" in str(found)
    assert str(compare(first, first)) == "3 of 3 layers take the same"
    assert np.isnan(compare(first, second).loss_change)
    with pytest.raises(ValueError, match="plan is for another model"):
        compare(first, planned(layers[:2], {"*": "int4"}))
