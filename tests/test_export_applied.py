"""Plans applied by the libraries themselves, each where it is installed: what comes out has the planned bits."""

import shutil
import subprocess
import warnings

import numpy as np
import pytest
import torch
from plans_to_export import decoder_layers, planned
from torch import nn

import mpq
from mpq.comparison import compare
from mpq.exporting import write_export
from mpq.fake_quantize import fake_quantize
from mpq.gguf_names import gguf_names
from mpq.importing import import_plan
from mpq.options import Option

LAYERS = [each for each in decoder_layers(1) if each.kind == "linear"]


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def weight(layer):
    return torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(layer.parameters)) / 8


def skeleton():
    """Modules with the names of a Llama's, whose weights are those of `weight`."""
    model = nn.Module()
    for layer in LAYERS:
        *parents, leaf = layer.name.split(".")
        parent = model
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        linear = nn.Linear(layer.weight_shape[1], layer.weight_shape[0], bias=False)
        linear.weight.data.copy_(weight(layer))
        parent.add_module(leaf, linear)
    return model.eval()


def run(model, layer):
    return model.get_submodule(layer.name)(torch.eye(layer.weight_shape[1])).T


def write_gguf(path):
    gguf = library("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 256),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 128),
    ):
        add(value)
    for layer in decoder_layers(1):
        writer.add_tensor(gguf_names(layer.weight_name)[0], weight(layer).numpy())
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(64, np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def test_llama_quantize_stores_the_planned_types_bytes_and_values(tmp_path):
    command = shutil.which("llama-quantize") or pytest.skip("llama-quantize is not on the path")
    gguf = library("gguf")
    options = {"*": "q8_0", "*q_proj": "q5_0", "*k_proj": "mxfp4", "*v_proj": "fp16", "*o_proj": "q4_1"}
    options |= {"*gate_proj": "q5_1", "*up_proj": "q4_0", "*down_proj": "q4_k", "lm_head": "bf16"}
    plan = planned(decoder_layers(1), options)
    plan_layers = [entry.layer for entry in plan.entries]
    write_gguf(tmp_path / "floats.gguf")
    write_export(plan, "llama.cpp", tmp_path / "types.txt")
    files = [str(tmp_path / name) for name in ("types.txt", "floats.gguf", "planned.gguf")]
    done = subprocess.run([command, "--tensor-type-file", *files, "Q8_0", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    found = import_plan(tmp_path / "planned.gguf", "llama.cpp", plan)
    assert compare(plan, found).differences == ()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "planned.gguf").tensors}
    stored = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if "norm" not in name)
    assert stored == plan.size_bytes - 100
    for name, option, tolerance in (
        *(("blk.0.attn_q", "q5_0", 0.0), ("blk.0.attn_k", "mxfp4", 0.2), ("blk.0.attn_output", "q4_1", 0.0)),
        *(("blk.0.ffn_up", "q4_0", 0.0), ("blk.0.ffn_gate", "q5_1", 0.0), ("token_embd", "q8_0", 0.0)),
    ):
        tensor = tensors[f"{name}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        exact = weight(next(layer for layer in plan_layers if gguf_names(layer.weight_name) == (f"{name}.weight",)))
        simulated = fake_quantize(exact, option)
        assert (values - simulated).norm() <= tolerance * (simulated - exact).norm() + 1e-4 * exact.norm()


def test_model_optimizer_rounds_weights_as_simulated():
    mtq = library("modelopt.torch.quantization")
    options = {"*q_proj": "int4@group32", "*k_proj": "int3", "*v_proj": "int8@tensor", "*gate_proj": "fp8_e4m3"}
    plan, model = planned(tuple(LAYERS), options), skeleton()
    mtq.quantize(model, mpq.export(plan, "modelopt"), lambda quantised: [run(quantised, layer) for layer in LAYERS])
    for entry in plan.entries:
        quantizer = model.get_submodule(entry.layer.name).weight_quantizer
        exact, option = weight(entry.layer), entry.choice
        if str(option) == "fp32":
            assert not quantizer.is_enabled
            continue
        simulated = fake_quantize(exact, option.weight)
        assert (quantizer(exact) - simulated).norm() < 0.3 * (simulated - exact).norm()
        assert (quantizer(exact) - exact).norm() == pytest.approx(float((simulated - exact).norm()), rel=0.02)


def test_compressed_tensors_attaches_the_planned_schemes_and_no_others():
    ct = library("compressed_tensors.quantization")
    options = {"*[qkv]_proj": "int4@group32", "*o_proj": "int8/int8@token", "*down_proj": "uint4@group64"}
    plan, model = planned(tuple(LAYERS), options), skeleton()
    exported = mpq.export(plan, "compressed-tensors")
    ct.apply_quantization_config(model, ct.QuantizationConfig(**exported))
    for entry in plan.entries:
        scheme = getattr(model.get_submodule(entry.layer.name), "quantization_scheme", None)
        assert (scheme is None) == (str(entry.choice) == "fp32")
        if scheme is not None:
            assert scheme.weights.num_bits == entry.value_bits
            assert (scheme.weights.group_size or -1) in (-1, entry.choice.weight.granularity.size)
            assert (scheme.input_activations is None) == (entry.activation is None)


def test_autoround_resolves_and_rounds_as_planned():
    library("auto_round")
    from auto_round.compressors.utils import set_layer_config
    from auto_round.data_type import QUANT_FUNC_WITH_DTYPE as ROUND

    options = {"*": "int4@group32", "*k_proj": "int2@group64", "*v_proj": "uint4@group64", "*up_proj": "mxfp4"}
    plan = planned(tuple(LAYERS), options | {"lm_head": "fp32"})
    given = mpq.export(plan, "autoround")
    resolved, _, _ = set_layer_config(skeleton(), given, "W8A16", "fp16", (nn.Linear,), ())
    for entry in plan.entries:
        fields = resolved[entry.layer.name]
        assert {name: fields[name] for name in given[entry.layer.name]} == given[entry.layer.name]
        if str(entry.choice) != "fp32":
            kind = {"int": "int_sym" if fields["sym"] else "int_asym", "mx_fp": "mx_fp4"}[fields["data_type"]]
            exact = weight(entry.layer)
            rounded = ROUND[kind](exact, bits=fields["bits"], group_size=fields["group_size"])[0]
            simulated = fake_quantize(exact, entry.choice.weight)
            assert (rounded - exact).norm() <= 1.01 * (simulated - exact).norm()


def test_quanto_packs_the_planned_types():
    quanto = library("optimum.quanto")
    options = {"*q_proj": "int8", "*gate_proj": "fp8_e4m3", "*up_proj": "uint4@channel", "*down_proj": "uint2@group128"}
    plan, model = planned(tuple(LAYERS), options), skeleton()
    for call in mpq.export(plan, "quanto")["calls"]:
        quanto.quantize(model, **call)
    quanto.freeze(model)
    for entry in plan.entries:
        applied, exact = model.get_submodule(entry.layer.name).weight, weight(entry.layer)
        assert isinstance(applied, quanto.QTensor) == (str(entry.choice) != "fp32")
        if isinstance(applied, quanto.QTensor):
            assert applied.qtype.bits == entry.value_bits
            error = (fake_quantize(exact, entry.choice.weight) - exact).norm()
            assert (applied.dequantize() - exact).norm() < 1.1 * error


def test_gptqmodel_resolves_as_planned():
    library("gptqmodel")
    from gptqmodel import QuantizeConfig

    plan = planned(
        tuple(LAYERS), {"*": "int4@group32", "*k_proj": "int2@group64", "*v_proj": "uint8", "*o_proj": "fp32"}
    )
    config = QuantizeConfig(**mpq.export(plan, "gptqmodel"))
    for entry in plan.entries:
        name = entry.layer.name
        if entry.choice == Option("fp32"):
            assert config.dynamic_get(name) is False
        else:
            assert config.dynamic_get(name, "bits", config.bits) == entry.value_bits
            size = entry.choice.weight.granularity.size or -1
            assert config.dynamic_get(name, "group_size", config.group_size) == size
