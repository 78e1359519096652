"""Mixed ONNX files, run by ONNX Runtime: codes, bytes, fused operators, and outputs next to the simulation."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.activation_ranges import calibrate_ranges
from mpq.export_onnxruntime import input_scale, quantised_codes
from mpq.fake_quantize import fake_quantize
from mpq.formats import parse
from mpq.options import Option
from mpq.plan import Entry, Plan

onnx = pytest.importorskip("onnx", reason="the extra mpq-search[export-onnxruntime] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra mpq-search[export-onnxruntime] is not installed")

SCALE = "@scale=fp32"
LAYERS = ("stem", "depthwise", "wide", "plain", "head")


class Net(nn.Module):
    """Convolutions, one in groups, and linear layers on sequences, which exporters write as MatMul, and as Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 32, 3, stride=2, groups=4)
        self.wide = nn.Linear(32, 64)
        self.plain = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        hidden = torch.relu(self.depthwise(torch.relu(self.stem(images)))).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.plain(torch.relu(self.wide(hidden)))).mean(1))


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


def to_onnx(model, example, path, opset=17):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=opset)
    return path


@pytest.fixture(scope="module")
def floats(model, tmp_path_factory):
    return to_onnx(model, images(), tmp_path_factory.mktemp("onnx") / "floats.onnx")


def planned(model, *options):
    traced = mpq.trace(model, images())
    chosen = dict(zip(LAYERS, options, strict=True))
    entries = tuple(Entry(layer, Option.parse(chosen[layer.name])) for layer in traced.layers)
    return Plan(entries, traced.fingerprint, outside={"size": traced.outside_bytes})


def session(path, *, optimised=None, exact=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs of MatMulNBits stay fp32
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    elif exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path, example, **how):
    run = session(path, **how)
    return torch.from_numpy(run.run(None, {run.get_inputs()[0].name: example.numpy()})[0])


def simulated(model, plan):
    with torch.no_grad():
        exact = model(images())
        with mpq.quantized(model, plan):
            return model(images()), exact


PLANS = [
    ["int8" + SCALE] * 5,
    ["int8" + SCALE, "int4" + SCALE, "int4@group16" + SCALE, "uint4@group32" + SCALE, "int8@group32" + SCALE],
    ["uint8" + SCALE, "uint4" + SCALE, "uint8" + SCALE, "uint8@group16" + SCALE, "int4" + SCALE],
    ["int8@tensor" + SCALE, "uint4@tensor" + SCALE, "fp16", "bf16", "int4@mse" + SCALE],
    [
        "int8@percentile99" + SCALE,
        "fp32",
        f"int8{SCALE}/uint8{SCALE}",
        f"fp32/uint8{SCALE}",
        f"int4{SCALE}/uint8{SCALE}",
    ],
]


@pytest.mark.parametrize("options", PLANS)
def test_outputs_are_those_of_the_simulation_and_bytes_those_of_the_plan(model, floats, tmp_path, options):
    """To a thousandth of the error that quantisation makes: sums are taken in another order."""
    plan, path = planned(model, *options), tmp_path / "mixed.onnx"
    exported = mpq.export(plan, "onnxruntime", source=floats, output=path, model=model)
    expected, exact = simulated(model, plan)
    for how in ({}, {"optimised": tmp_path / "fused.onnx"}):
        assert (outputs(path, images(), **how) - expected).norm() < 1e-3 * (expected - exact).norm()
    stored = onnx.load(str(path)).graph.initializer
    counted = 0.0
    for initializer in stored:
        bits = 4 if initializer.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else None
        values = int(np.prod(initializer.dims))
        counted += values * bits / 8 if bits else onnx.numpy_helper.to_array(initializer).nbytes
    integers = sum(onnx.numpy_helper.to_array(i).nbytes for i in stored if i.data_type == onnx.TensorProto.INT64)
    assert counted - integers == pytest.approx(plan.size_bytes, rel=0.01)
    planned_bytes = {entry.layer.name: entry.storage_bits / 8 for entry in plan.entries}
    assert {name: layer["bytes"] for name, layer in exported["layers"].items()} == pytest.approx(planned_bytes, abs=1)


def test_the_file_is_as_large_as_predicted(tmp_path):
    torch.manual_seed(0)
    options = ["int8" + SCALE, "int4@group32" + SCALE, "uint4" + SCALE, "bf16", "uint8@group64" + SCALE]
    model, example = nn.Sequential(*[nn.Linear(256, 256) for _ in options]).eval(), torch.randn(2, 256)
    traced = mpq.trace(model, example)
    entries = tuple(Entry(layer, Option(option)) for layer, option in zip(traced.layers, options, strict=True))
    plan = Plan(entries, traced.fingerprint, outside={"size": traced.outside_bytes})
    source = to_onnx(model, example, tmp_path / "floats.onnx")
    mpq.export(plan, "onnxruntime", source=source, output=tmp_path / "mixed.onnx")
    assert (tmp_path / "mixed.onnx").stat().st_size == pytest.approx(plan.size_bytes, rel=0.01)


