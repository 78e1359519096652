"""`mpq solve` and `mpq pareto` on saved and hand-written tables, against enumeration of their plans."""

import csv
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mpq
from mpq import Plan
from mpq.__main__ import main
from mpq.budgets import format_quantity
from mpq.layers import Layer
from mpq.planning import predict, solve_units
from mpq.table_report import knee_of, spread
from mpq.tables import CostTable

UNITS, OPTIONS = ["conv1", "conv2", "block.fc", "head"], ["int2", "int4", "int8"]
WEIGHTS = np.array([72, 300, 1000, 200])


def table(**changes):
    rng = np.random.default_rng(3)
    scores = np.sort(rng.lognormal(-3, 1.5, (4, 3)), axis=1)[:, ::-1]
    bits = np.array([2.0, 4.0, 8.0])
    fields = {
        "units": UNITS,
        "options": OPTIONS,
        "quantities": {
            "sensitivity": scores,
            "sensitivity_se": scores * rng.uniform(0.1, 1.5, scores.shape),
            "size": WEIGHTS[:, None] * bits / 8,
            "latency": WEIGHTS[:, None] * (1 + bits * rng.uniform(0.05, 0.2, scores.shape)) * 1e-8,
        },
        "parameters": WEIGHTS,
        "layers": tuple(
            Layer(name, "linear", (int(n), 1), int(n), int(n), (1, 1), (1, int(n)))
            for name, n in zip(UNITS, WEIGHTS, strict=True)
        ),
        "offsets": {"size": 40.0},
        "reference": {"size": 4.0 * WEIGHTS.sum() + 40.0},
    }
    return CostTable(**{**fields, **changes})


