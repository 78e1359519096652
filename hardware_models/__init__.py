"""What every choice costs on the machine that will run it: size, bit operations, latency.

A target is a chip and a runtime, described by a device file in which every number has its unit and source.
"""

from .device_file import available, load
from .target import Number, Source, Target, storage

__all__ = [
    "Number",
    "Source",
    "Target",
    "available",
    "load",
    "storage",
]