def test_four_bits_in_groups_fuse_to_matmulnbits(model, floats, tmp_path):
    plan = planned(model, "fp32", "fp32", *["int4@group16" + SCALE] * 2, "uint4@group32" + SCALE)
    mpq.export(plan, "onnxruntime", source=floats, output=tmp_path / "mixed.onnx", model=model)
    session(tmp_path / "mixed.onnx", optimised=tmp_path / "fused.onnx")
    operators = [node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node]
    assert operators.count("MatMulNBits") == 3
    assert "DequantizeLinear" not in operators


@pytest.mark.parametrize("inputs", ["int8", "uint8", "uint8" + SCALE])
def test_calibrated_inputs_are_quantised_as_simulated_and_fuse(model, floats, tmp_path, inputs):
    """As written the graph computes the simulation; fused, ONNX Runtime rounds biases and products to integers."""
    plan = calibrate_ranges(model, [images()], planned(model, *[f"int8{SCALE}/{inputs}"] * 5))
    path = tmp_path / "mixed.onnx"
    mpq.export(plan, "onnxruntime", source=floats, output=path, model=model)
    expected, exact = simulated(model, plan)
    assert (outputs(path, images()) - expected).norm() < 1e-3 * (expected - exact).norm()
    fused = outputs(path, images(), optimised=tmp_path / "fused.onnx")
    assert (fused - exact).norm() < 2 * (expected - exact).norm()
    if inputs != "int8":
        assert "QLinearConv" in [node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node]


@pytest.mark.parametrize("text", ["int4", "int8@tensor", "uint4@group16", "int4@group16@mse", "uint8@percentile98"])
def test_codes_times_scales_are_the_simulated_weights(text):
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    rows[1], rows[2, :16], rows[3] = 0, 0, rows[3].abs() + 1
    fmt = parse(text + SCALE).bind("weight")
    codes, scale, zero = quantised_codes(rows.numpy(), fmt)
    groups = codes.reshape(6, scale.shape[1] if scale.ndim > 1 else 1, -1)
    spread = scale.reshape(-1, scale.shape[1] if scale.ndim > 1 else 1, 1)
    shifted = groups - (0 if zero is None else zero.reshape(spread.shape))
    np.testing.assert_allclose(
        (shifted * spread).reshape(6, 32), fake_quantize(rows, fmt).numpy(), rtol=1e-5, atol=1e-7
    )
    assert np.abs(codes).max() < 2**fmt.bits


def test_input_scales_of_symmetric_formats_sit_at_128():
    scale, zero = input_scale(parse("int8@tensor@scale=fp32"), -12.7, 3.0)
    assert (round(float(scale), 6), int(zero)) == (0.1, 128)
    assert float(input_scale(parse("int8@tensor"), 0.0, 0.0)[0]) == 1


def test_tied_weights_are_found_twice_by_their_values(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(torch.relu(self.embed(tokens)))

    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.randint(0, 64, (2, 5))
    path, traced = to_onnx(model, tokens, tmp_path / "tied.onnx"), mpq.trace(model, tokens)
    plan = Plan(tuple(Entry(layer, Option("int4@group32" + SCALE)) for layer in traced.layers), traced.fingerprint)
    exported = mpq.export(plan, "onnxruntime", source=path, output=tmp_path / "mixed.onnx", model=model)
    with torch.no_grad(), mpq.quantized(model, plan):
        expected = model(tokens)
    torch.testing.assert_close(outputs(tmp_path / "mixed.onnx", tokens), expected, rtol=1e-4, atol=1e-5)
    copies = len(exported["layers"]["embed"]["initializers"])
    assert exported["layers"]["embed"]["bytes"] == copies * plan.entries[0].storage_bits / 8


def test_weights_that_are_not_found_and_ranges_that_are_missing_are_named(model, floats, tmp_path):
    plan = planned(model, *["int8" + SCALE] * 5)
    with pytest.raises(ValueError, match=r"no weight of layer 'wide' and 1 more: pass model="):
        mpq.export(plan, "onnxruntime", source=floats, output=tmp_path / "m.onnx")
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="no weight of layer 'wide'.*made from this model"):
        mpq.export(plan, "onnxruntime", source=floats, output=tmp_path / "m.onnx", model=Net())
    plan = planned(model, *[f"int8{SCALE}/int8"] * 5)
    with pytest.raises(ValueError, match="needs the range of 'stem''s int8@tensor input: calibrate"):
        mpq.export(plan, "onnxruntime", source=floats, output=tmp_path / "m.onnx", model=model)
    assert not (tmp_path / "m.onnx").exists()
