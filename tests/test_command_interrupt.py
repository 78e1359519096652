"""Ctrl-C: what was measured is kept, the message names the command that goes on, and that command goes on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import mpq
from mpq.__main__ import main

SLOW = """
import os, time
from pathlib import Path
import torch

def load():
    torch.manual_seed(0)

    class Slow(torch.nn.Linear):
        def forward(self, x):
            with open("passes", "a") as file:
                file.write(".")
            time.sleep(float(os.environ.get("SLOW", "0")))
            return super().forward(x)

    model = torch.nn.Sequential(Slow(4, 8), torch.nn.ReLU(), Slow(8, 6), Slow(6, 3))
    return model, (torch.randn(8, 4), torch.randint(0, 3, (8,)))
"""
SEARCH = ["search", "slow.py:load", "--options", "int2,int3,int4,int5,int6,int8", "--budget", "size=50%"]


def kept_in(folder):
    """Pieces that are whole; those being written beside them begin with a dot."""
    return [path for path in Path(folder).rglob("*.npy") if not path.name.startswith(".")]


def interrupted(folder, *arguments):
    """Send SIGINT to a real process once a piece is kept and the measurement goes on, for seconds more."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mpq.__file__).parents[1]), "SLOW": "0.2"}
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs of a shell ignore it
    command = [sys.executable, "-c", f"{heard}; from mpq.__main__ import main; main(prog_name='mpq')", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)
    end = time.monotonic() + 240
    while not kept_in(folder / "kept") and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_an_interrupted_search_goes_on_with_the_command_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("slow.py").write_text(SLOW)
    code, output, errors = interrupted(tmp_path, *SEARCH, "--cache", "kept")
    assert (code, output) == (130, ""), errors
    assert "Traceback" not in errors
    *_, first, second = errors.splitlines()
    assert first == "interrupted: what was measured is kept in kept; to go on:"
    typed = shlex.split(second)
    assert typed == ["mpq", *SEARCH, "--cache", "kept"]
    pieces = kept_in("kept")
    assert pieces
    Path("passes").unlink()
    again = CliRunner().invoke(main, typed[1:])
    assert again.exit_code == 0, again.output
    passes_of_rest = Path("passes").stat().st_size
    Path("passes").unlink()
    fresh = CliRunner().invoke(main, SEARCH)
    assert fresh.stdout == again.stdout
    assert passes_of_rest < Path("passes").stat().st_size, "what was kept is not measured again"
    assert set(pieces) < set(kept_in("kept"))


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (
            ["refine", "demo", "t.parquet", "--budget", "size=3 bits", "--cache=a b"],
            "",
            "kept in a b; to go on:\n  mpq refine",
        ),
        (["refine", "demo", "t.parquet", "--budget", "size=1"], "[refine]\ncache = 'c'\n", "kept in c; to go on:"),
        (["refine", "demo", "t.parquet", "--budget", "size=1", "--storage", "s.log"], "", "kept in s.log; to go on:"),
        (["table", "measure", "demo", "--output", "t.csv"], "", "--output t.csv --cache measured"),
        (
            ["device", "measure", "--output", "m.toml", "--model", "demo"],
            "",
            "finished kernels are kept; to go on:\n  mpq",
        ),
        (["show", "plan.json"], "", "interrupted\n"),
    ],
)
def test_each_command_says_how_to_go_on(tmp_path, monkeypatch, arguments, settings, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mpq.toml").write_text(settings)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name in ("mpq.model_source.load_source", "mpq.plan.Plan.load", "mpq.tables.CostTable.load"):
        monkeypatch.setattr(name, interrupt)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 130
    assert said in done.stderr
    if "  mpq" in done.stderr:
        typed = shlex.split(done.stderr.split("\n  ")[-1])
        assert typed[1 : 1 + len(arguments)] == arguments
