"""What notebooks show: well-formed, escaped, without scripts or style sheets, and short however long the thing is."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from pictured import OPTIONS, table_of

import mpq.hardware_models
from mpq.allocation import Allocation, Proof
from mpq.html_card import ROWS, card, strip, table
from mpq.layers import Network
from mpq.options import Option
from mpq.plan import Entry, Plan, Split

VOID = {"br", "img", "path", "hr"}
HOSTILE = "<script>alert('{}')</script>\"&"


class Page(HTMLParser):
    """Checks that elements are closed in order; collects their names, texts and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def nouns(layers=6, **table_settings):
    costs = table_of(layers, **table_settings)
    front = costs.pareto("size", epsilon=0.05)
    measured = replace(
        front,
        standard_error=np.ones(len(front)),
        provenance={"measured": "KL", "plans": 40},
        is_heuristic=True,
    )
    return {
        "plan": costs.solve({"size": "35%"}, pins={"*0*": "int8"}),
        "table": costs,
        "frontier": front,
        "measured": measured,
        "gain": front.compare(costs.pareto("size", epsilon=0.5)),
        "allocation": front.allocation(at="40%"),
        "network": Network(
            costs.layers, siblings=((costs.layers[0].name, costs.layers[1].name),), skipped={"n": "why"}
        ),
    }


DEVICES = {name: mpq.hardware_models.load(name) for name in ("nvidia-t4", "gap8", "systolic")}
DEVICES["storage"] = mpq.hardware_models.storage()
SMALL, LARGE, RUDE = nouns(), nouns(200), nouns(6, name=HOSTILE)


@pytest.mark.parametrize("noun", [*SMALL.values(), *LARGE.values(), *RUDE.values(), *DEVICES.values()])
def test_pages_are_safe_in_any_notebook(noun):
    page = Page(noun._repr_html_())
    assert not {"script", "style", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "href", "class", "id"}
        assert "url(" not in value
        if name == "style" and "color" in value.replace("border-color", ""):
            colours = [rule for rule in value.split(";") if rule.startswith(("color:", "background:#"))]
            assert len(colours) != 1 or not colours[0].startswith(
                "color:"
            )  # text has its own colour on one of ours only
    assert "http" not in noun._repr_html_()


@pytest.mark.parametrize("kind", RUDE)
def test_names_are_escaped(kind):
    text = RUDE[kind]._repr_html_()
    assert "<script" not in text
    if kind not in ("frontier", "measured", "gain"):
        name = RUDE["table"].layers[0].name
        page = Page(text)
        assert name in [value for key, value in page.attributes if key == "title"]


@pytest.mark.parametrize("kind", LARGE)
def test_long_ones_are_short_and_say_so(kind):
    text = LARGE[kind]._repr_html_()
    assert len(text) < 60_000
    rows = Page(text).tags.count("tr")
    assert rows <= 2 * (ROWS + 2)
    assert len(repr(LARGE[kind])) < 700
    if kind in ("plan", "allocation", "network"):
        assert "… 180 more layers, 200 in all" in text
    if kind == "table":
        assert "sensitivity of 20 of 200 units" in text


def test_a_plan_shows_its_numbers():
    plan = SMALL["plan"]
    page = Page(plan._repr_html_())
    for entry in plan.entries:
        assert entry.layer.name in page.texts
        assert f"{entry.layer.parameters:,}" in page.texts
    assert f"sensitivity {plan.predicted['sensitivity']:.4g}" in page.text
    assert plan.budgets[0].meaning in page.text
    assert "optimal" in page.text
    assert "measured" not in page.text
    measured = replace(plan, measured={"KL": 0.0123, "KL_se": 0.5}, edited=("blocks.1.fc",), proof=None)
    text = Page(measured._repr_html_()).text
    assert "measured on held-out data: KL 0.0123" in " ".join(text.split())
    assert "set by hand: blocks.1.fc" in " ".join(text.split())
    assert "optimal" not in text


