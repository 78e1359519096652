"""Device files: what ships keeps the rules, and what breaks one is told where."""

import tomllib
from importlib.resources import files

import pytest

import mpq.hardware_models as hardware
from mpq.hardware_models.device_file import parse_target
from mpq.hardware_models.kernel_rows import REFUSED, first_row

SMALL = """\
schema = 1

[target]
name = "small"
kind = "gpu"
runtime = "kernels"

[[source]]
id = "sheet"
title = "data sheet"
kind = "datasheet"
read = "2026"

[[source]]
id = "guess"
title = "from memory"
kind = "estimate"
read = "2026"

[memory.dram]
bandwidth_Bps = 1e9
efficiency = 0.5
source = ["sheet"]

[[compute]]
unit = "int8-unit"
weight = ["int8"]
activation = "int8"
ops_per_s = 1e12
efficiency = 0.25
launch_overhead_s = 1e-6
align_k = 32
source = ["sheet"]
efficiency_source = ["guess"]

[[compute]]
unit = "fp-unit"
weight = "fp16"
activation = "fp16"
ops_per_s = 1e11
efficiency = 0.5
launch_overhead_s = 1e-6
source = "sheet"

[[fallback]]
weight = ["int4", "mxfp6"]
activation = "fp16"
runs_as = "fp-unit"
dequant_s_per_weight = 1e-12
source = ["guess"]
"""


