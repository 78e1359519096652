"""`mpq export`, `mpq import` and `mpq compare`."""

import json

import pytest
from click.testing import CliRunner
from plans_to_export import decoder_layers, planned

import mpq
from mpq.export_commands import compare, export, import_


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    planned(decoder_layers(1), {"*": "q8_0", "*up_proj": "q4_0"}).save(path)
    return path


def test_a_plan_goes_out_and_comes_back_and_the_two_are_compared(tmp_path, plan):
    types, theirs = tmp_path / "types.txt", tmp_path / "theirs.json"
    assert run(export, plan, "llama.cpp", "--output", types).output == f"wrote {types}\n"
    assert run(export, plan, "llama.cpp").output == types.read_text()
    done = run(import_, "llama.cpp", types, "--like", plan, "--output", theirs)
    assert done.exit_code == 0
    assert mpq.Plan.load(theirs).options == mpq.Plan.load(plan).options
    assert run(compare, plan, theirs).output == "9 of 9 layers take the same\n"
    types.write_text(types.read_text().replace("q4_0", "q5_0"))
    run(import_, "llama.cpp", types, "--like", plan, "--output", theirs)
    shown = run(compare, plan, theirs).output
    assert "8 of 9 layers" in shown
    assert "mlp.up_proj  q4_0   q5_0    +2048" in shown
    assert (
        run(compare, plan, theirs, "--csv")
        .output.splitlines()[1]
        .startswith("model.layers.0.mlp.up_proj,q4_0,q5_0,9216")
    )


def test_export_prints_what_the_library_reads(plan):
    assert run(export, plan, "csv").output.startswith("layer,parameter,option")
    refused = run(export, plan, "autoround")
    assert refused.exit_code == 1
    assert "AutoRound cannot hold q8_0" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama.cpp", "--name", "a=b"), "--name is for hawq, not for 'llama.cpp'"),
        (("onnxruntime", "--output", "x.onnx"), "give --source MODEL.onnx"),
        (("onnxruntime", "--source", "x.onnx"), "give --output MIXED.onnx"),
        (("llama",), "'llama' is not known"),
    ],
)
def test_options_of_another_library_are_refused(plan, arguments, message):
    assert message in str(run(export, plan, *arguments).exception)


def test_hawq_names_go_both_ways(tmp_path):
    path, bits = tmp_path / "plan.json", tmp_path / "bits.json"
    planned(decoder_layers(1)[1:3], {"*": "int4"}).save(path)
    name = ("--name", "model.layers.0.self_attn.q_proj=quant_q")
    assert run(export, path, "hawq", "--output", bits, *name).exit_code == 0
    assert json.loads(bits.read_text())["quant_q"] == 4
    done = run(import_, "hawq", bits, "--like", path, "--output", tmp_path / "b.json", *name)
    assert "2 int4" in done.output
