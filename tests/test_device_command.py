"""`mpq device`: what it shows, what it refuses, and a search on the machine that it measured."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_hardware_device_files import SMALL

import mpq.hardware_models as hardware
from mpq.__main__ import OneLineErrors
from mpq.device_commands import device
from mpq.options import SearchSpace

SHAPES = "kind,m,k,n,repeats,taps\nlinear,2,32,16,1,1\nconv2d,16,72,8,1,9\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder, under the group that reports errors in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    main = click.group(cls=OneLineErrors)(lambda: None)
    main.add_command(device)

    def invoke(*arguments):
        return CliRunner().invoke(main, ["device", *arguments])

    return invoke


@pytest.mark.parametrize("name", hardware.available())
def test_show_prints_every_number_with_its_sources(run, name):
    shown = run("show", name)
    assert shown.exit_code == 0, shown.output
    target = hardware.load(name)
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 100
    squeezed = " ".join(shown.output.split())
    for number in target.numbers:
        assert number.unit in squeezed
        mark = "~" if number.is_estimate else ""
        assert f"{mark}{number.value:.6g}" in squeezed
    for source in target.sources:
        assert f"{source.id} [{source.kind}]: " in squeezed
    guesses = sum(number.is_estimate for number in target.numbers)
    assert f"~ marks {guesses} of {len(target.numbers)} numbers" in squeezed or not guesses


def test_show_marks_estimates_and_only_these(run):
    Path("small.toml").write_text(SMALL)
    lines = run("show", "small.toml").output.splitlines()
    rows = {tuple(line.split()[:3]): line for line in lines if line.startswith(("compute", "fallback", "memory"))}
    marked = [key for key, line in rows.items() if "~" in line]
    assert len(rows) > len(marked) == 2
    assert all("estimate" in rows[key] and "guess" in rows[key] for key in marked)


def test_show_of_an_unknown_device_suggests(run):
    shown = run("show", "nvidia-t5")
    assert shown.exit_code == 1
    assert "unknown target 'nvidia-t5': did you mean 'nvidia-t4'" in shown.output


def test_check_says_what_it_found(run):
    Path("small.toml").write_text(SMALL)
    checked = run("check", "small.toml")
    assert (checked.exit_code, checked.output) == (0, "ok: roofline, 10 numbers, 2 estimates\n")


def test_check_tells_every_problem_on_its_line(run):
    Path("small.toml").write_text(SMALL.replace("efficiency = 0.25", "eficiency = 0.25").replace("_Bps", ""))
    checked = run("check", "small.toml")
    assert checked.exit_code == 1
    assert sorted(line.split(":")[1] for line in checked.stderr.splitlines()) == ["20", "21", "25", "30"]
    assert not checked.stdout


def test_check_of_no_file(run):
    checked = run("check", "nothing.toml")
    assert checked.exit_code == 1
    assert "cannot read the device file 'nothing.toml'" in checked.stderr


def test_measure_writes_a_device_that_checks_and_resumes(run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    Path("shapes.csv").write_text(SHAPES)
    arguments = ("measure", "--shapes", "shapes.csv", "--options", "int4,int8/int8,int4/int8", "--repeats", "1")
    measured = run(*arguments, "--output", "mine.toml")
    assert measured.exit_code == 0, measured.output
    assert "not measured, 1 kernel: onnxruntime has no kernel for int4 weights and int8 inputs in a conv2d" in (
        measured.output
    )
    assert "6 kernels, " in measured.output
    assert run("check", "mine.toml").output == "ok: lookup, 1 number, 0 estimates\n"
    before = Path("mine.csv").read_text()
    assert run(*arguments, "--output", "mine.toml", "--name", "ours").exit_code == 0
    assert Path("mine.csv").read_text() == before
    target = hardware.load("mine.toml")
    assert target.name == "ours"
    assert sorted(target.models[0].table.kernel_keys)[0] == ("conv2d", "16", "72", "8", "1", "9", "fp32", "fp32")


def test_a_search_runs_on_the_measured_machine(run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from mpq.batches import batches_of, model_inputs
    from mpq.model_source import load_source
    from mpq.tracing import trace

    measured = run("measure", "--model", "demo", "--options", "int8/int8", "--repeats", "1", "--output", "mine.toml")
    assert measured.exit_code == 0, measured.output
    target = hardware.load("mine.toml")
    assert f"{len(target.models[0].table)} kernels" in measured.output
    source = load_source("demo")
    network = trace(source.model, model_inputs(source.model, batches_of(source.data)[0]))
    costs = target.costs(network, SearchSpace(["int8/int8"]))
    assert costs["latency"].notna().all()
    assert costs.attrs["reference"]["latency"] > 0


WRONG = [
    (("--output", "mine.csv", "--model", "demo"), "--output must end in .toml, got 'mine.csv'"),
    (("--output", "mine.toml"), "give what to measure: --model MODEL or --shapes SHAPES.csv"),
    (("--output", "mine.toml", "--model", "demo", "--shapes", "shapes.csv"), "one of them"),
    (("--output", "no/mine.toml", "--model", "demo"), "the folder 'no' does not exist"),
    (("--output", "shapes.toml", "--shapes", "shapes.csv"), "the table would overwrite 'shapes.csv'"),
    (("--output", "mine.toml", "--shapes", "broken.csv"), "broken.csv:2: k must be a whole number"),
    (("--output", "mine.toml", "--shapes", "shapes.csv", "--options", "int99"), "int99"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_measured_is_told_at_once(run, arguments, message):
    Path("shapes.csv").write_text(SHAPES)
    Path("broken.csv").write_text("kind,m,k,n\nlinear,1,x,4\n")
    measured = run("measure", *arguments)
    assert measured.exit_code == 1
    assert message in measured.output
    assert not Path("mine.toml").exists()
