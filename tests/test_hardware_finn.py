"""FINN's equations by hand and one number at a time, its folding step by step, minifloats value by value."""

import math

import numpy as np
import pytest

from mpq.formats import parse
from mpq.hardware_models.finn_folding import depthwise_folding, matrix_folding
from mpq.hardware_models.finn_resources import (
    Folding,
    Window,
    block_rams,
    integer_arithmetic,
    ultra_rams,
    unit_dsps,
    unit_luts,
    weight_luts,
)
from mpq.hardware_models.finn_thresholds import parallel_thresholds, searched_thresholds
from mpq.hardware_models.minifloat_luts import Operand, minifloat_arithmetic


def numbers(*values):
    return [np.array([float(value)]) for value in values]


def test_lookup_tables_by_hand():
    # 4 elements of 9 lanes, 4-bit weights and 4-bit unsigned inputs, 576 inputs a row:
    # multipliers 9 (2 ceil(8/6) - 1) 8 = 216, adder tree 8 (2 9 - 1) = 136,
    # accumulator: alpha = log2 576 + 4 + 4 - 1 = 16.17, ceil(16.17 + 0.00002 + 1) = 18 bits
    folding = Folding(*numbers(576, 64, 9, 4))
    arithmetic = integer_arithmetic(*numbers(4, 4, 0, 576))
    assert arithmetic.accumulator_bits[0] == 18
    # floor(300 + 1.1 x 4 x (216 + 136 + 18)) = floor(1928.0)
    assert unit_luts(folding, arithmetic, *numbers(0, 0))[0] == 1928
    # with DSP slices: floor(300 + 1.1 x 4 x (136 + 18)) = floor(977.6)
    assert unit_luts(folding, arithmetic, *numbers(0, 1))[0] == 977
    # thresholds in parallel for 4 bits: 15 x 18 x (ceil(16/64) + 1) = 540; floor(300 + 4.4 x 910) = 4304
    thresholds = parallel_thresholds(*numbers(4, 18, 64 / 4)).luts
    assert thresholds[0] == 540
    assert unit_luts(folding, arithmetic, thresholds, np.zeros(1))[0] == 4304
    # weights in lookup tables: 4 x 9 x 4 x ceil(1024 / 64)
    assert weight_luts(folding, np.array([4.0]))[0] == 2304
    # signed inputs need one bit less: one of theirs is the sign
    assert integer_arithmetic(*numbers(4, 4, 1, 576)).accumulator_bits[0] == 17
    assert integer_arithmetic(*numbers(16, 16, 1, 4096)).accumulator_bits[0] == 32


def test_slices_and_memories_by_hand():
    folding = Folding(*numbers(576, 64, 9, 6))
    assert unit_dsps(folding, *numbers(8, 1))[0] == 54  # 6 x 9
    assert unit_dsps(folding, *numbers(8, 4))[0] == 18  # ceil(6 / 4) x 9
    assert unit_dsps(folding, *numbers(50, 1))[0] == 108  # 50 bits take two slices
    # 4 x 9 lanes of 4 bits: 144 bits wide, 1024 deep: ceil(1024 / 1024) ceil(144 / 18)
    assert block_rams(Folding(*numbers(576, 64, 9, 4)), np.array([4.0]))[0] == 8
    # 16 x 36 lanes: 2304 bits wide, 64 deep: ceil(64 / 512) ceil(2304 / 36)
    assert block_rams(Folding(*numbers(576, 64, 36, 16)), np.array([4.0]))[0] == 64
    # 32 lanes of 8 bits, 73728 deep: ceil(73728 / 4096) x ceil(256 / 72) = 18 x 4
    assert ultra_rams(Folding(*numbers(4608, 512, 8, 4)), np.array([8.0]))[0] == 72
    # 3x3 window, stride 2, 32 columns of 64 channels: (2 + 1) ceil(64 / 512) ceil(256 / 36)
    assert Window(*numbers(3, 2, 32, 64)).block_rams(np.array([4.0]))[0, 0] == 24


