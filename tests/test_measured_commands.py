"""`mpq smallest` and `mpq evolve`: what Python does with the same settings."""

import json
from pathlib import Path

import pytest
from model_file import load
from test_command_line import MODEL
from test_command_quantizer import done, run

import mpq
from mpq.evaluator import Evaluator
from mpq.terminal import smallest_in_words

pytest.importorskip("optuna", reason="the extra mpq-search[evolve] is not installed")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "table.parquet"
    done("table", "measure", MODEL, "--options", "int2,int3,int4,int8", "--output", path)
    return path


def test_smallest_finds_what_python_finds(table, tmp_path):
    output = tmp_path / "plan.json"
    asked = ("smallest", MODEL, table, "--drop", "20%", "--metric", "divergence")
    answer = json.loads(done(*asked, "--output", output, "--json").stdout)
    model, data, _, holdout = load()
    how = {"drop": 0.2, "metric": "divergence", "holdout": holdout}
    mine = mpq.smallest(model, data, mpq.CostTable.load(table), **how)
    assert mine.plan is not None
    assert {row["layer"]: row["option"] for row in answer["plan"]["layers"]} == mine.plan.options
    assert answer["drop"] == pytest.approx(mine.drop)
    assert answer["drop"] < answer["limit"] == 0.2
    assert answer["p_value"] < answer["level"] == 0.05
    assert answer["samples"] == 16
    assert answer["heldout"]["samples"] == 8
    judge = Evaluator(model, holdout, mpq.CostTable.load(table), metric="divergence")
    assert answer["heldout"]["drop"] == pytest.approx(judge.measure(mine.plan).divergence, rel=1e-5)
    assert [step["drop"] for step in answer["history"]] == pytest.approx([drop for _, drop, _ in mine.history])
    assert mpq.Plan.load(output).options == mine.plan.options
    shown = done(*asked).stdout
    assert shown == f"{mine}\n"
    assert "held out: " in shown


def test_smallest_takes_resource_and_pins(table):
    asked = ("smallest", MODEL, table, "--drop", "0.5", "--metric", "divergence", "--json")
    free = json.loads(done(*asked, "--resource", "bops").stdout)
    assert free["resource"] == {"name": "bops", "value": free["plan"]["predicted"]["bops"]}
    first = free["plan"]["layers"][0]["layer"]
    held = json.loads(done(*asked, "--resource", "bops", "--pin", f"{first}=int8").stdout)
    assert held["plan"]["layers"][0]["option"] == "int8"
    assert held["resource"]["value"] > free["resource"]["value"]


def test_the_smallest_plan_knows_what_it_was_found_under(table, tmp_path):
    output = tmp_path / "plan.json"
    asked = ("smallest", MODEL, table, "--drop", "0.5", "--metric", "divergence")
    first = json.loads(done(*asked, "--json").stdout)
    limit = 1.05 * first["plan"]["predicted"]["bops"]
    held = first["plan"]["layers"][-1]["layer"]
    again = (*asked, "--budget", f"bops={limit:.0f}", "--pin", f"{held}=int4", "--output", output, "--json")
    answer = json.loads(done(*again).stdout)
    plan = mpq.Plan.load(output)
    assert plan.predicted["bops"] <= limit
    assert [budget.quantity for budget in plan.budgets] == ["bops"]
    assert (plan.edited, plan.options[held]) == ((held,), "int4")
    kept = plan.provenance["smallest"]
    assert (kept["drop"], kept["limit"], kept["p_value"]) == (answer["drop"], 0.5, answer["p_value"])
    assert kept["heldout"] == answer["heldout"]
    assert smallest_in_words(kept) in " ".join(done("show", output).stdout.split())
    done("refine", MODEL, table, "--start", output, "--evaluations", "2", "--output", output)
    assert mpq.Plan.load(output).options[held] == "int4"


def test_held_out_data_is_tried_before_the_search(table, tmp_path, monkeypatch):
    file = tmp_path / "unlabelled.py"
    file.write_text("from small_models import images\n\ndef only_inputs():\n    return [x for x, _ in images()]\n")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("mpq.accuracy_constraint._Bisection.run", lambda self: pytest.fail("searched"))
    found = run("smallest", MODEL, table, "--drop", "5%", "--holdout", f"{file}:only_inputs")
    assert found.exit_code == 1
    assert "held-out data: metric 'accuracy' needs labels" in found.output


def test_a_metric_is_told_apart_by_its_file(table, tmp_path):
    file, cache = tmp_path / "metrics.py", tmp_path / "kept"
    text = "SCALE = 1.0\n\ndef margin(outputs):\n    return SCALE * outputs.values.amax(1)\n"
    file.write_text(text)
    asked = ("smallest", MODEL, table, "--drop", "100", "--metric", f"{file}:margin", "--cache", cache, "--json")
    first = json.loads(done(*asked).stdout)["history"]
    file.write_text(text.replace("1.0", "10.0"))
    second = json.loads(done(*asked).stdout)["history"]
    assert second[0]["drop"] == pytest.approx(10 * first[0]["drop"], rel=1e-4)


