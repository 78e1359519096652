"""The report page: what it says is what the plan, the table and the verification say; how it behaves in a browser."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from reported_plans import OPTIONS, WICKED, cost_table, solved, verification
from small_models import cnn, images

import mpq
from mpq.budgets import format_quantity
from mpq.layers import Layer
from mpq.options import Option
from mpq.plan import Entry, Plan, Split
from mpq.quantizer_choice import choose_quantizer
from mpq.report_axes import Axis
from mpq.report_exchange import exchanges
from mpq.report_formats import looks
from mpq.report_layers import MOST_BARS, layer_rows, strip
from mpq.report_reproduction import commands, python_lines, record
from mpq.report_subject import Subject
from mpq.reporting import report_html, write_report
from mpq.tables import CostTable
from mpq.terminal import refinement_in_words


@pytest.fixture(scope="module")
def table():
    return cost_table()


@pytest.fixture(scope="module")
def plan(table):
    return solved(table)


@pytest.fixture(scope="module")
def page(plan, table):
    return report_html(plan, table, verification(plan, table), data="held-out", model="demo")


VOID = {"meta", "br", "input", "link", "img", "hr"}
MAY_STAY_OPEN = {"td", "th"}  # HTML closes them with the next cell


class Page(HTMLParser):
    """Elements with their attributes and own text; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag in {"td", "th", "tr"}:
            self._close_cell()
        found = [tag, dict(attributes), ""]
        self.elements.append(found)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(found)

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag in {"tr", "table", "tbody", "thead"}:
            self._close_cell()
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def _close_cell(self):
        if self.open and self.open[-1][0] in MAY_STAY_OPEN:
            self.open.pop()

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e[0] == tag and all(e[1].get(n) == v for n, v in wanted.items())]

    def tags(self):
        return [e[2] for e in self.elements if "tag" in (e[1].get("class") or "").split()]

    @property
    def layer_rows(self):
        start = next(i for i, e in enumerate(self.elements) if e[1].get("id") == "layer-table")
        rows = []
        for element in self.elements[start + 1 :]:
            if element[0] == "table":
                break
            if element[0] == "tr":
                rows.append([])
            if element[0] in ("td", "th"):
                rows[-1].append(element)
        return rows[1:]


