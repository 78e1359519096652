"""A predictor of kernels' latencies: a forest on shapes, formats and what a roofline would say, trained on a table.

    log t = log max(t_c, t_m) + forest(features)
    t_c = 2 macs / peak[pair of formats],  t_m = bytes / bandwidth
    features: log2 of m, k, n, repeats, taps, macs, bytes, t_c, t_m, macs / bytes; bits of both formats; whether k and n
              are multiples of 16; kind and pair of formats, a 0 or 1 each

Shape and analytic features in a random forest are those of GPPerf (a random forest on m, n, k, tile sizes, arithmetic
intensity, bytes and operations of CUTLASS kernels) and of nn-Meter (Zhang et al. 2021, MobiSys; a forest a kind of
kernel, without precision), both read as code. Peaks and bandwidth are the best that the training kernels reach. The
forest learns the logarithm of the distance from the roofline rather than the time itself: trees predict nothing beyond
what they have seen, the roofline does.

Bytes are those of weights, inputs and outputs at their formats' widths, scales left out, every input counted once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpq.atomic import write_atomically
from mpq.formats import parse

from .forest import Forest

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

_FORMAT = "mpq latency forest 1"


@dataclass(frozen=True)
class HeldOut:
    """How well shapes that were not trained on are predicted.

    Attributes:
        samples: kernels.
        shapes: distinct shapes; all formats of one are held out together.
        mape: mean absolute relative error.
        kendall_tau: rank correlation of predicted and measured latencies, all kernels.
        tau_within: mean rank correlation of the formats of one shape; NaN where no shape has two formats.
    """

    samples: int
    shapes: int
    mape: float
    kendall_tau: float
    tau_within: float


@dataclass(frozen=True, eq=False)
class Features:
    """What a forest is told of kernels, and the roofline that it corrects.

    Attributes:
        kinds: kinds of layers.
        pairs: pairs of formats, names as in lookup tables.
        peaks: operations a second of each pair at best, (pairs,).
        bandwidth: bytes a second at best.
    """

    kinds: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    peaks: Floats
    bandwidth: float

    def of(self, kind: Codes, sizes: Floats, pair: Codes) -> tuple[Floats, Floats]:
        """The roofline [s], (samples,), and the features, (samples, features); arguments as `Predictor.latency`."""
        macs, traffic, bits = work_of_kernels(sizes, self.pairs, pair)
        compute, memory = 2 * macs / self.peaks[pair], traffic / self.bandwidth
        columns = [
            *np.log2(sizes).T,
            *np.log2([macs, traffic, compute, memory, macs / traffic]),
            *bits.T,
            *(sizes[:, 1:3] % 16 == 0).T,
            *(kind == code for code in range(len(self.kinds))),
            *(pair == code for code in range(len(self.pairs))),
        ]
        return np.maximum(compute, memory), np.column_stack(columns).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained forest and what its features need.

    Attributes:
        forest: predicts log(t / roofline).
        features: of kernels.
        trained: (kind, pair of formats) combinations that it has seen, (kinds, pairs).
        low, high: least and largest m, k, n, repeats, taps of each kind, (kinds, 5).
        held_out: how good it is on shapes that it has not seen.
    """

    forest: Forest
    features: Features
    trained: NDArray[np.bool_]
    low: Floats
    high: Floats
    held_out: HeldOut

    def latency(self, kind: Codes, sizes: Floats, pair: Codes) -> Floats:
        """Seconds of one call of each kernel, (samples,).

        Args:
            kind: position in `features.kinds`, (samples,).
            sizes: m, k, n, repeats, taps, (samples, 5).
            pair: position in `features.pairs`, (samples,).
        """
        roofline, features = self.features.of(kind, sizes, pair)
        return np.asarray(roofline * np.exp(self.forest.predict(features)))

    def is_extrapolated(self, kind: Codes, sizes: Floats) -> NDArray[np.bool_]:
        """Whether a size lies outside what the kind was trained on, (samples,)."""
        return np.asarray(((sizes < self.low[kind]) | (sizes > self.high[kind])).any(axis=1))

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file: the trees' arrays, and the rest as JSON in its metadata."""
        from safetensors.numpy import save

        facts = {
            "format": _FORMAT,
            "kinds": self.features.kinds,
            "pairs": self.features.pairs,
            "peaks": self.features.peaks.tolist(),
            "bandwidth": self.features.bandwidth,
            "trained": self.trained.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "held_out": asdict(self.held_out),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in self.forest.arrays().items()}
        write_atomically(path, save(arrays, metadata={"predictor": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Read what `save` wrote.

        Raises:
            ValueError: if it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("predictor", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"cannot read the predictor {Path(path).name!r}: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise ValueError(f"{Path(path).name!r} is no predictor of latencies ({_FORMAT})")
        try:
            return cls(
                forest=Forest.of_arrays(arrays),
                features=Features(
                    kinds=tuple(facts["kinds"]),
                    pairs=tuple((weight, activation) for weight, activation in facts["pairs"]),
                    peaks=np.array(facts["peaks"], dtype=np.float64),
                    bandwidth=float(facts["bandwidth"]),
                ),
                trained=np.array(facts["trained"], dtype=bool),
                low=np.array(facts["low"], dtype=np.float64),
                high=np.array(facts["high"], dtype=np.float64),
                held_out=HeldOut(**facts["held_out"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the predictor {Path(path).name!r} is damaged: {error}") from None


def work_of_kernels(sizes: Floats, pairs: Sequence[tuple[str, str]], pair: Codes) -> tuple[Floats, Floats, Floats]:
    """Multiply-adds and bytes, (samples,) each, and the bits of both formats, (samples, 2).

    Example:
        >>> work_of_kernels(np.array([[1.0, 64, 32, 1, 1]]), [("int4", "int8")], np.array([0]))
        (array([2048.]), array([1120.]), array([[4., 8.]]))
    """
    bits = np.array([[parse(name).bits for name in names] for names in pairs], dtype=np.float64)[pair]
    m, k, n, repeats, taps = sizes.T
    macs = m * k * n * repeats
    return macs, (k * n * repeats * bits[:, 0] + (m * k / taps + m * n) * repeats * bits[:, 1]) / 8, bits
