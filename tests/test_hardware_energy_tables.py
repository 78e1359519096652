"""Energies of operations and memories against published points; access counts against nested loops."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.formats import parse
from mpq.hardware_models.energy_accesses import RELEVANT, matmul_moves, refetches
from mpq.hardware_models.energy_memory import SRAM, DRAM_pJ_PER_BIT, sram_bit
from mpq.hardware_models.energy_qkeras import add_pJ, dram_pJ, multiply_pJ, sram_pJ
from mpq.hardware_models.energy_reuse import AccessCosts, operand_energy, partial_sum_energy
from mpq.hardware_models.energy_tables import OPERATIONS, float_multiply_pJ, horowitz_integer_pJ, mac_energy
from mpq.hardware_models.technology import ENERGY_COEFFICIENTS, NODES_NM, area_factor, energy_factor

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "qkeras_horowitz_energy.json"
FORMATS = ("int2", "int3", "int4", "uint8", "int8", "int16", "fp8_e4m3", "bf16", "fp16", "fp32", "mxfp4", "nf4", "log4")


# --- operations


def test_horowitz_law_meets_the_published_points_as_it_says():
    assert horowitz_integer_pJ(8, 8, 8) == pytest.approx(0.2 + 0.03)
    multiply = horowitz_integer_pJ(32, 32, 0)
    assert multiply / 3.1 == pytest.approx(1.03, abs=0.005)
    assert horowitz_integer_pJ(0, 0, 32) / 0.1 == pytest.approx(1.2)
    assert float_multiply_pJ(24) == pytest.approx(3.7, rel=0.005)
    table = OPERATIONS["horowitz-45nm"]
    found = [table.floating(*bits).pJ for bits in ((11, 16), (11, 32), (24, 32))]
    assert found == pytest.approx([1.5, 2, 4.6])


def test_bitfusion_elements_are_the_synthesised_ones_and_sub_quadratic():
    table = OPERATIONS["bitfusion-45nm-fixed"]
    found = [table.integer(bits, bits, 32).pJ for bits in (2, 4, 8, 16)]
    assert found == pytest.approx([0.0575, 0.120, 0.298, 0.947], rel=0.004)  # fJ a cycle in the published table
    slope = np.polyfit(np.log([2, 4, 8, 16]), np.log(found), 1)[0]
    assert slope == pytest.approx(1.34, abs=0.01)
    between = table.integer(4, 8, 32)
    assert between.kind == "derived"
    assert between.pJ == pytest.approx(math.sqrt(found[1] * found[2]))  # a straight line in log-log
    assert table.integer(1, 4, 32) is None
    assert table.integer(17, 4, 32) is None


@pytest.mark.parametrize("weight", range(1, 9))
@pytest.mark.parametrize("inputs", range(1, 9))
def test_the_fusion_element_counts_what_it_makes_at_once(weight, inputs):
    bricks = [next(bits for bits in (2, 4, 8) if bits >= wanted) for wanted in (weight, inputs)]  # powers of two
    at_once = (8 // bricks[0]) * (8 // bricks[1])
    assert OPERATIONS["bitfusion-45nm-fusion"].integer(weight, inputs, 32).pJ == pytest.approx(0.55992 / at_once)
    assert OPERATIONS["bitfusion-45nm-fusion"].integer(16, inputs, 32) is None


@pytest.mark.parametrize("name", OPERATIONS)
def test_multiply_adds_are_positive_and_grow_with_integer_bits(name):
    table = OPERATIONS[name]
    for weight, inputs in itertools.product(FORMATS, FORMATS):
        energy = mac_energy(table, parse(weight), parse(inputs))
        assert energy is None or energy.pJ > 0
    sizes = [b for b in range(2, 17) if table.integer(b, 8, 32)]
    energies = [table.integer(bits, 8, 32).pJ for bits in sizes]
    assert len(energies) >= 7
    assert energies == sorted(energies)


@pytest.mark.parametrize(
    ("weight", "inputs", "expected", "kind"),
    [
        ("int4", "int8", 0.2 * 32 / 64 + 0.12, "estimate"),
        ("int8", "int16", 0.4 + 0.12, "derived"),
        ("int4", "fp16", 2.0, "secondary"),  # unpacked to the float beside it
        ("nf4", "bf16", 1.1 * (8 / 11) ** 1.55 + 0.9, "estimate"),
        ("fp8_e4m3", "fp8_e5m2", 1.1 * (4 / 11) ** 1.55 + 0.9, "estimate"),
        ("mxint8", "int8", 0.32, "derived"),
        ("fixed4.4", "int8", 0.32, "derived"),
        ("nf4", "int8", None, None),
        ("log4", "int8", None, None),
        ("bcq2", "int4", None, None),
        ("q4_0", "int8", None, None),
    ],
)
def test_pairs_of_formats(weight, inputs, expected, kind):
    energy = mac_energy(OPERATIONS["horowitz-45nm"], parse(weight), parse(inputs))
    assert (energy and energy.pJ) == (expected if expected is None else pytest.approx(expected))
    assert (energy and energy.kind) == kind


def test_tables_differ_by_a_factor_of_four_at_32_bits():
    mult = [OPERATIONS[name].integer(32, 32, 32).pJ for name in ("aladdin-40nm", "horowitz-45nm")]
    assert mult == pytest.approx([12.68 + 0.21, 3.2 + 0.12])


# --- QKeras


@pytest.fixture(scope="module")
def qkeras():
    if not REFERENCE.is_file():
        pytest.skip(f"no published data at {REFERENCE}")
    return json.loads(REFERENCE.read_text())


def test_qkeras_energies_of_tensors_and_operations(qkeras):
    smallest = qkeras["test_case"]["settings"]["min_sram_size_bits"]
    reference, trial = qkeras["test_case"]["reference_int8_acc_int32"], qkeras["test_case"]["trial_mixed"]
    table = OPERATIONS["qkeras"]

    def tensors(*bits):
        return float(sram_pJ(bits, smallest).sum())

    assert tensors(784 * 8) == pytest.approx(reference["d0"]["inputs"], abs=0.1)
    assert tensors(784 * 300 * 8, 300 * 8) == pytest.approx(reference["d0"]["parameters"], abs=0.1)
    assert 784 * 300 * table.integer(8, 8, 32).pJ == pytest.approx(reference["d0"]["op_cost"], abs=0.1)
    assert tensors(300 * 4) == pytest.approx(trial["d1"]["inputs"], abs=0.1)
    assert tensors(300 * 100 * 4, 100 * 4) == pytest.approx(trial["d1"]["parameters"], abs=0.1)
    # and beyond the five worked cases
    assert 300 * 100 * table.integer(4, 4, 18).pJ == pytest.approx(trial["d1"]["op_cost"], abs=0.1)
    assert 100 * 10 * table.integer(4, 4, 16).pJ == pytest.approx(trial["d2"]["op_cost"], abs=0.1)
    assert tensors(100 * 10 * 8, 10 * 8) == pytest.approx(reference["d2"]["parameters"], abs=0.1)
    assert tensors(100 * 32) == pytest.approx(reference["d2"]["inputs"], abs=0.1)


def test_qkeras_polynomials(qkeras):
    points = qkeras["check_points"]
    assert add_pJ([8, 32]) == pytest.approx([points["int8 add pJ"], points["int32 add pJ"]])
    expected = [points["int8 mul pJ"], points["int8 mul pJ"], points["int32 mul pJ"]]
    assert multiply_pJ([8, 4, 32], [8, 8, 4]) == pytest.approx(expected, rel=1e-9)
    assert float(dram_pJ(1)) == DRAM_pJ_PER_BIT["qkeras"][0] == 20.3125
    assert float(sram_pJ(0)) == 0.0


# --- memories and technology


def test_sram_points_and_their_exponent():
    table = SRAM["cacti-45nm"]
    sizes = np.array(table.capacities_bytes)
    assert table.pJ_per_bit(sizes) * 32 == pytest.approx([0.68, 1.06, 1.13, 1.90, 3.43, 6.39, 9.98], rel=0.01)
    slope = np.polyfit(np.log(sizes[2:]), np.log(table.read_pJ[2:]), 1)[0]
    assert slope == pytest.approx(0.8, abs=0.02)
    assert table.pJ_per_bit(4 * 16384) == pytest.approx(4**0.8 * table.pJ_per_bit(16384))
    assert np.all(np.diff(table.pJ_per_bit(np.geomspace(128, 1e7, 200))) > 0)
    assert not sram_bit("cacti-45nm", "buffer", 3000).is_estimate
    assert sram_bit("cacti-45nm", "buffer", 16385).is_estimate
    assert SRAM["horowitz-45nm"].pJ_per_bit(8192) * 64 == pytest.approx(10.0)
    with pytest.raises(ValueError, match="capacity_bytes 100 has no energy: .* begins at 128 bytes"):
        table.pJ_per_bit(100)


def test_technology_scaling_is_the_ratio_of_polynomials():
    for (a, source), (b, target) in itertools.product(zip(NODES_NM, ENERGY_COEFFICIENTS, strict=True), repeat=2):
        assert energy_factor(a, 0.8, b, 0.9) == pytest.approx(np.polyval(target, 0.9) / np.polyval(source, 0.8))
    assert area_factor(45, 16) == 0.19
    assert area_factor(45, 32) == 0.46
    assert area_factor(130, 7) == pytest.approx(0.0092, rel=0.01)  # the published matrix, rounded


@given(nm=st.floats(7, 130), other=st.floats(7, 130), volts=st.floats(0.75, 1.2))
def test_scaling_chains_and_shrinks(nm, other, volts):
    there = energy_factor(nm, volts, other, 0.8)
    assert there * energy_factor(other, 0.8, nm, volts) == pytest.approx(1)
    assert energy_factor(45, 0.9, nm, 0.9) <= energy_factor(45, 0.9, 130, 0.9) * (1 + 1e-12)
    low, high = sorted((nm, other))
    assert energy_factor(45, 0.9, low, 0.9) <= energy_factor(45, 0.9, high, 0.9) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("node", "volts", "message"),
    [
        (5, 0.8, "between 7 and 130 nm, got 5 nm"),
        (65, 0.5, "0.59 to 1.3 V at 65 nm, got 0.5 V"),
        (55, 0.5, "0.59 to 1.3 V at 55 nm"),  # between nodes the stricter of both
        (45, 1.4, "got 1.4 V"),
    ],
)
def test_scaling_refuses_what_was_not_fitted(node, volts, message):
    with pytest.raises(ValueError, match=message):
        energy_factor(45, 0.9, node, volts)


# --- accesses and reuse


def simulated_moves(sizes, tiles, order):
    """A buffer of one tile a tensor, filled whenever the loops ask for another tile, element by element."""
    spans = {
        loop: [range(start, min(start + tile, size)) for start in range(0, size, tile)]
        for loop, size, tile in zip("mkn", sizes, tiles, strict=True)
    }
    held, fills, spills, seen = {}, dict.fromkeys(RELEVANT, 0), 0, set()
    for place in itertools.product(*(range(len(spans[loop])) for loop in order)):
        at = dict(zip(order, place, strict=True))
        for name, loops in RELEVANT.items():
            tile = tuple(at[loop] for loop in loops)
            if held.get(name) == tile:
                continue
            held[name] = tile
            elements = math.prod(len(spans[loop][at[loop]]) for loop in loops)
            if name == "outputs":
                spills += elements  # written back once it leaves
                if tile in seen:
                    fills[name] += elements
                seen.add(tile)
            else:
                fills[name] += elements
    return fills["inputs"], fills["weights"], fills["outputs"], spills


small = st.tuples(*[st.integers(1, 7)] * 3)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(small, min_size=1, max_size=3), tiles=small, order=st.permutations("mkn"))
def test_moves_equal_a_simulated_buffer(sizes, tiles, order):
    found = matmul_moves(sizes, tiles, "".join(order))
    for index, size in enumerate(sizes):
        expected = simulated_moves(size, tiles, order)
        moves = found.input_reads, found.weight_reads, found.output_reads, found.output_writes
        assert tuple(tensor[index] for tensor in moves) == expected


def test_moves_refuse_nonsense():
    with pytest.raises(ValueError, match="order must name the loops m, k and n once each"):
        matmul_moves([[2, 2, 2]], [1, 1, 1], "mmk")
    with pytest.raises(ValueError, match="at least 1, got 2 and 0"):
        matmul_moves([[2, 2, 2]], [1, 0, 1])
    assert refetches(np.ones((2, 0)), []).tolist() == [1, 1]


@given(reuse=st.tuples(*[st.integers(1, 4)] * 4))
def test_hierarchical_reuse_equals_counting(reuse):
    """Every access happens in its own iteration: an operand comes down the levels, a partial sum goes up and down."""
    a, b, c, d = reuse
    cost = AccessCosts(dram=200, buffer=6, array=2, register=1)
    operand = total = 0.0
    for i in range(a):
        operand += cost.dram
        total += cost.dram * (1 if i == 0 else 2)  # written; fetched again before all but the first round
        for j in range(b):
            operand += cost.buffer
            total += cost.buffer * (0 if j == 0 else 2)
            for k in range(c):
                operand += cost.array
                total += cost.array * (k > 0)  # one hop to the next element
                for use in range(d):
                    operand += cost.register
                    total += cost.register * (0 if use == 0 else 2)
    assert operand_energy(reuse) == pytest.approx(operand)
    assert partial_sum_energy(reuse) == pytest.approx(total)
