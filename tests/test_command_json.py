"""`--json`: one document with the documented keys on standard output, nothing else there, figures as in the objects."""

import json
import math

import click
import numpy as np
import pytest
from click.testing import CliRunner
from test_command_line import MODEL

import mpq
from mpq.__main__ import main
from mpq.command_group import AnswerCommand
from mpq.config_file import commands
from mpq.json_answers import json_text

ANSWERS = {place: command for place, command in commands(main) if isinstance(command, AnswerCommand)}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Plan, table and another plan of one model, and the answer of the search."""
    folder = tmp_path_factory.mktemp("made")
    plan, other, table = folder / "plan.json", folder / "other.json", folder / "table.parquet"
    searched = run("search", MODEL, "--budget", "size=45%", "--output", plan, "--table", table, "--json")
    assert searched.exit_code == 0, searched.output
    assert run("solve", table, "--budget", "size=30%", "--output", other).exit_code == 0
    types = folder / "bits.json"
    assert run("export", plan, "hawq", "--output", types).exit_code == 0
    return {"folder": folder, "plan": plan, "other": other, "table": table, "bits": types, "searched": searched}


def cases(made):
    plan, table, folder = made["plan"], made["table"], made["folder"]
    return {
        ("inspect",): ["inspect", MODEL],
        ("show",): ["show", plan],
        ("verify",): ["verify", MODEL, plan, "--table", table],
        ("refine",): ["refine", MODEL, table, "--budget", "size=45%", "--evaluations", "2", "--front", "size"],
        ("smallest",): ["smallest", MODEL, table, "--drop", "1", "--metric", "divergence"],
        ("evolve",): ["evolve", MODEL, table, "--resource", "size", "--evaluations", "3"],
        ("table", "measure"): ["table", "measure", MODEL, "--output", folder / "m.csv"],
        ("table", "show"): ["table", "show", table],
        ("table", "merge"): ["table", "merge", table, table, "--output", folder / "merged.parquet"],
        ("solve",): ["solve", table, "--budget", "size=40%", "--output", folder / "again.json"],
        ("pareto",): ["pareto", table, "--resource", "size", "--output", folder / "front.csv"],
        ("import",): ["import", "hawq", made["bits"], "--like", plan, "--output", folder / "theirs.json"],
        ("compare",): ["compare", plan, made["other"], "--table", table],
        ("device", "show"): ["device", "show", "nvidia-t4"],
        ("device", "check"): ["device", "check", "nvidia-t4"],
    }


ELSEWHERE = {
    ("search",),
    ("demo",),
    ("device", "measure"),
    ("report",),
}  # below, in test_command_demo, test_device_command


def strict(text):
    """The document, or an error where a number is none of JSON's."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_every_answer_has_the_keys_that_its_help_documents(made):
    tried = cases(made)
    assert set(ANSWERS) - ELSEWHERE == set(tried)
    for place, arguments in tried.items():
        done = run(*arguments, "--json")
        assert done.exit_code == 0, (place, done.output)
        assert list(strict(done.stdout)) == list(ANSWERS[place].answer), place
        shown = run(*place, "--help").output
        assert all(f"  {key}" in shown for key in ANSWERS[place].answer)


def test_a_search_answers_with_plan_and_verification(made):
    searched = made["searched"]
    answer = strict(searched.stdout)
    assert list(answer) == list(ANSWERS["search",].answer)
    plan = mpq.Plan.load(made["plan"])
    assert answer["plan"] == strict(run("show", made["plan"], "--json").stdout)
    assert {row["layer"]: row["option"] for row in answer["plan"]["layers"]} == plan.options
    outside = plan.outside["size"]
    assert math.isclose(sum(row["size"] for row in answer["plan"]["layers"]) + outside, plan.size_bytes)
    assert answer["plan"]["measured"] == dict(plan.measured)
    assert answer["written"] == [str(made["plan"]), str(made["table"])]
    found = answer["verification"]
    mine = next(row for row in found["models"] if row["name"] == "plan")
    assert mine["figures"]["divergence"]["value"] == plan.measured["KL"]
    assert mine["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["data"] == "held-out"
    assert found["verdict"].startswith("The plan")
    assert {row["quantity"]: row["found"] for row in found["quantities"]}["size"] == plan.size_bytes


def test_the_answer_of_a_table_is_what_the_table_says(made):
    table = mpq.CostTable.load(made["table"])
    answer = strict(run("table", "show", made["table"], "--json").stdout)
    reach = {row["quantity"]: (row["smallest"], row["largest"]) for row in answer["quantities"]}
    assert reach["size"] == table.reachable("size")
    assert "sensitivity_se" not in reach
    frame = table.frame["sensitivity"]
    assert {(row["layer"], o): v for row in answer["layers"] for o, v in row["sensitivity"].items()} == frame.to_dict()
    tidy = run("table", "show", made["table"], "--csv").stdout.splitlines()
    assert len(tidy) == 1 + len(table.units) * len(table.options)


def test_a_comparison_answers_with_differences(made):
    answer = strict(run("compare", made["plan"], made["other"], "--json").stdout)
    first, second = (mpq.Plan.load(made[name]).options for name in ("plan", "other"))
    differing = {name for name in first if first[name] != second[name]}
    assert {row["layer"] for row in answer["differences"]} == differing != set()
    assert answer["same"] == answer["layers"] - len(differing) == len(first) - len(differing)
    assert all(row["loss_change"] is None for row in answer["differences"])  # no table, no prediction


def test_a_wrong_device_file_is_an_answer_with_exit_code_1(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[device]\n")
    done = run("device", "check", file, "--json")
    answer = strict(done.stdout)
    assert (done.exit_code, answer["ok"], done.stderr) == (1, False, "")
    assert answer["problems"] == run("device", "check", file).stderr.splitlines() != []


def test_what_is_written_is_told_on_standard_error(made):
    done = run("solve", made["table"], "--budget", "size=40%", "--output", made["folder"] / "x.json", "--json")
    assert "written" in done.stderr
    assert "written" not in done.stdout


def test_json_has_no_numbers_that_readers_refuse():
    content = {"a": np.array([1.5, np.nan]), "b": {"c": (math.inf, np.int64(3), True, None)}, "d": "é"}
    assert strict(json_text(content)) == {"a": [1.5, None], "b": {"c": [None, 3, True, None]}, "d": "é"}


@pytest.mark.parametrize("place", ANSWERS, ids=" ".join)
def test_help_of_every_command_has_examples_that_name_it(place):
    shown = run(*place, "--help").output
    assert f"\n  mpq {' '.join(place)}" in shown
    assert "Keys of --json" in shown


def test_every_other_command_has_examples_as_well():
    for place, command in commands(main):
        assert f"\n  mpq {' '.join(place)}" in run(*place, "--help").output, place
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            assert f"\n  mpq {name}" in run(name, "--help").output