def plans(costs):
    """{option index of every unit: totals} of every plan, in plain loops."""
    found = {}
    for choices in itertools.product(range(len(costs.options)), repeat=len(costs.units)):
        found[choices] = {
            name: sum(values[i, c] for i, c in enumerate(choices)) + costs.offsets.get(name, 0.0)
            for name, values in costs.quantities.items()
            if not name.endswith("_se")
        }
    return found


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answered(*arguments):
    """The JSON of a command that must succeed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "table.parquet"
    table().save(path)
    return path


@pytest.fixture
def by_hand(tmp_path):
    path = tmp_path / "hand.csv"
    costs = table()
    lines = ["unit, option, sensitivity, sensitivity_se, size [B], latency [s], area [mm2]"]
    for u, o in itertools.product(range(4), range(3)):
        cells = [repr(float(values[u, o])) for values in costs.quantities.values()]
        lines.append(", ".join([UNITS[u], OPTIONS[o], *cells, str(1 + o)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_best_plan_under_budgets_is_that_of_enumeration(saved):
    for size, latency in itertools.product((800, 1000, 1300), (1.9e-5, 2.6e-5)):
        fits = [t for t in plans(table()).values() if t["size"] <= size and t["latency"] <= latency]
        asked = ("solve", saved, "--budget", f"size={size} B", "--budget", f"latency={latency * 1e6} us")
        if not fits:
            assert run(*asked).exit_code == 3
            continue
        answer = answered(*asked)
        assert answer["totals"]["sensitivity"] == pytest.approx(min(t["sensitivity"] for t in fits))
        assert answer["proof"]["status"] == "optimal"
        chosen = tuple(OPTIONS.index(answer["options"][unit]) for unit in UNITS)
        assert answer["totals"] == pytest.approx(plans(table())[chosen])
        assert [budget["used"] for budget in answer["budgets"]] == [answer["totals"][n] for n in ("size", "latency")]


def test_the_smallest_plan_with_a_predicted_loss(saved):
    for loss in (0.06, 0.2, 1.0):
        answer = answered("solve", saved, "--minimise", "size", "--budget", f"sensitivity={loss}")
        fits = [t["size"] for t in plans(table()).values() if t["sensitivity"] <= loss]
        assert answer["totals"]["size"] == pytest.approx(min(fits))  # the 40 B outside the plan included
        assert answer["proof"]["bound"] == pytest.approx(min(fits))
        assert answer["totals"]["sensitivity"] <= loss
    text = run("solve", saved, "--minimize", "size", "--budget", "sensitivity=0.2").output
    assert "sensitivity at most 0.2" in text
    [row] = [line for line in text.splitlines() if line.startswith("size ") and "minimised" in line]
    assert row.split()[0] == "size"


def test_norms_formats_and_costs(saved):
    everything, scores = plans(table()), table().quantities["sensitivity"]
    fits = [choices for choices, t in everything.items() if t["size"] <= 1000]
    chosen = [[scores[i, c] for i, c in enumerate(choices)] for choices in fits]
    budget = ("--budget", "size=1000")
    assert answered("solve", saved, *budget, "--norm", "max")["objective"] == pytest.approx(min(map(max, chosen)))
    three = min(sum(x**3 for x in row) ** (1 / 3) for row in chosen)
    assert answered("solve", saved, *budget, "--norm", "3")["objective"] == pytest.approx(three)
    few = min(everything[c]["sensitivity"] for c in fits if len(set(c)) <= 1)
    one = answered("solve", saved, *budget, "--max-formats", "1")
    assert one["objective"] == pytest.approx(few)
    assert len(set(one["options"].values())) == 1
    dear = min(everything[c]["sensitivity"] + 0.3 * (2 in c) + 0.01 * (0 in c) for c in fits)
    costs = ("--format-cost", "int8=0.3", "--format-cost", "int2=0.01")
    assert answered("solve", saved, *budget, *costs)["objective"] == pytest.approx(dear)
    assert "minimised: the worst of sensitivity" in run("solve", saved, *budget, "--norm", "max").output


def test_robust_plans_have_the_least_worst_case(saved, tmp_path):
    costs = table()
    errors = costs.quantities["sensitivity_se"]
    worst = {
        choices: t["sensitivity"] + 2 * math.sqrt(sum(errors[i, c] ** 2 for i, c in enumerate(choices)))
        for choices, t in plans(costs).items()
        if t["size"] <= 1000
    }
    answer = answered("solve", saved, "--budget", "size=1000", "--robust", "2")
    assert answer["robust"]["worst_case"] == pytest.approx(min(worst.values()))
    assert answer["robust"]["status"] == "optimal"
    chosen = min(worst, key=worst.get)
    assert list(answer["options"].values()) == [OPTIONS[c] for c in chosen]
    path = tmp_path / "plan.json"
    text = run("solve", saved, "--budget", "size=1000", "--robust", "2", "--output", path).output
    assert "2 standard errors off" in text
    assert "at worst, 2 standard errors off (optimal" in run("show", path).output
    without = table(quantities={n: v for n, v in costs.quantities.items() if n != "sensitivity_se"})
    with pytest.raises(ValueError, match="no quantity 'sensitivity_se'"):
        without.solve({"size": 1000}, robust=1)


def test_a_plan_is_written_and_is_that_of_python(saved, tmp_path):
    path = tmp_path / "plan.json"
    result = run("solve", saved, "--budget", "size=4.5 bits", "--pin", "block.*=int4", "--output", path)
    assert result.exit_code == 0, result.output
    for text in ("block.fc", "bits a planned weight", "4.5 bits averaged over 1,572 weights", "proof: optimal"):
        assert text in result.output
    loaded = Plan.load(path)
    expected = table().solve({"size": "4.5 bits"}, pins={"block.*": "int4"})
    assert loaded.options == expected.options
    assert loaded.options["block.fc"] == "int4"
    assert loaded.predicted == pytest.approx(predict(table(), expected))
    smallest = table().solve({"sensitivity": 0.2}, objective="size")
    assert smallest.predicted == pytest.approx(predict(table(), smallest))
    assert smallest.provenance["objective"] == "size"


def test_a_table_written_by_hand_is_answered_unit_by_unit(by_hand, tmp_path):
    result = run("solve", by_hand, "--budget", "area=8")
    assert result.exit_code == 0, result.output
    for text in (*UNITS, "area at most 8 mm2", "proof: optimal"):
        assert text in result.output
    path = tmp_path / "units.csv"
    printed = run("solve", by_hand, "--budget", "area=8", "--csv", "--output", path)
    assert printed.stdout == path.read_text()
    rows = list(csv.reader(io.StringIO(path.read_text())))
    assert rows[0] == ["unit", "option"]
    assert [row[0] for row in rows[1:]] == UNITS
    assert sum(1 + OPTIONS.index(row[1]) for row in rows[1:]) <= 8
    plan = tmp_path / "plan.json"
    refused = run("solve", by_hand, "--budget", "area=8", "--output", plan)
    assert (refused.exit_code, plan.exists()) == (1, False)
    assert "write the units with --output NAME.csv" in refused.output


def test_what_more_of_a_budget_would_buy(tmp_path):
    """One unit, 4 B apart in size and 4 in loss: a byte between buys 1; 1% of 4 B buys 0.04."""
    path = tmp_path / "one.csv"
    path.write_text("unit,option,sensitivity,size [B],area [mm2]\na,int4,5,2,1\na,int8,1,6,1\n")
    asked = ("solve", path, "--budget", "size=4", "--budget", "area=3")
    prices = {budget["quantity"]: budget["shadow_price"] for budget in answered(*asked)["budgets"]}
    assert prices == pytest.approx({"size": 1.0, "area": 0.0})
    text = run(*asked).output
    assert "1% more lowers sensitivity by about" in text
    [size] = [line for line in text.splitlines() if line.startswith("size ")]
    assert size.split()[-1] == "0.04"
    [area] = [line for line in text.splitlines() if line.startswith("area ")]
    assert area.endswith("nothing: does not bind")
    assert "1% more" not in run(*asked, "--norm", "max").output


def test_thousands_of_units_are_counted_not_listed(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "many.csv"
    many = CostTable(
        units=[f"unit{i}" for i in range(3000)],
        options=["a", "b"],
        quantities={"sensitivity": rng.random((3000, 2)), "size": np.tile([1.0, 2.0], (3000, 1))},
    )
    many.save(path)
    text = run("solve", path, "--budget", "size=4 kB", "--solver", "greedy").output
    assert "3,000 units: a x" in text
    assert len(text.splitlines()) < 20


def front_by_loops(costs, resource, objective, keeps=lambda total: True):
    """(resource, objective) of every plan that no other beats, in order."""
    points = sorted((t[resource], t[objective]) for t in plans(costs).values() if keeps(t))
    front = []
    for amount, value in points:
        if not front or value < front[-1][1] * (1 - 1e-9):
            front.append((amount, value))
    return front


def test_the_frontier_is_that_of_enumeration(saved, tmp_path):
    path = tmp_path / "front.csv"
    expected = front_by_loops(table(), "size", "sensitivity")
    answer = answered("pareto", saved, "--resource", "size", "--epsilon", "0", "--output", path)
    found = [(point["size"], point["sensitivity"]) for point in answer["points"]]
    assert np.allclose(found, expected, rtol=1e-9)
    for point in answer["points"]:
        assert plans(table())[tuple(point["choices"])]["size"] == pytest.approx(point["size"])
    rows = list(csv.reader(io.StringIO(path.read_text())))
    assert rows[0] == ["size [B]", "sensitivity [loss]", *OPTIONS]
    assert [tuple(map(float, row[:2])) for row in rows[1:]] == found
    assert all(sum(map(int, row[2:])) == len(UNITS) for row in rows[1:])
    assert run("pareto", saved, "--resource", "size", "--epsilon", "0", "--csv").stdout == path.read_text()


def test_a_frontier_keeps_budgets_and_counts_what_is_outside_the_plan(saved):
    kept = ("--resource", "latency", "--budget", "size=1000", "--pin", "conv1=int4", "--epsilon", "0")
    answer = answered("pareto", saved, *kept)
    pinned = {c: t for c, t in plans(table()).items() if c[0] == 1 and t["size"] <= 1000}
    front = []
    for total in sorted(pinned.values(), key=lambda t: (t["latency"], t["sensitivity"])):
        if not front or total["sensitivity"] < front[-1][1]:
            front.append((total["latency"], total["sensitivity"]))
    assert np.allclose([(p["latency"], p["sensitivity"]) for p in answer["points"]], front, rtol=1e-9)
    smallest = answered("pareto", saved, "--resource", "latency", "--minimise", "size", "--epsilon", "0")
    expected = front_by_loops(table(), "latency", "size")  # 40 B of it outside the plan
    assert np.allclose([(p["latency"], p["size"]) for p in smallest["points"]], expected, rtol=1e-9)
    impossible = run("pareto", saved, "--resource", "latency", "--budget", "size=1%")
    assert (impossible.exit_code, "smallest that can be reached" in impossible.output) == (3, True)


def test_several_resources_are_traded_at_once(saved, tmp_path):
    path, names = tmp_path / "front.csv", ("size", "latency", "sensitivity")
    answer = answered(
        "pareto", saved, "--resource", "size", "--resource", "latency", "--epsilon", "0", "--output", path
    )
    assert answer["resource"] == ["size", "latency"]
    assert list(answer["measures"]) == list(names)
    totals = {choices: tuple(total[name] for name in names) for choices, total in plans(table()).items()}
    front = {
        point
        for point in totals.values()
        if not any(
            all(a <= b * (1 + 1e-9) for a, b in zip(other, point, strict=True))
            for other in totals.values()
            if other != point
        )
    }
    found = [tuple(point[name] for name in names) for point in answer["points"]]
    assert len(found) == len(front) > 5
    assert np.allclose(sorted(found), sorted(front), rtol=1e-9)
    for point in answer["points"]:
        assert totals[tuple(point["choices"])] == pytest.approx([point[name] for name in names])
    rows = list(csv.reader(io.StringIO(path.read_text())))
    assert rows[0] == ["size [B]", "latency [s]", "sensitivity [loss]", *OPTIONS]
    assert [tuple(map(float, row[:3])) for row in rows[1:]] == found
    shown = run(
        "pareto", saved, "--resource", "size", "--resource", "latency", "--epsilon", "0", "--points", "4"
    ).output
    lines = shown.splitlines()
    assert lines[0].split()[:4] == ["size", "latency", "sensitivity", "options"]
    assert 3 <= sum(" int" in line for line in lines) <= 4
    assert sum("knee" in line for line in lines) == 1
    assert "•" not in shown
    assert f"of {len(front)} points shown" in shown
    assert "--budget size=LIMIT --budget latency=LIMIT" in shown


def test_a_frontier_is_shown_short_with_its_ends_and_its_knee(saved):
    whole = front_by_loops(table(), "size", "sensitivity")
    text = run("pareto", saved, "--resource", "size", "--epsilon", "0", "--points", "5").output
    header, _, *rest = text.splitlines()
    rows = rest[: rest.index("")]
    assert header.split()[:2] == ["size", "sensitivity"]
    assert 3 <= len(rows) <= 5 < len(whole)
    shown = [format_quantity(whole[end][0], "B") for end in (0, -1)]
    assert [rows[0].split(" int")[0].strip().startswith(shown[0]), rows[-1].strip().startswith(shown[1])] == [True] * 2
    assert sum("knee" in row for row in rows) == 1
    assert f"{len(rows)} of {len(whole)} points shown" in text
    assert 5 < sum(line.count("•") for line in text.splitlines()) <= len(whole)


def test_the_knee_and_the_points_shown():
    x = np.arange(101.0)
    y = np.where(x < 20, 100 - 4.5 * x, 10 - 0.1 * (x - 20))
    assert knee_of(x, y) == 20
    assert knee_of(x, 100 - x) is None
    for count in (2, 3, 7, 20):
        chosen = spread(x, y, count, keep=20)
        assert chosen[0] == 0
        assert chosen[-1] == 100
        assert len(chosen) <= count
        assert count == 2 or 20 in chosen
        assert chosen == sorted(set(chosen))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["solve", "TABLE", "--budget", "sizee=30%"], 1, "no quantity 'sizee': did you mean 'size'"),
        (["solve", "TABLE", "--budget", "size=4 ms"], 1, "budget of size must have a unit of B"),
        (["solve", "TABLE", "--budget", "sensitivity_se=1"], 1, "standard errors, which do not add up"),
        (["solve", "TABLE", "--budget", "size=1%"], 3, "smallest that can be reached is 433 B"),
        (["solve", "TABLE", "--budget", "size=30%", "--minimise", "size"], 1, "objective or have a budget, not both"),
        (["solve", "TABLE", "--budget", "size=30%", "--minimise", "latncy"], 1, "did you mean 'latency'"),
        (["solve", "TABLE", "--budget", "size=30%", "--pin", "zz=int8"], 1, "'zz' matches no layer"),
        (["solve", "TABLE", "--budget", "size=30%", "--pin", "head=int3"], 1, "pin of 'head' must be an option"),
        (["solve", "TABLE", "--budget", "size=30%", "--norm", "most"], 1, "--norm must be 1, max or a number"),
        (["solve", "TABLE", "--budget", "size=30%", "--norm", "0.5"], 1, "norm must be 1"),
        (["solve", "TABLE", "--budget", "size=30%", "--format-cost", "int3=1"], 1, "format_costs of 'int3'"),
        (["solve", "TABLE", "--budget", "size=30%", "--format-cost", "int4=x"], 1, "must be a number, got 'x'"),
        (["solve", "TABLE", "--budget", "size=30%", "--solver", "gredy"], 1, "did you mean 'greedy'"),
        (["solve", "TABLE", "--budget", "size=30%", "--output", "a.txt"], 1, "--output must end in .json or .csv"),
        (["solve", "TABLE", "--budget", "size=30%", "--output", "no/a.csv"], 1, "does not exist"),
        (["solve", "TABLE", "--budget", "size=30%", "--csv", "--json"], 1, "give one of them"),
        (["solve", "no.parquet", "--budget", "size=30%"], 1, "there is no such file"),
        (["solve", "TABLE"], 2, "--budget"),
        (["solve", "TABLE", "--budget", "size=30%", "--robust", "-1"], 2, "--robust"),
        (["slove", "TABLE"], 2, "did you mean 'solve'"),
        (["pareto", "TABLE"], 2, "--resource"),
        (["pareto", "TABLE", "--resource", "sizee"], 1, "did you mean 'size'"),
        (["pareto", "TABLE", "--resource", "sensitivity"], 1, "other than the objective, got 'sensitivity'"),
        (["pareto", "TABLE", "--resource", "size", "--resource", "size"], 1, "--resource size is given twice"),
        (["pareto", "TABLE", "--resource", "size", "--resource", "latncy"], 1, "did you mean 'latency'"),
        (["pareto", "TABLE", "--resource", "size", "--output", "a.json"], 1, "--output must end in .csv"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(saved, arguments, code, message):
    result = run(*(str(saved) if argument == "TABLE" else argument for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    if code in (1, 3):
        [line] = [line for line in result.output.splitlines() if line.strip()]
        assert line.startswith("error: ")


def process(code, *arguments):
    """A fresh interpreter's output and processor time."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mpq.__file__).parents[1])}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, spent


def test_no_command_on_a_table_imports_torch_and_answers_come_fast(saved, by_hand, tmp_path):
    code = (
        "import sys\nfrom mpq.__main__ import main\n"
        "main(sys.argv[1:], standalone_mode=False)\nprint('loaded:', *sorted({'torch', 'pandas'} & set(sys.modules)))"
    )
    plan = tmp_path / "plan.json"
    output, spent = process(code, "solve", saved, "--budget", "size=30%", "--output", plan)
    assert output.splitlines()[-1] == "loaded:"
    baseline = process("import numpy")[1]
    assert spent < max(2.0, 10 * baseline)
    assert "torch" not in process(code, "solve", by_hand, "--budget", "size=80%")[0].splitlines()[-1]


def test_settings_reach_the_solver():
    started = time.process_time()
    assert solve_units(table(), {"size": 1000}, solver="ilp", gap=0.5).allocation.proof.gap <= 0.5
    assert time.process_time() - started < 10
    with pytest.raises(TypeError, match="seconds"):
        solve_units(table(), {"size": 1000}, solver="ilp", seconds=5)
