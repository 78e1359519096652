"""Measured: the kernels of a runtime timed on this machine, each against a reference in the same loop.

    repeat r:  t_r = min over rounds of time(kernel),  f_r = min over rounds of time(reference)
    ratio = median over r of t_r / f_r,  spread = largest by smallest of the three ratios in the middle, less 1
    latency = ratio * the smallest reference ever seen

Other work on a machine only adds time, so the smallest of several runs is nearest to the truth; it adds about as much
to the reference that runs in turn with the kernel, so the ratio of the two repeats where times do not. A kernel of one
thread is timed by its processor time: on a busy machine nothing that takes longer than the scheduler's slices, some
milliseconds, ever runs without a break, however often it is tried. (Whole networks against the sum of their layers, two
cores, load average 7: 45 % off by passing time, 7 to 23 % by processor time.) Kernels are timed alone, with their
weights in the cache where they fit: a network's layers, one after the other, may be slower, and fused neighbours faster
(`calibration.py`).

Work that takes less than 0.2 ms runs several times a timing. Repeats are added while the spread exceeds 15 %, up to
three times as many.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpq.atomic import check_writable, write_atomically
from mpq.progress import track

from .kernels import Clock, Kernel, KernelSource, NoKernel, Run
from .lookup_table import SIZES, LookupTable, lookup_csv, read_lookup_table

REFERENCE = Kernel("linear", 64, 768, 768)
"""An fp32 product that stays in the second cache and takes some 0.3 ms on one core."""

WIDE = 0.15
"""Spread beyond which a row is marked."""

_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often a kernel is timed.

    Attributes:
        repeats: ratios, of which the median counts; up to `most` where they differ.
        most: see there; at least `repeats`.
        rounds: timings of kernel and reference in turn, a repeat.
        warm_up: runs before the first.
        shortest_s: what one timing takes at least, by running it several times.
        longest_s: what the rounds of one repeat may take; long kernels get fewer rounds, at least three.
    """

    repeats: int = 3
    most: int = 9
    rounds: int = 10
    warm_up: int = 3
    shortest_s: float = 2e-4
    longest_s: float = 1.0


@dataclass(frozen=True)
class Ratio:
    """A kernel against the reference: their ratio, its spread, and both times in seconds (the smallest seen)."""

    ratio: float
    spread: float
    seconds: float
    reference_s: float


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured, and what the runtime has no kernel for, with its reason."""

    table: LookupTable
    refused: dict[Kernel, str] = field(default_factory=dict)

    @property
    def wide(self) -> int:
        """Rows whose repeats differ by more than `WIDE`."""
        return sum(float(spread) > WIDE for spread in self.table.remarks["spread"])


def measure_kernels(
    kernels: Sequence[Kernel],
    source: KernelSource,
    *,
    path: str | Path | None = None,
    timing: Timing | None = None,
    reference: Kernel = REFERENCE,
    progress: bool = True,
) -> Measured:
    """Time every kernel that the source has.

    Args:
        kernels: what to time, as `kernels.kernels_of` finds them.
        source: a runtime.
        path: a .csv file that is written after every kernel; kernels that it has already are not timed again.
        timing: how often.
        reference: the kernel that all others are measured against.
        progress: whether to show a bar.

    Raises:
        ValueError: if the source has no kernel for the reference or for any of the kernels, or the file was measured
            by another runtime or machine.

    Example:
        >>> from mpq.hardware_models.kernels import Callback
        >>> source = Callback("nothing", lambda kernel: (lambda: None))
        >>> quick = Timing(rounds=1, shortest_s=0)
        >>> measure_kernels([Kernel("linear", 1, 8, 8)], source, timing=quick).table.kinds
        ('linear',)
    """
    timing = timing or Timing()
    against = _prepared(source, reference)
    if isinstance(against, str):
        raise ValueError(f"the reference kernel is needed: {against}")
    rows = _Rows(f"{source.name}; {machine()}", None if path is None else Path(path))
    refused: dict[Kernel, str] = {}
    for kernel in track(kernels, "kernels", shown=progress):
        if kernel.key in rows.known:
            continue
        run = _prepared(source, kernel)
        if isinstance(run, str):
            refused[kernel] = run
        else:
            rows.add(kernel, ratio_of(run, against, timing, source.clock))
    if not rows.known:
        why = next(iter(refused.values()), "there are none")
        raise ValueError(f"{source.name} has none of the {len(kernels)} kernels: {why}")
    return Measured(rows.table(), refused)


def ratio_of(run: Run, reference: Run, timing: Timing | None = None, clock: Clock = time.perf_counter) -> Ratio:
    """Time two functions in turn, by a clock.

    Example:
        >>> busy = lambda: sum(range(2000))
        >>> 0.1 < ratio_of(busy, busy, Timing(rounds=3)).ratio < 10
        True
    """
    timing = timing or Timing()
    pair = [(own, _inner(own, timing, clock)) for own in (run, reference)]
    first = sum(times * _seconds(own, times, clock) for own, times in pair)
    rounds = int(np.clip(timing.longest_s / max(first, 1e-9), min(3, timing.rounds), timing.rounds))
    fastest: list[tuple[float, float]] = []
    while len(fastest) < timing.repeats or (len(fastest) < timing.most and _spread(fastest) > WIDE):
        turns = [[_seconds(own, times, clock) for own, times in pair] for _ in range(rounds)]
        fastest.append((min(turn[0] for turn in turns), min(turn[1] for turn in turns)))
    seconds, reference_s = np.min(fastest, axis=0).tolist()
    return Ratio(float(np.median(_ratios(fastest))), _spread(fastest), seconds, reference_s)


def _ratios(fastest: Sequence[tuple[float, float]]) -> list[float]:
    return sorted(own / other for own, other in fastest)


def _spread(fastest: Sequence[tuple[float, float]]) -> float:
    """How far the three ratios in the middle lie apart."""
    start = max(0, (len(fastest) - 2) // 2)
    middle = _ratios(fastest)[start : start + 3]
    return middle[-1] / middle[0] - 1


def machine() -> str:
    """This machine's processor and what it can do, in words."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", name)
    if flags := " ".join(flag for flag in _FLAGS if flag in fields.get("flags", fields.get("Features", "")).split()):
        name += f" ({flags})"
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _prepared(source: KernelSource, kernel: Kernel) -> Run | str:
    """The kernel, or why there is none."""
    try:
        run = source(kernel)
    except NoKernel as error:
        return str(error)
    return run or f"{source.name} has no kernel for {kernel}"


