"""What the shell is offered, by the protocol that the printed scripts speak."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import mpq
import mpq.hardware_models as hardware
from mpq import adjuster, completers, drops, quantizer_choice, solvers
from mpq.__main__ import main

TABLE = "unit,option,sensitivity,size [B]\nstem,int4,3,4\nblock.fc,int4,5,4\n"


def offered(*words):
    """Plain completions of the last word, in this process."""
    line = {"COMP_WORDS": " ".join(["mpq", *words]), "COMP_CWORD": str(len(words))}
    environment = {**line, "_MPQ_COMPLETE": "bash_complete"}
    done = CliRunner(env=environment).invoke(main, [], prog_name="mpq", complete_var="_MPQ_COMPLETE")
    lines = [line.partition(",") for line in done.output.splitlines()]
    return [value for kind, _, value in lines if kind == "plain"]


def test_names_of_commands_and_options():
    assert offered("se") == ["search"]
    assert offered("table", "m") == ["measure", "merge"]
    assert "--budget" in offered("search", "demo", "--bud")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search", "demo", "--hardware", "nvidia-"], [n for n in hardware.available() if n.startswith("nvidia-")]),
        (["solve", "t.parquet", "--solver", "l"], [n for n in solvers.available() if n.startswith("l")]),
        (["search", "demo", "--sensitivity", "fish"], ["fisher", "fisher_full"]),
        (["export", "plan.json", "torch"], ["torchao"]),
        (["search", "demo", "--target", "llama"], ["llama.cpp"]),
        (["import", "haw"], ["hawq"]),
        (["search", "demo", "--options", "int4,int1"], ["int4,int16"]),
        (["search", "demo", "--budget", "lat"], ["latency="]),
        (["search", "demo", "--phase", "de"], ["decode"]),
        (["search", "demo-"], ["demo-transformer"]),
        (["device", "show", "gap"], ["gap8"]),
        (["verify", "demo", "p.json", "--baselines", "uniform,pro"], ["uniform,protected"]),
        (["search", "demo", "--quantizer", "gp"], ["gptq"]),
        (["verify", "demo", "p.json", "--adjust", "b"], ["bias-correction", "batch-norm-tuning"]),
        (["refine", "demo", "t.parquet", "--metric", "a"], ["accuracy", "agreement"]),
        (["pareto", "t.parquet", "--resource", "size", "--resource", "lat"], ["latency"]),
    ],
)
def test_values_of_options(words, expected):
    assert expected
    assert offered(*words) == expected


def test_names_that_are_completed_are_those_that_are_taken():
    assert completers.QUANTIZERS == quantizer_choice.QUANTIZERS
    assert tuple(adjuster.ADJUSTMENTS) == completers.ADJUSTMENTS
    assert completers.METRICS == drops.METRICS


def test_layers_of_the_plan_or_table_on_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(TABLE)
    assert offered("solve", "table.csv", "--pin", "") == ["stem=", "block.fc="]
    assert offered("solve", "table.csv", "--budget", "size=9", "--pin", "bl") == ["block.fc="]
    for missing in ("no.parquet", "no.json", "no.csv"):
        assert offered("solve", missing, "--pin", "bl") == []
    (tmp_path / "broken.json").write_text("{")
    assert offered("solve", "broken.json", "table.csv", "--pin", "st") == ["stem="]


def test_layers_of_a_parquet_table_and_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from test_solve_command import UNITS, table

    table().save("table.parquet")
    assert offered("solve", "table.parquet", "--pin", "") == [f"{unit}=" for unit in UNITS]
    CliRunner().invoke(main, ["solve", "table.parquet", "--budget", "size=30%", "--output", "plan.json"])
    assert offered("export", "plan.json", "hawq", "--name", "conv") == ["conv1=", "conv2="]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed_and_parse(shell, tmp_path):
    printed = CliRunner().invoke(main, ["completion", shell])
    assert printed.exit_code == 0
    assert "_MPQ_COMPLETE" in printed.stdout
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed: its script was not parsed")
    script = tmp_path / "script"
    script.write_text(printed.stdout)
    assert subprocess.run([program, "-n", str(script)], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_is_offered_devices_and_falls_back_to_files(tmp_path):
    program = tmp_path / "mpq"
    program.write_text(f"#!{sys.executable}\nfrom mpq.__main__ import main\nmain(prog_name='mpq')\n")
    program.chmod(0o755)
    code = (
        'eval "$(mpq completion bash)"; compopt() { :; }\n'
        "COMP_WORDS=(mpq search demo --hardware jet); COMP_CWORD=4; _mpq_completion mpq; echo ${COMPREPLY[@]}"
    )
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(mpq.__file__).parents[1]),
    }
    done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["jetson-orin"], done.stderr
