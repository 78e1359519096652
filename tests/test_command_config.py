"""`mpq.toml`: what it sets, what wins over it, and what is wrong with it, by line."""

import json
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_command_line import MODEL

from mpq.__main__ import main
from mpq.config_file import SHARED, commands, converted, keys, settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def table(here):
    Path("by-hand.csv").write_text(
        "unit,option,sensitivity,size [B]\na,int4,3,4\na,int8,1,8\nb,int4,5,4\nb,int8,0.5,8\n"
    )
    return "by-hand.csv"


def solved(*arguments):
    done = run("solve", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


def test_options_come_from_the_file_and_flags_win(table):
    Path("mpq.toml").write_text('[solve]\nbudget = { size = "12 B" }\npin = ["b=int4"]\n')
    answer, told = solved(table)
    assert answer["options"] == {"a": "int8", "b": "int4"}
    assert answer["budgets"][0]["limit"] == 12
    assert told == "from mpq.toml: budget, pin\n"
    answer, told = solved(table, "--pin", "a=int4")
    assert answer["options"] == {"a": "int4", "b": "int8"}, "the typed pin takes the place of the file's"
    assert told == "from mpq.toml: budget\n"
    answer, told = solved(table, "--budget", "size=8", "--pin", "a=int4")
    assert (answer["budgets"][0]["limit"], told) == (8, "")


def test_another_file_and_arguments(table):
    Path("mpq.toml").write_text("[solve]\nnonsense = 1\n")
    Path("nightly.toml").write_text(f'[defaults]\nbudget = {{ size = 12 }}\n[solve]\ntable = "{table}"\n')
    answer = run("--config", "nightly.toml", "solve", "--json")
    assert json.loads(answer.stdout)["options"] == {"a": "int4", "b": "int8"}
    missing = run("--config", "no.toml", "solve", table)
    assert (missing.exit_code, "cannot read settings 'no.toml'" in missing.output) == (1, True)


def test_a_command_wins_over_defaults_and_others_are_left_alone(here):
    Path("mpq.toml").write_text(
        '[defaults]\nseed = 3\ncache = "kept"\n[search]\nseed = 4\n[table.measure]\nbatch = 8\n'
    )
    found = settings("mpq.toml", main)
    assert (found["search"]["seed"], found["refine"]["seed"]) == (4, 3)
    assert found["table"]["measure"] == {"seed": 3, "cache": "kept", "batch": 8}
    assert found["solve"] == {}


def test_lists_and_tables_of_options(here):
    Path("mpq.toml").write_text(
        f'[search]\nmodel = "{MODEL}"\noptions = ["int4", "int8"]\n[search.budget]\nsize = "45%"\nbops = "30%"\n'
    )
    done = run("search", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)["plan"]
    assert {row["option"] for row in plan["layers"]} <= {"int4", "int8"}
    assert [budget["asked"] for budget in plan["budgets"]] == ["45%", "30%"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\n[search]\nopttions = 3\n", 3, "[search] has no key 'opttions': did you mean 'options'?"),
        ("[serch]\nseed = 1\n", 1, "[serch] is no command: did you mean 'search'?"),
        ("seed = 1\n", 1, "key 'seed' stands in no table of a command"),
        ("[search]\nseed = 'x'\n", 2, "'seed' of [search] must be a whole number, got \"x\""),
        ("[search]\nseed = 1.0\n", 2, "'seed' of [search] must be a whole number, got 1.0"),
        ("[search]\nseed = true\n", 2, "'seed' of [search] must be a whole number, got true"),
        ("[search]\nbatch = 0\n", 2, "'batch' of [search] must be a whole number of at least 1, got 0"),
        ("[search]\nrefine = '9'\n", 2, "'refine' of [search] must be a number of at least 1, got \"9\""),
        ("[refine]\nlevel = 2\n", 2, "'level' of [refine] must be a number above 0 and below 1, got 2"),
        ("[search]\nphase = 'decod'\n", 2, '\'phase\' of [search] must be one of "prefill", "decode", got "decod"'),
        ("[search]\nbudget = { size = true }\n", 2, "'budget' of [search] must be a table"),
        ("[search]\ndata = ['a']\n", 2, "'data' of [search] must be text"),
        ("[search]\noptions = [[1]]\n", 2, "'options' of [search] must be a list of texts"),
        ("[table.mesure]\nbatch = 1\n", 1, "[table.mesure] is no command: did you mean 'measure'"),
        ("[table]\nmeasure = 1\n", 2, "'measure' must be a table: write [table.measure]"),
        ("[defaults]\noutput = 'x'\n", 2, "[defaults] has no key 'output'"),
        ("[search]\njson = true\n", 2, "[search] has no key 'json'"),
        ("search = 1\n", 1, "'search' must be a table"),
        ("[table]\n[[table.measure]]\n", None, "'measure' must be a table"),
    ],
)
def test_mistakes_are_named_with_their_line(here, text, line, message):
    Path("mpq.toml").write_text(text)
    done = run("show", "plan.json")
    assert done.exit_code == 1
    assert done.output.startswith(f"error: mpq.toml{f', line {line}' if line else ''}: "), done.output
    assert message in done.output


def test_all_mistakes_are_told_at_once_and_what_is_no_toml(here):
    Path("mpq.toml").write_text("[search]\nsede = 1\nseed = 'x'\n")
    told = run("show", "plan.json").output
    assert "line 2" in told
    assert "line 3" in told
    Path("mpq.toml").write_text("[search\n")
    assert "settings 'mpq.toml' are not TOML: " in run("show", "plan.json").output


def test_help_and_the_template_work_beside_a_broken_file(here):
    Path("mpq.toml").write_text("[search\n")
    for arguments in (["search", "--help"], ["config"], ["completion", "fish"], ["--version"]):
        assert run(*arguments).exit_code == 0


def test_the_template_has_every_key_and_every_line_of_it_is_taken(here):
    printed = run("config").stdout
    assert tomllib.loads(printed).keys() >= {"defaults", "search", "solve", "table"}
    bare = "\n".join(
        line.removeprefix("# ") if line.partition(" = ")[0].replace("-", "").removeprefix("# ").isalpha() else line
        for line in printed.splitlines()
    )
    Path("mpq.toml").write_text(bare)
    content = tomllib.loads(bare)
    for place, command in commands(main):
        table = content
        for part in place:
            table = table[part]
        assert list(table) == list(keys(command)), place
        for parameter in command.params:
            if (
                isinstance(parameter, click.Option)
                and parameter.help
                and parameter.name not in ("help", "as_json", "as_csv")
            ):
                assert parameter.help.split()[0] in printed
    assert list(content["defaults"]) == list(SHARED)
    assert settings("mpq.toml", main)["search"]["batch"] == 1


def test_the_template_shows_defaults_as_they_are(here):
    found = tomllib.loads(
        run("config", "search").stdout.replace("# options = ", "options = ").replace("# seed", "seed")
    )
    assert found["search"] == {"options": ["int2", "int4", "int8"], "seed": 0}
    assert "[solve]" not in run("config", "search").stdout
    wrong = run("config", "table", "mesure")
    assert (wrong.exit_code, "did you mean 'table measure'" in wrong.output) == (1, True)


def test_values_reach_click_as_if_they_were_typed():
    options = keys(main.commands["search"])
    assert converted(["a", "b"], options["options"]) == "a,b"
    assert converted({"size": 12, "latency": "4 ms"}, options["budget"]) == ["size=12", "latency=4 ms"]
    assert converted("size=12", options["budget"]) == ["size=12"]
    with pytest.raises(TypeError):
        converted(True, options["options"])
