"""`--quantizer`, `--adjust`, `--metric`, `--storage` on the command line: what Python does with the same settings."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from model_file import load
from test_command_line import FILE, MODEL

import mpq
from mpq import adaquant
from mpq.__main__ import main
from mpq.adjuster import Adjuster
from mpq.options import SearchSpace
from mpq.quantizer_choice import choose_quantizer
from mpq.tables import CostTable
from mpq.terminal import refinement_in_words
from mpq.verification_report import UNADJUSTED
from mpq.weight_database import save_quantized_weights

OPTIONS = ("--options", "int2,int3,int4")
BUDGET = ("--budget", "size=26%")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments):
    finished = run(*arguments)
    assert finished.exit_code == 0, finished.output
    return finished


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    """Plan and table of a search by the error of GPTQ, and the JSON of the search."""
    folder = tmp_path_factory.mktemp("gptq")
    plan, table = folder / "plan.json", folder / "table.parquet"
    by = ("--quantizer", "gptq", "--sensitivity", "output_mse")
    found = done("search", MODEL, *OPTIONS, *BUDGET, *by, "--output", plan, "--table", table, "--json")
    return {"plan": plan, "table": table, "folder": folder, "answer": json.loads(found.stdout)}


def row_of(answer, name):
    return next(row for row in answer["models"] if row["name"] == name)


def divergence(answer, name="plan"):
    return row_of(answer, name)["figures"]["divergence"]["value"]


def test_a_search_scores_and_verifies_with_the_quantiser(gptq):
    model, data, _, holdout = load()
    quantizer = choose_quantizer("gptq", model, data)
    table = CostTable.load(gptq["table"])
    how = {"sensitivity": "output_mse", "quantizer": quantizer, "progress": False}
    mine = mpq.measure(model, data, ["int2", "int3", "int4"], **how)
    assert table.quantities["sensitivity"] == pytest.approx(mine.quantities["sensitivity"], rel=1e-5)
    rounded = mpq.measure(model, data, ["int2", "int3", "int4"], sensitivity="output_mse", progress=False)
    assert table.quantities["sensitivity"] != pytest.approx(rounded.quantities["sensitivity"], rel=1e-2)
    plan = mpq.Plan.load(gptq["plan"])
    assert plan.provenance["quantizer"] == repr(quantizer) == gptq["answer"]["verification"]["quantizer"]
    verified = mpq.verify(model, holdout, plan, quantizer=quantizer, baselines=())
    assert plan.measured["KL"] == pytest.approx(verified.measured["KL"], rel=1e-5)


def test_a_table_is_measured_with_the_quantiser(gptq):
    out = gptq["folder"] / "measured.parquet"
    done("table", "measure", MODEL, *OPTIONS, "--sensitivity", "output_mse", "--quantizer", "gptq", "--output", out)
    assert (
        CostTable.load(out).quantities["sensitivity"] == CostTable.load(gptq["table"]).quantities["sensitivity"]
    ).all()


def test_verify_takes_it_too_and_says_when_it_is_another(gptq):
    same = done("verify", MODEL, gptq["plan"], "--quantizer", "gptq", "--baselines", "none", "--json")
    assert divergence(json.loads(same.stdout)) == pytest.approx(divergence(gptq["answer"]["verification"]))
    assert "scored by" not in same.stderr
    other = done("verify", MODEL, gptq["plan"], "--baselines", "none", "--json")
    assert divergence(json.loads(other.stdout)) != pytest.approx(divergence(json.loads(same.stdout)), rel=1e-2)
    assert "scored by the error of GPTQ, measured with RoundToNearest here: see --quantizer" in other.stderr


def test_a_folder_of_weights_is_a_quantiser(gptq, tmp_path):
    model, data, *_ = load()
    space, network = SearchSpace(["int2", "int3", "int4"]), mpq.trace(model, data[0][0])
    quantizer = choose_quantizer("gptq", model, data)
    save_quantized_weights(model, network, space, quantizer, tmp_path / "weights", progress=False)
    how = ("--baselines", "none", "--json")
    read = json.loads(done("verify", MODEL, gptq["plan"], "--quantizer", tmp_path / "weights", *how).stdout)
    assert divergence(read) == pytest.approx(divergence(gptq["answer"]["verification"]), rel=1e-5)
    assert read["quantizer"].startswith("WeightDatabase('weights'")


def test_adjustments_are_those_of_python_and_stand_in_the_plan(gptq, monkeypatch):
    monkeypatch.setattr("mpq.adaquant.Calibration", partial(adaquant.Calibration, steps=10, samples=4))
    out = gptq["folder"] / "adjusted.json"
    asked = ("--adjust", "bias-correction", "--adjust", "adaquant", "--quantizer", "gptq", "--baselines", "none")
    found = done("verify", MODEL, gptq["plan"], *asked, "--output", out, "--json")
    answer = json.loads(found.stdout)
    assert answer["adjustments"] == ["AdaQuant", "bias correction"]
    assert answer["written"] == [str(out)]
    model, data, _, holdout = load()
    adjust, quantizer = Adjuster(["adaquant", "bias-correction"], data), choose_quantizer("gptq", model, data)
    plan = mpq.Plan.load(gptq["plan"])
    mine = mpq.verify(model, holdout, plan, quantizer=quantizer, adjust=adjust, baselines=())
    assert divergence(answer) == pytest.approx(mine.plan.divergence, rel=1e-4)
    assert divergence(answer, UNADJUSTED) == pytest.approx(divergence(gptq["answer"]["verification"]), rel=1e-5)
    written = mpq.Plan.load(out)
    assert written.help == ("AdaQuant", "bias correction")
    shown = done("show", out).output
    assert "done after the formats were chosen: AdaQuant, bias correction" in shown
    assert "on 16 samples, quantised by GPTQ" in shown
    assert written.options == plan.options
    assert written.measured["KL"] == pytest.approx(mine.measured["KL"], rel=1e-4)
    again = gptq["folder"] / "again.json"
    done("verify", MODEL, out, "--baselines", "none", "--output", again)
    assert mpq.Plan.load(again).help == ("RoundToNearest",)  # measured with that, and without what it named before
    done("verify", MODEL, again, "--baselines", "none", "--quantizer", "gptq", "--output", again)
    assert mpq.Plan.load(again).help == ()


def test_adjusting_on_what_is_measured_is_said(gptq):
    told = done("verify", f"{FILE}:unheld", gptq["plan"], "--adjust", "bias-correction", "--baselines", "none").stderr
    assert "measured on the calibration data, by which it was adjusted: too good to be true" in told


def test_a_report_measures_as_verify_does(gptq):
    page = gptq["folder"] / "page.html"
    asked = ("--quantizer", "gptq", "--adjust", "bias-correction")
    done("report", gptq["plan"], "--model", MODEL, *asked, "--output", page)
    assert UNADJUSTED in page.read_text()
    refused = run("report", gptq["plan"], "--adjust", "adaquant", "--output", page)
    assert (refused.exit_code, "give --model" in refused.output) == (1, True)


def test_a_metric_of_ones_own(gptq, tmp_path):
    file = tmp_path / "figures.py"
    file.write_text("def biggest(model, batch):\n    return model(batch[0]).amax(1)\n")
    found = json.loads(
        done("verify", MODEL, gptq["plan"], "--baselines", "none", "--metric", f"{file}:biggest", "--json").stdout
    )
    model, _, _, [(x, _)] = load()
    with torch.no_grad():
        assert row_of(found, "full precision")["figures"]["biggest"]["value"] == pytest.approx(
            float(model(x).amax(1).mean())
        )


QUICK = ("--evaluations", "3", "--json")


def test_refine_takes_quantiser_and_metric(gptq, tmp_path):
    asked = ("refine", MODEL, gptq["table"], *BUDGET)
    found = json.loads(done(*asked, "--quantizer", "gptq", "--metric", "loss", *QUICK).stdout)
    assert found["plan"]["provenance"]["refined"]["measured"] == "loss rise"
    file = tmp_path / "figures.py"
    file.write_text(
        "def margin(outputs):\n    top = outputs.values.topk(2, 1).values\n    return top[:, 0] - top[:, 1]\n"
    )
    other = done(*asked, "--metric", f"{file}:margin", *QUICK)
    assert json.loads(other.stdout)["plan"]["provenance"]["refined"]["measured"] == "margin drop"
    assert "scored by the error of GPTQ" in other.stderr
    model, data, _, holdout = load()
    from mpq.evaluator import Evaluator

    plan = {row["layer"]: row["option"] for row in found["plan"]["layers"]}
    quantizer, table = choose_quantizer("gptq", model, data), CostTable.load(gptq["table"])
    judge = Evaluator(model, holdout, table, quantizer=quantizer, metric="loss")
    choices = [table.options.index(plan[layer.name]) for layer in table.layers]
    assert found["heldout"]["best"] == pytest.approx(judge.measure(choices).divergence, rel=1e-5)


def test_refine_goes_on_from_a_plan(gptq, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    answer = json.loads(done("refine", MODEL, gptq["table"], *BUDGET, "--output", first, *QUICK).stdout)
    done("refine", MODEL, gptq["table"], "--start", first, "--output", second, "--evaluations", "2")
    refined = mpq.Plan.load(second).provenance["refined"]
    assert refined["selection"]["start"] == pytest.approx(answer["selection"]["best"], rel=1e-5)
    assert set(refined["heldout"]) == {"start", "best", "p_value", "samples"}
    assert [budget.limit for budget in mpq.Plan.load(second).budgets] == [b.limit for b in mpq.Plan.load(first).budgets]
    shown = done("show", second).stdout
    assert f"refined by measurement: {refinement_in_words(refined)}" in " ".join(shown.split())


def test_refine_shares_its_measurements(gptq, tmp_path):
    """The second run reads what the first measured and ends the same; another study and no study measure anew."""
    optuna = pytest.importorskip("optuna")
    storage = tmp_path / "shared.log"
    asked = ("refine", MODEL, gptq["table"], *BUDGET, *QUICK)
    alone = json.loads(done(*asked).stdout)
    first = json.loads(done(*asked, "--storage", storage).stdout)
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    trials = len(optuna.load_study(study_name="refine", storage=backend).trials)
    second = json.loads(done(*asked, "--storage", storage).stdout)
    assert len(optuna.load_study(study_name="refine", storage=backend).trials) == trials > 0
    same = ("improved", "evaluations", "plans", "selection")
    for found in (first, second):
        assert [found[key] for key in same] == [alone[key] for key in same]
        assert found["plan"]["layers"] == alone["plan"]["layers"]
    done(*asked, "--storage", storage, "--study", "other")
    assert {study.study_name for study in optuna.get_all_study_summaries(backend)} == {"refine", "other"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", MODEL, *BUDGET, "--quantizer", "gtpq"], "did you mean 'gptq'"),
        (["table", "measure", MODEL, "--quantizer", "no/folder", "--output", "t.csv"], "got 'no/folder'"),
        (["verify", MODEL, "PLAN", "--adjust", "adaqant"], "did you mean 'adaquant'"),
        (["verify", MODEL, "PLAN", "--adjust", "batch-norm-tuning"], "nothing to tune"),
        (["verify", MODEL, "PLAN", "--metric", "no.py:f"], "there is no file 'no.py'"),
        (["verify", MODEL, "PLAN", "--metric", "accuracy"], "FILE.py:function, got 'accuracy'"),
        (["verify", MODEL, "PLAN", "--output", "no/such/plan.json"], "does not exist"),
        (["verify", f"{FILE}:unheld", "PLAN", "--output", "out.json"], "give --holdout"),
        (["refine", MODEL, "TABLE", *BUDGET, "--metric", "accurcy"], "metric must be one of"),
        (["refine", MODEL, "TABLE", *BUDGET, "--study", "mine"], "give --storage"),
        (["refine", MODEL, "TABLE", *BUDGET, "--front", "latenc"], "table has no quantity 'latenc'"),
        (["refine", MODEL, "TABLE"], "--budget size=18%, or --start"),
    ],
)
def test_errors_are_one_line(gptq, arguments, message):
    names = {"PLAN": gptq["plan"], "TABLE": gptq["table"]}
    finished = run(*(names.get(argument, argument) for argument in arguments))
    assert finished.exit_code == 1
    assert message in finished.output
    assert finished.output.splitlines()[-1].startswith("error: ")


def test_weights_read_in_parts_are_rounded(tmp_path):
    from safetensors.torch import save_file

    save_file({"up.weight": torch.randn(8, 16)}, tmp_path / "model.safetensors")
    finished = run("search", tmp_path, "--options", "int4,int8", "--budget", "size=8 bits", "--quantizer", "gptq")
    assert (finished.exit_code, "--quantizer gptq needs the model" in finished.output) == (1, True)


def test_data_that_can_be_read_once_is_enough(tmp_path):
    file = tmp_path / "once.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom small_models import cnn, images\n"
        "def load():\n    return cnn(), iter(images(batches=2, samples=8))\n"
    )
    how = ("--quantizer", "gptq", "--sensitivity", "weight_error", "--refine", "2")
    assert "evaluations" in done("search", f"{file}:load", *OPTIONS, *BUDGET, *how).output


def test_settings_files_have_the_keys(gptq, tmp_path):
    settings = tmp_path / "mine.toml"
    settings.write_text('[defaults]\nquantizer = "gptq"\nadjust = ["bias-correction"]\n[verify]\nbaselines = "none"\n')
    found = json.loads(done("--config", settings, "verify", MODEL, gptq["plan"], "--json").stdout)
    assert found["adjustments"] == ["bias correction"]
    assert found["quantizer"].startswith("GPTQ(")
