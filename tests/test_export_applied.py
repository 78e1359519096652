"""Plans applied by the libraries themselves, each where it is installed: what comes out has the planned bits."""

import json
import shutil
import subprocess
import warnings
from dataclasses import replace

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


def llama(folder, dtype):
    """A random Llama of two blocks, saved with a tokenizer of its 256 tokens; the model and its layers."""
    transformers = library("transformers")
    from tokenizers import Tokenizer, models

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.mul_(5)  # blocks that matter beside the residual stream
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(256)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(folder)
    return model, mpq.trace(model, {"input_ids": tokens(1, 2)})


def tokens(seed, rows):
    return torch.randint(3, 256, (rows, 64), generator=torch.Generator().manual_seed(seed))


def outputs(model, plan=None):
    with torch.no_grad():
        if plan is None:
            return model(tokens(9, 8)).logits.float()
        with mpq.quantized(model, plan):
            return model(tokens(9, 8)).logits.float()


def stored_tensors(folder, name):
    """The tensors of a module in a file of weights, by their last names."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    return {key.rsplit(".", 1)[1]: value for key, value in stored.items() if key.startswith(f"{name}.")}


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


def unpacked(words, bits, rows):
    """Codes that lie one after the other in the columns of 32-bit words, least significant bits first."""
    ones = (words.long().unsqueeze(1) >> torch.arange(32).view(1, 32, 1)) & 1
    codes = ones.reshape(-1, words.shape[1])[: rows * bits].reshape(rows, bits, -1)
    return (codes << torch.arange(bits).view(1, -1, 1)).sum(1)


def test_gptqmodel_packs_the_planned_bits_groups_and_bytes(tmp_path, monkeypatch):
    library("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    monkeypatch.chdir(tmp_path)  # where it writes its logs
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is fewer than its loader asks for
    model, net = llama(tmp_path / "floats", torch.float32)
    options = {"*_proj": "int4@group32", "*k_proj": "int2@group64", "*v_proj": "uint8", "*0*down_proj": "int3@group32"}
    plan = planned(net.layers, options | {"*o_proj": "fp32", "*gate_proj": "uint4@group64"})
    plan = replace(plan, fingerprint=net.fingerprint)
    config = QuantizeConfig(**json.loads(json.dumps(mpq.export(plan, "gptqmodel"))))
    quantised = GPTQModel.load(str(tmp_path / "floats"), config, device="cpu", dtype=torch.float32)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens(3, 32)]
    quantised.quantize(samples, batch_size=8)
    quantised.save(str(tmp_path / "packed"))
    packed = GPTQModel.load(str(tmp_path / "packed"), device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model
    exact, simulated = outputs(model), outputs(model, plan)
    for entry in plan.entries:
        name, option = entry.layer.name, entry.choice
        found, bits, (rows, columns) = (
            stored_tensors(tmp_path / "packed", name),
            option.weight.bits,
            entry.layer.weight_shape,
        )
        stored = sum(tensor.nbytes for tensor in found.values())
        if str(option) == "fp32":
            assert list(found) == ["weight"]
            assert torch.equal(found["weight"], model.get_submodule(name).weight)
            assert stored == entry.storage_bits / 8
            continue
        module = packed.get_submodule(name)
        size = option.weight.granularity.size or columns
        assert (module.bits, module.group_size) == (bits, size)
        assert found["scales"].shape == (columns // size, rows)
        symmetric = option.weight.name.startswith("int")
        assert stored == entry.storage_bits / 8 + 4 * columns + symmetric * bits * found["scales"].numel() / 8
        codes, zeros = unpacked(found["qweight"], bits, columns), unpacked(found["qzeros"].T, bits, rows).T + 1
        assert (zeros == 2 ** (bits - 1)).all() == symmetric
        groups = found["g_idx"].long()
        model.get_submodule(name).weight.data.copy_((found["scales"].float()[groups] * (codes - zeros[groups])).T)
    assert (outputs(packed) - outputs(model)).norm() < 0.01 * outputs(model).norm()
    assert (outputs(packed) - exact).norm() < (simulated - exact).norm()


# The first has symmetric ints, whose scale differs from the simulation's; the others the same grid, and arithmetic in
# bf16, as llm-compressor computes codes for models of that type, or in fp32.
MIXED = {"*[qkv]_proj": "int4@group32", "*o_proj": "int8/int8@token", "*0*gate_proj": "uint4@group64"}
MIXED |= {"*0*up_proj": "uint4@group64", "*0*down_proj": "fp8_e4m3/fp8_e4m3@token", "*1*down_proj": "int8"}
SAME_GRID = {"*[qkv]_proj": "uint4@group32", "*gate_proj": "uint8", "*up_proj": "uint8"}
SAME_GRID |= {"*down_proj": "fp8_e4m3/fp8_e4m3@token"}
SAME_GRID_32 = {
    "*[qkv]_proj": "uint4@group32@scale=fp32",
    "*gate_proj": "uint8@scale=fp32",
    "*up_proj": "uint8@scale=fp32",
}
SAME_GRID_32 |= {"*down_proj": "fp8_e4m3@scale=fp32/fp8_e4m3@token"}


@pytest.mark.parametrize(
    ("options", "dtype", "distance"),
    [(MIXED, torch.bfloat16, 1.3), (SAME_GRID, torch.bfloat16, 0.6), (SAME_GRID_32, torch.float32, 0.1)],
)
def test_llm_compressor_stores_the_planned_schemes_bytes_and_outputs(tmp_path, options, dtype, distance):
    library("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import LlamaForCausalLM

    _, net = llama(tmp_path / "floats", dtype)
    unquantised = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    plan = planned(net.layers, options, default=unquantised)
    plan = replace(plan, fingerprint=net.fingerprint, outside={"size": net.outside_bytes})
    exported = json.loads(json.dumps(mpq.export(plan, "compressed-tensors")))
    recipe = QuantizationModifier(config_groups=exported["config_groups"], ignore=exported["ignore"])
    oneshot(
        model=str(tmp_path / "floats"),
        recipe=recipe,
        output_dir=str(tmp_path / "packed"),
        precision=str(dtype).removeprefix("torch."),
    )
    deployed = LlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    total = plan.outside["size"]
    for entry in plan.entries:
        found = stored_tensors(tmp_path / "packed", entry.layer.name)
        total += sum(tensor.nbytes for tensor in found.values())
        scheme = getattr(deployed.get_submodule(entry.layer.name), "quantization_scheme", None)
        assert (scheme is None) == (list(found) == ["weight"]) == (str(entry.choice) == unquantised)
        if scheme is not None:
            assert scheme.weights.num_bits == entry.value_bits
            assert (scheme.weights.group_size or None) == (entry.choice.weight.granularity.size or None)
            assert scheme.weights.symmetric == (not entry.choice.weight.name.startswith("uint"))
            assert (scheme.input_activations is None) == (entry.activation is None)
    assert total == pytest.approx(plan.size_bytes, rel=0.01)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    exact, simulated, applied = outputs(model), outputs(model, plan), outputs(deployed)
    assert (applied - exact).norm() == pytest.approx(float((simulated - exact).norm()), rel=0.05)
    assert (applied - simulated).norm() < distance * (simulated - exact).norm()
