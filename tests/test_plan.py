"""Plans: what they say, how they are edited, what their files refuse."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import mpq
from mpq.layers import Layer, Network
from mpq.options import Option
from mpq.plan import AskedBudget, Entry, Plan, Split, uniform_plan
from mpq.plan_file import schema
from mpq.problem import Proof

LAYERS = (
    Layer("conv", "conv2d", (4, 2, 3, 3), 72, 700, (1, 2, 5, 5), (1, 4, 3, 3), "conv.weight", "conv", weight_bytes=288),
    Layer("fc", "linear", (6, 8), 48, 48, (1, 8), (1, 6), "fc.weight", "fc", ("head.weight",), weight_bytes=192),
)


def plan(**changes):
    fields = {
        "entries": (Entry(LAYERS[0], Option("int4", "int8")), Entry(LAYERS[1], Option("int8"))),
        "fingerprint": "f" * 64,
        "predicted": {"sensitivity": 0.1 + 0.2, "size": 100.0},
        "measures": {"sensitivity": "loss", "size": "B"},
        "proof": Proof("optimal", 0.3, 0.0),
        "budgets": (AskedBudget("size", "25%", 122.0, "B", "size at most 25%"),),
        "outside": {"size": 8.0},
        "provenance": {"seed": 0, "options": ["int4/int8", "int8"], "note": "ü"},
    }
    return Plan(**{**fields, **changes})


def split_plan(granularity="rows:4", codes=(0, 1)):
    split = Split(granularity, (Option("int2"), Option("int8")), np.array(codes, np.uint8))
    return plan(entries=(plan().entries[0], Entry(LAYERS[1], split)))


def test_what_a_plan_says():
    p = plan()
    assert p.options == {"conv": "int4/int8", "fc": "int8"}
    assert p.weight_bits == {"conv": 4, "fc": 8}
    bits = (72 * 4 + 4 * 16) + (48 * 8 + 6 * 16)
    assert p.average_bits == pytest.approx(bits / 120)
    assert p.size_bytes == pytest.approx(bits / 8 + 8)
    assert p.value_bytes == (72 * 4 + 48 * 8) / 8
    assert p.full_bytes == 288 + 192 + 8
    assert "2 layers" in repr(p)


def test_a_split_layer_counts_its_index_and_every_unit_on_its_own():
    p = split_plan()
    rows = (4 * 8 * 2 + 4 * 16) + (2 * 8 * 8 + 2 * 16)
    assert p.entries[1].storage_bits == rows + 2  # one bit says which of two options each of two units takes
    assert p.weight_bits["fc"] == pytest.approx((4 * 2 + 2 * 8) / 6)
    assert p.options["fc"] == "rows:4(int2 x1, int8 x1)"


@pytest.mark.parametrize("p", [plan(), split_plan(), split_plan("groups:5", [0, 1] * 6), plan(proof=None, budgets=())])
def test_the_way_to_disk_and_back_is_exact(tmp_path, p):
    path = tmp_path / "plan.json"
    p.save(path)
    assert Plan.load(path) == p
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_saved_plans_keep_to_the_shipped_schema(tmp_path):
    shipped = json.loads((Path(mpq.__file__).parent / "plan.schema.json").read_text())
    assert shipped == json.loads(msgspec.json.encode(schema()))
    split_plan().save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    record = shipped["$defs"]["PlanRecord"]
    assert set(record["required"]) <= set(saved) <= set(record["properties"])
    assert saved["schema_version"] == 1


def edited(tmp_path, change):
    path = tmp_path / "plan.json"
    plan().save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=999), "schema_version 999, this mpq reads version 1"),
        (lambda raw: raw.pop("schema_version"), "not an mpq plan"),
        (lambda raw: raw["layers"][0].update(option="int2"), "changed after mpq wrote it"),
        (lambda raw: raw["predicted"].update(sensitivity=0.0), "changed after mpq wrote it"),
        (lambda raw: raw.pop("layers"), r"missing required field `layers`"),
        (lambda raw: raw.update(extra=1), "unknown field `extra`"),
        (lambda raw: raw["layers"][0]["layer"].update(parameters="many"), r"\$\.layers\[0\]\.layer\.parameters"),
    ],
)
def test_files_that_were_changed_are_refused_with_the_reason(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Plan.load(edited(tmp_path, change))


def test_truncated_missing_and_foreign_files_are_errors(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="cannot read plan"):
        Plan.load(path)
    plan().save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole JSON file"):
        Plan.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not an mpq plan"):
        Plan.load(path)


def test_edited_plans_lose_what_no_longer_holds_and_name_their_pins():
    changed = plan().with_options({"f*": "int4"})
    assert changed.options == {"conv": "int4/int8", "fc": "int4"}
    assert changed.proof is None
    assert changed.predicted == {"size": changed.size_bytes}
    assert changed.pins() == {"fc": "int4"}
    assert changed.pins("conv") == {"conv": "int4/int8"}
    assert plan().options["fc"] == "int8"
    with pytest.raises(ValueError, match="'zz' matches no layer"):
        plan().with_options({"zz": "int4"})
    with pytest.raises(ValueError, match="'fc' is split"):
        split_plan().pins("fc")
    with pytest.raises(ValueError, match="no layer 'cnv'.*'conv'"):
        plan().pins("cnv")


def test_uniform_plans_give_every_layer_the_same():
    assert set(uniform_plan(plan(), Option("int2")).options.values()) == {"int2"}


def test_an_unwritable_path_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        plan().save(tmp_path / "no" / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    from mpq.atomic import write_atomically

    path = tmp_path / "file.txt"
    path.write_text("old")

    def fails(partial):
        partial.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_codes_beyond_the_options_are_refused(tmp_path):
    bad = split_plan()
    split = replace(bad.entries[1].choice, codes=np.array([0, 7], np.uint8))
    bad = replace(bad, entries=(bad.entries[0], replace(bad.entries[1], choice=split)))
    bad.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="option that its split does not list"):
        Plan.load(tmp_path / "plan.json")


def test_plans_need_units_that_fit_their_layer(tmp_path):
    bad = split_plan(codes=(0, 1, 1))
    bad.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="'fc' has 3 codes.*2 units"):
        Plan.load(tmp_path / "plan.json")


def test_layers_view_of_a_network_is_what_units_use():
    assert len(Network((LAYERS[1],)).units("rows:4")) == 2


def test_uniform_plans_leave_pinned_layers_alone():
    pinned = plan(provenance={"candidates": {"conv": ["int4/int8"], "fc": ["int2", "int8"]}})
    assert uniform_plan(pinned, Option("int2")).options == {"conv": "int4/int8", "fc": "int2"}
