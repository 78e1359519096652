"""Colours of formats: in order of lightness, apart for every kind of colour vision, and readable under text."""

import itertools

import numpy as np
import pytest

from mpq.format_colours import PALETTE, UNKNOWN, bits_colour, option_bits, option_colour, text_colour

# Machado, Oliveira and Fernandes (2009): how people without one kind of cone see linear RGB, from memory.
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
TO_OKLAB = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def linear(colour):
    channels = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def seen(colour, vision):
    """OKLab, by how a kind of vision sees a colour."""
    light = np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1)
    return np.array(TO_OKLAB) @ np.cbrt(np.array(TO_CONES) @ light)


def contrast(one, other):
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
def test_usual_widths_are_told_apart(vision):
    usual = [PALETTE[bits] for bits in (2, 3, 4, 8, 16, 32)]
    nearest = min(
        np.linalg.norm(seen(one, vision) - seen(other, vision)) for one, other in itertools.combinations(usual, 2)
    )
    assert nearest > 0.06  # about three just noticeable differences


def test_lightness_falls_with_the_bits():
    lightness = [seen(colour, "usual")[0] for colour in PALETTE.values()]
    assert lightness == sorted(lightness, reverse=True)
    assert list(PALETTE) == sorted(PALETTE)
    warm, cool = (linear(PALETTE[bits]) for bits in (2, 8))
    assert warm[0] > warm[2]
    assert cool[2] > cool[0]


@pytest.mark.parametrize("colour", [*PALETTE.values(), UNKNOWN])
def test_text_is_readable_on_every_colour(colour):
    assert contrast(colour, text_colour(colour)) >= 4.5


def test_averages_lie_between():
    for low, high in itertools.pairwise(PALETTE):
        ends = np.sort([linear(PALETTE[low]), linear(PALETTE[high])], axis=0)
        middle = linear(bits_colour((low + high) / 2))
        assert (ends[0] - 0.01 <= middle).all()
        assert (middle <= ends[1] + 0.01).all()
    assert bits_colour(0.3) == PALETTE[1]
    assert bits_colour(64) == PALETTE[32]


def test_options_by_their_weight():
    assert option_bits("int4@group128/int8") == 4
    assert option_bits("-/fp8_e4m3") == 8
    assert option_colour("<script>") == UNKNOWN
    assert option_colour("nvfp4") == option_colour("int4") == PALETTE[4]
