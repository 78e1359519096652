"""`mpq demo`: the story, the files, and every command that it says to try next."""

import json
import shlex
from pathlib import Path

from click.testing import CliRunner

from mpq import CostTable, Plan
from mpq.__main__ import main


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_the_demo_tells_what_it_does_and_everything_it_says_to_try_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("demo", "--folder", "a demo", "--size", "30%")
    assert done.exit_code == 0, done.output
    rest = done.output.split("$ mpq search", 1)[1]
    typed = shlex.split(rest.splitlines()[0])
    assert "at most" in rest
    assert typed[:1] == ["demo"]
    assert "--report" in typed
    plan, table = Plan.load("a demo/plan.json"), CostTable.load("a demo/table.parquet")
    assert plan.size_bytes <= 0.3 * plan.full_bytes
    assert plan.measured["agreement"] > 0.97
    assert table.solve({"size": "30%"}).options == plan.options
    assert "The plan " in done.output
    assert "<html" in Path("a demo/page.html").read_text("utf-8")
    lines = done.output.split("To try next:")[1].splitlines()
    suggested = [line.partition("mpq ")[2] for line in lines if "mpq " in line]
    assert len(suggested) >= 5
    Path("net.py").write_text(
        "from mpq import demo\ndef load():\n    return demo.cnn(), demo.digits().calibration[:1]\n"
    )
    for line in suggested:
        tried = run(*shlex.split(line))
        assert tried.exit_code == 0, (line, tried.output)


def test_the_demo_answers_for_machines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def quick(*_, **__):
        raise RuntimeError("measured")

    monkeypatch.setattr("mpq.pipeline.measure", quick)
    done = run("demo", "--json")
    assert (done.exit_code, done.stdout) == (1, ""), "no story on standard output"
    assert json.loads(json.dumps(done.stderr.strip())).startswith("error: RuntimeError: measured")
    assert run("demo", "--folder", "/proc/none").exit_code == 1
