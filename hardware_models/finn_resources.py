"""FINN's equations: tables, DSP slices, block memories and cycles of a matrix-vector unit of P elements with Q lanes.

    LUT  = floor(300 + 1.1 P (Q (2 ceil((W+A)/6) - 1) (W+A) + (W+A) (2Q - 1) + acc + thr) + c2)
    acc  = min(32, ceil(alpha + log2(1 + 2^-alpha) + 1)),  alpha = log2(MW) + W + A - 1 - [inputs are signed]
    thr  = what the thresholds take (`finn_thresholds`),  c2 = P Q W ceil(depth / 64) for weights in LUTs
    DSP  = ceil(P/d) Q ceil((W+A)/48),  depth = MW MH / (P Q),  width = P Q W
    cycles = (MH/P) (MW/Q) vectors

for an MH x MW matrix with weights of W bits and inputs of A bits. With multipliers in DSP slices the
first term of LUT is 0. d multiplications share a slice: 1 in FINN's HLS unit, 4 in its RTL unit for up to 4 bits.
Source: Blott et al. (2018), "FINN-R", and FINN's code (fpgadataflow: `lut_estimation`, `dsp_estimation`,
`bram_estimation`, `uram_estimation`, `get_exp_cycles` of MVAU and VVAU), read; the accumulator bound is that of Colbert
et al. (2023), arXiv 2301.13376. A depthwise layer (VVAU) has MW = taps and MH = channels; FINN counts DSP = P there,
which we multiply by Q as for the MVAU. The sliding window of a convolution is FINN-R's, as a port of it on GitHub has
it (the paper was not read):

    BRAM = (ceil(k/s) + 1) ceil(s w / 512) ceil(C A / 36),  LUT = 426

with k kernel rows, stride s, inputs of width w and C channels. Estimates are before synthesis; FIFOs, width converters,
pooling and the shell are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LARGEST_ACCUMULATOR = 32.0


@dataclass(frozen=True)
class Folding:
    """How a matrix is laid over lanes; arrays that broadcast together.

    Attributes:
        mw, mh: columns and rows of the matrix.
        simd: lanes of a processing element, divides mw.
        pe: processing elements, divides mh.

    Example:
        >>> folding = Folding(*(np.array([x]) for x in (576.0, 64.0, 9.0, 4.0)))
        >>> folding.depth, folding.cycles(np.array([196.0]))
        (array([1024.]), array([200704.]))
    """

    mw: Floats
    mh: Floats
    simd: Floats
    pe: Floats

    @property
    def depth(self) -> Floats:
        """Words of the weight memory, each with the weights of all lanes."""
        return self.mw * self.mh / (self.pe * self.simd)

    def cycles(self, vectors: Floats) -> Floats:
        """Cycles for that many input vectors."""
        return vectors * self.depth


@dataclass(frozen=True)
class Arithmetic:
    """What one lane multiplies and adds with; arrays that broadcast with the folding.

    Attributes:
        multiplier_luts: of one multiplier, without a DSP slice.
        alignment_luts: of what shifts one product into place, 0 for integers.
        product_bits: width of a product on the adder tree.
        accumulator_bits: width of the accumulator.
    """

    multiplier_luts: Floats
    alignment_luts: Floats
    product_bits: Floats
    accumulator_bits: Floats

    def where(self, chosen: NDArray[np.bool_], other: Arithmetic) -> Arithmetic:
        """This one where chosen, else the other."""
        return Arithmetic(
            multiplier_luts=np.where(chosen, self.multiplier_luts, other.multiplier_luts),
            alignment_luts=np.where(chosen, self.alignment_luts, other.alignment_luts),
            product_bits=np.where(chosen, self.product_bits, other.product_bits),
            accumulator_bits=np.where(chosen, self.accumulator_bits, other.accumulator_bits),
        )


def multiplier_luts(width: Floats) -> Floats:
    """Lookup tables of a multiplier whose operands have `width` bits together.

    Example:
        >>> multiplier_luts(np.array([2.0, 8.0, 16.0]))
        array([ 2., 24., 80.])
    """
    return (2 * np.ceil(width / 6) - 1) * width


def integer_arithmetic(weight_bits: Floats, activation_bits: Floats, is_signed: Floats, mw: Floats) -> Arithmetic:
    """Of integers; `is_signed` is 1 for signed inputs.

    Example:
        Weights of 4 bits, unsigned inputs of 4 bits, 576 of them: 9.17 + 4 + 4 bits, one of sign.

        >>> integer_arithmetic(*(np.array([x]) for x in (4.0, 4.0, 0.0, 576.0))).accumulator_bits
        array([18.])
    """
    width = weight_bits + activation_bits
    alpha = np.log2(mw) + width - 1 - is_signed
    bits = np.minimum(np.ceil(alpha + np.log2(1 + 2.0**-alpha) + 1), LARGEST_ACCUMULATOR)
    return Arithmetic(multiplier_luts(width), np.zeros_like(width), width, bits)


def unit_luts(folding: Folding, arithmetic: Arithmetic, thresholds: Floats, in_dsp: Floats) -> Floats:
    """Lookup tables of a unit; `thresholds` of one element, `in_dsp` 1 where DSP slices multiply."""
    lanes = folding.simd * (arithmetic.multiplier_luts * (1 - in_dsp) + arithmetic.alignment_luts)
    tree = arithmetic.product_bits * (2 * folding.simd - 1)
    return np.floor(300 + 1.1 * (folding.pe * (lanes + tree + arithmetic.accumulator_bits + thresholds)))


def unit_dsps(folding: Folding, width: Floats, macs_per_dsp: Floats) -> Floats:
    """DSP slices of a unit whose operands have `width` bits together.

    Example:
        >>> unit_dsps(Folding(*(np.array([x]) for x in (576.0, 64.0, 9.0, 6.0))), np.array([8.0]), np.array([4.0]))
        array([18.])
    """
    return np.ceil(folding.pe / macs_per_dsp) * folding.simd * np.ceil(width / 48)


def block_rams(folding: Folding, weight_bits: Floats) -> Floats:
    """Block memories of 18 kbit for the weights, simple dual port, as FINN's table of widths says.

    Example:
        >>> block_rams(Folding(*(np.array([x]) for x in (576.0, 64.0, 9.0, 4.0))), np.array([4.0]))
        array([8.])
    """
    depth, width = folding.depth, folding.pe * folding.simd * weight_bits
    words, bits = (16384, 8192, 4096, 2048, 1024, 512), (1, 2, 4, 9, 18, 36)
    blocks = [np.ceil(depth / w) * np.ceil(width / b) for w, b in zip(words, bits, strict=True)]
    fits = [width == 1, width == 2, width <= 4, width <= 9, (width <= 18) | (depth > 512)]
    found: Floats = np.select(fits, blocks[:-1], blocks[-1])
    return found


def ultra_rams(folding: Folding, weight_bits: Floats) -> Floats:
    """UltraRAMs of 288 kbit for the weights.

    Example:
        >>> ultra_rams(Folding(*(np.array([x]) for x in (4608.0, 512.0, 8.0, 4.0))), np.array([4.0]))
        array([36.])
    """
    return np.ceil(folding.pe * folding.simd * weight_bits / 72) * np.ceil(folding.depth / 4096)


def weight_luts(folding: Folding, weight_bits: Floats) -> Floats:
    """Lookup tables that hold the weights where no block memory does.

    Example:
        >>> weight_luts(Folding(*(np.array([x]) for x in (72.0, 16.0, 9.0, 4.0))), np.array([2.0]))
        array([72.])
    """
    return folding.pe * folding.simd * weight_bits * np.ceil(folding.depth / 64)


@dataclass(frozen=True)
class Window:
    """Sliding windows of the layers, all (layers,): kernel rows, stride, width and channels of the inputs.

    Example:
        A 3x3 window with stride 1 over 32 columns of 16 channels of 4 bits: 4 x 1 x ceil(64 / 36).

        >>> window = Window(*(np.array([x]) for x in (3.0, 1.0, 32.0, 16.0)))
        >>> window.block_rams(np.array([4.0, 8.0]))
        array([[ 8., 16.]])
    """

    kernel: Floats
    stride: Floats
    width: Floats
    channels: Floats

    LUTS = 426.0

    def block_rams(self, activation_bits: Floats) -> Floats:
        """Block memories of 18 kbit for the rows a window needs, (layers, columns)."""
        rows = (np.ceil(self.kernel / self.stride) + 1) * np.ceil(self.stride * self.width / 512)
        return rows[:, None] * np.ceil(np.outer(self.channels, activation_bits) / 36)
