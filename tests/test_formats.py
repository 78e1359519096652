"""Number formats: names, bits, and what the parser refuses."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.formats import (
    GGUF_BLOCKS,
    MSE,
    TENSOR,
    Granularity,
    Integer,
    Minifloat,
    MinMax,
    NumberFormat,
    Percentile,
    parse,
)

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "gguf_bits_per_weight.json"

FREE = [f"{kind}{bits}" for kind in ("int", "uint") for bits in range(2, 17)]
FREE += [f"fp{1 + e + m}_e{e}m{m}" for e in range(1, 8) for m in range(7) if 3 <= 1 + e + m <= 8] + ["nf4"]
FREE += [f"{kind}{bits}" for kind in ("ulog", "ulogsqrt") for bits in range(2, 9)]
CODED, LOG = [f"bcq{bits}" for bits in range(1, 5)], [f"log{bits}" for bits in range(2, 9)]
PLAIN = ["fp16", "bf16", "fp32", "fp64", "fixed1.7", "fixed8.8", "fixed16.16", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2"]
PLAIN += ["mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4", *GGUF_BLOCKS]

granularities = st.sampled_from(["", "@tensor", "@channel", "@token"]) | st.integers(1, 4096).map("@group{}".format)
ranges = st.sampled_from(["", "@minmax", "@mse"]) | st.floats(50, 100, exclude_min=True).map(
    lambda p: f"@percentile{p:.6f}" if p > 50.01 else "@percentile99.9"
)
scales = st.sampled_from(["", "@scale=fp16", "@scale=bf16", "@scale=fp32", "@scale=e8m0"])
texts = (
    st.builds("{}{}{}{}".format, st.sampled_from(FREE), granularities, ranges, scales)
    | st.builds("{}{}{}".format, st.sampled_from(CODED), granularities, scales)
    | st.builds("{}{}{}".format, st.sampled_from(LOG), granularities, ranges)
    | st.sampled_from(PLAIN)
)


@given(texts)
def test_text_parses_back_to_the_same_format(text: str) -> None:
    fmt = parse(text)
    for form in (fmt, fmt.bind("weight"), fmt.bind("activation")):
        assert parse(str(form)) == form
        assert hash(parse(str(form))) == hash(form)
        assert repr(form) == str(form)
        assert pickle.loads(pickle.dumps(form)) == copy.deepcopy(form) == form


@given(texts, texts)
def test_formats_are_equal_exactly_when_their_texts_are(one: str, other: str) -> None:
    assert (parse(one) == parse(other)) == (str(parse(one)) == str(parse(other)))


def test_canonical_text_leaves_out_defaults() -> None:
    assert str(parse(" INT4@mse@Group128@scale=fp16 ")) == "int4@group128@mse"
    assert str(parse("int8@minmax@scale=fp32@channel")) == "int8@channel@scale=fp32"
    assert str(parse("Q4_K")) == "q4_k"
    assert str(parse("uint3@percentile99.90")) == "uint3@percentile99.9"
    assert str(parse("uint3@percentile99.0")) == "uint3@percentile99"


def test_attributes() -> None:
    fmt = parse("uint4@group64@percentile99.9@scale=e8m0")
    assert (fmt.name, fmt.bits, fmt.granularity, fmt.range, fmt.scale) == (
        "uint4", 4, Granularity("group", 64), Percentile(99.9), "e8m0",
    )  # fmt: skip
    assert isinstance(fmt, NumberFormat)
    assert parse("int4") == Integer(4)
    assert Integer(4, granularity=TENSOR, range=MSE()) == parse("int4@tensor@mse")
    assert parse("int4") != parse("uint4")
    assert parse("int4").range == MinMax()
    assert (parse("fp32").scale, parse("fp32").granularity) == (None, None)


def test_binding_by_role() -> None:
    assert str(parse("int4").bind("weight")) == "int4@channel"
    assert str(parse("int4").bind("activation")) == "int4@tensor"
    assert str(parse("int4@group32@mse").bind("activation")) == "int4@group32@mse"
    for text in PLAIN:
        assert parse(text).bind("weight") == parse(text).bind("activation") == parse(text)
    assert parse("mxfp4").granularity == Granularity("group", 32)
    with pytest.raises(ValueError, match="role must be 'weight' or 'activation', got 'bias'"):
        parse("int4").bind("bias")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("int4", (3, 5), 15 * 4 + 3 * 16),
        ("int4@tensor", (3, 5), 15 * 4 + 16),
        ("int4@group4", (3, 10), 30 * 4 + 3 * 3 * 16),  # groups of 4, 4 and 2 columns
        ("int4@group128", (10, 3, 2, 2), 120 * 4 + 10 * 16),  # 12 columns: one group a row
        ("int4@token", (2, 7, 5), 70 * 4 + 14 * 16),
        ("int4@channel", (7,), 7 * 4 + 16),  # 1-D: one row
        ("int4@token", (), 4 + 16),
        ("int4@group2@scale=fp32", (5,), 5 * 4 + 3 * 32),
        ("int4@scale=e8m0", (3, 5), 15 * 4 + 3 * 8),
        ("uint4@group32", (2, 64), 128 * 4 + 4 * (16 + 4)),
        ("uint3@tensor@scale=bf16", (2, 64), 128 * 3 + 16 + 3),
        ("fp8_e4m3@tensor", (8, 8), 64 * 8 + 16),
        ("fp8_e5m2", (8, 8), 64 * 8 + 8 * 16),
        ("fp16", (8, 8), 64 * 16),
        ("fp64", (8, 8), 64 * 64),
        ("fp32", (8,), 8 * 32),
        ("fixed3.6", (8, 8), 64 * 9),
        ("mxfp4", (2, 40), 80 * 4 + 2 * 2 * 8),
        ("mxint8", (2, 32), 64 * 8 + 2 * 8),
        ("nvfp4", (2, 40), 80 * 4 + 2 * 3 * 8 + 32),
        ("nf4@group64", (1, 64), 64 * 4 + 16),
        ("bcq3@group8", (2, 16), 32 * 3 + 4 * 3 * 16),
        ("log4", (2, 16), 32 * 4 + 2 * 8),
        ("q4_0", (1, 32), 18 * 8),
        ("q4_0", (1, 40), 40 * 4 + 2 * 16),  # a header of 16 bits for the 8 values left over
        ("q6_k", (1, 10), 10 * 6 + (210 * 8 - 256 * 6)),
        ("int4", (0, 5), 0),
        ("nvfp4", (5, 0), 0),
    ],
)
def test_storage_bits_by_hand(text: str, shape: tuple[int, ...], bits: int) -> None:
    assert parse(text).storage_bits(shape) == bits


def test_bits_per_value_read_like_the_fields() -> None:
    for text, bits in {"int4@group128": 4.125, "mxfp4": 4.25, "mxfp8_e4m3": 8.25, "q4_k": 4.5}.items():
        assert parse(text).bits_per_value((4096, 4096)) == bits
    assert parse("nvfp4").bits_per_value((4096, 4096)) == 4.5 + 32 / 4096**2
    with pytest.raises(ValueError, match="at least one value"):
        parse("int4").bits_per_value((3, 0))
    with pytest.raises(ValueError, match="no negative size"):
        parse("int4").storage_bits((3, -1))


def test_gguf_bits_equal_the_published_table() -> None:
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not there")
    types = json.loads(REFERENCE.read_text())["types"]
    for name in GGUF_BLOCKS:
        assert parse(name).bits_per_value((3, 2560)) == types[name.upper()]["bpw"], name
    floats = {"F16", "F32", "BF16", "F64", "I8", "I16", "I32", "I64"}
    elsewhere = {"MXFP4", "NVFP4", "Q8_1", "Q8_K", "Q1_0"}  # formats of their own; sums for dot products; later type
    assert set(types) - floats - elsewhere == {name.upper() for name in GGUF_BLOCKS}


def test_gguf_bits_equal_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    for name, block in GGUF_BLOCKS.items():
        assert constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[name.upper()]] == block


def test_largest_minifloats() -> None:
    largest = {"fp4_e2m1": 6, "fp6_e2m3": 7.5, "fp6_e3m2": 28, "fp8_e4m3": 448, "fp8_e5m2": 57344, "fp8_e3m4": 31}
    for text, value in largest.items():
        fmt = parse(text)
        assert isinstance(fmt, Minifloat)
        assert fmt.largest == value
    assert Minifloat(4, 2).largest == 448  # (2 − 1/4) · 2^(15 − 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int99", "int must have 2 to 16 bits, got int99"),
        ("int1", "int must have 2 to 16 bits"),
        ("uint17", "uint must have 2 to 16 bits"),
        ("bcq5", "bcq must have 1 to 4 bits"),
        ("log9", "log must have 2 to 8 bits"),
        ("fp4_e9m9", "1 sign + E exponent + M mantissa bits, 3 to 8 in all, got fp4_e9m9, which has 19"),
        ("fp9_e4m4", "minifloat must have 3 to 8 bits"),
        ("fp4_e0m3", "at least one of exponent, got fp4_e0m3"),
        ("fixed0.8", "at least 1 integer bit"),
        ("fixed17.16", "2 to 32 bits in all, got fixed17.16"),
        ("int4@grp", "or @scale=<float>, got '@grp' in 'int4@grp'"),
        ("int4@group0", "group size must be at least 1"),
        ("int4@percentile40", "percentile must lie in (50, 100], got 40"),
        ("int4@mse@minmax", "one range, got two"),
        ("int4@scale=fp8", "scale of int4 must be one of fp16, bf16, fp32, e8m0, got 'fp8'"),
        ("mxfp4@channel", "mxfp4 has its granularity built in, blocks of 32: it takes no granularity, got @channel"),
        ("q4_k@group64", "q4_k has its granularity built in, blocks of 256"),
        ("fp32@tensor", "fp32 has no scale: it takes no granularity, got @tensor; write fp32"),
        ("fixed4.4@scale=fp16", "fixed4.4 has no scale"),
        ("nvfp4@scale=fp32", "nvfp4 stores its scales as fp8_e4m3"),
        ("log4@scale=fp16", "log4 stores its scales as e8m0"),
        ("mxfp4@mse", "mxfp4 leaves no range to choose"),
        ("bcq2@mse", "bcq2 leaves no range to choose"),
        ("q4k", "unknown format 'q4k': did you mean q4_k"),
        ("fp8", "did you mean fp8_e4m3, fp8_e5m2"),
        ("nonsense", "unknown format 'nonsense'. Formats are int2…int16, uint2…uint16"),
        ("", "unknown format ''. Formats are"),
        ("@tensor", "unknown format ''"),
        ("int٤", "unknown format"),
    ],
)
def test_errors_say_the_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_direct_construction_obeys_the_same_rules() -> None:
    with pytest.raises(ValueError, match="2 to 16 bits"):
        Integer(1)
    with pytest.raises(ValueError, match="group size"):
        Granularity("group")
    with pytest.raises(ValueError, match="takes no size"):
        Granularity("channel", 4)
    with pytest.raises(ValueError, match="must be tensor, channel, group<n> or token"):
        Granularity("rows")  # type: ignore[arg-type]


def test_families_in_the_error_all_parse() -> None:
    with pytest.raises(ValueError, match="Formats are") as error:
        parse("?")
    names = re.findall(
        r"\b(?:u?int\d+|[bm]?x?fp\d+(?:_e\dm\d)?|mxint8|nvfp4|nf4|bcq\d|u?log(?:sqrt)?\d|i?q\d_\w+)", str(error.value)
    )
    assert len(names) > 20
    for name in names:
        assert parse(name).name == name


def test_formats_need_no_torch() -> None:
    code = "import sys, mpq.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
