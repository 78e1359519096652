"""BOPs against published totals and against counting."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpq.hardware_models.bops import bit_operations

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def reference(name):
    if not (REFERENCE / name).is_file():
        pytest.skip(f"{name} is not beside this checkout")
    return json.loads((REFERENCE / name).read_text())


def test_convolution_of_qonnx():
    # qonnx's compute_bops_and_macs on a UINT8 x INT4 3x3 convolution, 16 to 32 channels, 8x8 pixels.
    macs = 3 * 3 * 16 * 32 * 8 * 8
    assert macs == 294912
    assert bit_operations([macs], [4], [8]) == 9437184


def test_counting_every_pair_of_bits_gives_the_same():
    macs, weights, activations = [3, 0, 7], [2, 4], [8, 3]
    counted = [
        [
            sum(1 for _ in range(m) for _ in range(w) for _ in range(a))
            for w, a in zip(weights, activations, strict=True)
        ]
        for m in macs
    ]
    assert bit_operations(macs, weights, activations).tolist() == counted


def test_totals_of_resnet18_are_hawqs():
    middle = np.array(reference("hawq_ilp_resnet18.json")["bops_raw"], dtype=float)
    first_and_last = [118013952, 512 * 1000]
    in_8_bits = bit_operations([*middle, *first_and_last], [8], [8]).sum()
    in_4_bits = bit_operations(middle, [4], [4]).sum() + bit_operations(first_and_last, [8], [8]).sum()
    in_fp32 = bit_operations([*middle, *first_and_last], [32], [32]).sum()
    published = {"fp32": 1858e9, "W8A8": 116e9, "W4A4": 34e9}  # HAWQ's README; first and last layer at 8 bits
    assert in_8_bits == pytest.approx(published["W8A8"], rel=0.005)
    assert in_4_bits == pytest.approx(published["W4A4"], abs=1e9)
    assert in_fp32 == pytest.approx(published["fp32"], rel=0.005)


@pytest.mark.parametrize(
    ("network", "macs_by_bits"),
    [("FINN-TFC_W2A2", {(2, 2): 59008}), ("FINN-CNV_W2A2", {(2, 8): 1555200, (2, 2): 57906176})],
)
def test_totals_of_qonnx_networks(network, macs_by_bits):
    total = reference("qonnx_inference_cost.json")["expected"][network]["expected_dense"]["total_cost"]
    bits = np.array(list(macs_by_bits))
    table = bit_operations(list(macs_by_bits.values()), bits[:, 0], bits[:, 1])
    assert sum(macs_by_bits.values()) == total["total_macs"]
    assert np.trace(table) == total["total_bops"]
