"""Pictures: what is drawn is what the nouns hold, on the user's own axes, whatever the numbers and names are."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from pictured import OPTIONS, table_of

import mpq.hardware_models
from mpq.allocation import Allocation, Proof
from mpq.format_colours import ACCENT, PALETTE
from mpq.layers import Network
from mpq.options import Option
from mpq.picture import Axis, Bars, Points, axis_of, below_note, layer_ticks, short_name, thinned
from mpq.plan import Entry, Plan, Split
from mpq.solvers.pareto import pareto_frontier

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib: mpq-search[explore]")
matplotlib.use("Agg")
pyplot = pytest.importorskip("matplotlib.pyplot")
plotly = pytest.importorskip("plotly.graph_objects", reason="interactive pictures need plotly: mpq-search[explore]")

TABLE = table_of(6)
FRONT = TABLE.pareto("size")
PLAN = TABLE.solve({"size": "35%"})
NETWORK = Network(TABLE.layers)
MEASURED = replace(
    FRONT,
    objective=np.abs(FRONT.objective) + 1e-3,
    standard_error=np.abs(FRONT.objective) / 5 + 1e-4,
    provenance={"measured": "KL"},
)
TWO = replace(pareto_frontier(TABLE.problem({}), ["size", "latency"]), table=TABLE, minimised="sensitivity")
DEVICE = mpq.hardware_models.load("nvidia-t4")
NOUNS = {
    "plan": PLAN,
    "table": TABLE,
    "frontier": FRONT,
    "measured frontier": MEASURED,
    "two resources": TWO,
    "allocation": FRONT.allocation(at="40%"),
    "network": NETWORK,
    "device": DEVICE,
}


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    pyplot.close("all")  # another file's, in the same process
    yield
    pyplot.close("all")


@pytest.mark.parametrize("noun", NOUNS.values(), ids=NOUNS)
def test_axes_to_build_on(noun, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_: pytest.fail("shown"))
    before = dict(matplotlib.rcParams)
    _, mine = pyplot.subplots()
    assert noun.plot(mine) is mine
    assert noun.plot(ax=None) is not mine
    assert len(pyplot.get_fignums()) == 2
    assert mine.get_title(loc="left")
    mine.figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="leave one of them out"):
        noun.plot(mine, interactive=True)


@pytest.mark.parametrize("noun", NOUNS.values(), ids=NOUNS)
def test_interactive_ones_hold_the_same_numbers(noun):
    figure = noun.plot(interactive=True)
    assert isinstance(figure, plotly.Figure)
    assert figure.to_json()
    for trace in figure.data:
        assert len(trace.x) == len(trace.y)
        assert trace.hovertext is None or len(trace.hovertext) == len(trace.x)


def heights(ax, colour):
    """Tops of the bars of a colour, in the order of their left ends."""
    wanted = matplotlib.colors.to_rgba(colour)
    bars = [bar for bar in ax.patches if bar.get_facecolor() == wanted]
    return [bar.get_y() + bar.get_height() for bar in sorted(bars, key=lambda bar: bar.get_x())]


def test_the_strip_of_a_plan():
    ax = PLAN.plot(quantity="bits")
    lefts = sorted((bar.get_x(), bar.get_width()) for bar in ax.patches)
    assert len(lefts) == 6
    for (left, width), (after, _) in itertools.pairwise(lefts):
        assert left + width == pytest.approx(after)
    assert [width for _, width in lefts] == [entry.layer.parameters for entry in PLAN.entries]
    for bits in (2, 4, 8):
        expected = [8.0 * (bits == 8) or float(bits) for entry in PLAN.entries if entry.value_bits == bits]
        assert heights(ax, PALETTE[bits]) == expected
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {label.split(" (")[0] for label in labels} == set(PLAN.options.values())


def test_the_height_of_a_layer_is_what_it_takes():
    rows = np.arange(6)
    codes = np.array([OPTIONS.index(label) for label in PLAN.options.values()])
    planned = TABLE.quantities["latency"][rows, codes]
    ax = PLAN.plot(quantity="latency")
    assert ax.get_ylabel() == "latency [µs]" or ax.get_ylabel() == "latency [us]"
    tops = sorted((bar.get_x(), bar.get_y() + bar.get_height()) for bar in ax.patches if bar.get_alpha() == 1.0)
    np.testing.assert_allclose([top for _, top in tops], planned * 1e6)
    pale = sorted((bar.get_x(), bar.get_y() + bar.get_height()) for bar in ax.patches if bar.get_alpha() != 1.0)
    np.testing.assert_allclose([top for _, top in pale], TABLE.quantities["latency"][:, 0] * 1e6)


def test_layers_with_hardly_any_weights_are_still_seen():
    layers = [replace(layer, parameters=1 if place else 10**6) for place, layer in enumerate(TABLE.layers)]
    entries = [replace(entry, layer=layer) for entry, layer in zip(PLAN.entries, layers, strict=True)]
    widths = [bar.get_width() for bar in replace(PLAN, entries=tuple(entries), table=None).plot().patches]
    assert min(widths) > 0.02 * sum(widths)


def test_a_plan_without_its_table_and_split_layers():
    bare = replace(PLAN, table=None)
    assert bare.plot().get_ylabel() == "bits of a stored weight"
    with pytest.raises(ValueError, match="needs the plan's table"):
        bare.plot(quantity="sensitivity")
    with pytest.raises(ValueError, match="no quantity 'sise'.*did you mean 'size'"):
        PLAN.plot(quantity="sise")
    codes = np.tile([0, 1], TABLE.layers[0].weight_shape[0] // 2).astype(np.uint8)
    split = Split("rows:1", (Option("int4"), Option("int8")), codes)
    plan = Plan((Entry(TABLE.layers[0], split), *bare.entries[1:]), "")
    assert [text.get_text() for text in plan.plot().get_legend().get_texts()][-1].startswith(("split", "int8"))
    assert any(trace.name == "split (1 layer)" for trace in plan.plot(interactive=True).data)


def lines(ax):
    return {line.get_color(): line for line in ax.lines}


def test_a_table_has_a_line_an_option():
    ax = TABLE.plot()
    drawn = lines(ax)
    values = TABLE.quantities["sensitivity"]
    for column, bits in ((0, 2), (1, 4)):
        np.testing.assert_allclose(drawn[PALETTE[bits]].get_ydata(), values[:, column])
    assert [text.get_text() for text in ax.get_xticklabels()] == list(TABLE.units)


def test_what_a_logarithmic_axis_has_no_place_for_is_at_its_floor():
    ax = TABLE.plot()
    assert ax.get_yscale() == "log"
    shown = lines(ax)[PALETTE[8]].get_ydata()
    values = TABLE.quantities["sensitivity"]
    assert (shown > 0).all()
    assert shown[0] == shown[-1] == values[values > 0].min() / 2
    assert "2 values at or below 0 are drawn at the lower end" in ax.get_xlabel()
    for noun in (PLAN, TABLE.pareto("size")):
        noun.plot().figure.canvas.draw()
    negative = replace(TABLE, quantities={**TABLE.quantities, "sensitivity": -TABLE.quantities["sensitivity"]})
    ax = negative.plot()
    assert ax.get_yscale() == "linear"
    np.testing.assert_allclose(lines(ax)[PALETTE[8]].get_ydata(), -values[:, 2])


def test_one_quantity_against_another():
    ax = TABLE.plot(quantity="latency", against="size", plan=PLAN)
    points = np.concatenate([drawn.get_offsets() for drawn in ax.collections])
    expected = {
        (round(float(size), 6), round(float(latency) * 1e6, 6))
        for size, latency in zip(TABLE.quantities["size"].ravel(), TABLE.quantities["latency"].ravel(), strict=True)
    }
    assert {(round(float(x), 6), round(float(y), 6)) for x, y in points} == expected
    ring = next(drawn for drawn in ax.collections if drawn.get_label() == "the plan")
    np.testing.assert_allclose(ring.get_offsets()[:, 0].sum(), PLAN.predicted["size"])


def test_many_units_are_spread_and_said():
    big = table_of(2500)
    ax = big.plot()
    assert all(len(line.get_xdata()) == 2000 for line in ax.lines)
    assert "2000 of 2500 units" in ax.get_xlabel()


def test_a_frontier_is_a_staircase():
    ax = FRONT.plot(uniform=False)
    stairs = ax.lines[0]
    assert stairs.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(stairs.get_xdata(), FRONT.resource / 1e3)
    np.testing.assert_allclose(stairs.get_ydata(), FRONT.objective)
    assert ax.get_xlabel() == "size [kB]"
    assert ax.get_ylabel() == "predicted sensitivity [loss]"
    assert FRONT.plot(uniform=False, interactive=True).data[0].line.shape == "hv"


def test_marks_of_a_frontier():
    ax = FRONT.plot(plan=PLAN, budget="1 kB", points={"mine": [(700.0, 0.1), (800.0, 0.2)], "again": PLAN})
    marks = {drawn.get_label(): np.asarray(drawn.get_offsets()) for drawn in ax.collections}
    place = [PLAN.predicted["size"] / 1e3, PLAN.predicted["sensitivity"]]
    np.testing.assert_allclose(marks["the plan"], [place])
    np.testing.assert_allclose(marks["again"], [place])
    np.testing.assert_allclose(marks["mine"], [[0.7, 0.1], [0.8, 0.2]])
    whole = TABLE.quantities
    for column, label in enumerate(OPTIONS[:2]):
        expected = [[whole["size"][:, column].sum() / 1e3, whole["sensitivity"][:, column].sum()]]
        np.testing.assert_allclose(marks[f"all {label}"], expected)
    across = {line.get_label(): line.get_xdata()[0] for line in ax.lines if line.get_color() == ACCENT}
    assert across["size at most 1.00 kB"] == 1.0
    assert PLAN.budgets[0].limit / 1e3 in across.values()


def test_uniform_marks_keep_to_what_is_allowed():
    quantities = {name: values.copy() for name, values in TABLE.quantities.items()}
    for values in quantities.values():
        values[2, 0] = np.nan
    ax = replace(TABLE, quantities=quantities).pareto("size").plot()
    mark = next(drawn for drawn in ax.collections if drawn.get_label() == "all int2")
    nearest = TABLE.quantities["size"][:, 0].sum() + np.diff(TABLE.quantities["size"][2, :2])[0]
    assert mark.get_offsets()[0][0] == pytest.approx(nearest / 1e3)


def test_measured_frontiers_show_errors_and_no_predictions():
    ax = MEASURED.plot(others={"again": MEASURED})
    assert ax.get_ylabel() == "measured KL"
    bars = [drawn for drawn in ax.collections if isinstance(drawn, matplotlib.collections.LineCollection)]
    ends = np.array([segment[:, 1] for segment in bars[0].get_segments()])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * MEASURED.standard_error)
    assert not any(text.get_text().startswith("all ") for text in ax.get_legend().get_texts())
    plan = MEASURED.plan(at="40%")
    place = next(d for d in MEASURED.plot(plan=plan).collections if d.get_label() == "the plan").get_offsets()[0]
    assert place[1] == pytest.approx(plan.provenance["frontier"]["value"])
    with pytest.raises(ValueError, match="no point of this measured frontier"):
        MEASURED.plot(plan=PLAN.with_options({"*": "int8", "*0*": "int2"}))


def test_two_resources_are_coloured_by_the_objective():
    ax = TWO.plot(plan=PLAN, budget={"latency": "0.9 ms"})
    cloud = ax.collections[0]
    np.testing.assert_allclose(
        cloud.get_offsets(), TWO.resource / [1e3, 1e-6 if TWO.resource[:, 1].max() < 1e-3 else 1e-3]
    )
    assert len(cloud.get_array()) == len(TWO)
    assert ax.get_ylabel().startswith("latency [")
    figure = TWO.plot(interactive=True)
    assert figure.data[0].type == "scatter3d"
    assert figure.layout.scene.zaxis.title.text == "predicted sensitivity [loss]"


def test_wrong_marks_are_refused():
    with pytest.raises(ValueError, match=r"a point needs 2 numbers \(size, sensitivity\)"):
        FRONT.plot(points={"mine": (1.0, 2.0, 3.0)})
    with pytest.raises(ValueError, match="'other' trades latency, this frontier size"):
        FRONT.plot(others={"other": TABLE.pareto("latency")})
    with pytest.raises(ValueError, match="must have a unit of B"):
        FRONT.plot(budget="3 ms")
    with pytest.raises(ValueError, match="knows its table"):
        replace(FRONT, table=None).plot(plan=PLAN)
    assert replace(FRONT, table=None).plot().get_xlabel() == "size"


def test_an_allocation_of_options_that_are_no_formats():
    names = ("a", "b")
    allocation = Allocation(np.array([1, 0]), 1.0, {}, Proof("optimal"), names, ("slow", "fast"))
    ax = allocation.plot()
    assert ax.get_ylabel() == "option"
    assert sorted(bar.get_height() for bar in ax.patches) == [1.0, 2.0]
    assert list(allocation.to_frame()["option"]) == ["fast", "slow"]


def test_shares_of_a_network():
    ax = NETWORK.plot()
    weights = np.array([layer.parameters for layer in NETWORK.layers])
    np.testing.assert_allclose(heights(ax, PALETTE[8]), 100 * weights / weights.sum())
    assert len(table_of(61).layers) == len(Network(table_of(61).layers).plot().lines[0].get_xdata())


def test_numbers_of_a_device():
    ax = DEVICE.plot(key="launch_overhead_s")
    values = [number.value for number in DEVICE.numbers if number.key == "launch_overhead_s"]
    np.testing.assert_allclose(sorted(bar.get_height() for bar in ax.patches), sorted(values))
    assert len(DEVICE.plot().patches) == sum(number.key == "ops_per_s" for number in DEVICE.numbers)
    with pytest.raises(ValueError, match="did you mean 'efficiency'"):
        DEVICE.plot(key="eficiency")
    with pytest.raises(ValueError, match="storage has no numbers"):
        mpq.hardware_models.storage().plot()
    for name in mpq.hardware_models.available():
        assert mpq.hardware_models.load(name).plot().patches
        pyplot.close("all")


def test_long_names_are_cut_and_stay_apart():
    table = table_of(30, name="model.decoder.layers.{}.self_attention.query_key_value_projection")
    ticks = [text.get_text() for text in table.plot().get_xticklabels()]
    assert max(map(len, ticks)) <= 26
    assert short_name("short") == "short"
    assert layer_ticks(["x"] * 41) is None
    hover = table.plot(interactive=True).data[0].hovertext[3]
    assert hover.startswith("model.decoder.layers.3.self_attention.query_key_value_projection<br>")


@pytest.mark.parametrize("name", ["<b onclick=x>{}</b><script>alert(1)</script>", "<script>{}</script>"])
def test_plotly_reads_no_markup_of_names(name):
    table = table_of(3, name=name)
    for noun in (table, table.solve({"size": "35%"}), Network(table.layers), table.pareto("size").allocation(at="40%")):
        text = noun.plot(interactive=True).to_json()
        assert "<script" not in text.replace("\\u003c", "<")
        assert "&lt;script" in text.replace("\\u0026", "&")


def test_axes_choose_units_and_scales():
    assert axis_of("size", [[1e3, 9e4]], "B") == Axis(title="size [kB]", unit=1e3)
    assert axis_of("x", [[1.0, 100.0]]).is_log
    assert not axis_of("x", [[1.0, 99.0]]).is_log
    assert not axis_of("x", [[-1.0, -5.0, 1e-9, 1.0]] * 2 + [[-1.0]]).is_log
    assert axis_of("x", []).title == "x"
    assert axis_of("x", [[np.nan, np.inf]]).placed([3.0])[0] == 3.0
    assert np.isnan(Axis(is_log=True).placed([0.0])[0])
    assert below_note(Axis(), [-1.0]) == ""
    assert thinned(3).tolist() == [0, 1, 2]
    assert thinned(10**6, 5).tolist() == [0, 250000, 500000, 749999, 999999]


def test_bars_of_one_picture_stand_on_one_line():
    bars = [Bars(left=np.zeros(1), width=np.ones(1), height=np.array([high]), colour="#000000") for high in (1e-3, 1.0)]
    from mpq.picture import Picture

    picture = Picture(x=Axis(), y=Axis(is_log=True), marks=(*bars, Points(x=np.zeros(1), y=np.ones(1))))
    assert {bar.get_y() for bar in picture.drawn().patches} == {5e-4}
    assert {trace.base for trace in picture.drawn(interactive=True).data if trace.type == "bar"} == {5e-4}


@pytest.mark.parametrize(("library", "interactive"), [("matplotlib", False), ("plotly", True)])
def test_a_missing_library_is_named(library, interactive, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"pip install 'mpq-search\[explore\]'"):
        FRONT.plot(interactive=interactive)


def test_saved_tables_are_drawn_without_torch(tmp_path):
    TABLE.save(tmp_path / "table.parquet")
    code = f"""
import sys, matplotlib
matplotlib.use("Agg")
from mpq.tables import CostTable
table = CostTable.load({str(tmp_path / "table.parquet")!r})
front = table.pareto("size")
plan = front.plan(front.knee())
for noun in (table, front, plan):
    noun.plot(), noun.plot(interactive=True), noun._repr_html_()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
