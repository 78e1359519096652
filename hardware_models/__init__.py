"""What every choice costs on the machine that will run it: size, bit operations, latency.

A target is a chip and a runtime, described by a device file in which every number has its unit and source.
"""

from .composition import compose
from .device_file import available, load
from .device_numbers import Number, Source
from .target import Target, storage

__all__ = [
    "Number",
    "Source",
    "Target",
    "available",
    "compose",
    "load",
    "storage",
]