def raw(name):
    return tomllib.loads(files("mpq.hardware_models").joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def plain_numbers(value):
    if isinstance(value, dict):
        return [number for entry in value.values() for number in plain_numbers(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in plain_numbers(entry)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", hardware.available())
def test_every_number_that_ships_has_a_source(name):
    target, document = hardware.load(name), raw(name)
    assert document.pop("schema") == 1
    assert sorted(number.value for number in target.numbers) == sorted(plain_numbers(document))
    assert all(number.sources and number.unit for number in target.numbers)


@pytest.mark.parametrize("name", hardware.available())
def test_every_efficiency_that_ships_is_below_one_and_every_source_is_used(name):
    target = hardware.load(name)
    assert all(0 < number.value < 1 for number in target.numbers if number.key == "efficiency")
    assert {source for number in target.numbers for source in number.sources} == set(target.sources)
    assert target.name == name


@pytest.mark.parametrize("name", hardware.available())
def test_description_shows_every_number_with_its_sources(name):
    text = hardware.load(name).describe()
    for number in hardware.load(name).numbers:
        line = next(x for x in text.splitlines() if x.startswith(f"{number.where}: {number.key} = "))
        assert f"{number.value:g} ({number.unit})" in line
        assert all(source.kind in line and source.id in line for source in number.sources)


def test_small_file_is_read():
    target = parse_target(SMALL, "small.toml")
    (roofline,) = target.models
    unit = roofline.rows[0].unit
    assert (target.name, unit["ops_per_s"], unit["align_k"], "align_n" in unit) == ("small", 1e12, 32, False)
    assert roofline.memory["bandwidth_Bps"] == 1e9
    estimates = {(number.where, number.key) for number in target.numbers if number.is_estimate}
    assert estimates == {("compute int8-unit", "efficiency"), ("fallback fp-unit", "dequant_s_per_weight")}


@pytest.mark.parametrize(
    ("weight", "activation", "unit"),
    [
        ("int8@channel", "int8@tensor", "int8-unit"),
        ("int4@group128", "fp16", "fp-unit"),
        ("mxfp6_e2m3", "fp16", "fp-unit"),
        ("int4@channel", "int8@tensor", None),
        ("uint8@channel", "int8@tensor", None),
        ("mxfp4", "fp16", None),
    ],
)
def test_pairs_find_their_unit_by_name_or_family(weight, activation, unit):
    rows = parse_target(SMALL).models[0].rows
    row = first_row(rows, weight, activation, "linear")
    assert (None if row == REFUSED else rows[row].unit["unit"]) == unit


def test_rows_may_be_for_some_kinds_of_layers_only():
    target = parse_target(SMALL.replace('runs_as = "fp-unit"', 'runs_as = "fp-unit"\nops = ["linear", "conv*"]'))
    rows, kinds = target.models[0].rows, ("linear", "conv_transpose2d", "depthwise_conv2d", "experts")
    assert [first_row(rows, "int4", "fp16", kind) for kind in kinds] == [2, 2, REFUSED, REFUSED]


# What is replaced in the file above, what by, and the message.
WRONG = [
    (
        "[target]",
        "[target",
        "small.toml: not TOML: Expected ']' at the end of a table declaration (at line 3, column 8)",
    ),
    ("schema = 1", "schema = 2", "small.toml:1: schema must be 1, got 2"),
    ('kind = "gpu"', 'kind = "tpu"', "small.toml:5: [target]: kind must be one of gpu, cpu, npu, mcu, fpga, asic, got"),
    (
        'kind = "estimate"',
        'kind = "web"',
        "small.toml:17: [[source]] number 2: kind must be one of datasheet, paper, code",
    ),
    ('runtime = "kernels"\n', "", "small.toml:3: [target]: runtime is missing"),
    (
        "efficiency = 0.25",
        "eficiency = 0.25",
        "small.toml:30: [[compute]] number 1: unknown key 'eficiency': did you mean 'efficiency'",
    ),
    ("efficiency = 0.25\n", "", "small.toml:25: [[compute]] number 1: efficiency is missing (share of the peak"),
    ("efficiency = 0.25", "efficiency = 1", "efficiency must be above 0 and below 1 (share of the peak"),
    (
        "bandwidth_Bps = 1e9",
        "bandwidth_GBps = 1",
        "21: [memory.dram]: unknown key 'bandwidth_GBps': give it in bytes a second as bandwidth_Bps",
    ),
    (
        "ops_per_s = 1e12",
        "peak_TOPS = 1",
        "'peak_TOPS': give it in operations a second, two a multiply-add, dense as ops_per_s",
    ),
    (
        "launch_overhead_s = 1e-6",
        "launch_overhead_us = 1",
        "'launch_overhead_us': give it in seconds a call as launch_overhead_s",
    ),
    (
        "bandwidth_Bps = 1e9",
        "bandwidth_Bps = -1",
        "small.toml:21: [memory.dram]: bandwidth_Bps must be above 0 (bytes a second), got -1",
    ),
    ("bandwidth_Bps = 1e9", "bandwidth_Bps = inf", "bandwidth_Bps must be a finite number (bytes a second), got inf"),
    ("bandwidth_Bps = 1e9", "bandwidth_Bps = true", "bandwidth_Bps must be a finite number (bytes a second), got True"),
    (
        "bandwidth_Bps = 1e9",
        'bandwidth_Bps = "1 GB/s"',
        "bandwidth_Bps must be a finite number (bytes a second), got '1 GB/s'",
    ),
    (
        "align_k = 32",
        "align_k = 32.5",
        "small.toml:32: [[compute]] number 1: align_k must be a whole number (inputs a tile), got 32.5",
    ),
    (
        'efficiency = 0.5\nsource = ["sheet"]',
        "efficiency = 0.5",
        "21: [memory.dram]: bandwidth_Bps has no source: add source = [...] for the table or bandwidth_source",
    ),
    (
        'efficiency_source = ["guess"]',
        'efficiency_source = ["gues"]',
        "34: [[compute]] number 1: efficiency_source: no [[source]] has the id 'gues': did you mean 'guess'?",
    ),
    (
        'efficiency_source = ["guess"]',
        "efficiency_source = []",
        "efficiency_source must be text or a list of texts, got []",
    ),
    ('weight = ["int8"]', 'weight = ["int88"]', "small.toml:27: [[compute]] number 1: weight has an unknown format"),
    (
        'weight = ["int8"]',
        'weight = ["int8@channel"]',
        "weight must name formats without granularity, got 'int8@channel': write 'int8'",
    ),
    ('weight = ["int8"]', "weight = [8]", "weight must be text or a list of texts, got [8]"),
    (
        'runs_as = "fp-unit"',
        'runs_as = "fp-unti"',
        "48: [[fallback]] number 1: runs_as: no [[compute]] has the unit 'fp-unti': did you mean 'fp-unit'?",
    ),
    (
        'runs_as = "fp-unit"',
        'runs_as = "fp-unit"\nops = "linaer"',
        "49: [[fallback]] number 1: ops must name kinds of layers, got 'linaer': did you mean 'linear'?",
    ),
    ('unit = "fp-unit"', 'unit = "int8-unit"', "small.toml:37: [[compute]] number 2: unit 'int8-unit' is there twice"),
    (
        'weight = "fp16"\nactivation = "fp16"',
        'weight = ["fp16", "int8"]\nactivation = ["fp16", "int8"]',
        "small.toml:38: [[compute]] number 2: weight 'int8' with activation 'int8' on",
    ),
    ('id = "guess"', 'id = "sheet"', "small.toml:15: [[source]] number 2: source 'sheet' is there twice"),
    (
        "[memory.dram]",
        "[memory.drum]",
        "small.toml:20: unknown table or key 'memory.drum': did you mean 'memory.dram'",
    ),
    (
        "[[fallback]]",
        "[fallback]",
        "small.toml:45: [[fallback]] number 1: fallback must be a table that begins with [[fallback]]",
    ),
    (
        "bandwidth_Bps = 1e9\nefficiency = 0.5",
        "bandwidth_Bps = 1e9",
        "small.toml:20: [memory.dram]: bandwidth_Bps and efficiency go together: efficiency is missing",
    ),
    (
        "[memory.dram]\nbandwidth_Bps = 1e9\nefficiency = 0.5",
        "[memory.dram]\ncapacity_bytes = 1e9",
        "small.toml: [memory.dram] with bandwidth_Bps is missing: [[compute]] needs it",
    ),
    (
        "bandwidth_Bps = 1e9\nefficiency = 0.5",
        'bandwidth_Bps = 1e9\nefficiency = 0.5\nholds = ["weight"]',
        "small.toml:23: [memory.dram]: holds must be one of weights, activations, got 'weight'",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_told_with_line_and_key(old, new, message):
    assert old in SMALL
    with pytest.raises(ValueError, match=r"^small\.toml") as caught:
        parse_target(SMALL.replace(old, new, 1), "small.toml")
    assert message in str(caught.value)


def test_all_problems_are_told_at_once():
    text = SMALL.replace("efficiency = 0.25", "eficiency = 0.25").replace("bandwidth_Bps", "bandwidth")
    with pytest.raises(ValueError, match="eficiency") as caught:
        parse_target(text, "small.toml")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["21", "30", "25", "20"]


@pytest.mark.parametrize("table", ["[target]", "[[source]]", "[memory.dram] with bandwidth_Bps"])
def test_a_missing_table_is_named(table):
    parts = SMALL.split("\n\n")
    text = "\n\n".join(part for part in parts if not part.startswith(table.split(" ")[0]))
    with pytest.raises(ValueError, match="is missing") as caught:
        parse_target(text, "small.toml")
    assert f"small.toml: {table} is missing" in str(caught.value)


def test_a_file_that_describes_no_family_is_told_what_it_needs():
    parts = SMALL.split("\n\n")
    text = "\n\n".join(part for part in parts if not part.startswith(("[[compute]]", "[[fallback]]")))
    with pytest.raises(ValueError, match=r"small.toml: nothing says how fast the target is: .*\[compute\]"):
        parse_target(text, "small.toml")


def test_texts_over_several_lines_do_not_shift_lines():
    text = SMALL.replace('title = "data sheet"', 'title = """\n[[compute]]\nunit = 3\n"""').replace(
        "schema = 1", "schema = 2"
    )
    text = text.replace("bandwidth_Bps = 1e9", "bandwidth_Bps = 0")
    with pytest.raises(ValueError, match="schema") as caught:
        parse_target(text, "small.toml")
    assert str(caught.value).splitlines()[1].startswith("small.toml:24: [memory.dram]: bandwidth_Bps must be above 0")


def test_loading_by_path_and_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert hardware.load(path) == hardware.load(str(path)) == parse_target(SMALL)
    assert hardware.load("nvidia-t4") == hardware.load("nvidia-t4")
    with pytest.raises(ValueError, match="unknown target 'nvidia-t': did you mean 'nvidia-t4'"):
        hardware.load("nvidia-t")
    with pytest.raises(ValueError, match=r"cannot read the device file .*nothing.toml"):
        hardware.load(tmp_path / "nothing.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read the device file"):
        hardware.load(path)
