"""BOPs against published totals and against counting."""

import json
import re
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


SCALED = r"(?:SCALED)?U?INT<?(\d+)>?"


@pytest.mark.parametrize("network", ["FINN-CNV_W2A2", "FINN-TFC_W2A2", "RadioML_VGG10"])
@pytest.mark.parametrize("count", ["expected_dense", "expected_sparse"])
def test_totals_of_qonnx_networks(network, count):
    total = reference("qonnx_inference_cost.json")["expected"][network][count]["total_cost"]
    products = [(re.fullmatch(f"op_mac_{SCALED}_{SCALED}", name), macs) for name, macs in total.items()]
    rows = [(macs, int(found[2]), int(found[1])) for found, macs in products if found]
    table = bit_operations(*(list(column) for column in zip(*rows, strict=True)))
    assert sum(macs for macs, _, _ in rows) == total["total_macs"]
    assert np.trace(table) == total["total_bops"]
    stored = [(re.fullmatch(f"mem_w_{SCALED}", name), elements) for name, elements in total.items()]
    assert sum(int(found[1]) * elements for found, elements in stored if found) == total["total_mem_w_bits"]


def test_nncf_counts_two_operations_in_the_wider_of_both_widths():
    macs, weights, activations = [5, 7], [2, 8, 4], [8, 4, 4]
    counted = [[sum(max(w, a) for _ in range(2 * m)) for w, a in zip(weights, activations, strict=True)] for m in macs]
    assert bit_operations(macs, weights, activations, convention="nncf").tolist() == counted


def test_nncf_compression_ratio_is_over_the_model_in_8_bits():
    # NNCF compares a plan with the same network in int8 throughout: half the work in 4 bits is 8 / 6.
    plan = np.trace(bit_operations([100, 100], [4, 8], [4, 4], convention="nncf"))
    assert bit_operations([100, 100], [8], [8], convention="nncf").sum() / plan == pytest.approx(8 / 6)


def test_additions_are_counted_in_an_accumulator_that_holds_them():
    # Products of 4 and 8 bits have 12; 256 of them need 8 more. 32 bit operations of products, 20 of additions.
    assert bit_operations([1], [4], [8], convention="additions", reduction=[256]).tolist() == [[32 + 20]]
    both = bit_operations([3, 10], [4, 2], [8, 2], convention="additions", reduction=[1, 64])
    assert both.tolist() == [[3 * (32 + 12), 3 * (4 + 4)], [10 * (32 + 18), 10 * (4 + 10)]]


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="unknown convention of bit operations 'nncff': did you mean 'nncf'"):
        bit_operations([1], [4], [8], convention="nncff")
    with pytest.raises(ValueError, match="'additions' needs reduction"):
        bit_operations([1], [4], [8], convention="additions")


@pytest.mark.parametrize("convention", ["hawq", "nncf", "additions"])
def test_a_target_counts_in_the_convention_it_is_asked_for(convention):
    import mpq.hardware_models as hardware
    from mpq.layers import Layer, Network
    from mpq.options import SearchSpace

    layer = Layer("fc", "linear", (10, 64), 640, 1280, (2, 64), (2, 10), weight_bytes=2560, batch=2)
    frame = hardware.storage().costs(
        Network((layer,), batch=2, total_bytes=2560), SearchSpace(["int4/int8"]), bops=convention
    )
    expected = {"hawq": 640 * 32, "nncf": 640 * 16, "additions": 640 * (32 + 4 + 8 + 6)}[convention]
    assert frame["bops"].item() == expected
    assert frame.attrs["provenance"]["notes"]["bops"] == f"convention of {convention}"