def test_page_is_whole_and_alone(page):
    found = Page(page)
    assert page.startswith("<!doctype html>")
    assert len(found.ids) == len(set(found.ids))
    for _, attributes, _ in found.elements:
        assert not {"src", "srcset", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
        if "href" in attributes:
            assert attributes["href"][1:] in found.ids
        for name in ("aria-labelledby", "aria-controls"):
            assert attributes.get(name, found.ids[0]) in found.ids
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|//# sourceMapping|<link", page)
    assert len(found.all("script")) == 2
    assert found.all("html", lang="en")
    assert found.all("main")
    assert found.all("nav")
    assert len(found.all("h1")) == 1
    assert all(e[1].get("scope") for e in found.all("th"))
    areas = [e for e in found.all("svg") if "area" in (e[1].get("class") or "")]
    assert len(areas) == 4
    assert all(area[1]["aria-label"] for area in areas)


def test_names_are_escaped(page):
    found = Page(page)
    assert WICKED in [row[1][2] for row in found.layer_rows]
    assert not [e for e in found.elements if "onclick" in e[1]]
    assert json.loads(found.all("script", id="data")[0][2])["layers"][1] == WICKED


def test_layers_are_the_plans(page, plan, table):
    rows = Page(page).layer_rows
    assert len(rows) == len(plan.entries)
    scores = table.quantity("sensitivity")
    for place, (entry, cells) in enumerate(zip(plan.entries, rows, strict=True)):
        texts = [cell[2].strip() for cell in cells]
        column = OPTIONS.index(str(entry.choice))
        assert texts[:4] == [f"{place + 1}", entry.layer.name, "linear", f"{entry.layer.parameters:,}"]
        assert texts[4:7] == [str(entry.choice), f"{entry.value_bits:g}", format_quantity(entry.storage_bits / 8, "B")]
        assert float(texts[8]) == pytest.approx(scores[place, column], rel=0.01)
        assert float(texts[9]) == pytest.approx(scores[place].max(), rel=0.01)


def test_figures_are_the_plans(page, plan, table):
    found = Page(page)
    values = [e[2] for e in found.all("p", class_="value")]
    latency = table.quantity("latency")[range(4), [OPTIONS.index(label) for label in plan.options.values()]].sum()
    assert values[:2] == [format_quantity(plan.size_bytes, "B"), format_quantity(latency, "s")]
    assert format_quantity(plan.size_bytes, "B") in found.all("h1")[0][2]
    whats = [e[2].split("\n")[0] for e in found.all("p", class_="what")]
    assert [text.rsplit(" ", 1) for text in whats[:6]] == [
        ["size", "counted"], ["latency", "predicted"], ["energy", ""], ["KL from full precision", "measured"],
        ["loss", "measured"], ["accuracy", "measured"]]  # fmt: skip
    assert "rests on estimated device numbers" in page
    assert verification(plan, table).verdict in page.replace("&#39;", "'")


def test_nothing_predicted_is_called_measured(plan, table):
    bare = report_html(replace(plan, table=None))
    for text in (bare, report_html(plan, table)):
        assert "measured" not in Page(text).tags()
        assert "Nothing here is measured" in text
    assert "--table TABLE.parquet" in bare
    assert "--model MODEL" in bare
    assert not [e for e in Page(bare).elements if e[0] == "use" and "best" in (e[1].get("class") or "")]
    searched = replace(plan, measured={"KL": 0.25, "KL_se": 0.01, "accuracy": 0.5})
    assert "measured" in Page(report_html(searched)).tags()
    assert "0.25" in report_html(searched)


def test_calibration_data_is_owned_up_to(plan, table):
    found = verification(plan, table)
    assert "flatters" in report_html(plan, table, found, data="calibration")
    assert "flatters" not in report_html(plan, table, found, data="held-out")


def test_same_input_same_page(plan, table, page):
    assert report_html(plan, table, verification(plan, table), data="held-out", model="demo") == page


@pytest.mark.parametrize("quantity", ["size", "latency"])
def test_best_plans_are_the_front_of_all_plans(plan, table, quantity):
    """No assignment at all, with the other budget kept, is cheaper and better than one of the picture."""
    subject = Subject(plan=plan, table=table)
    picture = next(found for found in exchanges(subject) if found.quantity == quantity)
    other = ({"size", "latency"} - {quantity}).pop()
    limit, everything = subject.limits[other], []
    for choices in itertools.product(range(3), repeat=4):
        sums = {name: table.quantity(name)[range(4), list(choices)].sum() + table.offsets.get(name, 0.0)
                for name in ("size", "latency", "sensitivity")}  # fmt: skip
        if sums[other] <= limit:
            everything.append((sums[quantity], sums["sensitivity"]))
    best = picture.of("best")
    assert len(best) >= 4
    for point in best:
        assert not [
            1 for cost, loss in everything if cost <= point.cost * (1 + 1e-9) and loss < point.loss * (1 - 1e-9)
        ]
        assert min(abs(cost - point.cost) + abs(loss - point.loss) for cost, loss in everything) < 1e-9
    own = picture.of("plan")[0]
    assert own.cost == pytest.approx(plan.predicted[quantity])
    assert len(picture.of("uniform")) == 3
    assert picture.lines == (("x", subject.limits[quantity]),)
    for point in picture.of("random"):
        assert point.fits in (True, False)
        assert min(abs(cost - point.cost) + abs(loss - point.loss) for cost, loss in everything) < 1e-9


def test_measured_points_carry_what_was_measured(plan, table):
    found = verification(plan, table)
    picture = exchanges(Subject(plan=plan, table=table, verification=found))[0]
    points = {point.name: point for point in picture.of("measured")}
    assert set(points) == {"this plan, measured", "uniform int2, measured", "uniform int4, measured"}
    assert points["this plan, measured"].loss == found.plan.divergence
    assert points["uniform int4, measured"].choices.tolist() == [1, 1, 1, 1]
    assert picture.measured_y is None
    scored = cost_table(measure="score")
    other = solved(scored)
    apart = exchanges(Subject(plan=other, table=scored, verification=verification(other, scored)))[0]
    assert apart.measured_y is not None  # a score and a loss share no axis


def test_price_is_what_a_byte_buys():
    """Five bytes more lower the loss from 5 to 1, and the whole way costs 4 each."""
    layer = Layer("fc", "linear", (4, 1), 4, 4, (1, 1), (1, 4), weight_bytes=16)
    found = CostTable(units=["fc"], options=["int4", "int8"], layers=(layer,), parameters=[4],
                      quantities={"sensitivity": [[5.0, 1.0]], "size": [[200.0, 600.0]]})  # fmt: skip
    text = report_html(found.solve({"size": 400.0}))
    assert "10 B more would lower the predicted loss by about 0.1" in text  # (5 - 1) / (600 - 200) = 0.01 a byte
    assert ">binds<" in text
    assert "stops 1 of 1" in text


def test_budget_without_effect_says_so(table):
    text = report_html(table.solve({"size": "99%"}))
    assert "not the limit" in text
    assert "More of it would buy nothing" in text


def test_another_models_table_is_refused(plan, table):
    with pytest.raises(ValueError, match="another model"):
        report_html(plan, replace(table, fingerprint="xyz"))
    with pytest.raises(ValueError, match=r"table is not the plan's: .* the plan has 'stem'"):
        report_html(plan, cost_table(names=("a", "b", "c", "d")))


def test_another_device_is_refused(plan, table):
    with pytest.raises(ValueError, match="give that of the plan"):
        report_html(plan, table, device="nvidia-a100")
    assert "geektopia" in report_html(plan, table, device="nvidia-t4")


def test_another_runs_table_is_owned_up_to(plan, table):
    doubled = replace(table, quantities={**table.quantities, "sensitivity": 2 * table.quantity("sensitivity")})
    assert "the table is of another run" in report_html(plan, doubled)
    assert "the table is of another run" not in report_html(plan, table)


def test_hand_made_plans_have_a_page(plan, table):
    edited = plan.with_options({"fc": "nf4"})
    text = report_html(edited, table)
    assert "edited by hand" in text
    assert "does not price" in text
    assert "nf4" in [row[4][2] for row in Page(text).layer_rows]
    bare = Plan(entries=plan.entries, fingerprint="")
    assert "keeps no record of a search" in report_html(bare)


def test_split_layers_show_their_mix(plan):
    layer = plan.entries[0].layer
    rows = layer.weight_shape[0]
    codes = np.zeros(-(-rows // 16), np.uint8)
    codes[1] = 1
    split = Entry(layer, Split("rows:16", (Option("int4"), Option("int8")), codes))
    mixed = replace(plan, entries=(split, *plan.entries[1:]), table=None)
    found = Page(report_html(mixed))
    assert found.layer_rows[0][4][2] == f"int4 ×{len(codes) - 1:,}, int8 ×1 (rows:16)"
    bits = float(found.layer_rows[0][5][2])
    assert 4 < bits < 8
    assert bits == pytest.approx(split.value_bits, abs=0.01)


def test_thousands_of_layers_stay_below_a_megabyte():
    names = tuple(f"model.layers.{i}.self_attention.projection" for i in range(MOST_BARS + 1))
    found = cost_table(names=names)
    plan = found.solve({"size": "20%"})
    text = report_html(plan, found)
    Page(text)
    assert len(text.encode()) < 1_000_000
    drawn = strip(layer_rows(Subject(plan=plan, table=found), LOOKS))
    assert len(drawn.bars) <= MOST_BARS
    assert sum(bar.width for bar in drawn.bars) == pytest.approx(100, abs=0.5)


LOOKS = looks(Plan((), ""), OPTIONS)


def test_bars_are_in_order_of_weights_and_losses(plan, table):
    subject = Subject(plan=plan, table=table)
    bars = strip(layer_rows(subject, LOOKS)).bars
    weights = [entry.layer.parameters for entry in plan.entries]
    assert np.argsort([bar.width for bar in bars]).tolist() == np.argsort(weights).tolist()
    worst = table.quantity("sensitivity").max(1)
    assert np.argsort([bar.height for bar in bars]).tolist() == np.argsort(worst).tolist()
    assert [bar.left for bar in bars] == sorted(bar.left for bar in bars)
    widest = int(np.argmax(weights))
    assert bars[widest].text == f"{plan.entries[widest].value_bits:g}"  # colour is not the only sign


@pytest.mark.parametrize(
    "values", [[1e-9, 1.0], [3.0], [0.0, 0.0], [-5.0, 5.0], [0.0, -1e-7, 1e-4, 2.0, 3.0], [1e6, 2e6]]
)
def test_axes_keep_order_and_have_ticks_inside(values):
    axis = Axis.over("x", "loss", values)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    assert 2 <= len(axis.ticks) <= 8
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_commands_make_the_plan_again(plan, table, tmp_path, monkeypatch):
    from mpq.__main__ import main

    monkeypatch.chdir(tmp_path)
    table.save("table.parquet")
    plan.save("plan.json")
    search, solve, report = (shlex.split(line) for line in commands(Subject(plan=plan, table=table, model="demo")))
    done = CliRunner().invoke(main, [*solve[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["options"] == plan.options
    assert search[:3] == ["mpq", "search", "demo"]
    assert {"--options", "int2,int4,int8", "--seed", "3", "fisher", "--batch", "2", "nvidia-t4"} <= set(search)
    assert {one.name for one in main.commands["search"].params if f"--{one.name}" in search} >= {"options", "batch"}
    assert report[1] == "report"
    compile(python_lines(Subject(plan=plan, table=table)), "page", "exec")


def margin(outputs):
    return outputs.values.amax(1)


def test_a_refined_plan_is_refined_again():
    from mpq.__main__ import main

    model, data = cnn(), images()
    made = mpq.search(model, data, ["int2", "int3"], {"size": "45%"}, pins={"head": "int3"}, progress=False)
    plan = mpq.refine(model, data, made, evaluations=3, seed=2, level=0.5, metric="loss", kbest=4).plan
    subject = Subject(plan=plan, table=made.table, model="demo")
    _, again, _ = (shlex.split(line) for line in commands(subject))
    assert again[:4] == ["mpq", "refine", "demo", "table.parquet"]
    parsed = main.commands["refine"].make_context("refine", again[2:]).params
    assert (parsed["evaluations"], parsed["seed"], parsed["level"], parsed["metric"]) == (3, 2, 0.5, "loss")
    assert (parsed["budgets"], parsed["pins"]) == (("size=45%",), ("head=int3",))
    quantizer = choose_quantizer("gptq", model, data)
    by_gptq = mpq.refine(model, data, made, evaluations=3, quantizer=quantizer, metric=margin).plan
    searched, again, report = commands(Subject(plan=by_gptq, table=made.table, model="demo"))
    assert "--quantizer" not in searched
    assert "--quantizer gptq" in report
    assert "--quantizer gptq" in again
    assert "--metric FILE.py:margin" in again
    assert "metric=margin, quantizer=quantizer)" in python_lines(Subject(plan=by_gptq, table=made.table))
    lines = python_lines(subject)
    compile(lines, "page", "exec")
    asked = "evaluations=3, seed=2, metric='loss', kbest=4, level=0.5"
    assert f"plan = mpq.refine(model, data, plan, {asked}).plan" in lines
    assert dict(record(subject))["refined"] == refinement_in_words(plan.provenance["refined"])


def test_command_writes_the_page_without_torch(plan, table, tmp_path):
    table.save(tmp_path / "table.parquet")
    plan.save(tmp_path / "plan.json")
    code = (
        "import sys; from mpq.__main__ import main\n"
        "try: main(['report', 'plan.json', '--table', 'table.parquet', '--output', 'page.html'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written: page.html" in done.stdout
    assert (tmp_path / "page.html").read_text("utf-8") == report_html(Plan.load(tmp_path / "plan.json"), table)


def test_plan_writes_its_page(plan, tmp_path):
    path = plan.report(tmp_path / "page.html")
    assert path.read_text("utf-8") == report_html(plan)  # its own table
    assert "best plan at a budget" in path.read_text("utf-8")
    with pytest.raises(ValueError, match="does not exist"):
        write_report(plan, tmp_path / "nowhere" / "page.html")


def variables(css, dark):
    """Colours of the style sheet by name."""
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", blocks[0]))
    return found | (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", blocks[1])) if dark else {})


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_contrast(dark):
    colours = variables((Path(mpq.__file__).parent / "report.css").read_text("utf-8"), dark)

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(one, other):
        light, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (light + 0.05) / (low + 0.05)

    pairs = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("bg", "surface")]
    for ink, ground in [*pairs, ("warn", "warn-bg"), ("warn", "surface"), ("ink", "faint"), ("surface", "accent")]:
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    for mark in ("mark", "muted"):
        assert contrast(mark, "surface") >= 3, mark
