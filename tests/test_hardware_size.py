"""Size against bytes counted by hand, one value and one scale at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.formats import parse
from mpq.hardware_models.size import size_bytes, value_bytes
from mpq.layers import Layer


def layer(name, *shape):
    parameters = int(np.prod(shape))
    return Layer(
        name, "linear", shape, parameters, parameters, (1, shape[-1]), (1, shape[0]), weight_bytes=4 * parameters
    )


def bits_by_hand(shape, value_bits, group, group_bits):
    """Walks over every row, every value, and opens a group where one begins."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    bits = 0
    for _ in range(rows):
        for column in range(columns):
            bits += value_bits
            if column % (group or columns) == 0:
                bits += group_bits
    return bits


@pytest.mark.parametrize("shape", [(10, 64), (3, 5, 3, 3), (7, 130), (1, 1)])
@pytest.mark.parametrize(
    ("text", "value_bits", "group", "group_bits"),
    [
        ("int4@channel", 4, None, 16),
        ("int2@group32", 2, 32, 16),
        ("uint4@group64", 4, 64, 16 + 4),
        ("int8@channel@scale=fp32", 8, None, 32),
        ("mxfp4", 4, 32, 8),
        ("fp16", 16, None, 0),
    ],
)
def test_bytes_are_those_counted_by_hand(shape, text, value_bits, group, group_bits):
    table = size_bytes([layer("a", *shape)], [parse(text)])
    assert table[0, 0] == bits_by_hand(shape, value_bits, group, group_bits) / 8


def test_a_layer_by_hand():
    # 3x3 convolution from 16 to 32 channels: 4608 values of 4 bits and 32 scales of 16 bits; 2304 bytes of values.
    conv = layer("conv", 32, 16, 3, 3)
    assert size_bytes([conv], [parse("int4")])[0, 0] == 2304 + 64
    assert value_bytes([conv], [parse("int4")])[0, 0] == 2304


def test_rows_are_layers_and_columns_are_formats_also_where_layers_share_a_shape():
    layers = [layer("a", 4, 8), layer("b", 6, 10), layer("c", 4, 8)]
    formats = [parse("int8"), parse("int4@group4"), None]
    for table, bytes_of in (
        (size_bytes(layers, formats), lambda shape, fmt: fmt.storage_bits(shape) / 8),
        (value_bytes(layers, formats), lambda shape, fmt: shape[0] * shape[1] * fmt.bits / 8),
    ):
        assert table.shape == (3, 3)
        for row, one in zip(table, layers, strict=True):
            expected = [one.weight_bytes if fmt is None else bytes_of(one.weight_shape, fmt) for fmt in formats]
            assert row.tolist() == expected


shapes = st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4)
granularities = st.sampled_from(["", "@tensor", "@channel", "@token", "@group1", "@group32"])


@settings(max_examples=60, deadline=None)
@given(shapes, granularities)
def test_many_shapes_at_once_take_what_each_takes_alone(drawn, granularity):
    texts = [f"int3{granularity}", f"uint5{granularity}", f"bcq2{granularity}", "nvfp4", "q4_k", "fp16", "fixed4.3"]
    formats = [parse(text) for text in texts]
    table = size_bytes([layer(f"{index}", *shape) for index, shape in enumerate(drawn)], formats)
    assert (8 * table).tolist() == [[fmt.storage_bits(shape) for fmt in formats] for shape in drawn]


def test_no_layers_and_no_formats_make_empty_tables():
    assert size_bytes([], [parse("int4")]).shape == (0, 1)
    assert size_bytes([layer("a", 2, 2)], []).shape == (1, 0)
    assert value_bytes([], [parse("int4")]).shape == (0, 1)
