"""What is measured: one call of a layer in a pair of formats, and what stands for it in a runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Protocol

import numpy as np

from mpq.layers import Layer

from .cells import Cells
from .lookup_table import Shape, format_keys

Run = Callable[[], object]
Clock = Callable[[], float]


class NoKernel(ValueError):
    """A runtime cannot run an operator in a pair of formats; the message says which and why."""


@dataclass(frozen=True)
class Kernel:
    """One call of a layer: `repeats` products of an (m, k) by a (k, n) matrix, or the convolution that they stand for.

    Attributes:
        kind: kind of layer, as `cells.kernel_kind` names it.
        m, k, n, repeats, taps: see `workload.Work`; k of a convolution is inputs of a group x taps.
        weight, activation: names of formats; of a weight with `@group<n>`.
        image: input of a convolution, (samples, channels, ...).
        window, strides: of a convolution, a number an axis.

    Example:
        >>> Kernel("conv2d", 196, 72, 16, 1, 9, "int8", "int8").with_geometry().image
        (1, 8, 14, 14)
    """

    kind: str
    m: int
    k: int
    n: int
    repeats: int = 1
    taps: int = 1
    weight: str = "fp32"
    activation: str = "fp32"
    image: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What it is called in a table, as `LookupTable.kernel_keys`."""
        sizes = (self.m, self.k, self.n, self.repeats, self.taps)
        return (self.kind, *map(str, sizes), self.weight, self.activation)

    @property
    def is_convolution(self) -> bool:
        """Whether it slides a window over an image."""
        return "conv" in self.kind

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def channels(self) -> tuple[int, int]:
        """Inputs and outputs of a convolution, all groups together."""
        if self.is_transposed:
            return self.repeats * self.k, self.repeats * self.n // self.taps
        return self.repeats * self.k // self.taps, self.repeats * self.n

    def with_geometry(self) -> Kernel:
        """Itself, or with an image and a window of the right number of positions where none are given."""
        if not self.is_convolution or self.image:
            return self
        axes = int(self.kind[-2])
        image = (1, self.channels[0], *_factors(self.m, axes))
        return _replaced(self, image, _factors(self.taps, axes), (1,) * axes)

    def __str__(self) -> str:
        more = {"repeats": self.repeats, "taps": self.taps}
        sizes = {"m": self.m, "k": self.k, "n": self.n} | {name: size for name, size in more.items() if size > 1}
        shape = " ".join(f"{name}={size}" for name, size in sizes.items())
        return f"{self.kind} {shape} in {self.weight} x {self.activation}"


def clock_of(threads: int) -> Clock:
    """The processor time of one thread: it stands still while other work has the processor; else passing time."""
    return time.thread_time if threads == 1 else time.perf_counter


class KernelSource(Protocol):
    """A runtime that runs kernels: a `name` with versions and threads, and a call that prepares one.

    The call returns a function that runs the kernel once, or None (or raises `NoKernel`) where the runtime has none.
    """

    @property
    def name(self) -> str:
        """The runtime, its version and its threads: what measurements of different runs have to share."""

    @property
    def clock(self) -> Clock:
        """What tells the seconds: of the calling thread's processor time where that does all the work, else passing."""

    def __call__(self, kernel: Kernel) -> Run | None:
        """Prepare a kernel: weights, inputs, everything that is done once."""


@dataclass(frozen=True)
class Callback:
    """A user's own runtime as a source of kernels: `make(kernel)` returns a function that runs it once, or None.

    A function that runs has finished when it returns: it waits for what it starts elsewhere.

    Example:
        >>> source = Callback("numpy", lambda kernel: None)
        >>> source.name, source(Kernel("linear", 1, 8, 8))
        ('numpy', None)
    """

    name: str
    make: Callable[[Kernel], Run | None]
    clock: Clock = time.perf_counter

    def __call__(self, kernel: Kernel) -> Run | None:
        """Prepare a kernel."""
        return self.make(kernel)


def kernels_of(cells: Cells) -> list[Kernel]:
    """The distinct kernels of a network in its pairs of formats, in order; lookups are none.

    Example:
        >>> from mpq.layers import Layer, Network
        >>> from mpq.options import Option
        >>> fc = Layer("fc", "linear", (32, 8), 256, 6144, (2, 12, 8), (2, 12, 32), batch=2)
        >>> cells = Cells.of(Network((fc,), batch=2), [Option("int8", "int8")])
        >>> [str(kernel) for kernel in kernels_of(cells)]
        ['linear m=12 k=8 n=32 in int8 x int8', 'linear m=12 k=8 n=32 in fp32 x fp32']
    """
    work = cells.work
    per_call = np.ceil(work.m / np.maximum(work.calls, 1) - 1e-9)
    names = [
        (format_keys(weight or cells.dtype)[0], format_keys(activation or cells.dtype)[0])
        for weight, activation in zip(cells.weights, cells.activations, strict=True)
    ]
    found: dict[tuple[str, ...], Kernel] = {}
    for index, (layer, kind) in enumerate(zip(cells.network.layers, cells.kinds, strict=True)):
        if kind == "lookup":
            continue
        sizes = (per_call, work.k, work.n, work.repeats, work.taps)
        m, k, n, repeats, taps = (int(size[index]) for size in sizes)
        for weight, activation in names:
            kernel = Kernel(kind, m, k, n, repeats, taps, weight, activation)
            if kernel.key not in found:
                found[kernel.key] = _with_image(kernel, layer)
    return list(found.values())


def kernels_of_shapes(shapes: Iterable[Shape], pairs: Sequence[tuple[str, str]]) -> list[Kernel]:
    """Every shape in every pair of formats; images of convolutions are made up.

    Example:
        >>> [str(kernel) for kernel in kernels_of_shapes([("linear", 1, 8, 4, 1, 1)], [("int4@group32", "fp32")])]
        ['linear m=1 k=8 n=4 in int4@group32 x fp32']
    """
    return [Kernel(*shape, *pair).with_geometry() for shape in dict.fromkeys(shapes) for pair in dict.fromkeys(pairs)]


def _with_image(kernel: Kernel, layer: Layer) -> Kernel:
    """The kernel with the layer's own image where that has the right number of positions."""
    if not kernel.is_convolution:
        return kernel
    axes = len(layer.kernel)
    read, written = layer.input_shape[-axes:], layer.output_shape[-axes:]
    slid = read if kernel.is_transposed else written
    samples, rest = divmod(kernel.m, prod(slid))
    if rest or not samples:
        return kernel.with_geometry()
    larger, smaller = (written, read) if kernel.is_transposed else (read, written)
    strides = tuple(max(1, round(wide / narrow)) for wide, narrow in zip(larger, smaller, strict=True))
    return _replaced(kernel, (samples, kernel.channels[0], *slid), layer.kernel, strides)


def _replaced(kernel: Kernel, image: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...]) -> Kernel:
    """With an image: `image` holds the positions slid over, from which a plain convolution's input follows."""
    if not kernel.is_transposed:
        image = (*image[:2], *(size * stride for size, stride in zip(image[2:], strides, strict=True)))
    return replace(kernel, image=image, window=window, strides=strides)


def _factors(positions: int, axes: int) -> tuple[int, ...]:
    """A square where the number is one, else a line."""
    side = isqrt(positions)
    if axes == 2 and side * side == positions:
        return side, side
    cube = round(positions ** (1 / 3))
    if axes == 3 and cube**3 == positions:
        return (cube,) * 3
    return (*(1,) * (axes - 1), positions)