def test_a_drop_is_called_one(table):
    shown = done("evolve", MODEL, table, "--resource", "size", "--evaluations", "4", "--metric", "accuracy").stdout
    assert "accuracy drop" in shown


def test_nothing_is_written_where_nothing_is_sure(table, tmp_path):
    output = tmp_path / "plan.json"
    output.write_text("of an earlier run")
    found = run("smallest", MODEL, table, "--drop", "1e-9", "--output", output, "--json")
    assert found.exit_code == 3
    answer = json.loads(found.stdout)
    assert (answer["plan"], answer["p_value"], answer["heldout"], answer["written"]) == (None, None, None, [])
    assert answer["drop"] is None
    assert output.read_text() == "of an earlier run"


def test_evolve_finds_what_python_finds(table, tmp_path):
    csv, plans = tmp_path / "front.csv", tmp_path / "plans"
    asked = ("evolve", MODEL, table, "--resource", "size", "--evaluations", "12", "--budget", "size=30%")
    answer = json.loads(done(*asked, "--output", csv, "--plans", plans, "--json").stdout)
    model, data, _, _ = load()
    loaded = mpq.CostTable.load(table)
    front = mpq.evolve(Evaluator(model, data, loaded), ["size"], {"size": "30%"}, evaluations=12)
    assert [point["resources"][0] for point in answer["points"]] == front.resource.tolist()
    assert [point["value"] for point in answer["points"]] == pytest.approx(front.objective.tolist())
    assert [point["choices"] for point in answer["points"]] == front.choices.tolist()
    assert answer["plans"] == 12
    assert csv.read_text() == front.to_frame().to_csv(index=False)
    files = sorted(plans.iterdir())
    assert answer["written"] == [str(csv), *map(str, files)]
    assert [mpq.Plan.load(file).options for file in files] == [front.plan(point).options for point in front]
    shown = done(*asked).stdout
    assert "; --output FRONT.csv lists all, --plans FOLDER writes each" in shown
    assert "12 plans measured on 16 samples, which chose them; the study has its 12 plans" in shown
    assert (answer["samples"], answer["stopped"]) == (16, "the study has its 12 plans")
    assert "a point of a measured frontier: divergence" in " ".join(done("show", files[0]).stdout.split())


def test_evolve_goes_on_from_its_storage(table, tmp_path):
    asked = ("evolve", MODEL, table, "--resource", "size", "--storage", tmp_path / "shared.log", "--json")
    first = json.loads(done(*asked, "--evaluations", "6").stdout)
    more = json.loads(done(*asked, "--evaluations", "10").stdout)
    assert (first["plans"], more["plans"]) == (6, 10)
    other = run(*asked, "--evaluations", "6", "--metric", "loss")
    assert other.exit_code == 1
    assert "study" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smallest", MODEL, "TABLE", "--drop", "much"], "such as 0.01 or 1%, got 'much'"),
        (["smallest", MODEL, "TABLE", "--drop", "-1%"], "drop must be a positive number"),
        (["smallest", MODEL, "TABLE", "--drop", "inf"], "drop must be a positive number, got inf"),
        (["smallest", MODEL, "TABLE", "--drop", "1%", "--resource", "siz"], "did you mean 'size'"),
        (["smallest", MODEL, "TABLE", "--drop", "1%", "--metric", "accurcy"], "metric must be one of"),
        (["smallest", MODEL, "TABLE", "--drop", "1%", "--output", "no/such/plan.json"], "does not exist"),
        (["evolve", MODEL, "TABLE", "--resource", "latenc"], "table has no quantity 'latenc'"),
        (["evolve", MODEL, "TABLE", "--resource", "sensitivity"], "other than the objective"),
        (["evolve", MODEL, "TABLE", "--resource", "size", "--study", "mine"], "give --storage"),
        (["evolve", MODEL, "TABLE", "--resource", "size", "--output", "front.json"], "must end in .csv"),
        (
            ["evolve", MODEL, "TABLE", "--resource", "size", "--plans", "TABLE"],
            "a new or an empty folder",
        ),
        (["evolve", MODEL, "TABLE", "--resource", "size", "--plans", "TABLE/x"], "a folder that can be made"),
        (["evolve", MODEL, "TABLE", "--resource", "size", "--plans", "f.csv", "--output", "f.csv"], "an empty folder"),
    ],
)
def test_errors_are_one_line(table, arguments, message):
    finished = run(*(str(argument).replace("TABLE", str(table)) for argument in arguments))
    assert finished.exit_code == 1
    assert message in finished.output
    assert len(finished.output.strip().splitlines()) == 1
