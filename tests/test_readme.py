"""What the README shows works as written."""

import shlex
from pathlib import Path

from click.testing import CliRunner
from documented_code import blocks

from mpq import demo
from mpq.__main__ import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_near_the_top():
    top = README[:600]
    assert "make demo" in top
    assert "make test" in top


def test_the_python_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = demo.digits()
    names = {"model": demo.cnn(), "data": digits.calibration, "heldout": digits.holdout, "x": digits.holdout[0][0]}
    block, solving, measured = blocks(README, "python")
    without_export, export = block.split("mpq.export")
    exec(compile(without_export, "README.md", "exec"), names)
    assert "uniform int4" in capsys.readouterr().out
    assert (tmp_path / "plan.json").is_file()
    kernels = [entry.layer.name for entry in names["plan"].entries if entry.layer.kernel not in ((), (1, 1))]
    pinned = names["plan"].with_options(dict.fromkeys(kernels, "fp32"))  # torchao holds 1 x 1 convolutions alone
    exec(compile(f"import mpq\nmpq.export{export.replace('plan', 'pinned')}", "README.md", "exec"), {"pinned": pinned})
    exec(compile(measured, "README.md", "exec"), names)
    assert names["refined"].plan.predicted["size"] <= names["plan"].budgets[0].limit
    assert names["within"].plan is not None
    names["plan"].table.save("table.parquet")
    exec(compile(f"import mpq\n{solving}", "README.md", "exec"), again := {})
    assert len(set(again["plan"].options.values())) <= 2
    assert again["small"].predicted["sensitivity"] <= 0.01
    assert len(again["front"]) > 20


def test_the_shown_plan_is_what_the_demo_finds():
    command, *shown = README.split("$ mpq ")[1].split("```")[0].splitlines()
    arguments = shlex.split(command)[:-2]  # without --output plan.json
    printed = CliRunner().invoke(main, arguments).output
    layers = shown[2 : shown.index("")]
    assert len(layers) == 9
    for line in layers:
        assert line in [row.rstrip() for row in printed.splitlines()]
