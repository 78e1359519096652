"""The families of hardware models that a device file can describe, in the order in which they price."""

from __future__ import annotations

from . import bit_array, energy, fpga, learned, lookup, microcontroller, roofline, systolic
from .prices import Family

FAMILIES: tuple[Family, ...] = (
    roofline.FAMILY,
    learned.FAMILY,
    lookup.FAMILY,
    microcontroller.FAMILY,
    fpga.FAMILY,
    systolic.FAMILY,
    bit_array.FAMILY,
    energy.FAMILY,
)