def _inner(run: Run, timing: Timing, clock: Clock) -> int:
    """How often to run it a timing, after the warm-up."""
    for _ in range(max(timing.warm_up, 1)):
        run()
    once = min(_seconds(run, 1, clock) for _ in range(3))
    return max(1, round(timing.shortest_s / max(once, 1e-7)))


def _seconds(run: Run, times: int, clock: Clock) -> float:
    start = clock()
    for _ in range(times):
        run()
    return max(clock() - start, 1e-9) / times


class _Rows:
    """The rows measured so far, saved after every one."""

    def __init__(self, runtime: str, path: Path | None) -> None:
        self._runtime, self._path = runtime, path
        self._rows: list[tuple[tuple[str, ...], Ratio, str]] = []
        if path is not None and check_writable(path).exists():
            self._resume(path)

    @property
    def known(self) -> set[tuple[str, ...]]:
        return {key for key, _, _ in self._rows}

    def add(self, kernel: Kernel, ratio: Ratio) -> None:
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        self._rows.append((kernel.key, ratio, load))
        if self._path is not None:
            write_atomically(self._path, lookup_csv(self.table()))

    def table(self) -> LookupTable:
        ratios = [ratio for _, ratio, _ in self._rows]
        fastest = min(ratio.reference_s for ratio in ratios)
        latency: NDArray[np.float64] = np.array([float(f"{ratio.ratio * fastest:.6g}") for ratio in ratios])
        keys = [key for key, _, _ in self._rows]
        return LookupTable(
            kinds=tuple(key[0] for key in keys),
            sizes=np.array([[int(size) for size in key[1:6]] for key in keys], dtype=np.int64).reshape(-1, len(SIZES)),
            weights=tuple(key[6] for key in keys),
            activations=tuple(key[7] for key in keys),
            quantities={"latency": latency},
            remarks={
                "ratio": tuple(f"{ratio.ratio:.6g}" for ratio in ratios),
                "measured [s]": tuple(f"{ratio.seconds:.6g}" for ratio in ratios),
                "reference [s]": tuple(f"{ratio.reference_s:.6g}" for ratio in ratios),
                "spread": tuple(f"{ratio.spread:.4f}" for ratio in ratios),
                "load": tuple(load for _, _, load in self._rows),
                "runtime": (self._runtime,) * len(keys),
            },
        )

    def _resume(self, path: Path) -> None:
        table = read_lookup_table(path)
        if other := sorted({*table.remarks.get("runtime", ("an unknown runtime",))} - {self._runtime}):
            raise ValueError(
                f"{path.name!r} was measured by another runtime or machine ({other[0]}), this is {self._runtime}: "
                "delete it or give another name"
            )
        columns = [table.remarks[name] for name in ("ratio", "spread", "measured [s]", "reference [s]")]
        ratios = [Ratio(*map(float, row)) for row in zip(*columns, strict=True)]
        self._rows = list(zip(table.kernel_keys, ratios, table.remarks["load"], strict=True))