def slow_block_rams(width, depth):
    if width == 1:
        return math.ceil(depth / 16384)
    if width == 2:
        return math.ceil(depth / 8192)
    if width <= 4:
        return math.ceil(depth / 4096) * math.ceil(width / 4)
    if width <= 9:
        return math.ceil(depth / 2048) * math.ceil(width / 9)
    if width <= 18 or depth > 512:
        return math.ceil(depth / 1024) * math.ceil(width / 18)
    return math.ceil(depth / 512) * math.ceil(width / 36)


def test_block_memories_one_at_a_time():
    for width in (1, 2, 3, 4, 5, 8, 9, 10, 18, 19, 36, 37, 144):
        for depth in (1, 500, 512, 513, 1024, 1025, 4096, 5000, 8192, 16384, 16385, 40000):
            found = block_rams(Folding(*numbers(depth * width, 1, width, 1)), np.ones(1))
            assert found[0] == slow_block_rams(width, depth)


def slow_luts(mw, mh, simd, pe, w, a, signed):
    alpha = math.log2(mw) + w + a - 1 - signed
    acc = min(32, math.ceil(alpha + math.log2(1 + 2**-alpha) + 1))
    lane = simd * (2 * math.ceil((w + a) / 6) - 1) * (w + a)
    return int(300 + 1.1 * (pe * (lane + (w + a) * (2 * simd - 1) + acc)))


def test_lookup_tables_one_at_a_time():
    draw = np.random.default_rng(0)
    for _ in range(200):
        simd, pe, folds = (int(n) for n in draw.integers(1, 64, 3))
        w, a, signed = (int(n) for n in draw.integers([1, 1, 0], [9, 9, 2]))
        mw, mh = simd * folds, pe * 3
        found = unit_luts(
            Folding(*numbers(mw, mh, simd, pe)), integer_arithmetic(*numbers(w, a, signed, mw)), *numbers(0, 0)
        )
        assert found[0] == slow_luts(mw, mh, simd, pe, w, a, signed)


def test_searched_thresholds_one_stage_at_a_time():
    for bits in (1, 2, 4, 8):
        for acc in (9, 18, 25):
            for channels in (1, 16, 65):
                luts, blocks = bits * acc, 0
                for stage in range(bits):
                    words = channels * 2**stage
                    if words <= 512:
                        luts += acc * math.ceil(words / 64)
                    else:
                        shapes = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))
                        blocks += min(math.ceil(words / deep) * math.ceil(acc / wide) for deep, wide in shapes)
                found = searched_thresholds(*numbers(bits, acc, channels))
                assert (found.luts[0], found.block_rams[0]) == (luts, blocks)


def divisors(number):
    return [i for i in range(1, number + 1) if number % i == 0]


def stepwise_matrix(mw, mh, vectors, bits, target):
    """FINN's SetFolding for one matrix, one attempt after the other."""
    pe, simd = 1, 1
    for attempt in divisors(mw):
        before, simd = simd, attempt
        if mh / pe * (mw / simd) * vectors < target:
            break
        if bits * simd > 36:
            simd = before
            break
    for pe in divisors(mh):
        if mh / pe * (mw / simd) * vectors < target:
            break
    return simd, pe


def stepwise_depthwise(taps, channels, vectors, target):
    simd = 1
    for pe in divisors(channels):
        if channels * taps / pe * vectors < target:
            break
    if pe == channels and channels * taps / pe * vectors > target:
        for simd in divisors(taps):
            if channels * taps / pe / simd * vectors < target:
                break
    return simd, pe


def test_folding_is_that_of_finn():
    draw = np.random.default_rng(1)
    mw, mh, vectors = draw.integers(1, 600, 300), draw.integers(1, 200, 300), draw.integers(1, 500, 300)
    bits = np.array([1.0, 2.0, 4.0, 8.0, 4.0, 16.0])
    for target in (1.0, 50.0, 1e3, 2e4, 1e6, 1e9):
        found = matrix_folding(mw.astype(float), mh.astype(float), vectors.astype(float), bits, target)
        for i, sizes in enumerate(zip(mw.tolist(), mh.tolist(), vectors.tolist(), strict=True)):
            for j, width in enumerate(bits):
                assert (found.simd[i, j], found.pe[i, j]) == stepwise_matrix(*sizes, width, target)


