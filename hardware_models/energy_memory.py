"""What a bit read from a memory costs, by the size of an SRAM or the technology of a DRAM, in pJ.

SRAM "cacti-45nm": reads of 32 bits that CACTI gives for 45 nm from 128 B to 16 KiB (hsharma35/bitfusion,
sram/cacti_sweep.csv), interpolated in log-log. "horowitz-45nm": 64-bit reads of 8 KiB (10 pJ; 32 KiB and 1 MiB from
memory) of Horowitz (ISSCC 2014). Above its largest point a table grows with capacity^0.8, the exponent of CACTI's
points from 1 KiB up, and what it gives is an estimate; below its smallest it refuses.

DRAM: one number a technology. The spread between sources is a factor of five (Horowitz 20 to 40, BitFusion's code 15
beside a comment that says 6, ZigZag 10.9 and 15.6 pJ/bit): results that compare options on one device feel it less than
results that compare devices. Writes count as reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .device_numbers import Number, Source

Floats = NDArray[np.float64]

SRAM_EXPONENT = 0.8

_SEEN = "2026-11, from the file named"
_MEMORY = "2026-11, from memory, confirmed by no source"


@dataclass(frozen=True, kw_only=True)
class SramTable:
    """Energies of reads at some capacities.

    Attributes:
        source: where the points come from.
        capacities_bytes, read_pJ: the points, ascending.
        word_bits: bits a read.
        confirmed_bytes: the largest capacity whose point is not from memory.
    """

    source: Source
    capacities_bytes: tuple[float, ...]
    read_pJ: tuple[float, ...]
    word_bits: int
    confirmed_bytes: float

    def pJ_per_bit(self, capacity_bytes: ArrayLike) -> Floats:
        """Energy of a bit read, for each capacity.

        Raises:
            ValueError: if a capacity is below the smallest point.

        Example:
            >>> SRAM["cacti-45nm"].pJ_per_bit([1024, 16384, 65536]).round(3)
            array([0.035, 0.312, 0.946])
        """
        size = np.asarray(capacity_bytes, dtype=np.float64)
        known = np.array(self.capacities_bytes)
        if np.any(size < known[0]):
            rule = f"the table ({self.source.title}) begins at {known[0]:g} bytes"
            raise ValueError(f"capacity_bytes {size.min():g} has no energy: {rule}; give energy_pJ_per_bit itself")
        inside = np.exp(np.interp(np.log(size), np.log(known), np.log(self.read_pJ)))
        beyond = np.maximum(size / known[-1], 1.0) ** SRAM_EXPONENT
        energy: Floats = inside * beyond / self.word_bits
        return energy


SRAM = {
    "cacti-45nm": SramTable(
        source=Source("cacti-45nm", "CACTI at 45 nm, hsharma35/bitfusion sram/cacti_sweep.csv", "code", _SEEN),
        capacities_bytes=(128, 512, 1024, 2048, 4096, 8192, 16384),
        read_pJ=(0.683701, 1.06097, 1.13324, 1.90318, 3.42953, 6.39163, 9.9817),
        word_bits=32,
        confirmed_bytes=16384,
    ),
    "horowitz-45nm": SramTable(
        source=Source("horowitz-45nm", "Horowitz, ISSCC 2014: 45 nm, 0.9 V", "secondary", _SEEN),
        capacities_bytes=(8192, 32768, 1048576),
        read_pJ=(10.0, 20.0, 100.0),
        word_bits=64,
        confirmed_bytes=8192,
    ),
}

DRAM_pJ_PER_BIT = {
    "horowitz-45nm": (20.0, Source("horowitz-45nm", "640 pJ for 32 bits, a profiler's constant", "secondary", _SEEN)),
    "qkeras": (20.3125, Source("qkeras", "google/qkeras, qtools", "code", _SEEN)),
    "bitfusion": (15.0, Source("bitfusion", "hsharma35/bitfusion, stats.py; its comment says 6", "code", _SEEN)),
    "zigzag-tpu": (700 / 64, Source("zigzag", "ZigZag, tpu_like.yaml: 700 pJ for 64 bits", "code", _SEEN)),
    "zigzag-eyeriss": (1000 / 64, Source("zigzag", "ZigZag, eyeriss_like.yaml: 1000 pJ for 64 bits", "code", _SEEN)),
    "hbm2": (4.0, Source("memory", "HBM2, about 4 pJ a bit", "estimate", _MEMORY)),
    "hbm3e": (8.0, Source("hbm3e", "HBM3E, 7 to 9 pJ a bit, a report of low authority", "estimate", _SEEN)),
    "gddr6": (7.5, Source("memory", "GDDR6, 7 to 8 pJ a bit", "estimate", _MEMORY)),
    "lpddr4": (5.0, Source("memory", "LPDDR4 and LPDDR5, 4 to 6 pJ a bit", "estimate", _MEMORY)),
    "lpddr5": (5.0, Source("memory", "LPDDR4 and LPDDR5, 4 to 6 pJ a bit", "estimate", _MEMORY)),
}


def sram_bit(table: str, level: str, capacity_bytes: float) -> Number:
    """What a bit costs at an SRAM of that size, as a number of a device file; an estimate above the confirmed points.

    Raises:
        ValueError: if the table begins above that size.

    Example:
        >>> sram_bit("cacti-45nm", "buffer", 2**20).is_estimate
        True
    """
    known = SRAM[table]
    kind = "derived" if capacity_bytes <= known.confirmed_bytes else "estimate"
    energy = float(known.pJ_per_bit(capacity_bytes))
    key = f"energy_pJ_per_bit by {table}"
    return Number(f"memory.{level}", key, energy, "picojoules a bit", (replace(known.source, kind=kind),))


def dram_bit(technology: str) -> Number:
    """What a bit costs at a DRAM of that technology, as a number of a device file.

    Example:
        >>> dram_bit("lpddr4").value, dram_bit("lpddr4").is_estimate, dram_bit("bitfusion").is_estimate
        (5.0, True, False)
    """
    energy, source = DRAM_pJ_PER_BIT[technology]
    return Number("memory.dram", f"energy_pJ_per_bit of {technology}", energy, "picojoules a bit", (source,))