def test_split_layers_and_empty_plans():
    layer = SMALL["table"].layers[0]
    codes = np.tile([0, 1], layer.weight_shape[0] // 2).astype(np.uint8)
    plan = Plan((Entry(layer, Split("rows:1", (Option("int4"), Option("int8")), codes)),), "")
    assert "int4 × 4" in Page(plan._repr_html_()).text
    assert "0 layers" in Page(Plan((), "")._repr_html_()).text
    assert Page(Network(())._repr_html_()).text


def test_a_table_shows_what_it_can_reach():
    costs = SMALL["table"]
    page = Page(costs._repr_html_())
    values = costs.quantities["sensitivity"]
    for value in values.ravel():
        assert f"{value:.3g}" in page.texts
    assert list(OPTIONS) == [text for text in page.texts if text in OPTIONS][:3]
    quantities = {name: array.copy() for name, array in costs.quantities.items()}
    quantities["latency"][0, 0] = np.inf
    masked = Page(replace(costs, quantities=quantities)._repr_html_())
    assert "1 option without a finite number, see table.masked" in masked.text
    assert "–" in masked.texts


def test_measured_is_never_called_predicted():
    assert "predicted sensitivity" in Page(SMALL["frontier"]._repr_html_()).text
    page = Page(SMALL["measured"]._repr_html_())
    assert "measured KL ± standard error" in page.text
    assert "predicted" not in page.text
    assert "among 40 measured plans" in page.text
    shown = [f"{value:.4g} ± 1" for value in SMALL["measured"].objective[[0, -1]]]
    assert set(shown) <= set(page.texts)


def test_every_number_of_a_device_with_its_source():
    frame = DEVICES["gap8"].to_frame()
    assert len(frame) == len(DEVICES["gap8"].numbers)
    assert frame[["unit", "kind", "source", "title"]].ne("").all(axis=None)
    page = Page(DEVICES["gap8"]._repr_html_())
    for row in frame.itertuples():
        assert row.unit in page.texts
        assert f"{row.value:g}" in page.texts
    estimates = int((frame["kind"] == "estimate").sum())
    assert f"{estimates} of {len(frame)} numbers rest on one" in page.text
    assert repr(DEVICES["gap8"]).endswith(f"{len(frame)} numbers, {estimates} of them estimates)")
    assert "\n" not in repr(DEVICES["nvidia-t4"])


def test_frames_are_tidy():
    plan, costs = SMALL["plan"], SMALL["table"]
    frame = plan.to_frame()
    assert list(frame.index) == list(plan.options)
    assert frame["size"].sum() == pytest.approx(plan.size_bytes)
    for name in ("sensitivity", "latency"):
        assert frame[name].sum() == pytest.approx(plan.predicted[name])
        assert frame.attrs["measures"][name] == costs.measures[name]
    assert list(replace(plan, table=None).to_frame().columns) == ["kind", "weights", "macs", "option", "bits", "size"]
    layers = SMALL["network"].to_frame()
    assert layers.index.name == "layer"
    assert layers["parameters"].tolist() == [layer.parameters for layer in costs.layers]
    chosen = SMALL["allocation"].to_frame()
    assert chosen["option"].tolist() == list(SMALL["allocation"].options)
    assert chosen.attrs["objective"] == SMALL["allocation"].objective


def test_tables_count_what_they_leave_out():
    rows = [(str(number),) for number in range(ROWS + 1)]
    page = Page(str(table(("x",), rows, what="things")))
    assert "… 1 more things, 21 in all" in page.text
    assert [text for text in page.texts if text.isdigit()] == [str(n) for n in range(ROWS + 1) if n != 15]
    whole = Page(str(table(("x",), rows[:ROWS], what="things")))
    assert "more" not in whole.text


def test_a_strip_of_many_layers_joins_neighbours():
    cells = [(1.0, "#aaaaaa" if number % 500 else "#bbbbbb", f"layer {number}") for number in range(1000)]
    page = Page(str(strip(cells)))
    widths = [float(value.split("flex:")[1].split()[0]) for key, value in page.attributes if "flex:" in value]
    assert widths == [1.0, 499.0, 1.0, 499.0]
    assert ("title", "layer 1 … layer 499") in page.attributes


def test_texts_of_cards_are_escaped():
    assert "<b>" not in card("<b>", "<b>")


def test_options_and_resources_are_escaped():
    rude = ("<script>", "<i>")
    allocation = Allocation(np.array([0, 1]), 1.0, {"<u>": 2.0}, Proof("optimal"), ("a", "b"), rude)
    costs = replace(SMALL["table"], options=("<script>", "int4", "int8"))
    for noun in (allocation, costs, costs.pareto("size")):
        text = noun._repr_html_()
        assert "&lt;script&gt;" in text
        assert not {"script", "i", "u"} & set(Page(text).tags)


def test_an_allocation_without_names():
    bare = Allocation(np.array([0]), 1.0, {"size": 2.0}, Proof("feasible", 0.5, 0.5), (), ("int4",))
    assert "feasible, gap 0.5" in Page(bare._repr_html_()).text
    assert bare.to_frame().index.tolist() == ["layer 0"]