def test_depthwise_folding_is_that_of_finn():
    draw = np.random.default_rng(2)
    taps, channels = draw.choice([1, 9, 25, 12], 200), draw.integers(1, 200, 200)
    vectors = draw.integers(1, 500, 200)
    for target in (1.0, 60.0, 1e3, 2e4, 1e9):
        found = depthwise_folding(*(sizes.astype(float) for sizes in (taps, channels, vectors)), target)
        for i, sizes in enumerate(zip(taps.tolist(), channels.tolist(), vectors.tolist(), strict=True)):
            assert (found.simd[i, 0], found.pe[i, 0]) == stepwise_depthwise(*sizes, target)


def test_folding_at_exactly_the_target():
    """FINN goes on until a unit is faster than the target; a depthwise one gets more lanes only if it is slower."""
    for simd, pe in ((1, 1), (2, 1), (9, 2), (9, 64)):
        target = 196.0 * 576 * 64 / (simd * pe)
        found = matrix_folding(*numbers(576, 64, 196, 4), target)
        assert (found.simd[0, 0], found.pe[0, 0]) == stepwise_matrix(576, 64, 196, 4, target)
    for pe, simd in ((8, 1), (32, 1), (32, 3), (32, 9)):
        target = 50.0 * 9 * 32 / (pe * simd)
        found = depthwise_folding(*numbers(9, 32, 50), target)
        assert (found.simd[0, 0], found.pe[0, 0]) == stepwise_depthwise(9, 32, 50, target)


def test_no_fewer_elements_meet_the_target():
    """All pairs of divisors: with the lanes chosen, one step fewer elements is too slow."""
    for mw, mh, vectors, target in ((576, 64, 196, 1e5), (27, 16, 1024, 1e5), (64, 10, 1, 40.0)):
        found = matrix_folding(*numbers(mw, mh, vectors, 4), target)
        simd, pe = found.simd[0, 0], found.pe[0, 0]
        meets = [p for p in divisors(mh) if mh / p * mw / simd * vectors < target]
        assert pe == min(meets)


def values(fmt):
    """Every value of a minifloat, from its codes."""
    found = set()
    for sign in (-1, 1):
        for exponent in range(2**fmt.exponent_bits):
            for mantissa in range(2**fmt.mantissa_bits):
                hidden = 2**fmt.mantissa_bits if exponent else 0
                power = max(exponent, 1) - fmt.bias - fmt.mantissa_bits
                found.add(sign * (hidden + mantissa) * 2.0**power)
    return [value for value in found if abs(value) <= fmt.largest]


@pytest.mark.parametrize("pair", ["fp3_e2m0 fp3_e1m1", "fp4_e2m1 fp4_e2m1", "fp5_e2m2 fp6_e3m2", "fp8_e4m3 int4"])
def test_every_sum_of_products_fits_the_accumulator(pair):
    weight, activation = (parse(name) for name in pair.split())
    sides = [values(f) if hasattr(f, "bias") else list(range(-7, 8)) for f in (weight, activation)]
    smallest = math.prod(min(abs(value) for value in side if value) for side in sides)
    products = {x * y / smallest for x in sides[0] for y in sides[1]}
    assert all(product == int(product) for product in products)  # fixed point, nothing is rounded
    count = 100
    found = minifloat_arithmetic(Operand.of([weight]), Operand.of([activation]), *numbers(count, 0.5))
    largest = max(abs(product) for product in products)
    assert largest < 2 ** (found.product_bits[0] - 1)
    assert count * largest < 2 ** (found.accumulator_bits[0] - 1)
    # and no narrower number would do; e4m3 reserves its largest code, which may save a bit
    assert largest >= 2 ** (found.product_bits[0] - 3)
