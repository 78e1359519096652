"""The command line as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mpq import Plan
from mpq.__main__ import main

TESTS = Path(__file__).parent
FILE = TESTS / "model_file.py"
MODEL = f"{FILE}:load"


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_search_show_and_verify_a_model_from_a_file(tmp_path):
    plan, table = tmp_path / "plan.json", tmp_path / "table.parquet"
    searched = run(
        *("search", MODEL, "--options", "int2,int4,int8", "--budget", "size=6 bits", "--budget", "bops=20%"),
        *("--pin", "head=int8", "--output", str(plan), "--table", str(table)),
    )
    assert searched.exit_code == 0, searched.output
    for text in ("first", "head", "int8", "predicted: sensitivity", "uniform int4", "measured on", "optimal"):
        assert text in searched.output
    loaded = Plan.load(plan)
    assert loaded.options["head"] == "int8"
    assert loaded.average_bits <= 6 + 1e-9
    assert loaded.measured
    shown = run("show", str(plan))
    assert shown.exit_code == 0
    assert "bits a planned weight" in shown.output
    as_csv = run("show", str(plan), "--csv").output.splitlines()
    assert as_csv[0] == "layer,kind,weights,option,value_bits,size_bytes"
    assert len(as_csv) == 1 + len(loaded.entries)
    verified = run("verify", MODEL, str(plan), "--table", str(table))
    assert verified.exit_code == 0
    assert "uniform int8" in verified.output
    assert next(line for line in verified.output.splitlines() if "uniform int8" in line).split()[-1] == "no"


def test_inspect_says_what_is_there_before_anything_long():
    inspected = run("inspect", MODEL, "--options", "int4,int8", "--hardware", "nvidia-t4")
    assert inspected.exit_code == 0, inspected.output
    for text in (
        "conv_transpose2d",
        "reachable",
        "latency",
        "size",
        "method kl",
        "estimated from one timed forward pass",
    ):
        assert text in inspected.output
    assert "classification, 16 samples" in inspected.output
    refused = run("inspect", MODEL, "--options", "int3/int8,int8/int8", "--hardware", "x86-amx").output
    [line] = [line for line in refused.splitlines() if line.startswith("refused: int3/int8 in") and " a conv2d" in line]
    assert "first" in line


@pytest.mark.parametrize("columns", [None, 30, 60, 200])
def test_no_table_loses_a_character(tmp_path, monkeypatch, columns):
    plan = tmp_path / "plan.json"
    pins = ("--pin", "head=int4@group32@mse", "--pin", "up=int8")
    assert run("search", MODEL, "--budget", "size=50%", *pins, "--output", str(plan)).exit_code == 0
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["show", str(plan)], ["inspect", MODEL], ["verify", MODEL, str(plan)]):
        printed = run(*arguments).output
        assert "…" not in printed
        together = "".join(printed.split())
        whole = {"show": ("int4@group32@mse", "(pinned)"), "inspect": ("conv_transpose2d",), "verify": ("100.0%",)}
        if columns != 30:
            assert all(text in together for text in whole[arguments[0]])
    if columns is None or columns == 200:
        assert "int4@group32@mse (pinned)" in run("show", str(plan)).output
    if columns == 60:
        tables = run("inspect", MODEL).output.split("classification,")[0]
        assert max(map(len, tables.splitlines())) <= 60


def test_small_figures_are_not_rounded_to_nothing(tmp_path):
    searched = run("search", MODEL, "--options", "int12,int16", "--budget", "size=60%").output
    [line] = [line for line in searched.splitlines() if line.startswith("plan ")]
    assert "0.00000 ±" not in line


def test_verifying_on_calibration_data_says_so(tmp_path):
    plan = tmp_path / "plan.json"
    assert run("search", f"{FILE}:unheld", "--budget", "size=50%", "--output", str(plan)).exit_code == 0
    assert "measured on 16 calibration samples" in run("verify", f"{FILE}:unheld", str(plan)).output


def test_list_names_everything():
    listed = run("list").output
    for name in ("int2", "output_fisher", "ilp", "nvidia-t4", "x86-amx", "torchao"):
        assert name in listed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", MODEL, "--budget", "size=1%"], 3, "size"),
        (["search", MODEL, "--budget", "size=4 ms"], 1, "budget of size"),
        (["search", MODEL, "--budget", "size"], 1, "--budget must be NAME=LIMIT"),
        (["search", MODEL, "--budget", "size=50%", "--pin", "head"], 1, "--pin must be PATTERN=OPTION"),
        (["search", MODEL, "--budget", "size=50%", "--budget", "size=40%"], 1, "'size' is given twice"),
        (["search", MODEL, "--budget", "latency=50%"], 1, "give --hardware"),
        (["search", MODEL, "--budget", "size=50%", "--table", "t.txt"], 1, "--table must end in .parquet or .csv"),
        (["search", MODEL, "--budget", "size=50%", "--table", "a.csv", "--output", "a.csv"], 1, "must be two files"),
        (["search", MODEL, "--budget", "size=50%", "--holdout", "models"], 1, "FILE.py:function, got 'models'"),
        (["search", MODEL, "--budget", "size=50%", "--pin", "zz=int8"], 1, "'zz' matches no layer"),
        (["search", MODEL, "--budget", "size=50%", "--options", "int44"], 1, "int44"),
        (["search", MODEL, "--budget", "size=50%", "--output", "/no/such/plan.json"], 1, "does not exist"),
        (["search", "no-such-model", "--budget", "size=50%"], 1, "MODEL must be demo"),
        (["search", "no.py:load", "--budget", "size=50%"], 1, "there is no file 'no.py'"),
        (["search", f"{TESTS / 'model_file.py'}:lod", "--budget", "size=50%"], 1, "no function 'lod'"),
        (["search", f"{TESTS / 'model_file.py'}:wrong", "--budget", "size=50%"], 1, "must return (model, data)"),
        (["search", f"{TESTS / 'model_file.py'}:empty", "--budget", "size=50%"], 1, "at least one batch"),
        (["search", f"{FILE}:failing", "--budget", "size=50%"], 1, "RuntimeError: no checkpoint (model_file.py, line"),
        (["search", f"{FILE}:no_model", "--budget", "size=50%"], 1, "the model a torch.nn.Module, got str"),
        (["search", f"{FILE}:no_holdout", "--budget", "size=50%"], 1, "held-out data must hold at least one batch"),
        (
            ["search", f"{FILE}:other_holdout", "--budget", "size=50%"],
            1,
            "cannot run on the held-out data: RuntimeError",
        ),
        (["search", str(TESTS / "benchmarks"), "--budget", "size=50%"], 1, "no config.json"),
        (["search", MODEL, "--budget", "size=50%", "--task", "classify"], 1, "task must be one of"),
        (["show", "no-such-plan.json"], 1, "cannot read plan"),
        (["serch"], 2, "did you mean 'search'"),
        (["search", MODEL], 2, "--budget"),
    ],
)
def test_errors_are_one_line_with_an_exit_code_and_no_traceback(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    if code in (1, 3):
        [line] = [line for line in result.output.splitlines() if line.strip()]
        assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("two\nlines"), 1, "error: RuntimeError: two lines (`mpq --debug list ...` shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_surprises_and_ctrl_c_are_one_line_as_well(monkeypatch, error, code, said):
    def surprise():
        raise error

    monkeypatch.setattr("mpq.exporting.targets", surprise)
    result = run("list")
    assert (result.exit_code, result.output.strip()) == (code, said)


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -c \"from mpq.__main__ import main; main(['list'])\" | true"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert finished.stderr == ""


def test_debug_keeps_the_traceback():
    result = run("--debug", "show", "no-such-plan.json")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("command", ["", "search", "inspect", "verify", "show", "list"])
def test_help_teaches_by_example(command):
    result = run(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    before_options = result.output.split("Options:")[0]
    assert command in ("list",) or "\n  mpq " in before_options, "examples stand on lines of their own"
    assert "\\b" not in result.output
    assert "..." not in result.output.split("Commands:")[-1].replace("[ARGS]...", ""), "no summary is cut"


def test_show_and_help_load_neither_torch_nor_pandas(tmp_path):
    plan = tmp_path / "plan.json"
    run("search", MODEL, "--budget", "size=50%", "--output", str(plan))
    for arguments in (["--help"], ["search", "--help"], ["show", str(plan)], ["show", str(plan), "--csv"]):
        code = (
            "import sys; from mpq.__main__ import main\n"
            f"main({arguments!r}, standalone_mode=False)\n"
            "sys.exit(','.join(sorted({'torch', 'pandas', 'pulp'} & set(sys.modules))))"
        )
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert finished.stderr.strip() == "", (arguments, finished.stderr)


def test_the_demo_runs_end_to_end(tmp_path):
    plan = tmp_path / "plan.json"
    result = run(
        *("search", "demo", "--options", "int4,int8", "--budget", "size=18%", "--hardware", "nvidia-t4"),
        *("--output", str(plan)),
    )
    assert result.exit_code == 0, result.output
    saved = json.loads(plan.read_text())
    assert saved["measured"]["agreement"] > 0.97
    assert "The plan" in result.output.splitlines()[-2]
    assert "paired difference" in result.output
